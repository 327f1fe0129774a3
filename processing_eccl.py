"""The processor of ECCL: it turns images into pixels of a person's shape, and captions into token ids."""

import functools
import html
import io
import math
import os
import re
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps
from transformers import BatchFeature, CLIPImageProcessorPil, CLIPTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import TextKwargs
from transformers.utils import logging

from .configuration_eccl import ECCLConfig

logger = logging.get_logger(__name__)

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


# In characters. A longer text takes the tokenizer seconds, and the model reads a few dozen words.
LONGEST_CAPTION = 20_000


def clean_caption(caption: str) -> str:
    """Cleans a caption as CLIP's published tokenizer does; the tokenizer of transformers leaves this step out.

    With it, a caption gets the same tokens as in CLIP's published code. The steps: UTF-8 that was read as Windows-1252
    is repaired; HTML entities are resolved, twice because of text such as `&amp;quot;`; curly quotes become straight;
    ligatures and full-width letters become plain; control characters are removed; letters become lower case. The
    tokenizer itself collapses whitespace.

    Args:
        caption: any text; what is after the first 20,000 characters, far more than a model reads, is left out.

    Raises:
        ValueError: the text has characters that UTF-8 does not have (lone surrogates).
    """
    caption = _MISREAD.sub(_repair, caption[:LONGEST_CAPTION])
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text {caption[:80]!r} is not valid: {error}") from error
    return unescape(unescape(caption)).translate(_PLAIN_CHARACTERS).lower()


def unescape(text: str) -> str:
    """Resolves HTML entities. A text with an entity of more digits than Python converts to a number stays as it is."""
    try:
        return html.unescape(text)
    except ValueError:
        return text


def _repair(match: re.Match[str]) -> str:
    """Decodes a match as UTF-8: `â€™` is the three bytes of an apostrophe, each read as one character."""
    misread = match[0]
    try:
        return bytes([ord(misread[0]), *(_CONTINUATIONS[character] for character in misread[1:])]).decode("utf-8")
    except UnicodeDecodeError:
        return misread


# The formats of pictures that are read, by Pillow's names, and the suffixes of their files. Pillow knows more: some of
# them start another program. An installation of Pillow may lack some of these (AVIF, for example).
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2",),
}
IMAGE_SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
# A picture at the limit of pixels has at most this many bytes, uncompressed.
_MAX_FILE_BYTES = 512 * 2**20
# Limits for checkpoints from others; those of known models are far below.
_LARGEST_TEXT_LENGTH, _LARGEST_SIDE = 8_192, 16_384
# Pillow's modes for one grey channel of more than 8 bits start with these letters.
_DEEP_MODES = ("I", "F")


