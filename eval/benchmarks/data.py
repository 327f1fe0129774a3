"""Times the way of the data: first load with every check, second load, and training pairs from workers.

python -m eccl.eval.benchmarks.data --dataset cuhk_pedes --data_dir DIR

Each measurement runs in a process of its own, so that its peak memory is its own; the cache is a fresh one.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise

import datasets
from torch.utils.data import DataLoader

from ...dataset_scripts import BENCHMARKS
from ...processing_eccl import ECCLImageProcessor, ECCLProcessor
from ...training.pairs import CaptionPairs, PairCollator
from ...training.samplers import PairSampler
from ...utils.shipped import clip_tokenizer

_BATCH_SIZE = 128


def time_load(dataset: str, data_dir: str, cache_dir: str) -> dict[str, float]:
    """Seconds for `load_dataset`, and how many images it gave."""
    start = time.perf_counter()
    splits = datasets.load_dataset(dataset, data_dir=data_dir, cache_dir=cache_dir)
    return {"seconds": time.perf_counter() - start, "images": sum(map(len, splits.values()))}


def time_pairs(dataset: str, data_dir: str, cache_dir: str, num_workers: int, batches: int) -> dict[str, float]:
    """Training pairs a second, decoded, augmented, tokenised and collated; the median over batches after the first."""
    rows = datasets.load_dataset(dataset, data_dir=data_dir, cache_dir=cache_dir, split="train")
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer())
    pairs = CaptionPairs(rows, processor)
    loader = DataLoader(
        pairs,
        batch_size=_BATCH_SIZE,
        sampler=PairSampler(len(pairs)),
        num_workers=num_workers,
        collate_fn=PairCollator(processor),
        multiprocessing_context="fork" if num_workers else None,
    )
    # Workers hand over in bursts: rates over stretches of as many batches as there are workers, the start left out.
    stretch = max(1, num_workers)
    times = []
    for index, _ in enumerate(loader):
        if index % stretch == 0:
            times.append(time.perf_counter())
        if index >= batches:
            break
    # The first batches were waiting in the workers' queues, filled while nothing was taken from them.
    stretches = [later - earlier for earlier, later in pairwise(times[2:])]
    rates = [stretch * _BATCH_SIZE / seconds for seconds in stretches]
    return {"pairs_per_second": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def _measured(task: Callable[[], dict[str, float]]) -> None:
    """Prints what a measurement gave, with this process's peak memory, for the parent to read."""
    result = task()
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps(result | {"peak_mib": peaks[0], "worker_peak_mib": peaks[1]}))


def _in_own_process(measurement: str, options: argparse.Namespace, cache_dir: str) -> dict[str, float]:
    command = [sys.executable, "-m", "eccl.eval.benchmarks.data", "--measure", measurement, "--cache_dir", cache_dir]
    for name in ("dataset", "data_dir", "num_workers", "batches"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eccl.eval.benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--dataset", choices=BENCHMARKS, default="cuhk_pedes")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--num_workers", type=int, default=2, help="processes that make training pairs")
    parser.add_argument("--batches", type=int, default=60, help="batches of 128 pairs to time")
    parser.add_argument("--measure", choices=("load", "pairs"), help=argparse.SUPPRESS)
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    where = (options.dataset, options.data_dir, options.cache_dir)
    if options.measure == "load":
        return _measured(lambda: time_load(*where))
    if options.measure == "pairs":
        return _measured(lambda: time_pairs(*where, options.num_workers, options.batches))
    with tempfile.TemporaryDirectory() as cache_dir:
        first, second = (_in_own_process("load", options, cache_dir) for _ in range(2))
        pairs = _in_own_process("pairs", options, cache_dir)
    print(f"{int(first['images']):,} images of {options.dataset} in {options.data_dir}")
    for name, figures in (("first load, every image decoded", first), ("second load", second)):
        print(f"{name:34} {figures['seconds']:8.1f} s   peak memory {figures['peak_mib']:6.0f} MiB")
    spread = f"{pairs['slowest']:.0f} to {pairs['fastest']:.0f}"
    name = f"training pairs, {options.num_workers} workers"
    memory = f"{pairs['peak_mib']:6.0f} MiB, of a worker {pairs['worker_peak_mib']:.0f} MiB"
    print(f"{name:34} {pairs['pairs_per_second']:8.0f} / s   peak memory {memory}; {spread} / s")


if __name__ == "__main__":
    main()
