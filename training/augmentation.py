"""The published augmentation of images and captions."""

import random
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps

from ..processing_eccl import read_image

# The published run pads by 10 pixels where images are 384 high; other sizes pad in proportion.
_PADDING_SHARE = 10 / 384
_FLIP_PROBABILITY = 0.5
_ERASE_PROBABILITY = 0.5
_ERASE_AREA = (0.02, 0.4)
_ERASE_RATIO = (0.3, 3.3)
_DROP_WORD_PROBABILITY = 0.1


def augment_image(image: Image.Image, height: int, width: int, rng: random.Random) -> Image.Image:
    """Resizes to `height` x `width` (Pillow bilinear), flips, pads with black and crops at random.

    Args:
        image: any size, any mode.
        height, width: of the result, in pixels.
        rng: the only source of chance.

    Returns:
        An RGB image.
    """
    image = read_image(image).resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < _FLIP_PROBABILITY:
        image = ImageOps.mirror(image)
    padding = round(height * _PADDING_SHARE)
    left, top = rng.randint(0, 2 * padding), rng.randint(0, 2 * padding)
    return ImageOps.expand(image, padding).crop((left, top, left + width, top + height))


def random_erase(pixels: torch.Tensor, fill: Sequence[float], rng: random.Random) -> torch.Tensor:
    """Overwrites a random rectangle of a normalised image (Random Erasing, AAAI 2020).

    Args:
        pixels: `(channels, height, width)`, changed in place.
        fill: a value for each channel.
        rng: the only source of chance: whether (p 0.5), the area (0.02 to 0.4 of the image), the ratio height / width
            (0.3 to 3.3) and the place.

    Returns:
        `pixels`.
    """
    if rng.random() >= _ERASE_PROBABILITY:
        return pixels
    height, width = pixels.shape[-2:]
    # A rectangle that does not fit is drawn anew, a hundred times at the most, as in the published augmentation.
    for _ in range(100):
        area, ratio = rng.uniform(*_ERASE_AREA) * height * width, rng.uniform(*_ERASE_RATIO)
        erased_height, erased_width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if erased_height < height and erased_width < width:
            top, left = rng.randint(0, height - erased_height), rng.randint(0, width - erased_width)
            pixels[:, top : top + erased_height, left : left + erased_width] = torch.tensor(fill)[:, None, None]
            break
    return pixels


def drop_words(caption: str, rng: random.Random) -> str:
    """Drops each word with probability 0.1; a caption never loses all of them."""
    words = caption.split()
    return " ".join(word for word in words if rng.random() >= _DROP_WORD_PROBABILITY) or caption
