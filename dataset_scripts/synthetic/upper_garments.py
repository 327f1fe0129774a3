"""Garments of the upper body: t-shirt, shirt, sweater, hoodie, jacket, coat and tank top."""

from typing import NamedTuple

from .body import neck_half_width
from .colours import luminance, scale_colour
from .figure import Figure
from .shapes import smooth_curve

_HEM = {"coat": 0.7, "jacket": 0.5, "hoodie": 0.53, "tank top": 0.49}
_LOOSENESS = {"coat": 0.02, "hoodie": 0.018, "jacket": 0.012, "sweater": 0.012}
_LONG_SLEEVES = ("shirt", "sweater", "hoodie", "jacket", "coat")


class _Cut(NamedTuple):
    """The measures of a garment: y of the hem, and half widths of the neckline and of the lower edge."""

    hem: float
    neckline: float
    bottom: float


def draw_torso(figure: Figure) -> None:
    """Draws the garment without its sleeves, then the details of its kind."""
    cut = _draw_trunk(figure)
    kind, front = figure.person["upper"], figure.middle_of_front
    if kind in ("jacket", "coat") and front is not None:
        _draw_opening(figure, cut, front)
    elif kind == "shirt" and front is not None:
        _draw_buttons_and_collar(figure, cut, front)
    elif kind == "hoodie":
        _draw_hood(figure, front)
    elif kind == "sweater":
        dark = scale_colour(figure.look.upper, 0.62)
        figure.canvas.line([(-cut.bottom * 0.95, cut.hem - 0.012), (cut.bottom * 0.95, cut.hem - 0.012)], dark, 0.02)
        figure.canvas.line([(-cut.neckline, 0.178), (0.0, 0.19), (cut.neckline, 0.178)], dark, 0.018)


def draw_sleeve(figure: Figure, index: int) -> None:
    """Draws a sleeve: the left one for `index` 0, the right one for 1; a tank top has none."""
    kind = figure.person["upper"]
    shoulder, elbow, hand = figure.arms[index]
    thickness = 0.4 + 0.6 * figure.build
    if kind in _LONG_SLEEVES:
        bulk = 1.15 if kind in ("coat", "hoodie", "jacket") else 1.0
        cuff = (hand[0] - (hand[0] - elbow[0]) * 0.1, hand[1] - (hand[1] - elbow[1]) * 0.1)
        half_widths = [0.036 * thickness * bulk, 0.031 * thickness * bulk, 0.026 * bulk]
        figure.limb([shoulder, elbow, cuff], half_widths, "upper")
        if kind in ("sweater", "hoodie"):
            figure.canvas.ellipse(cuff, 0.024, 0.012, scale_colour(figure.look.upper, 0.62))
    elif kind == "t-shirt":
        end = (shoulder[0] + (elbow[0] - shoulder[0]) * 0.62, shoulder[1] + (elbow[1] - shoulder[1]) * 0.62)
        figure.limb([shoulder, end], [0.038 * thickness, 0.04 * thickness], "upper")


def _draw_trunk(figure: Figure) -> _Cut:
    kind = figure.person["upper"]
    hem, loose = _HEM.get(kind, 0.51), _LOOSENESS.get(kind, 0.0)
    shoulder = figure.shoulder * (0.72 if kind == "tank top" else 1.0) + loose * 0.5
    waist, hip = figure.waist + loose + 0.008, figure.hip + loose
    bottom = hip * (1.22 if kind == "coat" else 1.02)
    neckline = neck_half_width(figure) * 1.5
    scoop = 0.215 if kind == "tank top" else 0.185
    outline = [
        (-neckline, 0.17), (0.0, scoop), (neckline, 0.17),
        (shoulder, 0.192), (shoulder * 0.97, 0.27), (waist, 0.4), (bottom, hem - 0.015),
        (bottom * 0.97, hem), (-bottom * 0.97, hem), (-bottom, hem - 0.015), (-waist, 0.4),
        (-shoulder * 0.97, 0.27), (-shoulder, 0.192),
    ]  # fmt: skip
    figure.cloth(smooth_curve(outline, steps=3), "upper")
    return _Cut(hem, neckline, bottom)


def _draw_opening(figure: Figure, cut: _Cut, front: float) -> None:
    """The inner shirt and the lapels of an open jacket or coat, and a coat's buttons; `front` is x of its middle."""
    canvas, look, kind = figure.canvas, figure.look, figure.person["upper"]
    gap = 0.03 if kind == "jacket" else 0.018
    if figure.view == "side":
        gap *= 0.5
    hem = cut.hem - 0.004
    canvas.polygon(
        [(front - gap * 0.6, 0.182), (front + gap * 0.6, 0.182), (front + gap, hem), (front - gap, hem)], look.inner
    )
    for side in (-1, 1):
        lapel = [(front + side * gap * 0.6, 0.178), (front + side * (gap + 0.034), 0.2), (front + side * gap, 0.3)]
        canvas.polygon(lapel, scale_colour(look.upper, 0.62))
    if kind == "coat":
        for level in (0.36, 0.45, 0.54):
            canvas.ellipse((front + gap + 0.016, level), 0.007, 0.007, look.upper_accent)


def _draw_buttons_and_collar(figure: Figure, cut: _Cut, front: float) -> None:
    """The details of a shirt; `front` is x of its buttons."""
    canvas, look = figure.canvas, figure.look
    canvas.line([(front, 0.19), (front, cut.hem - 0.005)], scale_colour(look.upper, 0.62), 0.005)
    button = (250, 250, 250) if luminance(look.upper) < 150 else (60, 60, 60)
    for number in range(5):
        canvas.ellipse((front, 0.23 + 0.06 * number), 0.0065, 0.0065, button)
    for side in (-1, 1):
        collar = [(front, 0.192), (front + side * 0.04, 0.168), (front + side * 0.042, 0.212)]
        canvas.polygon(collar, look.upper_accent)


def _draw_hood(figure: Figure, front: float | None) -> None:
    """The details of a hoodie: its hood from the back, or else its pocket and strings; `front` is x of its middle."""
    canvas, upper = figure.canvas, figure.look.upper
    if front is None:
        hood = [(-0.06, 0.17), (0.06, 0.17), (0.05, 0.25), (0.0, 0.28), (-0.05, 0.25)]
        canvas.blob(hood, scale_colour(upper, 0.8))
    else:
        if figure.view == "front":
            pocket = [(front - 0.055, 0.4), (front + 0.055, 0.4), (front + 0.075, 0.475), (front - 0.075, 0.475)]
        else:
            pocket = [(front * 0.2, 0.4), (front, 0.4), (front, 0.47), (front * 0.1, 0.47)]
        canvas.polygon(pocket, scale_colour(upper, 0.78))
        for side in (-1, 1):
            canvas.line([(front + side * 0.018, 0.2), (front + side * 0.02, 0.28)], (240, 240, 240), 0.006)
    canvas.line([(-0.058, 0.182), (0.0, 0.198), (0.058, 0.182)], scale_colour(upper, 0.7), 0.02)
