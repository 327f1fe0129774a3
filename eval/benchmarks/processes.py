"""Measuring in a new process, whose peak memory is that of the measurement alone."""

import contextlib
import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
# With these variables, glibc gives freed memory back to the system at once: a peak counts only memory in use. It reads
# them when a process starts.
PROMPT_RELEASE = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536")


def peak_memory() -> int:
    """Returns the largest number of bytes of memory that this process has had.

    Linux counts the memory of the process that started this one in `getrusage`, but not in /proc.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Calls a function in a new process and returns what it returns; the function must be importable."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started in the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


__all__ = ["PROMPT_RELEASE", "environment", "peak_memory", "run_in_new_process"]
