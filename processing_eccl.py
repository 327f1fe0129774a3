"""ECCL's processor: images to person-shaped pixels, captions to token ids."""

import html
import re
import unicodedata
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ProcessingKwargs

from .configuration_eccl import ECCLConfig

# What CLIP's own clean-up writes plainly: curly quotes, typographic ligatures and full-width forms; controls go.
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
# What the bytes that continue a character in UTF-8 become when they are read as Windows-1252, which leaves five of them
# undefined: decoders pass those through.
_CONTINUATIONS = {
    bytes([byte]).decode("cp1252" if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else "latin-1"): byte
    for byte in range(0x80, 0xC0)
}
_CONTINUATION = f"[{re.escape(''.join(_CONTINUATIONS))}]"
# Latin letters and signs start with C2 or C3 in UTF-8, curly quotes and dashes with E2. Other leads are letters that
# stand before a curly quote in honest text.
_MISREAD = re.compile(f"[\u00c2\u00c3]{_CONTINUATION}|\u00e2{_CONTINUATION}{{2}}")


def clean_caption(caption: str) -> str:
    """The text clean-up of CLIP's own tokenizer, which transformers' leaves out; its tokens then are the original's.

    UTF-8 that was read as Windows-1252 is repaired, HTML entities are resolved (twice, for `&amp;quot;`), quotes made
    straight, ligatures and full-width letters plain, control characters dropped, and all is lower case. Whitespace is
    the tokenizer's to collapse.
    """
    caption = _MISREAD.sub(_repair, caption)
    return html.unescape(html.unescape(caption)).translate(_PLAIN_CHARACTERS).lower()


def _repair(match: re.Match) -> str:
    """`â€™` is the three bytes of an apostrophe, read one by one."""
    lead, *rest = match[0]
    try:
        return bytes([ord(lead), *(_CONTINUATIONS[character] for character in rest)]).decode("utf-8")
    except UnicodeDecodeError:
        return match[0]


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def list_images(folder: str | PathLike[str]) -> list[Path]:
    """Lists all images below a folder, in the order of their paths.

    Raises:
        ValueError: `folder` is not a folder, or there is no image below it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} contains no images ({', '.join(IMAGE_SUFFIXES)})")
    return paths


def read_image(source: str | PathLike[str] | BinaryIO | Image.Image) -> Image.Image:
    """Reads a picture as upright 8-bit RGB: the one way in which this project opens pictures.

    The EXIF orientation is applied; other modes are converted by Pillow, which drops an alpha channel.

    Args:
        source: a path, an open binary file, or a PIL image, which is not changed.

    Raises:
        ValueError: the picture cannot be read; the message names the file.
    """
    name = source if isinstance(source, (str, PathLike)) else getattr(source, "filename", "") or "the image"
    try:
        if isinstance(source, Image.Image):
            return ImageOps.exif_transpose(source).convert("RGB")
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    # Pillow's readers raise almost anything on malformed files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


class ECCLImageProcessor(CLIPImageProcessorPil):
    """Bilinear resize to 384 x 128 (height x width), no crop, CLIP's mean and standard deviation.

    It always computes with Pillow: a class of its own keeps `AutoImageProcessor` from taking the torchvision one where
    that is installed, so that a checkpoint sees the same pixels on every machine.
    """

    _auto_class = "AutoImageProcessor"
    resample = PILImageResampling.BILINEAR
    size = {"height": 384, "width": 128}
    default_to_square = True
    do_center_crop = False
    crop_size = None

    def convert_to_rgb(self, image, input_data_format=None):
        """Pillow's own conversion, as training uses it; transformers' would lay transparent pixels on white."""
        if isinstance(image, Image.Image):
            return np.asarray(read_image(image))
        return super().convert_to_rgb(image, input_data_format=input_data_format)


class ECCLProcessorKwargs(ProcessingKwargs, total=False):
    # The padding reaches no further than the longest caption: what follows the end token does not change a feature.
    _defaults = {"text_kwargs": {"padding": True, "truncation": True}}


class ECCLProcessor(ProcessorMixin):
    """An image processor and a CLIP tokenizer that leaves room for the prompts.

    Args:
        image_processor: usually an [`ECCLImageProcessor`].
        tokenizer: a CLIP tokenizer.
        max_text_length (`int`, defaults to 73): captions are cut to so many tokens, SOT and EOT included.
    """

    _auto_class = "AutoProcessor"
    valid_processor_kwargs = ECCLProcessorKwargs

    def __init__(self, image_processor=None, tokenizer=None, max_text_length: int = 73):
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer)

    @classmethod
    def for_model(cls, config: ECCLConfig, tokenizer: PreTrainedTokenizerBase) -> "ECCLProcessor":
        """The processor that fits a model: its image size, its longest caption.

        Raises:
            ValueError: the tokenizer has more tokens than the model, or another end-of-text token.
        """
        text = config.text_config
        if len(tokenizer) > text.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model embeds {text.vocab_size}")
        if tokenizer.eos_token_id != text.eos_token_id:
            raise ValueError(
                f"the tokenizer ends a text with token {tokenizer.eos_token_id}, "
                f"the model looks for {text.eos_token_id}"
            )
        height, width = config.vision_config.image_size
        image_processor = ECCLImageProcessor(size={"height": height, "width": width})
        return cls(image_processor, tokenizer, max_text_length=config.max_text_length)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Loads both parts as the classes they are: the auto classes would ask whether to trust the model's code."""
        return [
            part.from_pretrained(pretrained_model_name_or_path, **kwargs)
            for part in (ECCLImageProcessor, CLIPTokenizer)
        ]

    def __call__(self, images=None, text=None, **kwargs):
        """Processes images, captions or both.

        Args:
            images: a PIL image, array or tensor, or a list of them.
            text: a caption or a list of captions; cleaned by [`clean_caption`] and cut to `max_text_length` tokens, the
                end-of-text token kept last.
            **kwargs: as any processor of transformers takes them, `return_tensors="pt"` above all.

        Returns:
            `BatchFeature` with `pixel_values` `(images, 3, height, width)` and `input_ids`, `attention_mask`
            `(captions, longest)`.
        """
        if text is not None:
            text = clean_caption(text) if isinstance(text, str) else [clean_caption(caption) for caption in text]
            kwargs.setdefault("max_length", self.max_text_length)
        return super().__call__(images=images, text=text, **kwargs)


__all__ = ["IMAGE_SUFFIXES", "ECCLImageProcessor", "ECCLProcessor", "clean_caption", "list_images", "read_image"]
