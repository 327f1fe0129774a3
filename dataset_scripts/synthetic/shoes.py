"""Shoes: sneakers, boots, sandals and leather shoes."""

from .colours import Colour, contrast_colour, mix_colours, scale_colour
from .figure import Figure
from .shapes import Point, limb_outline

_WHITE: Colour = (250, 250, 250)


def draw_shoe(figure: Figure, index: int) -> None:
    """Draws one shoe: the left one for `index` 0, the right one for 1."""
    canvas, colour, kind = figure.canvas, figure.look.shoes, figure.person["shoes"]
    ankle = figure.legs[index][2]
    base = ankle[1] + 0.05
    outline = _side_outline(figure, ankle, base) if figure.view == "side" else _front_outline(index, ankle, base)
    left, right = min(x for x, _ in outline), max(x for x, _ in outline)
    middle = (left + right) / 2
    if kind == "sandals":
        canvas.polygon(outline, figure.look.skin)
        for level in (0.016, 0.032):
            canvas.line([(left + 0.004, ankle[1] + level), (right - 0.004, ankle[1] + level)], colour, 0.011)
    else:
        canvas.polygon(outline, colour)
    if kind == "boots":
        shaft: list[Point] = [(ankle[0], ankle[1] - 0.1), (ankle[0], ankle[1] + 0.02)]
        canvas.polygon(limb_outline(shaft, [0.04, 0.034]), colour)
        edge = [(ankle[0] - 0.036, ankle[1] - 0.095), (ankle[0] + 0.036, ankle[1] - 0.095)]
        canvas.line(edge, contrast_colour(colour), 0.007)
    if kind == "sneakers":
        canvas.line([(left, base), (right, base)], _WHITE, 0.014)
        canvas.line([(middle - 0.014, ankle[1] + 0.02), (middle + 0.014, ankle[1] + 0.02)], _WHITE, 0.005)
    else:
        canvas.line([(left, base), (right, base)], scale_colour(colour, 0.45), 0.008)
    if kind == "leather shoes":
        canvas.ellipse((middle, base - 0.02), 0.01, 0.006, mix_colours(colour, (255, 255, 255), 0.5))


def _side_outline(figure: Figure, ankle: Point, base: float) -> list[Point]:
    """A shoe in a side view; `base` is y of the sole."""
    toe, heel = ankle[0] + figure.facing * 0.075, ankle[0] - figure.facing * 0.03
    return [
        (heel, ankle[1]), (ankle[0] + figure.facing * 0.028, ankle[1]),
        (toe, ankle[1] + 0.03), (toe, base), (heel, base),
    ]  # fmt: skip


def _front_outline(index: int, ankle: Point, base: float) -> list[Point]:
    """A shoe in a front or back view; `base` is y of the sole."""
    half_width = 0.036
    toe, heel = ankle[0] + (1 if index else -1) * 0.022, ankle[0]
    return [
        (heel - half_width * 0.75, ankle[1] + 0.004), (heel + half_width * 0.75, ankle[1] + 0.004),
        (toe + half_width, base), (toe - half_width, base),
    ]  # fmt: skip
