"""Hair in each view: short, long, in a ponytail or in a bun."""

from .colours import scale_colour
from .figure import Figure
from .shapes import ellipse_points


def draw_hair_behind_body(figure: Figure) -> None:
    """Draws the part of long hair that the head and the shoulders hide in a front view."""
    if figure.person["hair"] == "long":
        outline = [(-0.05, 0.02), (0.05, 0.02), (0.074, 0.15), (0.068, 0.26), (-0.068, 0.26), (-0.074, 0.15)]
        figure.canvas.blob(outline, scale_colour(figure.look.hair, 0.8))


def draw_hair_around_face(figure: Figure) -> None:
    """Draws the hair that is in front of the head in a front view."""
    canvas, colour, style = figure.canvas, figure.look.hair, figure.person["hair"]
    parting = figure.bag_side * 0.02
    outline = [
        (-0.056, 0.085), (-0.053, 0.03), (-0.02, -0.004), (0.02, -0.004), (0.053, 0.03), (0.056, 0.085),
        (0.043, 0.058), (parting, 0.036), (-0.043, 0.058),
    ]  # fmt: skip
    canvas.blob(outline, colour)
    if style == "bun":
        canvas.blob(ellipse_points((0.0, -0.014), 0.031, 0.027), colour)
    elif style == "ponytail":
        side = figure.bag_side
        tail = [
            (side * 0.045, 0.05), (side * 0.075, 0.08), (side * 0.085, 0.19), (side * 0.062, 0.25), (side * 0.056, 0.14)
        ]  # fmt: skip
        canvas.blob(tail, colour)
    elif style == "long":
        for side in (-1, 1):
            strand = [
                (side * 0.04, 0.035), (side * 0.064, 0.07), (side * 0.078, 0.2),
                (side * 0.062, 0.275), (side * 0.04, 0.24), (side * 0.046, 0.12),
            ]  # fmt: skip
            canvas.blob(strand, colour)


def draw_hair_in_profile(figure: Figure) -> None:
    """Draws the hair in a side view."""
    canvas, colour, style = figure.canvas, figure.look.hair, figure.person["hair"]
    facing = figure.facing
    outline = [
        (facing * 0.04, 0.03), (facing * 0.022, 0.055), (facing * 0.0, 0.062), (facing * 0.002, 0.1),
        (-facing * 0.035, 0.125), (-facing * 0.058, 0.08), (-facing * 0.046, 0.018), (0.0, -0.002),
    ]  # fmt: skip
    canvas.blob(outline, colour)
    back = -facing
    if style == "long":
        hair = [
            (back * 0.02, 0.04), (back * 0.062, 0.06), (back * 0.078, 0.2),
            (back * 0.062, 0.29), (back * 0.02, 0.26), (back * 0.012, 0.12),
        ]  # fmt: skip
        canvas.blob(hair, colour)
    elif style == "ponytail":
        tail = [
            (back * 0.045, 0.04), (back * 0.09, 0.06), (back * 0.1, 0.18), (back * 0.078, 0.24), (back * 0.066, 0.12)
        ]  # fmt: skip
        canvas.blob(tail, colour)
    elif style == "bun":
        canvas.blob(ellipse_points((back * 0.062, 0.028), 0.031, 0.031), colour)


def draw_hair_at_back(figure: Figure) -> None:
    """Draws the hair that hangs down the back, or a bun, in a back view."""
    canvas, colour, style = figure.canvas, figure.look.hair, figure.person["hair"]
    if style == "long":
        outline = [
            (-0.05, 0.05), (0.05, 0.05), (0.072, 0.18), (0.058, 0.31), (0.0, 0.325), (-0.058, 0.31), (-0.072, 0.18)
        ]  # fmt: skip
        canvas.blob(outline, colour)
    elif style == "ponytail":
        # The red band that ties it.
        canvas.line([(-0.014, 0.085), (0.014, 0.085)], (200, 60, 90), 0.014)
        tail = [(-0.014, 0.09), (0.014, 0.09), (0.03, 0.18), (0.012, 0.28), (-0.012, 0.28), (-0.03, 0.18)]
        canvas.blob(tail, scale_colour(colour, 0.92))
    elif style == "bun":
        canvas.blob(ellipse_points((0.0, 0.03), 0.034, 0.032), scale_colour(colour, 0.92))
