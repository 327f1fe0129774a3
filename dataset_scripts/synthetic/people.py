"""The persons of the synthetic benchmark: their attributes, how they are sampled, and the oracle."""

import random
from functools import reduce

import numpy as np

COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")

# Every attribute that identifies a person, with its values. The position of a value is its class label.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "gender": ("man", "woman"),
    "build": ("slim", "average", "heavy"),
    "hair": ("short", "long", "ponytail", "bun"),
    "hair_colour": ("black", "brown", "blond", "red", "grey"),
    "hat": ("none", "cap", "beanie", "sun hat"),
    "hat_colour": ("none", *COLOURS),
    "upper": ("t-shirt", "shirt", "sweater", "hoodie", "jacket", "coat", "tank top"),
    "upper_colour": COLOURS,
    "upper_pattern": ("plain", "striped", "checked", "dotted"),
    "lower": ("trousers", "jeans", "shorts", "skirt"),
    "lower_colour": COLOURS,
    "lower_pattern": ("plain", "striped", "checked", "dotted"),
    "shoes": ("sneakers", "boots", "sandals", "leather shoes"),
    "shoes_colour": COLOURS,
    "bag": ("none", "backpack", "handbag", "shoulder bag", "shopping bag"),
    "bag_colour": ("none", *COLOURS),
}

Person = dict[str, str]
"""One value for each name of `ATTRIBUTES`."""


# How likely each value is. The order of the values must stay: it decides which person a seed gives.
_HAIR_WEIGHTS = {
    "woman": {"short": 0.2, "long": 0.45, "ponytail": 0.2, "bun": 0.15},
    "man": {"short": 0.8, "long": 0.1, "ponytail": 0.05, "bun": 0.05},
}
_HAT_WEIGHTS = {"none": 0.6, "cap": 0.15, "beanie": 0.13, "sun hat": 0.12}
_HEAVY_UPPER_PATTERN_WEIGHTS = {"plain": 0.7, "striped": 0.2, "checked": 0.2, "dotted": 0.0}
_LIGHT_UPPER_PATTERN_WEIGHTS = {"plain": 0.4, "striped": 0.2, "checked": 0.2, "dotted": 0.2}
_LOWER_WEIGHTS = {
    "woman": {"trousers": 0.3, "jeans": 0.25, "shorts": 0.2, "skirt": 0.3},
    "man": {"trousers": 0.3, "jeans": 0.25, "shorts": 0.2, "skirt": 0.0},
}
_LOWER_PATTERN_WEIGHTS = {"plain": 0.7, "striped": 0.1, "checked": 0.1, "dotted": 0.1}
_BAG_WEIGHTS = {
    "woman": {"none": 0.3, "backpack": 0.22, "handbag": 0.2, "shoulder bag": 0.18, "shopping bag": 0.12},
    "man": {"none": 0.3, "backpack": 0.22, "handbag": 0.05, "shoulder bag": 0.18, "shopping bag": 0.12},
}
_JEANS_COLOURS = ("blue", "black", "grey")
_HEAVY_UPPERS = ("jacket", "coat", "hoodie")
_BUILD_WEIGHTS = {"slim": 0.3, "average": 0.4, "heavy": 0.3}
# The attributes in which look-alikes differ. Gender and build stay: the garments depend on the gender, and few captions
# mention the build.
_LOOKALIKE_ATTRIBUTES = [name for name in ATTRIBUTES if name not in ("gender", "build")]
# Every person has at least this many look-alikes: there are 10 other colours of the upper garment, and 10 of the shoes.
MAX_LOOKALIKES = 100


