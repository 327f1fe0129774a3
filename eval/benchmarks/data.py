"""Measures how fast a benchmark is loaded, with every check and again from the cache, and how fast it feeds training.

python -m eccl.eval.benchmarks.data --dataset cuhk_pedes --data_dir DIR
python -m eccl.eval.benchmarks.data --rows 1000000 --data_dir DIR

The second form draws a Parquet data set of that many rows with small pictures in DIR, if it is not there, and measures
how long a training takes that ends after its first step: at the first load, at the second, and from a stream. Each
measurement runs in a new process, so that its peak memory is not that of another one. The cache is a new folder.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from ...utils.command_line import CommandParser, add_shared_option, at_least, command, say
from ...utils.files import complete_folder

_BATCH_SIZE = 128
_ROWS_PER_SHARD = 50_000


def time_load(dataset: str, data_dir: str, cache_dir: str) -> dict[str, float]:
    """Measures the seconds that `load_dataset` takes, and counts the images."""
    import datasets

    from ... import dataset_scripts  # noqa: F401  # registers the benchmarks

    start = time.perf_counter()
    splits = datasets.load_dataset(dataset, data_dir=data_dir, cache_dir=cache_dir)
    return {"seconds": time.perf_counter() - start, "images": sum(map(len, splits.values()))}


def time_pairs(dataset: str, data_dir: str, cache_dir: str, num_workers: int, batches: int) -> dict[str, float]:
    """Measures the training pairs per second that a data loader decodes, augments, tokenises and collates.

    Args:
        dataset, data_dir, cache_dir: the benchmark, as `load_dataset` takes it.
        num_workers: number of worker processes that make the pairs.
        batches: number of batches to measure, at least three for each worker.

    Returns:
        `pairs_per_second` (a median), `slowest` and `fastest`, each over stretches of one batch from each worker.

    Raises:
        ValueError: the train split has too few batches to measure a rate.
    """
    import datasets
    from torch.utils.data import DataLoader

    from ... import dataset_scripts  # noqa: F401  # registers the benchmarks
    from ...processing_eccl import ECCLImageProcessor, ECCLProcessor
    from ...training.pairs import CaptionPairs, PairCollator
    from ...training.samplers import PairSampler
    from ...utils.shipped import clip_tokenizer

    train = datasets.load_dataset(dataset, data_dir=data_dir, cache_dir=cache_dir, split="train")
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer())
    pairs = CaptionPairs(train, processor)
    loader = DataLoader(
        pairs,
        batch_size=_BATCH_SIZE,
        sampler=PairSampler(len(pairs)),
        num_workers=num_workers,
        collate_fn=PairCollator(processor),
        multiprocessing_context="fork" if num_workers else None,
    )
    # Workers deliver in bursts, so a rate is measured over as many batches as there are workers.
    stretch = max(1, num_workers)
    times = []
    for index, _ in enumerate(loader):
        if index % stretch == 0:
            times.append(time.perf_counter())
        if index >= batches:
            break
    # The first batches are left out: the workers made them before the loop asked for them.
    stretches = [later - earlier for earlier, later in pairwise(times[2:])]
    if not stretches:
        raise ValueError(
            f"the train split of {dataset} in {data_dir} has {len(loader)} batches of {_BATCH_SIZE} pairs, a rate "
            f"needs at least {3 * stretch + 1} with {num_workers} workers"
        )
    rates = [stretch * _BATCH_SIZE / seconds for seconds in stretches]
    return {"pairs_per_second": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}


def write_rows(folder: Path, rows: int) -> None:
    """Writes a Parquet data set with small pictures: four images of a person, two captions of an image.

    Args:
        folder: new folder; it gets `data/train-*.parquet`.
        rows: number of images. There are at most 10,000 different pictures.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(min(rows, 10_000)):
        file = io.BytesIO()
        noise = Image.fromarray(rng.integers(0, 256, (12, 4, 3), dtype=np.uint8))
        noise.resize((32, 96)).save(file, "JPEG", quality=60)
        pictures.append(file.getvalue())
    shards = max(1, rows // _ROWS_PER_SHARD)
    with complete_folder(folder) as unfinished:
        (unfinished / "data").mkdir(parents=True)
        for shard, numbers in enumerate(np.array_split(np.arange(rows), shards)):
            images = [{"bytes": pictures[number % len(pictures)], "path": None} for number in numbers.tolist()]
            captions = [
                [f"A person with bag number {number} walks by.", f"Somebody wears coat number {number % 977}."]
                for number in numbers.tolist()
            ]
            table = pa.table(
                {
                    "image": images,
                    "person_id": numbers // 4,
                    "captions": captions,
                    "file_path": [f"{number // 1000:05d}/{number:08d}.jpg" for number in numbers.tolist()],
                }
            )
            pq.write_table(
                table, unfinished / "data" / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=1_000
            )


def time_start(data_dir: str, cache_dir: str, streaming: bool) -> dict[str, float]:
    """Measures the seconds of a training on `data_dir` that ends after its first step, with TAL as its only loss."""
    root = Path(__file__).parents[2]
    words = ["--dataset_name", data_dir, "--init_from", str(root / "assets" / "synthetic-backbone")]
    words += ["--output_dir", str(Path(cache_dir) / "run"), "--overwrite", "True", "--losses", "tal=1"]
    words += ["--max_steps", "1", "--lr_scheduler_type", "cosine", "--eval_strategy", "no", "--save_strategy", "no"]
    words += ["--per_device_train_batch_size", "8", "--dataloader_num_workers", "0", "--use_cpu", "True"]
    words = [sys.executable, "-m", "eccl.train_eccl", *words, "--streaming", str(streaming)]
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_DATASETS_CACHE": cache_dir})
    return {"seconds": time.perf_counter() - start}


def run_measurement(options: argparse.Namespace) -> None:
    """Runs the measurement `options.measure` in this process, and prints the result as JSON for the parent process."""
    source = options.dataset, options.data_dir, options.cache_dir
    if options.measure == "load":
        result = time_load(*source)
    elif options.measure in ("start", "stream"):
        result = time_start(options.data_dir, options.cache_dir, options.measure == "stream")
    else:
        result = time_pairs(*source, options.num_workers, options.batches)
    peaks = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps(result | {"peak_mib": peaks[0], "worker_peak_mib": peaks[1]}))


