"""Compares the time of the metric with the time of the matrix product inside it, in one run.

python -m eccl.eval.benchmarks.metric
"""

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...utils.command_line import CommandParser, at_least, command, say
from .processes import peak_memory

if TYPE_CHECKING:
    import evaluate
    import numpy as np


class Size(NamedTuple):
    """The size of a test split."""

    queries: int
    gallery: int
    images_per_person: int


class Figures(NamedTuple):
    """The seconds of the matrix product and of the metric in each repeat, and the peak memory above the inputs, bytes.

    The memory is right only in a process that has not used more before.
    """

    product_seconds: list[float]
    metric_seconds: list[float]
    extra_memory: int


# The smaller split comes first, because the peak memory of a process never falls.
SIZES = {"CUHK-PEDES": Size(6_156, 3_074, 3), "ICFG-PEDES": Size(19_848, 19_848, 20)}
_DIM, _BLOCK = 512, 256
_METRIC = Path(__file__).parents[1] / "person_retrieval"


def time_product(queries: "np.ndarray", gallery: "np.ndarray") -> float:
    """Measures the seconds for all similarities, computed in blocks of 256 queries and not kept."""
    import numpy as np

    similarities = np.empty((_BLOCK, len(gallery)), dtype=np.float32)
    start = time.perf_counter()
    for first in range(0, len(queries), _BLOCK):
        part = queries[first : first + _BLOCK]
        np.matmul(part, gallery.T, out=similarities[: len(part)])
    return time.perf_counter() - start


def measure_size(size: Size, metric: "evaluate.EvaluationModule", repeats: int) -> Figures:
    """Measures both at the size of a split with random embeddings, in turn."""
    import numpy as np

    generator = np.random.default_rng(0)
    queries, gallery = (
        generator.standard_normal((count, _DIM), dtype=np.float32) for count in (size.queries, size.gallery)
    )
    gallery_ids = np.arange(size.gallery) // size.images_per_person
    # Each gallery image is the subject of as many queries as any other, give or take one.
    subjects = generator.permutation(size.gallery * (size.queries // size.gallery + 1))[: size.queries] % size.gallery
    query_ids = gallery_ids[subjects]
    product_seconds, metric_seconds = [], []
    peak_before = peak_memory()
    for _ in range(repeats):
        start = time.perf_counter()
        metric.compute(
            predictions=queries, references=query_ids, gallery_embeds=gallery, gallery_person_ids=gallery_ids
        )
        metric_seconds.append(time.perf_counter() - start)
        product_seconds.append(time_product(queries, gallery))
    return Figures(product_seconds, metric_seconds, peak_memory() - peak_before)


def load_metric() -> "evaluate.EvaluationModule":
    """Loads the metric of this project."""
    # Imported here, so that --help and a mistake in the arguments answer at once.
    import evaluate

    return evaluate.load(str(_METRIC))


def measure(name: str, size: Size, metric: "evaluate.EvaluationModule", repeats: int) -> str:
    """Measures both at the size of a split, and returns a row of the table."""
    products, metrics, extra_memory = measure_size(size, metric, repeats)
    ratios = [whole / product for whole, product in zip(metrics, products, strict=True)]
    return (
        f"| {name} | {size.queries:,} x {size.gallery:,} x {_DIM} | {statistics.median(products):.2f} s "
        f"| {statistics.median(metrics):.2f} s | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}) | {extra_memory / 2**20:.0f} MiB |"
    )


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.benchmarks.metric", __doc__)
    parser.add_argument(
        "--repeats", type=at_least(1), default=5, help="number of measurements; the table shows their median"
    )
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    say("loading the metric")
    metric = load_metric()
    print(
        "| size of | queries x gallery x width | product | metric | ratio (least to most) | memory above the inputs |"
    )
    print("|---|---|--:|--:|---|--:|")
    for name, size in SIZES.items():
        print(measure(name, size, metric, options.repeats), flush=True)


if __name__ == "__main__":
    main()
