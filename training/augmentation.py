"""The published augmentation of images and captions."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image, ImageOps

from ..processing_eccl import read_image

# The published run pads images of height 384 by 10 pixels; other heights are padded in proportion.
_PADDING_PER_HEIGHT = 10 / 384
_FLIP_PROBABILITY = 0.5
_ERASE_PROBABILITY = 0.5
_ERASE_AREA = (0.02, 0.4)
_ERASE_RATIO = (0.3, 3.3)
# The published probability.
WORD_DROP_PROBABILITY = 0.1


def augment_image(image: Any, height: int, width: int, rng: random.Random) -> Image.Image:
    """Resizes an image (Pillow bilinear), flips it with probability 0.5, pads it with black and crops it at random.

    Args:
        image: whatever [`~eccl.processing_eccl.read_image`] takes.
        height, width: size of the result, in pixels.
        rng: the only source of randomness.

    Returns:
        An RGB image.
    """
    resized = read_image(image).resize((width, height), Image.Resampling.BILINEAR)
    if rng.random() < _FLIP_PROBABILITY:
        resized = ImageOps.mirror(resized)
    padding = round(height * _PADDING_PER_HEIGHT)
    left, top = (rng.randint(0, 2 * padding) - padding for _ in range(2))
    # Outside of an image, Pillow crops black: this is the padding.
    return resized.crop((left, top, left + width, top + height))


def random_erase(pixels: torch.Tensor, fill: Sequence[float], rng: random.Random) -> torch.Tensor:
    """Overwrites a random rectangle of a normalised image (Random Erasing, AAAI 2020).

    The rectangle appears with probability 0.5; it covers 0.02 to 0.4 of the image, and its ratio of height to width is
    0.3 to 3.3.

    Args:
        pixels: `(channels, height, width)`, changed in place.
        fill: one value per channel.
        rng: the only source of randomness.

    Returns:
        `pixels`.
    """
    if rng.random() >= _ERASE_PROBABILITY:
        return pixels
    height, width = pixels.shape[-2:]
    # As in the published augmentation, a rectangle that does not fit is drawn again, at most a hundred times.
    for _ in range(100):
        area, ratio = rng.uniform(*_ERASE_AREA) * height * width, rng.uniform(*_ERASE_RATIO)
        erased_height, erased_width = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if erased_height < height and erased_width < width:
            top, left = rng.randint(0, height - erased_height), rng.randint(0, width - erased_width)
            pixels[:, top : top + erased_height, left : left + erased_width] = torch.tensor(fill)[:, None, None]
            break
    return pixels


def drop_words(caption: str, rng: random.Random, probability: float = WORD_DROP_PROBABILITY) -> str:
    """Drops each word of a caption with a probability, 0 to 1; one that would lose all its words stays whole."""
    words = caption.split()
    return " ".join(word for word in words if rng.random() >= probability) or caption


__all__ = ["WORD_DROP_PROBABILITY", "augment_image", "drop_words", "random_erase"]
