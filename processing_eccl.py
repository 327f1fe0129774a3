"""The processor of ECCL: it turns images into pixels of a person's shape, and captions into token ids."""

import html
import re
import unicodedata
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature, CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import PILImageResampling

from .configuration_eccl import ECCLConfig

# The replacements of CLIP's text clean-up: curly quotes, typographic ligatures and full-width forms become plain
# characters, control characters are removed.
_PLAIN_CHARACTERS = (
    {
        code: None
        for code in (*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD))
    }
    | dict.fromkeys((0x02BC, *range(0x2018, 0x201C)), "'")
    | dict.fromkeys(range(0x201C, 0x2020), '"')
    | {code: unicodedata.normalize("NFKC", chr(code)) for code in (0x3000, *range(0xFB00, 0xFB07))}
    | {code: unicodedata.normalize("NFKC", chr(code)) for code in (*range(0xFF01, 0xFFA0), *range(0xFFE0, 0xFFEF))}
)
# In UTF-8, the bytes 0x80 to 0xBF continue a character. Read as Windows-1252, each of them becomes a character. This
# table maps that character back to the byte. Windows-1252 does not define five of the bytes: decoders pass these on.
_CONTINUATIONS = {
    bytes([byte]).decode("cp1252" if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else "latin-1"): byte
    for byte in range(0x80, 0xC0)
}
_CONTINUATION = f"[{re.escape(''.join(_CONTINUATIONS))}]"
# In UTF-8, Latin letters and signs start with the byte C2 or C3, curly quotes and dashes with E2. Other first bytes are
# not repaired: read as Windows-1252 they are letters that correct text, too, has before a curly quote.
_MISREAD = re.compile(f"[\u00c2\u00c3]{_CONTINUATION}|\u00e2{_CONTINUATION}{{2}}")


def clean_caption(caption: str) -> str:
    """Cleans a caption as CLIP's published tokenizer does; the tokenizer of transformers leaves this step out.

    With it, a caption gets the same tokens as in CLIP's published code. The steps: UTF-8 that was read as Windows-1252
    is repaired; HTML entities are resolved, twice because of text such as `&amp;quot;`; curly quotes become straight;
    ligatures and full-width letters become plain; control characters are removed; letters become lower case. The
    tokenizer itself collapses whitespace.
    """
    caption = _MISREAD.sub(_repair, caption)
    return html.unescape(html.unescape(caption)).translate(_PLAIN_CHARACTERS).lower()