def _choose(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def sample_person(rng: random.Random) -> Person:
    """Draws the attributes of one person.

    Garments depend on each other as they do on a street: no man wears a skirt, jeans come in three colours, and a
    jacket, a coat or a hoodie is never dotted.

    Args:
        rng: the only source of randomness.

    Returns:
        A value of `ATTRIBUTES[name]` for each name.
    """
    gender = rng.choice(ATTRIBUTES["gender"])
    hair = _choose(rng, _HAIR_WEIGHTS[gender])
    hat = _choose(rng, _HAT_WEIGHTS)
    upper = rng.choice(ATTRIBUTES["upper"])
    upper_pattern = _choose(
        rng, _HEAVY_UPPER_PATTERN_WEIGHTS if upper in _HEAVY_UPPERS else _LIGHT_UPPER_PATTERN_WEIGHTS
    )
    lower = _choose(rng, _LOWER_WEIGHTS[gender])
    lower_colour = rng.choice(_JEANS_COLOURS if lower == "jeans" else COLOURS)
    lower_pattern = "plain" if lower == "jeans" else _choose(rng, _LOWER_PATTERN_WEIGHTS)
    bag = _choose(rng, _BAG_WEIGHTS[gender])
    return {
        "gender": gender,
        "build": _choose(rng, _BUILD_WEIGHTS),
        "hair": hair,
        "hair_colour": rng.choice(ATTRIBUTES["hair_colour"]),
        "hat": hat,
        "hat_colour": "none" if hat == "none" else rng.choice(COLOURS),
        "upper": upper,
        "upper_colour": rng.choice(COLOURS),
        "upper_pattern": upper_pattern,
        "lower": lower,
        "lower_colour": lower_colour,
        "lower_pattern": lower_pattern,
        "shoes": rng.choice(ATTRIBUTES["shoes"]),
        "shoes_colour": rng.choice(COLOURS),
        "bag": bag,
        "bag_colour": "none" if bag == "none" else rng.choice(COLOURS),
    }


def sample_lookalikes(first: Person, count: int, rng: random.Random) -> list[Person]:
    """Draws persons who differ in exactly two attributes from the first person.

    The two attributes are never the gender or the build. The garments of a look-alike depend on each other as those of
    [`sample_person`] do.

    Args:
        first: the attributes of the first person.
        count: number of look-alikes, 0 to 100.
        rng: the only source of randomness.

    Returns:
        `count` persons, all different from each other. A smaller `count` gives the first ones of them.

    Raises:
        ValueError: `count` is out of range.
    """
    if not 0 <= count <= MAX_LOOKALIKES:
        raise ValueError(f"count is {count}, it must be from 0 to {MAX_LOOKALIKES}")
    lookalikes: list[Person] = []
    while len(lookalikes) < count:
        changed = {
            name: rng.choice([value for value in ATTRIBUTES[name] if value != first[name]])
            for name in rng.sample(_LOOKALIKE_ATTRIBUTES, 2)
        }
        person = first | changed
        if _is_possible(person) and person not in lookalikes:
            lookalikes.append(person)
    return lookalikes


def _is_possible(person: Person) -> bool:
    """Returns whether `sample_person` can draw this person."""
    is_jeans = person["lower"] == "jeans"
    return not (
        (person["gender"] == "man" and person["lower"] == "skirt")
        or (is_jeans and (person["lower_colour"] not in _JEANS_COLOURS or person["lower_pattern"] != "plain"))
        or (person["upper"] in _HEAVY_UPPERS and person["upper_pattern"] == "dotted")
        or any((person[part] == "none") != (person[f"{part}_colour"] == "none") for part in ("hat", "bag"))
    )


def attribute_labels(person: Person) -> list[int]:
    """Returns the class label of each attribute, in the order of `ATTRIBUTES`."""
    return [values.index(person[name]) for name, values in ATTRIBUTES.items()]


def oracle_rank1(
    people: list[Person], images_per_person: list[int], queries: list[tuple[int, list[str]]], num_wrong: int = 0
) -> float:
    """Computes the oracle: the expected Rank-1 of a reader who recognises every attribute that a caption mentions.

    The reader knows nothing else. People with the same values of all mentioned attributes look the same to this
    reader, who picks one of their images at random. So a query counts as (images of its person) / (images of all
    people with these values).

    Args:
        people: the people in the gallery.
        images_per_person: the number of images of each person in the gallery.
        queries: for each caption, the index of its person in `people` and the names of the attributes it mentions.
        num_wrong: number of further captions, each of which is false of its person. They count as 0, because the reader
            picks only images of persons who have the mentioned attributes.

    Returns:
        The percentage, from 0 to 100.

    Raises:
        ValueError: there are no queries.
    """
    if not queries and not num_wrong:
        raise ValueError("the oracle needs at least one query, but the list of queries is empty")
    has_value = {
        (name, value): np.array([person[name] == value for person in people])
        for name, values in ATTRIBUTES.items()
        for value in values
    }
    num_images, everyone = np.asarray(images_per_person), np.ones(len(people), dtype=bool)
    total = 0.0
    for index, mentioned in queries:
        person = people[index]
        compatible = reduce(np.logical_and, (has_value[name, person[name]] for name in mentioned), everyone)
        total += images_per_person[index] / num_images[compatible].sum()
    return float(100.0 * total / (len(queries) + num_wrong))