def list_images(folder: str | PathLike[str]) -> list[Path]:
    """Lists the image files in a folder and all its subfolders, in the order of their paths.

    Hidden files and folders (`.name`), linked folders and folders that cannot be opened are left out. A warning counts
    everything that is left out.

    Args:
        folder: the folder. A file is an image if its name ends with one of `IMAGE_SUFFIXES`, in upper or lower case.

    Raises:
        ValueError: `folder` is not a folder, or contains no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    paths: list[Path] = []
    left_out: Counter[str] = Counter()

    def count_unreadable(_: OSError) -> None:
        left_out["unreadable folders"] += 1

    for parent, subfolders, files in os.walk(folder, onerror=count_unreadable):
        left_out["hidden folders"] += sum(name.startswith(".") for name in subfolders)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        left_out["linked folders"] += sum(os.path.islink(os.path.join(parent, name)) for name in subfolders)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in IMAGE_SUFFIXES:
                paths.append(Path(parent, name))
            else:
                left_out["hidden files" if name.startswith(".") else suffix or "files without a suffix"] += 1
    parts = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(left_out.items()) if count)
    if not paths:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise ValueError(f"{folder} contains no images ({suffixes})" + (f", only {parts}" if parts else ""))
    if parts:
        logger.warning(f"{folder} has {len(paths):,} images; left out: {parts}")
    return sorted(paths)


def read_image(source: str | PathLike[str] | BinaryIO | Image.Image | Mapping[str, Any]) -> Image.Image:
    """Reads an image as upright 8-bit RGB. Every image that the model sees is opened with it.

    The EXIF orientation is applied. Grey values of more than 8 bits are scaled to 8 bits: 16-bit values are divided by
    257, float values are taken as 0 to 1, or as 0 to 255 or 0 to 65,535 if they are larger. Pillow converts other modes
    to RGB; it drops an alpha channel.

    Args:
        source: a path, an open binary file, a PIL image, which is not changed, or what `datasets` gives with
            `Image(decode=False)`: a dict with `bytes` and `path`.

    Raises:
        ValueError: the source is not a regular file, is not an image in one of the formats of `IMAGE_SUFFIXES`, is
            damaged, has more pixels than `PIL.Image.MAX_IMAGE_PIXELS` (89 million by default) or more than 512 MiB, or
            has grey values outside the range. The message names the file.
    """
    name: str | PathLike[str] = "a file without a name"
    if isinstance(source, Mapping):
        content, name = source["bytes"], source["path"] or name
        source = source["path"] if content is None else io.BytesIO(content)
    elif isinstance(source, (str, PathLike)):
        name = source
    else:
        # A PIL image has `filename`, an open file has `name`. Both can be empty; the name of a file can be a number.
        found = getattr(source, "filename", None) or getattr(source, "name", None)
        name = found if isinstance(found, (str, PathLike)) else name
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        size = 0
        if isinstance(source, (str, PathLike)):
            status = os.stat(source)
            # A named pipe without a writer would block for ever.
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            size = status.st_size
        elif isinstance(source, io.BytesIO):
            size = source.getbuffer().nbytes
        if size > _MAX_FILE_BYTES:
            raise ValueError(f"it has {size:,} bytes, the limit is {_MAX_FILE_BYTES:,}")
        with Image.open(source, formats=_readable_formats()) as image:
            return _to_rgb(image)
    # On malformed files, Pillow raises errors of many types: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        # Pillow shows an open file by its place in memory.
        reason = re.sub(r" <_io\.\w+ object at 0x\w+>", "", str(error))
        raise ValueError(f"{name} cannot be read as an image: {reason}") from error


@functools.cache
def _readable_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, the limit is {limit:,} (PIL.Image.MAX_IMAGE_PIXELS)"
        )
    # The function copies the image: one copy is enough.
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(_DEEP_MODES):
        upright = _to_8_bits(upright)
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scales grey values of more than 8 bits; Pillow would cut off everything above 255."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    # Also false for NaN.
    if not (low >= 0 and high <= 65535):
        raise ValueError(f"its grey values run from {low:g} to {high:g}, they must lie between 0 and 65535")
    if image.mode.startswith("I;16") or high > 255:
        values = values / 257
    elif image.mode == "F" and high <= 1:
        values = values * 255
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


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

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        sides = dict(self.size)
        if not all(isinstance(side, int) and 1 <= side <= _LARGEST_SIDE for side in sides.values()):
            raise ValueError(f"the size of images is {sides}, each side must be between 1 and {_LARGEST_SIDE:,} pixels")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not (isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_number, values))):
                raise ValueError(f"{name} is {values!r}, it must be three numbers")
        if not _is_number(self.rescale_factor):
            raise ValueError(f"rescale_factor is {self.rescale_factor!r}, it must be a number")

    def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
        """Converts an image with Pillow, as training does; transformers would put transparent pixels on white."""
        if isinstance(image, Image.Image):
            return np.asarray(read_image(image))
        return super().convert_to_rgb(image, input_data_format=input_data_format)

    # The library calls it with keywords only, and passes the list as the first argument.
    def _preprocess(self, images: list[np.ndarray], **kwargs: Any) -> BatchFeature:  # type: ignore[override]
        if kwargs["do_rescale"]:
            for image in images:
                _check_values(image)
        return super()._preprocess(images, **kwargs)


def _check_values(image: np.ndarray) -> None:
    """Refuses an array whose values cannot be those of an 8-bit image: they would be divided by 255 all the same."""
    if image.dtype == np.uint8 or not image.size:
        return
    low, high = float(image.min()), float(image.max())
    # Also false for NaN.
    if not (low >= 0 and high <= 255) or (image.dtype.kind == "f" and 0 < high <= 1):
        raise ValueError(
            f"an image of type {image.dtype} has values from {low:g} to {high:g}, they must run from 0 to 255: convert "
            "it to uint8, or pass do_rescale=False if its values run from 0 to 1"
        )


class ECCLProcessor(ProcessorMixin):
    """An image processor and a CLIP tokenizer. Captions are truncated so that the model has room for its prompts.

    The end token stands only at the end of a caption, because the model reads a caption up to the first one. So the
    processor changes its tokenizer: special tokens in a caption, such as `<|endoftext|>`, are split like other text.

    Args:
        image_processor: usually an [`ECCLImageProcessor`].
        tokenizer: a CLIP tokenizer. If it writes the end token for characters that its vocabulary lacks, it is changed
            so that it leaves these characters out, and a warning says so.
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
        # The shortest caption has three tokens: start, one word and end.
        if not (isinstance(max_text_length, int) and 3 <= max_text_length <= _LARGEST_TEXT_LENGTH):
            raise ValueError(
                f"max_text_length is {max_text_length!r}, it must be between 3 and {_LARGEST_TEXT_LENGTH:,} tokens"
            )
        self.max_text_length = max_text_length
        if tokenizer is not None:
            _require_vocabulary(tokenizer, tokenizer.name_or_path or "the processor")
            _keep_end_token_at_the_end(tokenizer)
            # sentence-transformers shows this limit. CLIP's own is that without prompts.
            tokenizer.model_max_length = max_text_length
            # A checkpoint cannot change the arguments of a call, such as `stride`, by its tokenizer's settings.
            for name in TextKwargs.__annotations__.keys() - {"padding_side"}:
                tokenizer.init_kwargs.pop(name, None)
        super().__init__(image_processor, tokenizer)

    def to_dict(self) -> dict[str, Any]:
        # transformers adds this entry when it saves the code. Now a processor equals its saved copy.
        return super().to_dict() | {"auto_map": {self._auto_class: f"processing_eccl.{type(self).__name__}"}}

    def count_tokens(self, text: str) -> int:
        """Counts all tokens of a text, start and end included, also those that truncation cuts off.

        Threads may share a processor: a call of the tokenizer without truncation would change it while another thread
        uses it. The tokenizer keeps the parts that it has cut off.
        """
        encoding = self.tokenizer.backend_tokenizer.encode(clean_caption(text))
        # Each part has a start and an end, and may be padded.
        return sum(encoding.attention_mask) + sum(sum(part.attention_mask) - 2 for part in encoding.overflowing)

    @classmethod
    def for_model(cls, config: ECCLConfig, tokenizer: PreTrainedTokenizerBase) -> "ECCLProcessor":
        """Makes the processor that fits a model: its image size and its maximum caption length.

        Args:
            config: the configuration of the model.
            tokenizer: the tokenizer of the model.

        Raises:
            ValueError: the tokenizer has more tokens than the model, or another end-of-text token.
        """
        height, width = config.input_size
        image_processor = ECCLImageProcessor(size={"height": height, "width": width})
        processor = cls(image_processor, tokenizer, max_text_length=config.max_text_length)
        processor.require_fit(config)
        return processor

    def require_fit(self, config: ECCLConfig) -> None:
        """Checks that the processor makes what a model takes.

        Raises:
            ValueError: the tokenizer has more tokens than the model, or another end-of-text token; or the images have
                another size. The message names both values.
        """
        text, _ = config.encoder_configs
        if len(self.tokenizer) > text.vocab_size:
            raise ValueError(f"the tokenizer has {len(self.tokenizer)} tokens, the model embeds {text.vocab_size}")
        if self.tokenizer.eos_token_id != text.eos_token_id:
            raise ValueError(
                f"the tokenizer ends a text with token {self.tokenizer.eos_token_id}, "
                f"the model expects token {text.eos_token_id} at the end"
            )
        size = self.image_processor.size["height"], self.image_processor.size["width"]
        if size != config.input_size:
            raise ValueError(
                f"the processor makes images of {size[0]} x {size[1]} pixels, the model takes "
                f"{config.input_size[0]} x {config.input_size[1]}"
            )

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


