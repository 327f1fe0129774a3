"""The ids of persons: numbers and texts of any kind become numbers of 32 bits; a split is cut by person."""

import random
from collections.abc import Hashable, Iterable

import datasets
import numpy as np

_SMALLEST, _LARGEST = -(2**31), 2**31 - 1


def number_persons(ids: Iterable[Hashable]) -> dict[Hashable, int]:
    """Returns a number for each person, counted from 0 in the order of the ids; texts are sorted by their characters.

    Args:
        ids: the persons of all splits together.

    Returns:
        An empty dict if all ids are whole numbers that fit into 32 bits: they are kept as they are.
    """
    persons = set(ids)
    if all(isinstance(person, int) and _SMALLEST <= person <= _LARGEST for person in persons):
        return {}
    ordered = sorted(persons, key=lambda person: (isinstance(person, str), person))
    return {person: number for number, person in enumerate(ordered)}


def person_column(dataset: datasets.Dataset) -> np.ndarray:
    """Returns the person of each row as an array, without reading the images."""
    return np.asarray(dataset.select_columns("person_id").with_format("numpy")[:]["person_id"])


def cut_by_person(dataset: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Cuts a split into two parts that have no person in common.

    Args:
        dataset: a split with the column `person_id`.
        fraction: the part of the persons that goes into the second part, 0 to 1; at least one person, and at most all
            but one.
        seed: seed of the choice; the order of the rows does not matter for it.

    Returns:
        The rows of the other persons, and the rows of the chosen persons, both in the order of the split.

    Raises:
        ValueError: the split has fewer than two persons, or the fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"eval_fraction is {fraction}, it must be between 0 and 1")
    person_of_row = person_column(dataset)
    persons = np.unique(person_of_row).tolist()
    if len(persons) < 2:
        raise ValueError(f"the split has {len(persons)} person, at least 2 are needed to cut it by person")
    count = min(max(1, round(fraction * len(persons))), len(persons) - 1)
    chosen = random.Random(f"{seed}/persons").sample(persons, count)
    is_chosen = np.isin(person_of_row, chosen)
    return dataset.select(np.flatnonzero(~is_chosen)), dataset.select(np.flatnonzero(is_chosen))


__all__ = ["cut_by_person", "number_persons", "person_column"]
