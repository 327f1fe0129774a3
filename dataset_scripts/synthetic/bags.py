"""Bags: backpack, shoulder bag, handbag and shopping bag."""

from .colours import contrast_colour, scale_colour
from .figure import Figure


def draw_backpack(figure: Figure) -> None:
    """Draws a backpack without its straps; draws nothing if the person has none."""
    if figure.person["bag"] != "backpack":
        return
    if figure.view == "back":
        _draw_backpack_from_back(figure)
    elif figure.view == "side":
        _draw_backpack_from_side(figure)
    else:
        # Only its edges show on both sides of the body.
        half = figure.shoulder + 0.012
        outline = [
            (-half, 0.2), (half, 0.2), (half + 0.02, 0.3), (half + 0.008, 0.43), (-half - 0.008, 0.43),
            (-half - 0.02, 0.3),
        ]  # fmt: skip
        figure.canvas.blob(outline, figure.look.bag)


def draw_bag_over_shoulder(figure: Figure) -> None:
    """Draws what hangs over a shoulder, in front of the torso: the straps of a backpack, or a shoulder bag."""
    if figure.person["bag"] == "backpack":
        _draw_straps(figure)
    elif figure.person["bag"] == "shoulder bag":
        _draw_shoulder_bag(figure)


def draw_carried_bag(figure: Figure) -> None:
    """Draws the bag in a hand: a handbag or a shopping bag; draws nothing if the person has none."""
    canvas, colour, kind = figure.canvas, figure.look.bag, figure.person["bag"]
    hand = figure.arms[figure.bag_arm][2]
    x = hand[0] + figure.bag_side * 0.012
    if kind == "handbag":
        y = hand[1] + 0.062
        handle = [(x - 0.03, y), (x - 0.02, y - 0.05), (x + 0.02, y - 0.05), (x + 0.03, y)]
        canvas.line(handle, scale_colour(colour, 0.65), 0.01)
        outline = [(x - 0.048, y - 0.002), (x + 0.048, y - 0.002), (x + 0.064, y + 0.082), (x - 0.064, y + 0.082)]
        canvas.blob(outline, colour)
        canvas.line([(x - 0.05, y + 0.02), (x + 0.05, y + 0.02)], contrast_colour(colour), 0.007)
    elif kind == "shopping bag":
        y = hand[1] + 0.07
        handle = [(x - 0.022, y), (x - 0.014, y - 0.055), (x + 0.014, y - 0.055), (x + 0.022, y)]
        canvas.line(handle, scale_colour(colour, 0.65), 0.006)
        canvas.polygon([(x - 0.058, y), (x + 0.058, y), (x + 0.054, y + 0.16), (x - 0.054, y + 0.16)], colour)
        canvas.ellipse((x, y + 0.08), 0.026, 0.026, contrast_colour(colour))


def _draw_backpack_from_back(figure: Figure) -> None:
    canvas, colour = figure.canvas, figure.look.bag
    w = 0.085
    outline = [
        (-w, 0.22), (-w * 0.7, 0.195), (w * 0.7, 0.195), (w, 0.22),
        (w, 0.4), (w * 0.85, 0.43), (-w * 0.85, 0.43), (-w, 0.4),
    ]  # fmt: skip
    canvas.blob(outline, colour)
    pocket = [(-w * 0.65, 0.32), (w * 0.65, 0.32), (w * 0.65, 0.405), (-w * 0.65, 0.405)]
    canvas.polygon(pocket, scale_colour(colour, 0.82))
    canvas.line([(-w * 0.8, 0.27), (w * 0.8, 0.27)], contrast_colour(colour), 0.006)
    canvas.line([(-0.02, 0.195), (0.0, 0.18), (0.02, 0.195)], scale_colour(colour, 0.6), 0.01)


def _draw_backpack_from_side(figure: Figure) -> None:
    canvas, colour = figure.canvas, figure.look.bag
    back = -figure.facing
    near, far = figure.shoulder * 0.6, figure.shoulder * 0.6 + 0.105
    outline = [
        (back * near, 0.195), (back * far * 0.9, 0.205), (back * far, 0.3),
        (back * far, 0.4), (back * far * 0.85, 0.43), (back * near, 0.42),
    ]  # fmt: skip
    canvas.blob(outline, colour)
    pocket = [
        (back * far * 0.8, 0.32), (back * (far + 0.022), 0.325), (back * (far + 0.022), 0.4), (back * far * 0.8, 0.41)
    ]  # fmt: skip
    canvas.polygon(pocket, scale_colour(colour, 0.82))


def _draw_straps(figure: Figure) -> None:
    canvas, colour = figure.canvas, figure.look.bag
    if figure.view == "front":
        for side in (-1, 1):
            x = side * figure.shoulder * 0.62
            canvas.line([(x * 0.95, 0.185), (x * 1.05, 0.28), (x * 1.25, 0.4)], colour, 0.025)
    elif figure.view == "side":
        x = figure.facing * figure.shoulder * 0.25
        canvas.line([(0.0, 0.188), (x, 0.25), (0.0, 0.35), (-x, 0.39)], colour, 0.022)


def _draw_shoulder_bag(figure: Figure) -> None:
    canvas, colour, side = figure.canvas, figure.look.bag, figure.bag_side
    x = side * (figure.hip + 0.015)
    strap = [(-side * figure.shoulder * 0.65, 0.187), (side * figure.waist * 0.9, 0.42)]
    canvas.line(strap, scale_colour(colour, 0.9), 0.017)
    canvas.blob([(x - 0.058, 0.42), (x + 0.058, 0.42), (x + 0.062, 0.53), (x - 0.062, 0.53)], colour)
    flap = [(x - 0.058, 0.425), (x + 0.058, 0.425), (x + 0.05, 0.47), (x - 0.05, 0.47)]
    canvas.polygon(flap, scale_colour(colour, 0.82))
    canvas.ellipse((x, 0.472), 0.008, 0.008, (240, 220, 140))
