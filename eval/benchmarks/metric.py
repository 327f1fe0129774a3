"""Compares the time of the metric with the time of the matrix product inside it, in one run.

python -m eccl.eval.benchmarks.metric
"""

import resource
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ...utils.command_line import CommandParser, at_least, command, say

if TYPE_CHECKING:
    import evaluate
    import numpy as np


class Size(NamedTuple):
    """The size of a test split."""

    queries: int
    gallery: int
    images_per_person: int


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


def measure(name: str, size: Size, metric: "evaluate.EvaluationModule", repeats: int) -> str:
    """Measures both at the size of a split with random embeddings, and returns a row of the table."""
    import numpy as np

    generator = np.random.default_rng(0)
    queries, gallery = (
        generator.standard_normal((count, _DIM), dtype=np.float32) for count in (size.queries, size.gallery)
    )
    gallery_ids = np.arange(size.gallery) // size.images_per_person
    # Each gallery image is the subject of as many queries as any other, give or take one.
    subjects = generator.permutation(size.gallery * (size.queries // size.gallery + 1))[: size.queries] % size.gallery
    query_ids = gallery_ids[subjects]
    product_times, metric_times = [], []
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(repeats):
        start = time.perf_counter()
        metric.compute(
            predictions=queries, references=query_ids, gallery_embeds=gallery, gallery_person_ids=gallery_ids
        )
        metric_times.append(time.perf_counter() - start)
        product_times.append(time_product(queries, gallery))
    extra_memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_before) / 1024
    ratios = [whole / product for whole, product in zip(metric_times, product_times, strict=True)]
    return (
        f"| {name} | {size.queries:,} x {size.gallery:,} x {_DIM} | {statistics.median(product_times):.2f} s "
        f"| {statistics.median(metric_times):.2f} s | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
        f"{max(ratios):.2f}) | {extra_memory:.0f} MiB |"
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
    # Imported here, so that --help and a mistake in the arguments answer at once.
    import evaluate

    metric = evaluate.load(str(_METRIC))
    print(
        "| size of | queries x gallery x width | product | metric | ratio (least to most) | memory above the inputs |"
    )
    print("|---|---|--:|--:|---|--:|")
    for name, size in SIZES.items():
        print(measure(name, size, metric, options.repeats), flush=True)


if __name__ == "__main__":
    main()
