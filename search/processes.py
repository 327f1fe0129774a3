"""The processes of a launch that index together: what one of them does, and what each of them gets."""

from collections.abc import Callable
from typing import TypeVar

import torch

from ..encoding_eccl import rank_and_world_size

Result = TypeVar("Result")


class Processes:
    """The processes that `accelerate launch` has started; outside a launch it is this process alone.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self) -> None:
        self.rank, self.size = rank_and_world_size()

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
