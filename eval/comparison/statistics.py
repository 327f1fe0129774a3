"""Mean, deviation and paired bootstrap of the figures of several runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

METRICS = ("rank1", "rank5", "rank10", "mAP", "mINP")
# Resamples at a time, so that memory stays small.
_BLOCK = 500


@dataclass(frozen=True)
class PersonScores:
    """The scores of one run on one split, by person.

    Args:
        queries: `(persons,)`: number of queries of each person.
        sums: for each of `METRICS` `(persons,)`: the sum over the person's queries, in percent.
    """

    queries: np.ndarray
    sums: dict[str, np.ndarray]

    def mean(self, metric: str) -> float:
        """The figure of the whole split, in percent: the mean over all queries."""
        return float(self.sums[metric].sum() / self.queries.sum())


class Interval(NamedTuple):
    """A difference with its interval, in points."""

    difference: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the standard deviation of a sample (divided by n - 1); of one value, the latter is NaN."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return float(np.mean(values)), deviation


def paired_bootstrap(
    runs: Sequence[PersonScores],
    others: Sequence[PersonScores],
    metric: str,
    resamples: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Computes how much better the first method is than the second, with an interval.

    Run i of both methods has the same seed, and all runs are scored on the same queries. The interval covers which
    persons are in the test split, and which seeds were used. A resample draws persons, with all their queries, with
    replacement; both methods get the same ones. (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
    sections 6 and 13.3: the percentile interval.) A few seeds cannot be resampled: their resamples vary too little. So
    each resample adds a draw of the error of the mean over the seeds, which has Student's distribution. With one seed
    nothing is added, and the interval covers the persons only. What differs by person and seed together counts in both
    parts, so the interval is rather too wide than too narrow.

    Args:
        runs, others: the scores of the two methods, one entry for each seed. A method that is not trained has one entry
            for all seeds.
        metric: one of `METRICS`.
        resamples: number of resamples.
        level: the share of the resamples within the interval, 0 to 1.
        seed: seed of the resamples.

    Returns:
        The difference of the means in points, and the two ends of its interval.

    Raises:
        ValueError: the runs have other persons or numbers of queries, or the numbers of seeds differ.
    """
    num_seeds = max(len(runs), len(others))
    for entries in (runs, others):
        if len(entries) not in (1, num_seeds):
            raise ValueError(f"there are {len(runs)} and {len(others)} runs: each seed needs a run of both methods")
        if any(not np.array_equal(entry.queries, runs[0].queries) for entry in entries):
            raise ValueError("the runs were scored on different queries: score all of them on the same split")
    queries = runs[0].queries.astype(np.float64)
    sums = [
        np.broadcast_to(np.stack([entry.sums[metric] for entry in entries]), (num_seeds, len(queries)))
        for entries in (runs, others)
    ]
    differences = sums[0] - sums[1]
    by_seed = differences.sum(axis=1) / queries.sum()
    rng = np.random.default_rng(seed)
    resampled: list[np.ndarray] = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        persons = rng.multinomial(len(queries), np.full(len(queries), 1 / len(queries)), size)
        values = (persons @ differences.mean(axis=0)) / (persons @ queries)
        if num_seeds > 1:
            values = values + by_seed.std(ddof=1) / num_seeds**0.5 * rng.standard_t(num_seeds - 1, size)
        resampled.append(values)
    low, high = np.quantile(np.concatenate(resampled), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(by_seed.mean()), float(low), float(high))


__all__ = ["METRICS", "Interval", "PersonScores", "mean_and_deviation", "paired_bootstrap"]
