"""Measures ECCL beside transformers' CLIP with LoRA, and beside the matrix rate of the machine, in one run.

python -m eccl.eval.benchmarks.speed --output_dir DIR
python -m eccl.eval.benchmarks.speed --device cuda --output_dir DIR

What is compared takes turns within a round, and a ratio is the median of the ratios of the rounds. docs/performance.md
describes each part.
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...utils.command_line import CommandParser, add_shared_option, at_least, command, say, tell
from ...utils.files import locked_folder, read_json, require_absent, require_writable_folder
from .data import measure_in_new_process
from .metric import Figures, Size, load_metric, measure_size
from .processes import environment, run_in_new_process
from .speed_report import (
    OUTPUTS,
    SWEEP_HEAD,
    TABLE_HEAD,
    Budget,
    Row,
    SweepRow,
    describe_header,
    describe_load,
    format_row,
    format_sweep_row,
    spread,
    write_outputs,
)

if TYPE_CHECKING:
    import torch

    from .speed_models import Settings

# Those that use the device, and all that a CPU measures.
_DEVICE_PARTS = ("step", "images", "texts", "captions", "memory", "memories")
_CPU_PARTS = (*_DEVICE_PARTS, "metric", "large_metric", "data", "start")
PARTS = (*_CPU_PARTS, "sweep")
METRIC_SIZES = {
    "metric": (Size(6_156, 3_074, 3), Size(19_848, 19_848, 20)),
    "large_metric": (Size(100_000, 100_000, 20),),
}
# numpy's products are those of OpenBLAS, or of another library that reads the second variable.
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
# 25 batches of 128 pairs.
TRAIN_IDS, BATCHES, _WORKERS = 400, 24, 2
# Packages that a command must not load before it uses them.
_LATE_PACKAGES = ("datasets", "peft", "matplotlib", "gradio")


def measure_metric(settings: "Settings", part: str) -> Iterator[Row]:
    """Compares the metric with its matrix product, at the sizes of a part, each in a new process."""
    for size in METRIC_SIZES[part]:
        repeats = 1 if part == "large_metric" else settings.rounds
        with environment(dict.fromkeys(_THREAD_VARIABLES, str(settings.threads))):
            products, metrics, extra_memory = run_in_new_process(measure_metric_here, size, repeats)
        ratio = spread(whole / product for whole, product in zip(metrics, products, strict=True))
        name = f"metric, {size.queries:,} x {size.gallery:,}"
        budgets = [Budget("ratio", "at most", 1.3)] if size.queries > 10_000 else [Budget("value", "at most", 0.25)]
        yield Row(part, name, "s", spread(metrics), "its product", spread(products), ratio, budgets=tuple(budgets))
        if part == "large_metric":
            memory = spread([extra_memory / 2**30])
            yield Row(part, f"{name}, memory above the inputs", "GiB", memory, budgets=(Budget("value", "at most", 1),))


def measure_metric_here(size: Size, repeats: int) -> Figures:
    """Measures the metric in this process."""
    return measure_size(size, load_metric(), repeats)


def measure_data(settings: "Settings") -> Iterator[Row]:
    """Measures the training pairs per second that two workers make of a data set that is drawn for it."""
    from ...dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark

    with tempfile.TemporaryDirectory() as folder:
        say("drawing a data set")
        source = Path(folder, "data")
        benchmark = SyntheticBenchmark("cuhk_pedes", train_ids=TRAIN_IDS, val_ids=1, test_ids=1, images_per_id=4)
        write_benchmark(benchmark, source, num_workers=_WORKERS)
        options = argparse.Namespace(dataset="cuhk_pedes", data_dir=str(source), num_workers=_WORKERS, batches=BATCHES)
        rates = measure_in_new_process("pairs", options, str(Path(folder, "cache")))
    yield Row(
        "data",
        f"training pairs of 384 x 128 JPEGs, {_WORKERS} workers",
        "pairs/s",
        spread([rates["slowest"], rates["pairs_per_second"], rates["fastest"]]),
        budgets=(Budget("value", "at least", 1_000),),
    )


def measure_start(settings: "Settings") -> Iterator[Row]:
    """Measures imports and `--help` in new processes."""
    timed_import = "import time; start = time.perf_counter(); import eccl; print(time.perf_counter() - start)"
    after_help = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_module('eccl.train_eccl', run_name='__main__')\n"
        f"except SystemExit: print(' '.join(name for name in {_LATE_PACKAGES} if name in sys.modules))"
    )
    imports: list[float] = []
    helps: list[float] = []
    bare: list[float] = []
    for number in range(settings.rounds + 1):
        times = (
            float(_run_python("-c", timed_import).split()[-1]),
            _time_python("-m", "eccl.train_eccl", "--help"),
            _time_python("-c", "import torch, transformers"),
        )
        # The first round fills the cache of the disk.
        for values, seconds in zip((imports, helps, bare), times, strict=True) if number else ():
            values.append(seconds)
    yield Row("start", "import eccl", "s", spread(imports), budgets=(Budget("value", "at most", 0.05),))
    yield Row(
        "start",
        "python -m eccl.train_eccl --help",
        "s",
        spread(helps),
        "import torch, transformers",
        spread(bare),
        spread(own / other for own, other in zip(helps, bare, strict=True)),
        budgets=(Budget("ratio", "at most", 1.5),),
    )
    loaded = _run_python("-c", after_help).splitlines()[-1].split()
    found = f" (found: {', '.join(loaded)})" if loaded else ""
    name = f"packages among {', '.join(_LATE_PACKAGES)} that this --help loads{found}"
    yield Row("start", name, "", spread([len(loaded)]), budgets=(Budget("value", "at most", 0),))


def _run_python(*words: str) -> str:
    return subprocess.run([sys.executable, *words], check=True, stdout=subprocess.PIPE, text=True).stdout


def _time_python(*words: str) -> float:
    start = time.perf_counter()
    _run_python(*words)
    return time.perf_counter() - start


def make_measurements() -> dict[str, Callable[["Settings"], Iterator[Row]]]:
    """Returns the functions that measure the parts, apart from the sweep; it loads torch."""
    from . import speed_cases as cases

    return {
        "step": cases.measure_steps,
        "images": cases.measure_images,
        "texts": cases.measure_texts,
        "captions": cases.measure_captions,
        "memory": cases.measure_peaks,
        "memories": cases.measure_memories,
        "metric": lambda settings: measure_metric(settings, "metric"),
        "large_metric": lambda settings: measure_metric(settings, "large_metric"),
        "data": measure_data,
        "start": measure_start,
    }


def count_busy_seconds() -> float | None:
    """Returns how long the machine's cores were busy since its start; `None` where it is not known."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, first)
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")


