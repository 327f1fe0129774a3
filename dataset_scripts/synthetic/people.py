"""Who is drawn: the identity attributes of the synthetic benchmark, how people are sampled, and the oracle."""

import random
from functools import reduce

import numpy as np

COLOURS = ("black", "white", "grey", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")

# Every attribute that identifies a person, with its values; the position of a value is its class label.
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


def _pick(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def sample_person(rng: random.Random) -> Person:
    """Draws the attributes of one person.

    Garments depend on each other as they do on a street: few men wear skirts, jeans come in three colours,
    a coat is rarely dotted.

    Args:
        rng: the only source of chance.

    Returns:
        A value of `ATTRIBUTES[name]` for each name.
    """
    gender = rng.choice(ATTRIBUTES["gender"])
    woman = gender == "woman"
    hair = _pick(
        rng,
        {"short": 0.2, "long": 0.45, "ponytail": 0.2, "bun": 0.15}
        if woman
        else {"short": 0.8, "long": 0.1, "ponytail": 0.05, "bun": 0.05},
    )
    hat = _pick(rng, {"none": 0.6, "cap": 0.15, "beanie": 0.13, "sun hat": 0.12})
    upper = rng.choice(ATTRIBUTES["upper"])
    heavy_cloth = upper in ("jacket", "coat", "hoodie")
    upper_pattern = _pick(
        rng,
        {"plain": 0.7 if heavy_cloth else 0.4, "striped": 0.2, "checked": 0.2, "dotted": 0.0 if heavy_cloth else 0.2},
    )
    lower = _pick(rng, {"trousers": 0.3, "jeans": 0.25, "shorts": 0.2, "skirt": 0.3 if woman else 0.0})
    lower_colour = rng.choice(("blue", "black", "grey") if lower == "jeans" else COLOURS)
    lower_pattern = (
        "plain" if lower == "jeans" else _pick(rng, {"plain": 0.7, "striped": 0.1, "checked": 0.1, "dotted": 0.1})
    )
    bag = _pick(
        rng,
        {"none": 0.3, "backpack": 0.22, "handbag": 0.2 if woman else 0.05, "shoulder bag": 0.18, "shopping bag": 0.12},
    )
    return {
        "gender": gender,
        "build": _pick(rng, {"slim": 0.3, "average": 0.4, "heavy": 0.3}),
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


def attribute_labels(person: Person) -> list[int]:
    """The class label of each attribute, in the order of `ATTRIBUTES`."""
    return [values.index(person[name]) for name, values in ATTRIBUTES.items()]


def oracle_rank1(people: list[Person], images_per_person: list[int], queries: list[tuple[int, list[str]]]) -> float:
    """The expected Rank-1 of a reader who recognises every attribute and remembers only what the caption mentions.

    Such a reader cannot tell apart the people who agree on all that is mentioned, and picks one of their images
    by chance: a query counts own images / images of all compatible people.

    Args:
        people: the people of the gallery.
        images_per_person: how many images of each the gallery has.
        queries: for each caption the index of its person in `people` and the names of the attributes it mentions.

    Returns:
        Percent, 0 to 100.

    Raises:
        ValueError: no queries.
    """
    if not queries:
        raise ValueError("the oracle needs at least one query, found none")
    has = {
        (name, value): np.array([person[name] == value for person in people])
        for name, values in ATTRIBUTES.items()
        for value in values
    }
    weights, everyone = np.asarray(images_per_person), np.ones(len(people), dtype=bool)
    total = 0.0
    for own, mentioned in queries:
        compatible = reduce(np.logical_and, (has[name, people[own][name]] for name in mentioned), everyone)
        total += images_per_person[own] / weights[compatible].sum()
    return float(100.0 * total / len(queries))
