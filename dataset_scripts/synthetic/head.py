"""The head: face, profile or back of the head, with the hair."""

from .colours import scale_colour
from .figure import Figure
from .hair import draw_hair_around_face, draw_hair_at_back, draw_hair_in_profile
from .shapes import ellipse_points


def draw_head(figure: Figure) -> None:
    if figure.view == "back":
        _draw_back_of_head(figure)
    elif figure.view == "side":
        _draw_profile(figure)
        draw_hair_in_profile(figure)
    else:
        _draw_face(figure)
        draw_hair_around_face(figure)


def _draw_back_of_head(figure: Figure) -> None:
    canvas, look = figure.canvas, figure.look
    canvas.blob(ellipse_points((0.0, 0.075), 0.054, 0.074), look.hair)
    if figure.person["hair"] == "short":
        canvas.polygon([(-0.03, 0.125), (0.03, 0.125), (0.028, 0.155), (-0.028, 0.155)], look.skin)
    else:
        draw_hair_at_back(figure)


def _draw_profile(figure: Figure) -> None:
    canvas, skin, facing = figure.canvas, figure.look.skin, figure.facing
    canvas.blob(ellipse_points((0.0, 0.078), 0.05, 0.072), skin)
    nose = [(facing * 0.044, 0.072), (facing * 0.064, 0.092), (facing * 0.044, 0.098)]
    canvas.polygon(nose, skin)
    canvas.ellipse((facing * 0.03, 0.072), 0.006, 0.007, (30, 26, 26))
    canvas.line([(facing * 0.03, 0.118), (facing * 0.046, 0.116)], (150, 60, 60), 0.005)


def _draw_face(figure: Figure) -> None:
    canvas, look = figure.canvas, figure.look
    middle = figure.turn * 0.02
    canvas.blob(ellipse_points((0.0, 0.078), 0.05, 0.072), look.skin)
    for side in (-1, 1):
        canvas.ellipse((middle + side * 0.02, 0.076), 0.0075, 0.0085, (250, 250, 250))
        canvas.ellipse((middle + side * 0.02, 0.077), 0.0048, 0.0065, (34, 26, 24))
        eyebrow = [(middle + side * 0.012, 0.061), (middle + side * 0.03, 0.061)]
        canvas.line(eyebrow, scale_colour(look.hair, 0.8), 0.005)
    nose = [(middle, 0.08), (middle + 0.004, 0.097), (middle - 0.004, 0.099)]
    canvas.line(nose, scale_colour(look.skin, 0.75), 0.004)
    mouth = [(middle - 0.015, 0.117), (middle, 0.121), (middle + 0.015, 0.117)]
    canvas.line(mouth, (190, 60, 70) if figure.is_woman else (150, 84, 74), 0.007)
