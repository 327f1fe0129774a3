"""Bare arms, legs and neck, which garments then cover."""

from .colours import scale_colour
from .figure import Figure
from .shapes import limb_outline


def draw_leg(figure: Figure, index: int) -> None:
    """Draws a bare leg: the left one for `index` 0, the right one for 1."""
    thickness = 0.3 + 0.7 * figure.build
    half_widths = [0.05 * thickness, 0.034 * thickness, 0.022]
    figure.canvas.polygon(limb_outline(list(figure.legs[index]), half_widths), figure.look.skin)


def draw_arm(figure: Figure, index: int) -> None:
    """Draws a bare arm with its hand: the left one for `index` 0, the right one for 1."""
    canvas, skin = figure.canvas, figure.look.skin
    hand = figure.arms[index][2]
    thickness = 0.4 + 0.6 * figure.build
    canvas.polygon(limb_outline(list(figure.arms[index]), [0.028 * thickness, 0.022 * thickness, 0.016]), skin)
    canvas.ellipse((hand[0], hand[1] + 0.012), 0.019, 0.023, skin)


def neck_half_width(figure: Figure) -> float:
    return 0.03 if figure.is_woman else 0.037


def draw_neck(figure: Figure) -> None:
    neck = neck_half_width(figure)
    outline = [(-neck, 0.13), (neck, 0.13), (neck * 1.15, 0.19), (-neck * 1.15, 0.19)]
    figure.canvas.polygon(outline, scale_colour(figure.look.skin, 0.9))
