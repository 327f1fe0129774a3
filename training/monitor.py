"""Means of the values that a run logs, and its speed."""

import time
from collections.abc import Callable, Mapping

import torch


class StepMonitor:
    """Means of named values, and pairs per second, over the steps since the last report.

    The clock runs from step to step and so includes the loading of data. Call `start` after an evaluation or after a
    checkpoint, so that their time is not counted.

    Args:
        clock: gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._since = clock()
        self._sums: dict[str, tuple[torch.Tensor, int]] = {}
        self._pairs, self._seconds = 0, 0.0

    def start(self) -> None:
        """Starts the clock again: the time since the last step is not counted."""
        self._since = self._clock()

    def finish_step(self, pairs: int) -> None:
        """Adds a step that ends now.

        Args:
            pairs: number of pairs in the batch of the step, all processes together.
        """
        now = self._clock()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._pairs += pairs

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Adds scalar tensors; each name has a mean for itself."""
        for name, value in values.items():
            total, count = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = (total + value.detach(), count + 1)

    def report(self) -> dict[str, float]:
        """Returns the mean of each name and `pairs_per_second`, and starts new means; empty if nothing was added."""
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        if self._pairs:
            means["pairs_per_second"] = self._pairs / self._seconds
        self._sums, self._pairs, self._seconds = {}, 0, 0.0
        return means


__all__ = ["StepMonitor"]