class Load:
    """Counts what other processes do while this one measures."""

    def __init__(self) -> None:
        self.before = os.getloadavg()[0]
        self._start, self._busy, self._own = time.perf_counter(), count_busy_seconds(), self._count_own()

    @staticmethod
    def _count_own() -> float:
        return sum(os.times()[:4])

    def busy_with_others(self) -> float | None:
        """Returns the mean number of cores that other processes have kept busy; `None` where it is not known."""
        busy, elapsed = count_busy_seconds(), time.perf_counter() - self._start
        if busy is None or self._busy is None:
            return None
        return max(0.0, busy - self._busy - (self._count_own() - self._own)) / elapsed


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.benchmarks.speed", __doc__)
    parser.add_argument("--device", default="cpu", help="device that computes: cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="parts to measure, in their usual order (default: on a CPU all but sweep; otherwise sweep and those that "
        "use the device)",
    )
    parser.add_argument("--model", choices=("vit-b16", "small", "tiny"), default="vit-b16", help="size of the models")
    add_shared_option(parser, "batch_size", default=8, help="number of pairs, or of images, in a batch")
    parser.add_argument(
        "--batch_sizes",
        nargs="+",
        type=at_least(1),
        default=[16, 32, 64, 128, 256, 512],
        help="batch sizes of the sweep",
    )
    parser.add_argument("--rounds", type=at_least(1), default=5, help="number of measurements of each case")
    parser.add_argument(
        "--threads", type=at_least(1), help="number of threads on the CPU (default: the number that torch chooses)"
    )
    add_shared_option(parser, "output_dir", required=False, help=f"folder for {', '.join(OUTPUTS)}")
    add_shared_option(parser, "overwrite")
    return parser


@contextlib.contextmanager
def claim_outputs(folder: Path | None, overwrite: bool) -> Iterator[None]:
    """Keeps other runs from writing to the folder; `None` needs no claim.

    Raises:
        FileExistsError: the folder has results, and `overwrite` is false; or it has such files of something else.
    """
    if folder is None:
        yield
        return
    require_writable_folder(folder)
    with locked_folder(folder):
        outputs = [folder / name for name in OUTPUTS]
        require_absent(outputs, overwrite)
        if any(path.exists() for path in outputs) and not _is_ours(outputs[0]):
            raise FileExistsError(f"{folder} has files that no speed benchmark wrote: name another folder")
        yield


def _is_ours(file: Path) -> bool:
    try:
        return {"header", "rows", "sweep"} <= read_json(file).keys()
    except (ValueError, OSError):
        return False


def find_device(name: str) -> "torch.device":
    """Returns a device of this machine.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise ValueError(f"--device is {name!r}, which this machine does not have: {first}") from error
    return device


def describe_machine(options: argparse.Namespace, settings: "Settings") -> dict[str, Any]:
    """Returns what the figures depend on: the machine, the versions and the settings."""
    import torch
    import transformers

    is_cuda = settings.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(settings.device) if is_cuda else f"{settings.device} {_name_cpu()}",
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": options.model,
        "batch_size": options.batch_size,
        "rounds": options.rounds,
    }


def _name_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@command
def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.overwrite and not options.output_dir:
        parser.error("--overwrite only applies to --output_dir, which is missing")
    load = Load()
    folder = Path(options.output_dir) if options.output_dir else None
    with claim_outputs(folder, options.overwrite):
        say("loading torch and transformers")
        # Imported here, so that --help and a mistake in the arguments answer at once.
        import torch

        from .speed_models import Settings

        device = find_device(options.device)
        torch.set_num_threads(options.threads or torch.get_num_threads())
        settings = Settings(
            options.model,
            device,
            options.batch_size,
            options.rounds,
            torch.get_num_threads(),
            tuple(options.batch_sizes),
        )
        wanted = options.parts or (_CPU_PARTS if device.type == "cpu" else (*_DEVICE_PARTS, "sweep"))
        header = describe_machine(options, settings)
        tell(describe_header(header))
        rows, sweep_rows = run_parts([part for part in PARTS if part in wanted], settings)
        header |= {"load_before": load.before, "busy_with_others": load.busy_with_others()}
        tell(describe_load(header["load_before"], header["busy_with_others"]))
        if folder:
            write_outputs(folder, header, rows, sweep_rows)
            tell(f"written: {', '.join(str(folder / name) for name in OUTPUTS if (folder / name).exists())}")


def run_parts(parts: list[str], settings: "Settings") -> tuple[list[Row], list[SweepRow]]:
    """Measures the parts one after the other, and prints each row of the tables as soon as it is known."""
    from .speed_sweep import sweep

    measurements, rows, sweep_rows = make_measurements(), [], []
    for line in TABLE_HEAD if parts != ["sweep"] else ():
        tell(line)
    for part in parts:
        say(f"measuring {part}")
        if part != "sweep":
            for row in measurements[part](settings):
                rows.append(row)
                tell(format_row(row))
            continue
        for line in ("", *SWEEP_HEAD):
            tell(line)
        for each in sweep(settings):
            sweep_rows.append(each)
            tell(format_sweep_row(each))
    return rows, sweep_rows


if __name__ == "__main__":
    main()
