"""Hats: beanie, cap and sun hat."""

from .colours import contrast_colour, scale_colour
from .figure import Figure
from .shapes import Point, ellipse_points

_DOME: list[Point] = [(-0.058, 0.045), (-0.05, 0.0), (-0.018, -0.024), (0.018, -0.024), (0.05, 0.0), (0.058, 0.045)]


def draw_hat(figure: Figure) -> None:
    """Draws the person's hat; draws nothing if there is none."""
    kind = figure.person["hat"]
    if kind == "beanie":
        _draw_beanie(figure)
    elif kind == "cap":
        _draw_cap(figure)
    elif kind == "sun hat":
        _draw_sun_hat(figure)


def _draw_beanie(figure: Figure) -> None:
    canvas, colour = figure.canvas, figure.look.hat
    canvas.blob([*_DOME, (0.0, 0.052)], colour)
    brim = [(-0.061, 0.026), (0.061, 0.026), (0.061, 0.052), (-0.061, 0.052)]
    canvas.polygon(brim, scale_colour(colour, 0.8))
    canvas.ellipse((0.0, -0.032), 0.019, 0.017, contrast_colour(colour))


def _draw_cap(figure: Figure) -> None:
    canvas, colour = figure.canvas, figure.look.hat
    canvas.blob([*_DOME, (0.0, 0.042)], colour)
    if figure.view == "side":
        facing = figure.facing
        peak = [(facing * 0.03, 0.03), (facing * 0.12, 0.044), (facing * 0.118, 0.056), (facing * 0.03, 0.05)]
        canvas.polygon(peak, scale_colour(colour, 0.78))
    elif figure.view == "front":
        shift = figure.turn * 0.05
        peak = [
            (-0.056 + shift, 0.04), (shift, 0.03), (0.056 + shift, 0.04),
            (0.05 + shift, 0.058), (shift, 0.068), (-0.05 + shift, 0.058),
        ]  # fmt: skip
        canvas.blob(peak, scale_colour(colour, 0.78))
    else:
        # The opening above the strap.
        canvas.ellipse((0.0, 0.035), 0.018, 0.012, scale_colour(colour, 0.55))


def _draw_sun_hat(figure: Figure) -> None:
    canvas, colour = figure.canvas, figure.look.hat
    canvas.blob(ellipse_points((0.0, 0.036), 0.115, 0.022), scale_colour(colour, 0.88))
    crown = [(-0.054, 0.034), (-0.046, -0.012), (0.0, -0.026), (0.046, -0.012), (0.054, 0.034), (0.0, 0.04)]
    canvas.blob(crown, colour)
    canvas.line([(-0.054, 0.026), (0.0, 0.032), (0.054, 0.026)], contrast_colour(colour), 0.012)