def _repair(match: re.Match[str]) -> str:
    """Decodes a match as UTF-8: `â€™` is the three bytes of an apostrophe, each read as one character."""
    misread = match[0]
    try:
        return bytes([ord(misread[0]), *(_CONTINUATIONS[character] for character in misread[1:])]).decode("utf-8")
    except UnicodeDecodeError:
        return misread


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def list_images(folder: str | PathLike[str]) -> list[Path]:
    """Lists the image files in a folder and all its subfolders, in the order of their paths.

    Args:
        folder: the folder. A file is an image if its name ends with one of `IMAGE_SUFFIXES`, in upper or lower case.

    Raises:
        ValueError: `folder` is not a folder, or contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def read_image(source: str | PathLike[str] | BinaryIO | Image.Image) -> Image.Image:
    """Reads an image as upright 8-bit RGB. Every image that the model sees is opened with it.

    The EXIF orientation is applied. Pillow converts other modes to RGB; it drops an alpha channel.

    Args:
        source: a path, an open binary file, or a PIL image, which is not changed.

    Raises:
        ValueError: the image cannot be read. The message names the file.
    """
    name: str | PathLike[str] = "a file without a name"
    if isinstance(source, (str, PathLike)):
        name = source
    else:
        # A PIL image has `filename`, an open file has `name`. Both can be empty; the name of a file can be a number.
        found = getattr(source, "filename", None) or getattr(source, "name", None)
        name = found if isinstance(found, str) else name
    try:
        if isinstance(source, Image.Image):
            upright = ImageOps.exif_transpose(source)
        else:
            with Image.open(source) as image:
                upright = ImageOps.exif_transpose(image)
        # Both functions copy the image: one copy is enough.
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    # On malformed files, Pillow raises errors of many types: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


class ECCLImageProcessor(CLIPImageProcessorPil):
    """Resizes an image to 384 x 128 pixels (height x width) bilinearly, without a crop, and normalises it as CLIP does.

    It always computes with Pillow, so that a checkpoint sees the same pixels on every machine. This is why it is a
    separate class: for a class of transformers, `AutoImageProcessor` chooses the torchvision version if torchvision is
    installed.
    """

    # transformers declares `None`, and expects the name of an Auto class.
    _auto_class = "AutoImageProcessor"  # type: ignore[assignment]
    resample = PILImageResampling.BILINEAR
    size = {"height": 384, "width": 128}
    default_to_square = True
    do_center_crop = False
    # Without a crop there is no size; transformers declares a dict.
    crop_size = None  # type: ignore[assignment]

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """Converts an image with Pillow, as training does; transformers would put transparent pixels on white."""
        if isinstance(image, Image.Image):
            return np.asarray(read_image(image))
        return super().convert_to_rgb(image, input_data_format=input_data_format)


class ECCLProcessor(ProcessorMixin):
    """An image processor and a CLIP tokenizer. Captions are truncated so that the model has room for its prompts.

    Args:
        image_processor: usually an [`ECCLImageProcessor`].
        tokenizer: a CLIP tokenizer.
        max_text_length (`int`, defaults to 73): maximum caption length in tokens, start and end tokens included; longer
            captions are truncated.
    """

    # transformers declares `None`, and expects the name of an Auto class.
    _auto_class = "AutoProcessor"  # type: ignore[assignment]
    # The defaults for the tokenizer. A batch is padded only to its longest caption: tokens after the end token do not
    # change a feature.
    text_kwargs = {"padding": True, "truncation": True}

    def __init__(
        self,
        image_processor: CLIPImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        max_text_length: int = 73,
    ):
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer)

    def to_dict(self) -> dict[str, Any]:
        # transformers adds this entry when it saves the code. Now a processor equals its saved copy.
        return super().to_dict() | {"auto_map": {self._auto_class: f"processing_eccl.{type(self).__name__}"}}

    @classmethod
    def for_model(cls, config: ECCLConfig, tokenizer: PreTrainedTokenizerBase) -> "ECCLProcessor":
        """Makes the processor that fits a model: its image size and its maximum caption length.

        Args:
            config: the configuration of the model.
            tokenizer: the tokenizer of the model.

        Raises:
            ValueError: the tokenizer has more tokens than the model, or another end-of-text token.
        """
        text, _ = config.encoder_configs
        if len(tokenizer) > text.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model embeds {text.vocab_size}")
        if tokenizer.eos_token_id != text.eos_token_id:
            raise ValueError(
                f"the tokenizer ends a text with token {tokenizer.eos_token_id}, "
                f"the model expects token {text.eos_token_id} at the end"
            )
        height, width = config.input_size
        image_processor = ECCLImageProcessor(size={"height": height, "width": width})
        return cls(image_processor, tokenizer, max_text_length=config.max_text_length)

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], processor_dict: dict | None = None, **kwargs: Any
    ) -> list:
        """Loads both parts by their classes: the Auto classes would ask whether to trust the checkpoint's code."""
        return [
            part.from_pretrained(pretrained_model_name_or_path, **kwargs)
            for part in (ECCLImageProcessor, CLIPTokenizer)
        ]

    def __call__(self, images: Any = None, text: str | Iterable[str] | None = None, **kwargs: Any) -> BatchFeature:
        """Processes images, captions or both.

        Args:
            images: a PIL image, an array or a tensor, or a list of them.
            text: a caption or a list of captions. Each is cleaned by [`clean_caption`] and truncated to
                `max_text_length` tokens; the end-of-text token stays last.
            **kwargs: the arguments of any processor of transformers, most often `return_tensors="pt"`; for one part
                alone as `text_kwargs={...}` or `images_kwargs={...}`.

        Returns:
            `BatchFeature` with `pixel_values` `(images, 3, height, width)`, and with `input_ids` and `attention_mask`
            `(captions, tokens of the longest caption)`.
        """
        if text is not None:
            text = clean_caption(text) if isinstance(text, str) else [clean_caption(caption) for caption in text]
            # As a default in `text_kwargs` it would give way to the length that a tokenizer has stored: that of its
            # last call before it was saved.
            if "max_length" not in kwargs.get("text_kwargs", {}):
                kwargs.setdefault("max_length", self.max_text_length)
        return super().__call__(images=images, text=text, **kwargs)


__all__ = ["IMAGE_SUFFIXES", "ECCLImageProcessor", "ECCLProcessor", "clean_caption", "list_images", "read_image"]
