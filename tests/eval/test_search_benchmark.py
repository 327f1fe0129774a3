"""The benchmark of the store: its data and filters are what they claim to be, and its figures can be bad."""

import json

import numpy as np
import pytest

from eccl.eval.benchmarks import search
from eccl.search.store import VectorStore

PLACES = search.draw_places(1_000)


def matches(row, conditions):
    tests = {"==": lambda a, b: a == b, ">=": lambda a, b: a >= b, "<": lambda a, b: a < b}
    return all(tests[operator](row[column], value) for column, operator, value in conditions)


class Shelf:
    """A store in a list that searches exactly; under the filter `blind` it finds nothing."""

    def __init__(self, rows, blind=()):
        self.rows, self.blind = rows, blind

    def search(self, vectors, limit, conditions=()):
        found = [] if conditions and conditions == self.blind else [r for r in self.rows if matches(r, conditions)]
        return [sorted(found, key=lambda row: -float(row["vector"] @ vector))[:limit] for vector in vectors]


@pytest.fixture(scope="module")
def drawn():
    vectors, queries = search.draw_vectors("person", 1_000, 4)
    return vectors, queries, search.make_rows(vectors, PLACES, 0, 1_000)


def test_a_filter_keeps_the_rows_of_its_mask(drawn):
    filters = search.make_filters(PLACES)
    assert [(each.name, int(each.mask.sum())) for each in filters] == [
        ("none", 1_000),
        ("100 %", 1_000),
        ("10 %", 100),
        ("1 %", 10),
        ("100 rows", 100),
    ]
    for each in filters:
        assert [matches(row, each.conditions) for row in drawn[2]] == each.mask.tolist()


def test_crops_of_a_person_are_alike(drawn):
    vectors, queries, rows = drawn
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5) and len({row["id"] for row in rows}) == 1_000
    cosines = vectors @ vectors.T
    owners = np.arange(1_000) // 12
    same = (owners[:, None] == owners) & ~np.eye(1_000, dtype=bool)
    assert 0.8 < cosines[same].mean() < 0.9 and abs(np.median(cosines[~same])) < 0.05
    assert 0.6 < (vectors @ queries.T).max(axis=0).mean() < 0.8
    strangers, _ = search.draw_vectors("random", 500, 1)
    assert np.abs(strangers @ strangers.T - np.eye(500)).max() < 0.3


def test_an_exact_store_has_the_best_figures(drawn):
    vectors, queries, rows = drawn
    for each in search.measure_filters(Shelf(rows), vectors, queries, search.make_filters(PLACES), repeats=2):
        assert (each.recall, each.empty, each.complete) == (1, 0, 1) and 0 < each.p50_ms <= each.p99_ms


def test_lost_rows_are_seen(drawn):
    vectors, queries, rows = drawn
    filters = search.make_filters(PLACES)
    store = Shelf(rows[::2], blind=filters[3].conditions)
    none, _, tenth, hundredth, _ = search.measure_filters(store, vectors, queries, filters, repeats=1)
    assert 0.2 < none.recall < 0.8 and none.empty == 0 and none.complete == 1
    assert 0.2 < tenth.recall < 0.8 and (hundredth.recall, hundredth.empty, hundredth.complete) == (0, 1, 0)


def test_recall_counts_rows_that_the_filter_excludes_as_wrong():
    vectors = np.eye(20, 512, dtype=np.float32)
    query = np.zeros((1, 512), dtype=np.float32)
    query[0, :20] = np.arange(20, 0, -1)
    mask = np.arange(20) % 2 == 0
    assert search.measure_recall([list(range(0, 20, 2))], vectors, query, mask) == 1
    assert search.measure_recall([list(range(10))], vectors, query, mask) == 0.5


def test_the_benchmark_prints_two_tables_and_writes_json(tmp_path, capsys):
    uri, output = tmp_path / "store.db", tmp_path / "figures.json"
    words = ["--rows", "300", "--uri", str(uri), "--queries", "3", "--repeats", "1", "--output", str(output)]
    search.main(words)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 + 1 + 7 and lines[2].startswith("| embedded | person | 300 |")
    assert [line.split("|")[4].strip() for line in lines[6:]] == ["none", "100 %", "10 %", "1 %", "100 rows"]
    assert all(line.endswith("| 1.000 | 0.0% | 100.0% |") for line in lines[6:])
    (figures,) = json.loads(output.read_text())
    assert figures["disk_mib"] > 300 * 512 * 4 / 2**20 and figures["server_mib"] is None
    # Python with the engine and its libraries; not the memory of the test's process.
    assert 50 < figures["peak_mib"] < 1_000
    assert [each["matches"] for each in figures["filters"]] == [300, 300, 30, 3, 100]
    assert not uri.exists()


def test_a_store_that_exists_is_refused_and_kept(tmp_path, capsys):
    uri = tmp_path / "gallery.db"
    VectorStore.open(str(uri), dimension=8).close()
    with pytest.raises(SystemExit) as raised:
        search.main(["--rows", "300", "--uri", str(uri)])
    assert raised.value.code == 2 and f"error: --uri {uri} exists: name a new file" in capsys.readouterr().err
    VectorStore.open(str(uri), dimension=8, create=False).close()


@pytest.mark.slow
@pytest.mark.xdist_group("milvus")
def test_the_benchmark_measures_a_server_and_drops_its_collection(server_address, capsys):
    words = ["--rows", "2000", "--uri", server_address, "--queries", "5", "--repeats", "1", "--settle", "5"]
    search.main(words)
    with pytest.raises(FileNotFoundError):
        VectorStore.open(server_address, "search_benchmark_person_2000", create=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| server | person | 2,000 |")
    assert all(line.endswith("| 0.0% | 100.0% |") for line in lines[6:])
