"""The store, the same tests for the embedded engine and for a Milvus server."""

import contextlib
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from eccl.search import store as stores
from eccl.search.store import NO_TIME, Condition, VectorStore
from helpers import wait_until

DIMENSION = 32


def make_rows(count, seed=0, first=0):
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return [
        {
            "id": f"{first + number:064x}",
            "vector": vectors[number],
            "path": f"/pictures/{number}.jpg",
            "camera": f"camera {number % 3}",
            "time": number * 1000 if number % 5 else NO_TIME,
            "tracklet": f"{number // 4}",
            **{"width": 64, "height": 128, "added": 7, "size": number, "modified": 9},
            "zone": "ab"[number % 2],
            "floor": number % 7,
        }
        for number in range(count)
    ]


def rank(rows, query, limit):
    """The oracle: every score, sorted."""
    scored = sorted((-float(np.dot(row["vector"], query)), row["id"]) for row in rows)
    return [identity for _, identity in scored[:limit]]


def test_the_nearest_rows_are_found_in_order(store):
    rows = make_rows(300)
    store.upsert(rows)
    queries = np.stack([row["vector"] for row in make_rows(5, seed=1)])
    found = store.search(queries, 10, fields=("path", "floor"))
    for query, hits in zip(queries, found, strict=True):
        assert [hit["id"] for hit in hits] == rank(rows, query, 10)
        for hit in hits:
            row = rows[int(hit["id"], 16)]
            assert hit["score"] == pytest.approx(float(row["vector"] @ query), abs=1e-5)
            assert hit["path"] == row["path"] and hit["floor"] == row["floor"] and "vector" not in hit


@pytest.mark.parametrize(
    ("conditions", "holds"),
    [
        ([Condition("camera", "in", ["camera 1"])], lambda row: row["camera"] == "camera 1"),
        (
            [Condition("zone", "==", "a"), Condition("floor", "<", 3)],
            lambda row: row["zone"] == "a" and row["floor"] < 3,
        ),
        ([Condition("time", ">=", 250_000)], lambda row: row["time"] >= 250_000),
        ([Condition("floor", "not in", [1, 2, 3, 4, 5, 6])], lambda row: row["floor"] == 0),
        (
            [Condition("floor", "==", 3), Condition("time", "<", 50_000)],
            lambda row: row["floor"] == 3 and row["time"] < 5e4,
        ),
        ([Condition("floor", "==", 99)], lambda row: False),
    ],
)
def test_a_filter_keeps_what_matches_and_nothing_is_lost(store, conditions, holds):
    rows = make_rows(300)
    store.upsert(rows)
    matching = [row for row in rows if holds(row)]
    query = rows[0]["vector"]
    for limit in (1, 20, 300):
        (found,) = store.search(query[None], limit, conditions)
        assert [hit["id"] for hit in found] == rank(matching, query, limit)
    assert store.count(conditions) == len(matching)
    assert [row["id"] for row in store.scan(conditions)] == [row["id"] for row in matching]


def test_a_known_id_is_replaced(store):
    rows = make_rows(3)
    store.upsert(rows)
    store.upsert([rows[0] | {"camera": "new"}, rows[1] | {"camera": "old"}, rows[1] | {"camera": "newer"}])
    assert store.count() == 3
    assert [row["camera"] for row in store.scan(fields=["camera"])] == ["new", "newer", "camera 2"]


def test_rows_come_back_as_they_were_written(store):
    rows = make_rows(1_100)
    store.upsert(rows)
    ids = [rows[1_099]["id"], rows[5]["id"], "0" * 63 + "x"]
    read = store.get(ids)
    assert set(read) == set(ids[:2])
    for identity, row in read.items():
        written = rows[int(identity, 16)]
        assert {name: value for name, value in row.items() if name != "vector"} == {
            name: value for name, value in written.items() if name != "vector"
        }
        np.testing.assert_allclose(row["vector"], written["vector"], atol=1e-7)
    assert [row["id"] for row in store.scan()] == [row["id"] for row in rows]
    assert store.find("path", ["/pictures/7.jpg", "/none"], ["size"]) == [{"id": rows[7]["id"], "size": 7}]


