"""The effects of a camera: light, colour cast, blur, haze and sensor noise."""

import random

import numpy as np
from PIL import Image, ImageChops, ImageFilter


def apply_nuisance(value: float, neutral: float, nuisance: float) -> float:
    """Moves a drawn value towards its harmless value, or further away from it.

    Args:
        value: the drawn value.
        neutral: the value that does no harm.
        nuisance: 0 returns `neutral`, 1 returns `value` unchanged to the last bit, above 1 exaggerates.
    """
    return value if nuisance == 1.0 else neutral + nuisance * (value - neutral)


def shade_edge(image: Image.Image, background: Image.Image, rng: random.Random) -> Image.Image:
    """Makes the figure look round: it becomes darker towards its edge on the side away from the light.

    Args:
        image: the figure on its background.
        background: the same picture without the figure.
        rng: the only source of randomness: the side of the light.
    """
    silhouette = ImageChops.difference(image, background).convert("L").point(lambda level: 255 if level > 10 else 0)
    lit = ImageChops.offset(silhouette.filter(ImageFilter.BoxBlur(5)), rng.choice((-3, 3)), -1)
    shade = lit.point(lambda level: 150 + level * 105 // 255)
    shaded = ImageChops.multiply(image, Image.merge("RGB", (shade, shade, shade)))
    return Image.composite(shaded, image, silhouette)


def photograph(image: Image.Image, domain: str, rng: random.Random, nuisance: float) -> Image.Image:
    """Adds the light, the colour cast, the blur, the haze and the noise of one camera.

    Args:
        image: an RGB picture.
        domain: `source` or `target`: the range of each effect.
        rng: the only source of randomness.
        nuisance: factor on how strong the effects are, see [`apply_nuisance`].
    """
    target = domain == "target"
    exposure = apply_nuisance(rng.uniform(0.55, 1.08) if target else rng.uniform(0.68, 1.18), 0.95, nuisance)
    cast = [exposure * apply_nuisance(rng.uniform(0.9, 1.1), 1.0, nuisance) for _ in range(3)]
    if target:
        cast[1] *= 1.04
        cast[2] *= 0.92
    blur = apply_nuisance(rng.uniform(0.3, 2.2) if target else rng.uniform(0.0, 1.6), 0.0, nuisance)
    image = image.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(image, dtype=np.float32) * np.asarray(cast, dtype=np.float32)
    # The light comes from one side.
    slope = apply_nuisance(rng.uniform(-0.3, 0.3), 0.0, nuisance)
    pixels *= np.linspace(1 - slope, 1 + slope, pixels.shape[1], dtype=np.float32)[None, :, None]
    pixels += apply_nuisance(rng.uniform(0, 26) if target else rng.uniform(0, 14), 0.0, nuisance)  # haze
    generator = np.random.default_rng(rng.getrandbits(64))
    noise = generator.standard_normal(pixels.shape[:2], dtype=np.float32)
    noise = noise * apply_nuisance(rng.uniform(3, 13) if target else rng.uniform(0, 5), 0.0, nuisance)
    pixels += noise[:, :, None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
