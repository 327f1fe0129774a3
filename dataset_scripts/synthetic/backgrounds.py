"""The background behind the person (wall, floor, clutter), and the obstacles in front of the person."""

import random

from PIL import Image, ImageDraw, ImageFilter

from .colours import Colour, mix_colours, random_colour, scale_colour


def draw_background(domain: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Draws a wall, a floor and clutter.

    The clutter is panels, discs and posts by day in the source domain, shards and rails by night in the target domain.

    Args:
        domain: `source` or `target`.
        size: width and height in pixels.
        rng: the only source of randomness.
    """
    width, height = size
    low, high = (70, 215) if domain == "source" else (35, 135)
    wall, floor = random_colour(rng, low, high), random_colour(rng, low, high)
    # A grey that is as bright as the wall makes both colours less vivid.
    level = sum(wall) // 3
    grey = (level, level, level)
    wall, floor = mix_colours(wall, grey, 0.45), mix_colours(floor, grey, 0.6)
    image = Image.new("RGB", size, wall)
    draw = ImageDraw.Draw(image)
    horizon = int(height * rng.uniform(0.55, 0.85))
    draw.rectangle((0, horizon, width, height), fill=floor)
    for _ in range(rng.randint(3, 8)):
        paint = random_colour(rng, low, 255 if domain == "source" else 200)
        colour = mix_colours(paint, wall, rng.uniform(0.0, 0.6))
        if domain == "source":
            _draw_source_clutter(draw, size, colour, rng)
        else:
            _draw_target_clutter(draw, size, colour, rng)
    if rng.random() < 0.5:
        _draw_paving(draw, size, horizon, floor)
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0, 4)))


def draw_obstacles(image: Image.Image, domain: str, rng: random.Random, nuisance: float) -> None:
    """Now and then draws something in front of the person: a box at the feet, or a post.

    Args:
        image: the picture to draw on.
        domain: `source` or `target`.
        rng: the only source of randomness.
        nuisance: factor on how often it happens.
    """
    width, height = image.size
    draw = ImageDraw.Draw(image)
    low, high = (60, 220) if domain == "source" else (30, 150)
    if rng.random() < 0.14 * nuisance:
        left = rng.choice((0.0, 0.45))
        box = (left * width, height * rng.uniform(0.78, 0.92), (left + 0.55) * width, height)
        draw.rectangle(box, fill=random_colour(rng, low, high))
    if rng.random() < 0.1 * nuisance:
        x = rng.uniform(0, 1) * width
        draw.rectangle((x, 0, x + 0.05 * width, height), fill=random_colour(rng, low, high))


def _draw_source_clutter(draw: ImageDraw.ImageDraw, size: tuple[int, int], colour: Colour, rng: random.Random) -> None:
    """A panel, a disc or a post."""
    x, y, w, h = _sample_box(size, rng)
    kind = rng.random()
    if kind < 0.5:
        draw.rectangle((x, y, x + w, y + h), fill=colour)
    elif kind < 0.75:
        draw.ellipse((x, y, x + w, y + w), fill=colour)
    else:
        draw.line((x, 0, x + rng.uniform(-20, 20), size[1]), fill=colour, width=rng.randint(3, 10))


def _draw_target_clutter(draw: ImageDraw.ImageDraw, size: tuple[int, int], colour: Colour, rng: random.Random) -> None:
    """A shard or a rail."""
    width, height = size
    x, y, w, h = _sample_box(size, rng)
    if rng.random() < 0.5:
        corners = [(x + rng.uniform(-1, 1) * w, y + rng.uniform(-1, 1) * h) for _ in range(3)]
        draw.polygon(corners, fill=colour)
    else:
        draw.line((0, y, width, y + rng.uniform(-0.3, 0.3) * height), fill=colour, width=rng.randint(3, 16))


def _sample_box(size: tuple[int, int], rng: random.Random) -> tuple[float, float, float, float]:
    """Left, top, width and height in pixels."""
    width, height = size
    x, y = rng.uniform(-0.2, 1.0) * width, rng.uniform(-0.1, 1.0) * height
    w, h = rng.uniform(0.1, 0.5) * width, rng.uniform(0.04, 0.3) * height
    return x, y, w, h


def _draw_paving(draw: ImageDraw.ImageDraw, size: tuple[int, int], horizon: int, floor: Colour) -> None:
    width, height = size
    for step in range(1, 5):
        y = horizon + (height - horizon) * step / 5
        draw.line((0, y, width, y), fill=scale_colour(floor, 0.85), width=2)
