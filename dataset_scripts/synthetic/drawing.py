"""Draws one photograph of a person with Pillow: background, person, obstacles and the effects of the camera."""

import random

from PIL import Image

from .appearance import Appearance
from .backgrounds import draw_background, draw_obstacles
from .bags import draw_backpack, draw_bag_over_shoulder, draw_carried_bag
from .body import draw_arm, draw_leg, draw_neck
from .canvas import Canvas
from .colours import scale_colour
from .figure import Figure
from .hair import draw_hair_at_back, draw_hair_behind_body
from .hats import draw_hat
from .head import draw_head
from .lower_garments import draw_hips, draw_trouser_leg
from .people import Person
from .photograph import apply_nuisance, photograph, shade_edge
from .shoes import draw_shoe
from .upper_garments import draw_sleeve, draw_torso

IMAGE_HEIGHT, IMAGE_WIDTH = 384, 128
# Pictures are drawn at this many times their size and then reduced, so that edges are smooth.
_OVERSAMPLING = 2


def draw_person(
    person: Person, appearance: Appearance, domain: str, rng: random.Random, nuisance: float = 1.0
) -> Image.Image:
    """Draws one photograph of a person.

    Args:
        person: the attributes, see `ATTRIBUTES`.
        appearance: the person's colours, from `sample_appearance`.
        domain: `source` or `target`: background and camera.
        rng: the only source of randomness: pose, side, scale, shift, obstacles, light, blur. The order of the draws
            decides the picture; it must stay the same for the same seed to give the same bytes.
        nuisance: factor on how far scale, shift, light, blur and noise go, and on how often there is an obstacle.

    Returns:
        An RGB image, 384 pixels high and 128 wide.
    """
    size = (IMAGE_WIDTH * _OVERSAMPLING, IMAGE_HEIGHT * _OVERSAMPLING)
    background = draw_background(domain, size, rng)
    height = size[1] * min(apply_nuisance(rng.uniform(0.76, 0.93), 0.85, nuisance), 0.97)
    centre = size[0] * (0.5 + apply_nuisance(rng.uniform(-0.09, 0.09), 0.0, nuisance))
    top = (size[1] - height) * rng.uniform(0.3, 0.8) + height * 0.02
    picture = background.copy()
    canvas = Canvas(picture, centre, top, height)
    _draw_shadow(canvas, background)
    _draw_figure(Figure(canvas, person, appearance, rng))
    draw_obstacles(picture, domain, rng, nuisance)
    small, empty = (image.resize((IMAGE_WIDTH, IMAGE_HEIGHT), Image.Resampling.BOX) for image in (picture, background))
    return photograph(shade_edge(small, empty, rng), domain, rng, nuisance)


def _draw_shadow(canvas: Canvas, background: Image.Image) -> None:
    """Draws the shadow below the feet in a darker colour of the floor."""
    x, y = background.width // 2, background.height - 4
    red, green, blue = background.crop((x, y, x + 1, y + 1)).tobytes()
    canvas.ellipse((0.02, 0.995), 0.17, 0.014, scale_colour((red, green, blue), 0.6))


def _draw_figure(figure: Figure) -> None:
    """Draws all parts of a person, those at the back first."""
    from_back, from_side = figure.view == "back", figure.view == "side"
    near, far = (1, 0) if figure.facing > 0 else (0, 1)
    if figure.view == "front":
        draw_hair_behind_body(figure)
    if not from_back:
        draw_backpack(figure)
    if from_side:
        _draw_dressed_arm(figure, far)
    for index in (far, near):
        _draw_dressed_leg(figure, index)
    draw_hips(figure)
    if not from_back:
        draw_carried_bag(figure)
    draw_neck(figure)
    draw_torso(figure)
    for index in (near,) if from_side else (0, 1):
        _draw_dressed_arm(figure, index)
    if from_back:
        draw_carried_bag(figure)
    draw_bag_over_shoulder(figure)
    draw_head(figure)
    if from_back and figure.person["bag"] == "backpack":
        draw_backpack(figure)
        # Long hair hangs over the backpack.
        if figure.person["hair"] in ("long", "ponytail"):
            draw_hair_at_back(figure)
    draw_hat(figure)


def _draw_dressed_leg(figure: Figure, index: int) -> None:
    draw_leg(figure, index)
    draw_trouser_leg(figure, index)
    draw_shoe(figure, index)


def _draw_dressed_arm(figure: Figure, index: int) -> None:
    draw_arm(figure, index)
    draw_sleeve(figure, index)