def load_tokenizer(name: str | PathLike[str]) -> CLIPTokenizer:
    """Loads the tokenizer of a checkpoint.

    Raises:
        ValueError: the checkpoint has no vocabulary; transformers then makes a tokenizer of the special tokens alone.
        OSError: there is no such folder or Hub repository.
    """
    tokenizer = CLIPTokenizer.from_pretrained(name)
    _require_vocabulary(tokenizer, name)
    return tokenizer


def _require_vocabulary(tokenizer: PreTrainedTokenizerBase, name: str | PathLike[str]) -> None:
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"the tokenizer of {name} has no vocabulary: tokenizer.json, or vocab.json with merges.txt, is missing"
        )


def _keep_end_token_at_the_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.split_special_tokens = True
    if tokenizer.unk_token != tokenizer.eos_token:
        return
    vocabulary = tokenizer.get_vocab()
    letters = bytes_to_unicode().values()
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    suffix = getattr(model, "end_of_word_suffix", None) or ""
    missing = sorted({letter + ending for letter in letters for ending in ("", suffix)} - vocabulary.keys())
    if not missing:
        return
    # This file may not import the library of the class.
    if model is None or type(model).__name__ != "BPE":
        raise ValueError(
            f"the tokenizer writes its end token {tokenizer.eos_token} for characters that it does not know, and the "
            "model would stop reading there: use a tokenizer with another unk_token"
        )
    model.unk_token = None
    # Words that were split before are remembered.
    model._clear_cache()
    some = " ".join(missing[:8])
    logger.warning(
        f"the tokenizer lacks {len(missing)} of the tokens for single bytes ({some}{' ...' if missing[8:] else ''}): "
        "captions are read without these characters"
    )


__all__ = [
    "IMAGE_SUFFIXES",
    "LONGEST_CAPTION",
    "ECCLImageProcessor",
    "ECCLProcessor",
    "clean_caption",
    "list_images",
    "load_tokenizer",
    "read_image",
    "unescape",
]
