"""Timings of the speed benchmark: cases take turns within a round, and are compared with the round's matrix rate."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPVisionConfig

from .speed_report import Spread, spread

Case = Callable[[], object]


def time_in_turn(cases: Mapping[str, Case], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Measures the seconds of each case once in each round, in the opposite order in every second round.

    A slow moment of the machine then affects all cases. Each case runs once before the first round.
    """
    for case in cases.values():
        case()
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in reversed(names) if number % 2 else names:
            synchronize(device)
            start = time.perf_counter()
            cases[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished its work. A CPU works while the program waits."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Gemm:
    """The first matrix product of an MLP, some times in a row: what the machine can do.

    Args:
        rows: number of tokens of the whole batch.
        encoder: gives the widths.
        dtype, device: of the matrices.
    """

    def __init__(self, rows: int, encoder: CLIPTextConfig | CLIPVisionConfig, dtype: torch.dtype, device: torch.device):
        self.inputs = torch.randn(rows, encoder.hidden_size, device=device).to(dtype)
        self.weight = torch.randn(encoder.intermediate_size, encoder.hidden_size, device=device).to(dtype)
        self.calls = 10 if device.type == "cpu" else 50
        self.flops = self.calls * 2 * rows * encoder.hidden_size * encoder.intermediate_size

    @torch.inference_mode()
    def __call__(self) -> None:
        for _ in range(self.calls):
            nn.functional.linear(self.inputs, self.weight)


def shares(flops: float, seconds: Sequence[float], gemm: Gemm, gemm_seconds: Sequence[float]) -> Spread:
    """Compares the operations per second of a case with those of the matrix product of the same round."""
    return spread((flops / own) / (gemm.flops / product) for own, product in zip(seconds, gemm_seconds, strict=True))


def ratios(seconds: Sequence[float], others: Sequence[float]) -> Spread:
    """Divides the seconds of a case by those of another one in the same round."""
    return spread(own / other for own, other in zip(seconds, others, strict=True))


def dtype_of(name: str) -> torch.dtype:
    """Returns the dtype of the matrices in a precision."""
    return torch.bfloat16 if name == "bfloat16" else torch.float32


__all__ = ["Case", "Gemm", "dtype_of", "ratios", "shares", "synchronize", "time_in_turn"]
