"""Times the metric beside the matrix product that it rests on, in one run.

python -m eccl.eval.benchmarks.metric
"""

import argparse
import resource
import statistics
import time
from pathlib import Path

import evaluate
import numpy as np

# Queries, gallery, images a person: ICFG-PEDES' and CUHK-PEDES' test splits.
SIZES = {"ICFG-PEDES": (19_848, 19_848, 20), "CUHK-PEDES": (6_156, 3_074, 3)}
_DIM, _BLOCK = 512, 256
_METRIC = Path(__file__).parents[1] / "person_retrieval"


def time_product(queries: np.ndarray, gallery: np.ndarray) -> float:
    """Seconds for all similarities, made in blocks of 256 queries and thrown away."""
    similarities = np.empty((_BLOCK, len(gallery)), dtype=np.float32)
    start = time.perf_counter()
    for first in range(0, len(queries), _BLOCK):
        part = queries[first : first + _BLOCK]
        np.matmul(part, gallery.T, out=similarities[: len(part)])
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eccl.eval.benchmarks.metric", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is printed")
    options = parser.parse_args(arguments)
    metric = evaluate.load(str(_METRIC))
    generator = np.random.default_rng(0)
    print("| size of | queries x gallery | product | metric | ratio (least to most) | memory above the inputs |")
    print("|---|---|--:|--:|---|--:|")
    # The small one first: peak memory only rises.
    for name, (num_queries, gallery_size, images_per_person) in reversed(SIZES.items()):
        queries, gallery = (
            generator.standard_normal((size, _DIM), dtype=np.float32) for size in (num_queries, gallery_size)
        )
        gallery_ids = np.arange(gallery_size) // images_per_person
        query_ids = generator.permutation(gallery_size * (num_queries // gallery_size + 1))[:num_queries] % gallery_size
        query_ids = gallery_ids[query_ids]
        products, metrics = [], []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(options.repeats):
            start = time.perf_counter()
            metric.compute(
                predictions=queries, references=query_ids, gallery_embeds=gallery, gallery_person_ids=gallery_ids
            )
            metrics.append(time.perf_counter() - start)
            products.append(time_product(queries, gallery))
        above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        ratios = [whole / product for whole, product in zip(metrics, products, strict=True)]
        print(
            f"| {name} | {num_queries:,} x {gallery_size:,} x {_DIM} | {statistics.median(products):.2f} s "
            f"| {statistics.median(metrics):.2f} s | {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | {above:.0f} MiB |"
        )


if __name__ == "__main__":
    main()
