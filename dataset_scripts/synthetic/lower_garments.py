"""Garments of the lower body: trousers, jeans, shorts and skirts."""

from .colours import mix_colours
from .figure import Figure
from .shapes import smooth_curve


def draw_trouser_leg(figure: Figure, index: int) -> None:
    """Draws one leg of trousers or jeans; draws nothing if the person wears shorts or a skirt."""
    kind, canvas, lower = figure.person["lower"], figure.canvas, figure.look.lower
    if kind not in ("trousers", "jeans"):
        return
    hip, knee, ankle = figure.legs[index]
    thickness = 0.3 + 0.7 * figure.build
    joints = [hip, knee, (ankle[0], ankle[1] + 0.008)]
    if kind == "trousers":
        figure.limb(joints, [0.058 * thickness, 0.046 * thickness, 0.04], "lower")
        return
    figure.limb(joints, [0.058 * thickness, 0.037 * thickness, 0.027], "lower")
    side = 1 if index else -1
    seam = [(x + side * 0.024 * thickness, y + 0.01) for x, y in (hip, knee, ankle)]
    canvas.line(seam, mix_colours(lower, (236, 200, 120), 0.5), 0.004)
    faded = mix_colours(lower, (235, 240, 250), 0.28)
    canvas.ellipse((knee[0], knee[1] - 0.06), 0.015 * thickness, 0.06, faded)


def draw_hips(figure: Figure) -> None:
    """Draws a skirt, or the part of trousers, jeans or shorts that joins both legs."""
    kind = figure.person["lower"]
    if kind == "skirt":
        _draw_skirt(figure)
        return
    if kind == "shorts":
        thickness = 0.3 + 0.7 * figure.build
        for hip, knee, _ in figure.legs:
            end = (hip[0] + (knee[0] - hip[0]) * 0.85, 0.7)
            figure.limb([hip, end], [0.06 * thickness, 0.056 * thickness], "lower")
    waist, hips = figure.waist, figure.hip
    outline = [
        (-waist, 0.46), (waist, 0.46),
        (hips * 1.06, 0.53), (hips * 0.55, 0.585), (0.0, 0.57), (-hips * 0.55, 0.585), (-hips * 1.06, 0.53),
    ]  # fmt: skip
    figure.cloth(smooth_curve(outline), "lower")


def _draw_skirt(figure: Figure) -> None:
    waist, hips = figure.waist, figure.hip
    flare = hips * 1.25 + 0.035
    left_knee, right_knee = figure.legs[0][1], figure.legs[1][1]
    left, right = min(left_knee[0] - 0.03, -flare), max(right_knee[0] + 0.03, flare)
    outline = [
        (-waist, 0.455), (waist, 0.455),
        (hips * 1.12, 0.54), (right, 0.7), (0.0, 0.715), (left, 0.7), (-hips * 1.12, 0.54),
    ]  # fmt: skip
    figure.cloth(smooth_curve(outline), "lower")
