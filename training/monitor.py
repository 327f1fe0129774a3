"""What a run reports of its steps."""

import time

import torch


class StepMonitor:
    """Means of named values, and pairs a second, over the steps since the last report.

    The clock runs from step to step, the loading of data included; `start` leaves out what happened since the last one,
    an evaluation or a checkpoint.
    """

    def __init__(self):
        self._clear()
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter()

    def count(self, pairs: int) -> None:
        """Ends a batch of so many pairs, those of all processes together."""
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._pairs += pairs

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Takes in scalars; each name has a mean of its own."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach(), count + 1)

    def report(self) -> dict[str, float]:
        """The mean of each name, and `pairs_per_second`; empty where nothing was counted."""
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        if self._pairs:
            means["pairs_per_second"] = self._pairs / self._seconds
        self._clear()
        return means

    def _clear(self) -> None:
        self._sums: dict[str, tuple[torch.Tensor | float, int]] = {}
        self._pairs, self._seconds = 0, 0.0


__all__ = ["StepMonitor"]
