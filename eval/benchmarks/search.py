"""Measures the store of the gallery: insert, disk, memory, latency, recall and empty answers, with and without filters.

python -m eccl.eval.benchmarks.search --rows 10000 100000 --data person random
python -m eccl.eval.benchmarks.search --rows 10000 100000 --uri http://127.0.0.1:19530 --server_pid 1234

The vectors have 512 values and length 1. "person": identities of 12 crops each, spread over 64 looks, as similar people
in similar clothes are. "random": Gaussian, without any structure. Each size has a store of its own, which is removed
after its measurement. The program refuses a store that exists already.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ...utils.command_line import CommandParser, add_shared_option, at_least, command, say, tell
from ...utils.files import complete_file

if TYPE_CHECKING:
    import numpy as np

    from ...search.store import Condition, VectorStore

DIMENSION, TOP_K, BATCH = 512, 10, 100
_LOOKS, _CROPS_OF_A_PERSON = 64, 12
_ROWS_AT_A_TIME = 1_000
_CAMERAS, _ROWS_OF_A_VISIT = 10, 100
# 1 January 2026, UTC, in milliseconds: the time of the first row. One row follows each second.
_START = 1_767_225_600_000
# Two scores of the same pair of vectors differ by rounding: a result counts as right if its score is this close to that
# of the tenth best row.
_TOLERANCE = 1e-5


class Filter(NamedTuple):
    """A filter of the benchmark: its name, its conditions, and the rows that meet them (a mask of all rows)."""

    name: str
    conditions: "tuple[Condition, ...]"
    mask: "np.ndarray"


@dataclass
class FilterFigures:
    """The figures of one filter: latencies in milliseconds; recall and shares from 0 to 1."""

    name: str
    matches: int
    queries: int
    p50_ms: float
    p99_ms: float
    ratio: float
    recall: float
    empty: float
    complete: float


def draw_vectors(kind: str, rows: int, queries: int, seed: int = 0) -> "tuple[np.ndarray, np.ndarray]":
    """Draws the vectors of the rows and of the queries.

    Two crops of the same person have a cosine of about 0.86, two people of the same look 0.63, others 0. A query of
    "person" is about a person among the rows, with more noise than a crop has: its cosine with a crop is about 0.7.

    Args:
        kind: "person" or "random".
        rows, queries: how many to draw.
        seed: seed of the random choices.

    Returns:
        Float32 arrays of shape [rows, 512] and [queries, 512]. Each vector has length 1.
    """
    import numpy as np

    generator = np.random.default_rng(seed)

    def draw_noise(count: int) -> np.ndarray:
        return _unit(generator.standard_normal((count, DIMENSION), dtype=np.float32))

    vectors = np.empty((rows, DIMENSION), dtype=np.float32)
    blocks = [slice(first, min(first + 50_000, rows)) for first in range(0, rows, 50_000)]
    if kind == "random":
        for block in blocks:
            vectors[block] = draw_noise(block.stop - block.start)
        return vectors, draw_noise(queries)
    people = math.ceil(rows / _CROPS_OF_A_PERSON)
    identities = _unit(draw_noise(_LOOKS)[generator.integers(_LOOKS, size=people)] + 0.6 * draw_noise(people))
    for block in blocks:
        owners = np.arange(block.start, block.stop) // _CROPS_OF_A_PERSON
        vectors[block] = _unit(identities[owners] + 0.4 * draw_noise(len(owners)))
    return vectors, _unit(identities[generator.integers(people, size=queries)] + 0.8 * draw_noise(queries))


def _unit(vectors: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draw_places(rows: int, seed: int = 0) -> "np.ndarray":
    """Draws the place of each row in a random order, from 0: camera, time and visit follow from it."""
    import numpy as np

    return np.random.default_rng(seed + 1).permutation(rows)


def make_rows(vectors: "np.ndarray", places: "np.ndarray", first: int, stop: int) -> list[dict[str, Any]]:
    """Makes the rows `first` to `stop` (exclusive) of a gallery: ten cameras, one row a second, visits of 100 rows."""
    rows = []
    for number in range(first, stop):
        place = int(places[number])
        camera = f"cam{place % _CAMERAS}"
        rows.append(
            {
                "id": row_id(number),
                "vector": vectors[number],
                "path": f"{camera}/{place // 1000:05d}/{number:09d}.jpg",
                "camera": camera,
                "time": _START + 1000 * place,
                "tracklet": f"{camera}-{number // _CROPS_OF_A_PERSON}",
                "width": 64 + place % 64,
                "height": 192 + place % 128,
                "added": _START + 1000 * number,
                "size": 4_000 + place % 4_000,
                "modified": _START + 1000 * place,
                "visit": place // _ROWS_OF_A_VISIT,
            }
        )
    return rows


@functools.cache
def row_id(number: int) -> str:
    """Returns the id of a row: a SHA-256, as the id of a picture is."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def make_filters(places: "np.ndarray") -> list[Filter]:
    """Makes the five filters: none, and those that keep 100 %, 10 % and 1 % of the rows, and 100 rows."""
    import numpy as np

    from ...search.store import Condition

    rows = len(places)
    tenth = math.ceil(rows / 10)
    everything = np.ones(rows, dtype=bool)
    of_camera = places % _CAMERAS == 3
    camera = Condition("camera", "==", "cam3")
    since = Condition("time", ">=", _START)
    return [
        Filter("none", (), everything),
        Filter("100 %", (since,), everything),
        Filter("10 %", (camera,), of_camera),
        Filter("1 %", (camera, since, Condition("time", "<", _START + 1000 * tenth)), of_camera & (places < tenth)),
        Filter("100 rows", (Condition("visit", "==", 1),), places // _ROWS_OF_A_VISIT == 1),
    ]


def insert_rows(store: "VectorStore", vectors: "np.ndarray", places: "np.ndarray") -> float:
    """Writes all rows, and returns the seconds that the store needed; making the rows does not count."""
    seconds = 0.0
    for first in range(0, len(vectors), _ROWS_AT_A_TIME):
        rows = make_rows(vectors, places, first, min(first + _ROWS_AT_A_TIME, len(vectors)))
        start = time.perf_counter()
        store.upsert(rows)
        seconds += time.perf_counter() - start
        if first % 50_000 == 0 and first:
            say(f"{first:,} of {len(vectors):,} rows")
    return seconds


def measure_filters(
    store: "VectorStore", vectors: "np.ndarray", queries: "np.ndarray", filters: Sequence[Filter], repeats: int
) -> list[FilterFigures]:
    """Measures single queries with each filter in turn, so that a slow moment of the machine meets all filters alike.

    Args:
        store: the store with all rows.
        vectors: the vectors of the rows, [rows, 512]; the exact results are computed from them.
        queries: the vectors of the queries, [queries, 512].
        filters: the first one is what the others are compared with.
        repeats: how many times each query is asked with each filter.

    Returns:
        The figures of each filter. `ratio` is its latency relative to that of the first filter: the median over the
        queries. Recall is measured on the first answer to each query; empty and complete answers are counted in all
        answers. An answer is complete if it has min(10, matches) results.
    """
    import numpy as np

    for each in filters:  # The first query of a kind prepares things that later ones use.
        store.search(queries[:1], TOP_K, each.conditions)
    times = np.empty((len(filters), repeats, len(queries)))
    sizes = np.empty(times.shape, dtype=int)
    answers: list[list[list[str]]] = [[] for _ in filters]
    for turn in range(repeats):
        for number in range(len(queries)):
            for index, each in enumerate(filters):
                start = time.perf_counter()
                (answer,) = store.search(queries[number : number + 1], TOP_K, each.conditions)
                times[index, turn, number] = 1000 * (time.perf_counter() - start)
                sizes[index, turn, number] = len(answer)
                if turn == 0:
                    answers[index].append([result["id"] for result in answer])
    number_of = {row_id(number): number for number in range(len(vectors))}
    figures = []
    for index, each in enumerate(filters):
        matches = int(each.mask.sum())
        found = [[number_of[id] for id in answer] for answer in answers[index]]
        recall = measure_recall(found, vectors, queries, each.mask)
        ratios = np.median(times[index], axis=0) / np.median(times[0], axis=0)
        p50, p99 = np.percentile(times[index], (50, 99))
        complete = sizes[index] == min(TOP_K, matches)
        figures.append(
            FilterFigures(
                each.name,
                matches,
                len(queries),
                float(p50),
                float(p99),
                float(np.median(ratios)),
                recall,
                float((sizes[index] == 0).mean()),
                float(complete.mean()),
            )
        )
    return figures


def measure_recall(
    answers: Sequence[Sequence[int]], vectors: "np.ndarray", queries: "np.ndarray", mask: "np.ndarray"
) -> float:
    """Compares answers, given as numbers of rows, with an exact search of all rows in `mask`.

    Returns:
        The share of the min(10, matches) best rows that the answers have, averaged over the queries. A row that the
        mask excludes counts as wrong.
    """
    import numpy as np

    wanted = min(TOP_K, int(mask.sum()))
    shares = []
    for answer, query in zip(answers, queries, strict=True):
        scores = np.where(mask, vectors @ query, -np.inf)
        worst = np.partition(scores, -wanted)[-wanted]
        right = sum(bool(scores[number] >= worst - _TOLERANCE) for number in set(answer))
        shares.append(min(right, wanted) / wanted)
    return statistics.fmean(shares)


def time_batches(store: "VectorStore", queries: "np.ndarray", repeats: int) -> float:
    """Returns the median of the milliseconds that 100 queries in one call take, without a filter."""
    import numpy as np

    batch = np.resize(queries, (BATCH, DIMENSION))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        store.search(batch, TOP_K)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def measure_opening(uri: str, name: str, token: str | None) -> dict[str, float]:
    """Opens a store in this process, asks one query, and measures the seconds of both and the peak of the memory."""
    import numpy as np

    from ...search.store import VectorStore

    start = time.perf_counter()
    store = VectorStore.open(uri, name, token=token, create=False)
    opened = time.perf_counter()
    store.search(np.eye(1, DIMENSION, dtype=np.float32), TOP_K)
    answered = time.perf_counter()
    peak = _read_memory("self", "VmHWM")
    store.close()
    return {"open_seconds": opened - start, "first_query_seconds": answered - opened, "peak_mib": peak}


def _read_memory(process: int | str, field: str) -> float:
    """Reads a size in MiB. Unlike `getrusage`, it does not count the memory of the process that started this one."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError as error:
        raise ValueError(f"no process {process} whose memory can be read: {error}") from error
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _measure_opening_in_new_process(options: argparse.Namespace, name: str) -> dict[str, float]:
    words = [sys.executable, "-m", "eccl.eval.benchmarks.search", "--measure_opening"]
    words += ["--uri", options.uri, "--name", name]
    # The token goes through the environment: other users of the machine can read the words of a command.
    environment = os.environ | ({_TOKEN_VARIABLE: options.token} if options.token else {})
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode == 2:
        sys.exit(2)  # The process has reported the user's mistake on stderr.
    done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


_TOKEN_VARIABLE = "ECCL_STORE_TOKEN"


def _size_of_folder(folder: str | None) -> int | None:
    if folder is None:
        return None
    size = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # A server removes files while they are counted.
            size += path.stat().st_size if path.is_file() else 0
    return size


def measure_size(options: argparse.Namespace, kind: str, rows: int) -> dict[str, Any]:
    """Writes a store of one size, measures it, removes it, and returns all figures."""
    from ...search.store import VectorStore

    name = f"{options.name}_{kind}_{rows}"
    say(f"{kind}, {rows:,} rows: drawing vectors")
    vectors, queries = draw_vectors(kind, rows, options.queries, options.seed)
    places = draw_places(rows, options.seed)
    disk_before = _size_of_folder(options.server_data)
    load = os.getloadavg()[0]
    with _new_store(options, name) as store:
        say("inserting")
        seconds = insert_rows(store, vectors, places)
        if (found := store.count()) != rows:
            raise ValueError(f"the store has {found:,} rows after an insert of {rows:,}")
        figures: dict[str, Any] = {
            "engine": "embedded" if store.is_embedded else "server",
            "version": store.engine,
            "data": kind,
            "rows": rows,
            "queries": options.queries,
            "repeats": options.repeats,
        }
        if not store.is_embedded and options.settle:
            say(f"waiting {options.settle} s for the index of the server")
            store.purge()
            time.sleep(options.settle)
        start = time.perf_counter()
        # The embedded store writes the last rows to their files now.
        store.close()
        figures["rows_per_second"] = rows / (seconds + time.perf_counter() - start)
        say("opening it in a new process")
        figures |= _measure_opening_in_new_process(options, name)
        store = VectorStore.open(options.uri, name, token=options.token, create=False)
        try:
            say(f"asking {options.queries} queries, {options.repeats} times, with each filter")
            filters = measure_filters(store, vectors, queries, make_filters(places), options.repeats)
            figures["batch_ms"] = time_batches(store, queries, options.repeats)
            size = store.bytes_on_disk()
        finally:
            store.close()
        if disk_before is not None:
            size = int((_size_of_folder(options.server_data) or 0) - disk_before)
        figures["disk_mib"] = None if size is None else size / 2**20
        figures["server_mib"] = _read_memory(options.server_pid, "VmRSS") if options.server_pid else None
    figures["load_average"] = [load, os.getloadavg()[0]]
    figures["threads"] = os.environ.get("OMP_NUM_THREADS")
    figures["filters"] = [asdict(each) for each in filters]
    return figures


@contextlib.contextmanager
def _new_store(options: argparse.Namespace, name: str) -> "Iterator[VectorStore]":
    """Makes a store, and removes it at the end, also after an error; it refuses one that exists."""
    from ...search.store import VectorStore

    if "://" not in options.uri and Path(options.uri).exists():
        raise ValueError(f"--uri {options.uri} exists: name a new file, the benchmark removes it at its end")
    store = VectorStore.open(options.uri, name, dimension=DIMENSION, token=options.token)
    if not store.created:
        store.close()
        raise ValueError(f"{options.uri} has a collection {name}: give another --name, the benchmark removes it")
    try:
        yield store
    finally:
        store.close()
        if store.is_embedded:
            shutil.rmtree(options.uri)
        else:
            with contextlib.closing(VectorStore.open(options.uri, name, token=options.token, create=False)) as store:
                store.drop()


def format_sizes(results: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of the table with one row for each size."""
    lines = [
        "| engine | data | rows | insert, rows/s | disk, MiB | new process: open, s | first query, s "
        "| peak memory, MiB | server memory, MiB | batch of 100, ms | load average |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in results:
        disk, server = (f"{each[key]:,.0f}" if each[key] is not None else "" for key in ("disk_mib", "server_mib"))
        lines.append(
            f"| {each['engine']} | {each['data']} | {each['rows']:,} | {each['rows_per_second']:,.0f} | {disk} "
            f"| {each['open_seconds']:.1f} | {each['first_query_seconds']:.2f} | {each['peak_mib']:,.0f} | {server} "
            f"| {each['batch_ms']:,.0f} | {each['load_average'][0]:.1f} to {each['load_average'][1]:.1f} |"
        )
    return lines


def format_filters(results: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the lines of the table with one row for each size and filter."""
    lines = [
        "| engine | data | rows | filter | rows that match | p50, ms | p99, ms | median ratio to no filter | recall@10 "
        "| empty answers | complete answers |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for size in results:
        lines += [
            f"| {size['engine']} | {size['data']} | {size['rows']:,} | {each['name']} | {each['matches']:,} "
            f"| {each['p50_ms']:.1f} | {each['p99_ms']:.1f} | {each['ratio']:.2f} | {each['recall']:.3f} "
            f"| {each['empty']:.1%} | {each['complete']:.1%} |"
            for each in size["filters"]
        ]
    return lines


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.benchmarks.search", __doc__)
    parser.add_argument(
        "--rows",
        nargs="+",
        type=at_least(200),
        default=[10_000],
        help="numbers of rows to measure, one after the other",
    )
    parser.add_argument("--data", nargs="+", choices=("person", "random"), default=["person"], help="kinds of vectors")
    parser.add_argument(
        "--uri",
        type=os.path.expanduser,
        help="new .db file of an embedded store, which is removed after each size, or the address of a server (by "
        "default an embedded store in a temporary folder)",
    )
    parser.add_argument("--name", default="search_benchmark", help="start of the names of the collections")
    parser.add_argument(
        "--token",
        default=os.environ.get(_TOKEN_VARIABLE),
        help=f"user:password of the server, better given in the environment variable {_TOKEN_VARIABLE}",
    )
    parser.add_argument("--queries", type=at_least(1), default=100, help="number of different queries")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="how many times each query is asked")
    parser.add_argument(
        "--settle",
        type=at_least(0),
        default=60,
        help="seconds for a server to build its index after the insert; 0: measure at once, before there is an index",
    )
    parser.add_argument("--server_pid", type=at_least(1), help="process id of a server on this machine: reports memory")
    parser.add_argument("--server_data", help="data folder of a server on this machine: reports by how much it grows")
    add_shared_option(parser, "seed")
    add_shared_option(parser, "output", help="JSON file to write with all figures")
    # For the processes that this command starts.
    parser.add_argument("--measure_opening", action="store_true", help=argparse.SUPPRESS)
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    if options.measure_opening:
        print(json.dumps(measure_opening(options.uri, options.name, options.token)))
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        options.uri = options.uri or str(Path(folder, "benchmark.db"))
        for rows in options.rows:
            for kind in options.data:
                results.append(measure_size(options, kind, rows))
                if options.output:  # After each size: the next one can take long.
                    with complete_file(Path(options.output)) as file:
                        file.write_text(json.dumps(results, indent=2) + "\n")
    for line in (*format_sizes(results), "", *format_filters(results)):
        tell(line)


if __name__ == "__main__":
    main()