TEXTS = [
    'a"b',
    "a'b",
    "a\\b",
    "a\nb",
    "tab\t",
    "ü😀",
    "50%_",
    "",
    "{x}",
    "\\\\server\\share",
    "\u2028",
    '" or id != "',
    "a' or 1==1",
]


def test_any_text_can_be_stored_and_filtered(store):
    rows = [
        row | {"path": text, "zone": text, "camera": text}
        for row, text in zip(make_rows(len(TEXTS)), TEXTS, strict=True)
    ]
    store.upsert(rows)
    for row, text in zip(rows, TEXTS, strict=True):
        for column in ("path", "zone"):
            assert [found["id"] for found in store.scan([Condition(column, "==", text)], strong=False)] == [row["id"]]
            assert store.count([Condition(column, "not in", [text])], strong=False) == len(TEXTS) - 1


def test_deleted_rows_are_not_found(store):
    rows = make_rows(50)
    store.upsert(rows)
    assert store.delete([row["id"] for row in rows[:20]]) == 20
    store.purge()
    assert store.count() == 30
    (found,) = store.search(rows[0]["vector"][None], 50, fields=["floor"])
    assert [hit["id"] for hit in found] == rank(rows[20:], rows[0]["vector"], 50)
    store.upsert(rows[:1])
    assert store.count() == 31


def test_properties_last(store, reopen):
    store.set_properties({"columns": '{"a \\" b": 1}', "other": "ü"})
    store.set_properties({"other": "2"})
    assert store.properties == {"format": "1", "columns": '{"a \\" b": 1}', "other": "2"}
    rows = make_rows(20)
    store.upsert(rows)
    store = reopen(create=False)
    assert not store.created and store.dimension == DIMENSION
    assert store.properties == {"format": "1", "columns": '{"a \\" b": 1}', "other": "2"} and store.count() == 20
    with pytest.raises(ValueError, match="has vectors of 32 values, the model makes 8"):
        reopen(dimension=8)


def test_wrong_values_are_refused(store):
    row = make_rows(1)[0]
    for vector in (np.zeros(DIMENSION), np.full(DIMENSION, np.nan), 2 * row["vector"]):
        with pytest.raises(ValueError, match=r"the vector of 0{64} has the length"):
            store.upsert([row | {"vector": vector}])
    for limit in (0, 16_385):
        with pytest.raises(ValueError, match=f"a search for {limit} results: it must be between 1 and 16,384"):
            store.search(row["vector"][None], limit)
    for column in ('floor == 1 or "a', "a b", "ü", ""):
        with pytest.raises(ValueError, match="cannot be the name of a column"):
            store.count([Condition(column, "==", 1)])
    with pytest.raises(ValueError, match="contains a control character"):
        store.count([Condition("zone", "==", "\x00")])
    with pytest.raises(ValueError, match="is of type dict"):
        store.count([Condition("zone", "==", {})])
    assert store.count() == 0


@pytest.mark.parametrize("few", [0, 1_000])
@pytest.mark.parametrize("loss", ["short", "wrong"])
def test_the_graph_of_a_server_may_lose_rows_but_an_answer_does_not(store, monkeypatch, few, loss):
    """The engine's answer lacks rows, as that of a graph search under a narrow filter does."""
    monkeypatch.setattr(store, "is_lite", False)
    monkeypatch.setattr(stores, "_FEW_ROWS", few)
    rows = make_rows(200)
    store.upsert(rows)
    search = store._client.search
    lost = slice(0, 2) if loss == "short" else slice(2, None)
    monkeypatch.setattr(
        store._client, "search", lambda *args, **options: [hits[lost] for hits in search(*args, **options)]
    )
    conditions = [Condition("camera", "==", "camera 1")]
    matching = [row for row in rows if row["camera"] == "camera 1"]
    queries = np.stack([row["vector"] for row in rows[:3]])
    for limit in (5, 100):
        for query, hits in zip(queries, store.search(queries, limit, conditions, ["path"]), strict=True):
            assert [hit["id"] for hit in hits] == rank(matching, query, limit)
            assert all(hit["path"] and "vector" not in hit for hit in hits)


