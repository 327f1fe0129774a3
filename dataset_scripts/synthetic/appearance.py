"""The appearance of a person: the exact shade of everything that all photographs of this person show."""

import random
from dataclasses import dataclass

from .colours import DENIM, HAIR_COLOURS, PALETTES, SKIN_TONES, Colour, clip_channel, contrast_colour
from .people import Person

# The colour of a hat or a bag that the person does not have. It is never drawn.
_NO_COLOUR: Colour = (0, 0, 0)
_INNER_SHIRTS: list[Colour] = [(240, 240, 236), (206, 208, 212), (60, 62, 70)]


@dataclass(frozen=True)
class Appearance:
    """The colours, as RGB, that are the same in all photographs of a person.

    Args:
        skin, hair, hat, upper, lower, shoes, bag: the shade of each part.
        upper_accent, lower_accent: the second colour of the garment's pattern.
        inner: the shirt that shows below an open jacket or coat.
        pattern_phase: where the pattern starts, as a fraction of its period, 0 to 1.
    """

    skin: Colour
    hair: Colour
    hat: Colour
    upper: Colour
    upper_accent: Colour
    inner: Colour
    lower: Colour
    lower_accent: Colour
    shoes: Colour
    bag: Colour
    pattern_phase: float


def _sample_shade(colour: Colour, rng: random.Random, spread: int = 12) -> Colour:
    """Draws a shade: all channels move together by up to `spread`, and each one alone by up to half of it."""
    light = rng.uniform(-spread, spread)
    red, green, blue = (clip_channel(channel + light + rng.uniform(-spread / 2, spread / 2)) for channel in colour)
    return red, green, blue


def sample_appearance(person: Person, domain: str, rng: random.Random) -> Appearance:
    """Draws this person's shade of each colour, and what captions do not mention (skin, inner shirt).

    Args:
        person: the attributes, see `ATTRIBUTES`.
        domain: `source` or `target`; each has its palette.
        rng: the only source of randomness.
    """
    palette = PALETTES[domain]
    lower_colours = DENIM[domain] if person["lower"] == "jeans" else palette
    # The order of these lines is the order of the random draws: another order gives other pictures for the same seed.
    upper = _sample_shade(palette[person["upper_colour"]], rng)
    lower = _sample_shade(lower_colours[person["lower_colour"]], rng)
    return Appearance(
        skin=_sample_shade(rng.choice(SKIN_TONES), rng, 6),
        hair=_sample_shade(HAIR_COLOURS[person["hair_colour"]], rng, 8),
        hat=_sample_shade(palette.get(person["hat_colour"], _NO_COLOUR), rng),
        upper=upper,
        upper_accent=contrast_colour(upper),
        inner=_sample_shade(rng.choice(_INNER_SHIRTS), rng),
        lower=lower,
        lower_accent=contrast_colour(lower),
        shoes=_sample_shade(palette[person["shoes_colour"]], rng),
        bag=_sample_shade(palette.get(person["bag_colour"], _NO_COLOUR), rng),
        pattern_phase=rng.random(),
    )
