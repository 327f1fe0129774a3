"""The colours of the drawings: the RGB values of each colour name in each domain, and functions that change them."""

import random

Colour = tuple[int, int, int]
"""Red, green and blue, each from 0 to 255."""

PALETTES: dict[str, dict[str, Colour]] = {
    "source": {
        "black": (30, 30, 34),
        "white": (244, 243, 238),
        "grey": (138, 140, 144),
        "red": (212, 34, 38),
        "orange": (244, 130, 30),
        "yellow": (246, 214, 50),
        "green": (52, 158, 70),
        "blue": (38, 88, 204),
        "purple": (122, 54, 168),
        "pink": (246, 138, 184),
        "brown": (122, 74, 38),
    },
    "target": {
        "black": (24, 22, 30),
        "white": (226, 222, 208),
        "grey": (118, 122, 132),
        "red": (172, 26, 52),
        "orange": (206, 104, 44),
        "yellow": (206, 172, 54),
        "green": (34, 106, 58),
        "blue": (44, 72, 142),
        "purple": (96, 46, 122),
        "pink": (222, 122, 150),
        "brown": (98, 64, 42),
    },
}
HAIR_COLOURS: dict[str, Colour] = {
    "black": (26, 22, 22),
    "brown": (96, 58, 30),
    "blond": (226, 190, 104),
    "red": (176, 70, 26),
    "grey": (168, 166, 164),
}
SKIN_TONES: tuple[Colour, ...] = ((250, 218, 190), (232, 188, 152), (198, 146, 104), (140, 94, 62), (96, 62, 42))
DENIM: dict[str, dict[str, Colour]] = {
    "source": {"blue": (74, 110, 166), "black": (44, 44, 52), "grey": (128, 132, 142)},
    "target": {"blue": (58, 80, 118), "black": (36, 34, 44), "grey": (108, 110, 122)},
}


def clip_channel(value: float) -> int:
    """Rounds a channel down to a whole number and limits it to 0 to 255."""
    return int(min(255, max(0, value)))


def scale_colour(colour: Colour, factor: float) -> Colour:
    """Multiplies every channel: the colour becomes darker if `factor` is below 1."""
    red, green, blue = colour
    return clip_channel(red * factor), clip_channel(green * factor), clip_channel(blue * factor)


def mix_colours(colour: Colour, other: Colour, weight: float) -> Colour:
    """Mixes two colours: `weight` 0 gives `colour`, 1 gives `other`."""
    (red, green, blue), (other_red, other_green, other_blue) = colour, other
    return (
        int(red + (other_red - red) * weight),
        int(green + (other_green - green) * weight),
        int(blue + (other_blue - blue) * weight),
    )


def luminance(colour: Colour) -> float:
    """Returns the perceived brightness, from 0 to 255."""
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def contrast_colour(colour: Colour) -> Colour:
    """Returns a colour that is clearly lighter than a dark `colour` and clearly darker than a light one.

    It is the second colour of a pattern, and the colour of small details.
    """
    if luminance(colour) < 150:
        return mix_colours(colour, (255, 255, 250), 0.72)
    return mix_colours(colour, (20, 20, 40), 0.62)


def random_colour(rng: random.Random, low: int, high: int) -> Colour:
    """Draws a colour whose channels are between `low` and `high`, both included."""
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)