# -- The embedded store alone


def test_deleted_rows_leave_the_disk(tmp_path):
    with_secret = make_rows(400)
    with_secret[7] |= {"zone": "SECRET-TEXT", "path": "/secret/place.jpg"}
    path = tmp_path / "gallery.db"
    store = VectorStore.open(str(path), dimension=DIMENSION)
    store.upsert(with_secret)
    store.delete([with_secret[7]["id"]])
    store.purge()
    store.close()
    vector = np.asarray(with_secret[7]["vector"], dtype=np.float32).tobytes()
    kept = np.asarray(with_secret[8]["vector"], dtype=np.float32).tobytes()
    content = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert kept in content and vector not in content
    for text in (with_secret[7]["id"], "SECRET-TEXT", "/secret/place.jpg"):
        assert text.encode() not in content


@pytest.mark.parametrize("step", ["insert", "flush", "drop_collection", "rename_collection", "load_collection"])
def test_a_purge_that_is_interrupted_is_completed_at_the_next_opening(tmp_path, monkeypatch, step):
    uri = str(tmp_path / "gallery.db")
    rows = make_rows(30)
    store = VectorStore.open(uri, dimension=DIMENSION, properties={"format": "1"})
    store.upsert(rows)
    store.delete([rows[0]["id"]])
    with monkeypatch.context() as patched:
        patched.setattr(store._client, step, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.purge()
    store.close()
    store = VectorStore.open(uri, create=False)
    assert [row["id"] for row in store.scan()] == [row["id"] for row in rows[1:]]
    assert store.properties == {"format": "1"}
    store.close()
    secret = np.asarray(rows[0]["vector"], dtype=np.float32).tobytes()
    assert not any(secret in file.read_bytes() for file in (tmp_path / "gallery.db").rglob("*") if file.is_file())


HOLDER = """
import sys, time
from eccl.search.store import VectorStore
store = VectorStore.open(sys.argv[1], dimension=32)
print("open", flush=True)
time.sleep(60)
"""


def test_a_store_that_another_process_holds_is_refused_in_one_line(tmp_path):
    uri = str(tmp_path / "gallery.db")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, uri], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(
            BlockingIOError, match=r"another process has .*gallery.db open: end it, or .* .milvus-lite server"
        ):
            VectorStore.open(uri)
    finally:
        holder.kill()
        holder.wait()
    store = VectorStore.open(uri)
    with pytest.raises(BlockingIOError, match="is open in this process already"):
        VectorStore.open(uri)
    store.close()


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "old.db").write_bytes(b"SQLite format 3\x00")
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "folder.db" / "notes.txt").write_text("mine")
    for name, error, message in (
        ("old.db", ValueError, r"old.db is a file: a store of milvus-lite before version 3, or no store; index again"),
        ("folder.db", ValueError, r"folder.db is a folder with other files, it is no gallery"),
        ("gallery", ValueError, r"its name must end in .db, or be the address of a server"),
        ("none.db", FileNotFoundError, r"there is no gallery .*none.db: make it with eccl-gallery index"),
    ):
        with pytest.raises(error, match=message):
            VectorStore.open(str(tmp_path / name), create=False)
    assert sorted(os.listdir(tmp_path)) == ["folder.db", "old.db"]
    for name in ("a b", "a_rewritten", "ü"):
        with pytest.raises(ValueError, match=f"the name of the collection is '{name}'"):
            VectorStore.open(str(tmp_path / "new.db"), name, dimension=4)
    for uri, message in (
        ("http://host:abc", "http://host:abc is no address of a server"),
        ("htp://host", "it must start with http://"),
        ("http://me:secret@host:1", "must not contain a password"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            VectorStore.open(uri)
        assert "secret" not in str(raised.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "manifest", "schema", "data"])
def test_a_damaged_store_is_refused_and_keeps_its_files(tmp_path, damage):
    uri = str(tmp_path / "gallery.db")
    with contextlib.closing(VectorStore.open(uri, dimension=DIMENSION)) as store:
        store.upsert(make_rows(50))
    folder = tmp_path / "gallery.db" / "collections" / "gallery"
    manifest = folder / "manifest.json"
    if damage == "cut":
        manifest.write_bytes(manifest.read_bytes()[:100])
    elif damage == "empty":
        manifest.write_bytes(b"")
    else:
        {"manifest": manifest, "schema": folder / "schema.json", "data": next(folder.rglob("*.parquet"))}[
            damage
        ].unlink()
    files = sorted(folder.rglob("*"))
    with pytest.raises(OSError, match=r"gallery.db is damaged .*: restore a copy of it, or remove it and index again"):
        VectorStore.open(uri, create=False)
    assert sorted(folder.rglob("*")) == files


@pytest.mark.parametrize("size", [0, 100])
def test_an_index_that_a_killed_process_left_half_written_is_made_anew(tmp_path, size):
    uri, rows = str(tmp_path / "gallery.db"), make_rows(50)
    with contextlib.closing(VectorStore.open(uri, dimension=DIMENSION)) as store:
        store.upsert(rows)
        store.purge()
    (index,) = (tmp_path / "gallery.db").rglob("*.idx")
    index.write_bytes(index.read_bytes()[:size])
    with contextlib.closing(VectorStore.open(uri, create=False)) as store:
        (found,) = store.search(rows[0]["vector"][None], 50)
        assert [hit["id"] for hit in found] == rank(rows, rows[0]["vector"], 50)


def test_a_purge_that_failed_can_be_repeated(tmp_path, monkeypatch):
    with contextlib.closing(VectorStore.open(str(tmp_path / "gallery.db"), dimension=DIMENSION)) as store:
        store.upsert(make_rows(5))
        with monkeypatch.context() as patched:
            patched.setattr(store._client, "flush", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
            with pytest.raises(OSError, match="disk full"):
                store.purge()
        store.delete([make_rows(1)[0]["id"]])
        store.purge()
        assert store.count() == 4


def test_the_server_of_milvus_lite_shares_a_store_exactly_and_its_deleted_rows_are_purged_later(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "gallery.db"
    words = ["server", "--data-dir", folder, "--host", "127.0.0.1", "--port", port]
    program = f"from milvus_lite.cmdline import main; main({[str(word) for word in words]!r})"
    server = subprocess.Popen([sys.executable, "-c", program])
    rows = make_rows(300)
    conditions, query = [Condition("floor", "==", 3)], rows[0]["vector"]
    matching = [row for row in rows if row["floor"] == 3]
    try:
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        first, second = (VectorStore.open(f"http://127.0.0.1:{port}", dimension=DIMENSION) for _ in range(2))
        assert first.is_lite and not first.is_embedded
        first.upsert(rows)
        (found,) = second.search(query[None], 300, conditions)
        assert [hit["id"] for hit in found] == rank(matching, query, 300)
        assert first._client.describe_index(first.name, "vector")["index_type"] == "FLAT"
        second.delete([rows[0]["id"]])
        second.purge()
        first.close()
        second.close()
    finally:
        server.terminate()
        server.wait()
    with contextlib.closing(VectorStore.open(str(folder), create=False)) as store:
        assert store.count() == 299 and store.properties == {}
    secret = np.asarray(query, dtype=np.float32).tobytes()
    assert not any(secret in file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_a_server_that_does_not_answer_is_named_within_seconds():
    with pytest.raises(ConnectionError, match=r"the Milvus server http://127.0.0.1:1 does not answer within 1 s"):
        VectorStore.open("http://127.0.0.1:1", dimension=4, timeout=1)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "milvus_lite", None)
    with pytest.raises(ImportError, match=r"a gallery needs pymilvus and milvus-lite .*pip install 'eccl\[search\]'"):
        VectorStore.open(str(tmp_path / "gallery.db"), dimension=4)
    assert tmp_path / "gallery.db" not in stores._open_stores