def measure_in_new_process(measurement: str, options: argparse.Namespace, cache_dir: str) -> dict[str, float]:
    """Starts this command for one measurement, and returns its figures.

    Args:
        measurement: `"load"`, `"pairs"`, `"start"` or `"stream"`.
        options: needs `dataset`, `data_dir`, `num_workers` and `batches`.
        cache_dir: the cache of `load_dataset`.
    """
    words = [sys.executable, "-m", "eccl.eval.benchmarks.data", "--measure", measurement, "--cache_dir", cache_dir]
    for name in ("dataset", "data_dir", "num_workers", "batches"):
        words += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode == 2:
        # The process has reported the user's mistake on stderr.
        sys.exit(2)
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.benchmarks.data", __doc__)
    parser.add_argument(
        "--dataset",
        default="cuhk_pedes",
        help="benchmark to measure: cuhk_pedes, icfg_pedes, rstpreid or synthetic_pedes",
    )
    add_shared_option(parser, "data_dir")
    add_shared_option(parser, "num_workers", default=2, help="number of worker processes that make training pairs")
    parser.add_argument("--batches", type=at_least(3), default=60, help="number of batches of 128 pairs to measure")
    parser.add_argument(
        "--rows", type=at_least(1_000), help="draw and measure a Parquet data set of this many rows, not a benchmark"
    )
    # For the processes that this command starts.
    parser.add_argument("--measure", choices=("load", "pairs", "start", "stream"), help=argparse.SUPPRESS)
    parser.add_argument("--cache_dir", help=argparse.SUPPRESS)
    return parser


def measure_rows(options: argparse.Namespace) -> None:
    """Measures the start of a training on a large Parquet data set, and prints the figures."""
    folder = Path(options.data_dir).absolute()
    if not (folder / "data").is_dir():
        say(f"drawing {options.rows:,} rows in {folder}")
        write_rows(folder, options.rows)
    with tempfile.TemporaryDirectory() as cache_dir:
        for name, measurement in (("first load", "start"), ("second load", "start"), ("stream", "stream")):
            say(f"training one step: {name}")
            figures = measure_in_new_process(measurement, options, cache_dir)
            print(
                f"{name:34} {figures['seconds']:8.1f} s   peak memory {figures['worker_peak_mib']:6.0f} MiB",
                flush=True,
            )


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    if options.measure:
        run_measurement(options)
        return
    if options.rows:
        measure_rows(options)
        return
    needed = 3 * max(1, options.num_workers)
    if options.batches < needed:
        raise ValueError(
            f"--batches is {options.batches}, it must be at least {needed} with {options.num_workers} workers"
        )
    say(f"loading {options.dataset} from {options.data_dir}")
    # Imported here, because the import takes a second.
    from ...dataset_scripts import BENCHMARKS

    if options.dataset not in BENCHMARKS:
        raise ValueError(f"--dataset is {options.dataset!r}, it must be one of {', '.join(BENCHMARKS)}")
    with tempfile.TemporaryDirectory() as cache_dir:
        first, second = (measure_in_new_process("load", options, cache_dir) for _ in range(2))
        say("making training pairs")
        pairs = measure_in_new_process("pairs", options, cache_dir)
    print(f"{int(first['images']):,} images of {options.dataset} in {options.data_dir}")
    for name, figures in (("first load, every image decoded", first), ("second load, from the cache", second)):
        print(f"{name:34} {figures['seconds']:8.1f} s   peak memory {figures['peak_mib']:6.0f} MiB")
    name = f"training pairs, {options.num_workers} workers"
    memory = f"{pairs['peak_mib']:6.0f} MiB, {pairs['worker_peak_mib']:.0f} MiB in the largest worker"
    spread = f"{pairs['slowest']:.0f} to {pairs['fastest']:.0f} / s"
    print(f"{name:34} {pairs['pairs_per_second']:8.0f} / s   peak memory {memory}; {spread}")


if __name__ == "__main__":
    main()
