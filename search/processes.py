"""The processes of a launch that index together: what one of them does, and what each of them gets."""

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Processes:
    """The processes that `accelerate launch` has started; outside a launch it is this process alone.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        is_launch = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if is_launch else 0
        self.size = torch.distributed.get_world_size() if is_launch else 1

    def gather(self, value: Result) -> list[Result]:
        """Gives every process the values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        gathered: list[Result] = [value] * self.size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def share(self, make: Callable[[], Result]) -> Result:
        """Calls a function in the first process, and gives every process its result, or raises its error in each."""
        if self.size == 1:
            return make()
        outcome: list[tuple[Result | None, Exception | None]] = [(None, None)]
        if self.rank == 0:
            try:
                outcome = [(make(), None)]
            except Exception as error:
                outcome = [(None, error)]
        torch.distributed.broadcast_object_list(outcome, src=0)
        result, failure = outcome[0]
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]


__all__ = ["Processes"]
