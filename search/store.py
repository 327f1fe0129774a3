"""The vector store behind a gallery: Milvus, embedded in this process or on a server.

This is the only file that knows that the two differ.
"""

import contextlib
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from ..utils.files import read_json

if TYPE_CHECKING:
    from pymilvus import MilvusClient

# Milvus refuses a search for more results.
LONGEST_ANSWER = 16_384
# The time of a picture whose time is unknown, in milliseconds; it is after every other time.
NO_TIME = 2**62
# In bytes of UTF-8.
LONGEST_PATH, LONGEST_NAME = 4_096, 256

# Property names get this prefix, because Milvus has properties, too.
_PREFIX = "eccl."
_TO_PURGE = "to_purge"
# The end of the name of a collection that is being written anew.
_SPARE = "_rewritten"
_PAGE = 1_000
_SCHEMES = ("http://", "https://", "tcp://", "unix:")
# In seconds, for calls that search or write; the first contact has a limit of its own.
_CALL_TIMEOUT = 60.0
# By default, pymilvus asks every ten seconds whether the server is alive. That of Milvus Lite takes this for an attack,
# and closes the connection. The calls here have time limits of their own.
_CONNECTION = {"grpc.keepalive_time_ms": 600_000, "grpc.keepalive_permit_without_calls": False}
# A larger value finds more of the nearest neighbours, and takes longer.
_EF = 512
# So many rows are read and compared in a tenth of a second.
_FEW_ROWS = 1_000
# The stores that this process has open.
_open_stores: set[Path] = set()


class Condition(NamedTuple):
    """One condition on a column. Several conditions must all hold.

    Attributes:
        column: the name of the column.
        operator: `==`, `>=`, `<`, `in` or `not in`.
        value: a text, a number or a truth value; for `in` and `not in` a collection of them.
    """

    column: str
    operator: str
    value: Any


class VectorStore:
    """Rows with a unit vector and columns, searched by cosine similarity.

    A row has `id` (at most 64 characters), `vector`, `path`, `camera`, `time`, `tracklet`, `width`, `height`, `added`,
    `size`, `modified`, and any further columns. The embedded store searches exactly. A server searches a graph (HNSW);
    if few rows match, or an answer has fewer rows than it should, it searches exactly. Threads may share a store.

    Attributes:
        uri: path of the embedded store, or address of the server.
        name: name of the collection.
        is_embedded: whether the store is in this process.
        is_lite: whether the engine is Milvus Lite: the embedded store, or the server that comes with it.
        dimension: number of values of a vector.
        created: whether opening made the store.
    """

    def __init__(self, client: "MilvusClient", uri: str, name: str, is_embedded: bool):
        self._client, self.uri, self.name, self.is_embedded = client, uri, name, is_embedded
        self.is_lite = is_embedded
        self.created = False
        self.dimension = 0
        self._is_closed = False
        # An embedded store with many rows takes long to open, and cannot hang.
        self._timeout = None if is_embedded else _CALL_TIMEOUT
        # The embedded engine allows one writer, and `purge` replaces the collection.
        self._lock: contextlib.AbstractContextManager = threading.RLock() if is_embedded else contextlib.nullcontext()

    @classmethod
    def open(
        cls,
        uri: str,
        name: str = "gallery",
        *,
        dimension: int | None = None,
        token: str | None = None,
        create: bool = True,
        properties: Mapping[str, str] | None = None,
        timeout: float = 5.0,
    ) -> "VectorStore":
        """Opens a store, and makes it if it is missing.

        Args:
            uri: a path that ends in `.db`, or the address of a Milvus server (`http://host:19530`).
            name: name of the collection: letters, digits and `_`.
            dimension: number of values of a vector; needed to make a store.
            token: `user:password` or a key of the server.
            create: makes the store if it is missing.
            properties: texts that a new store keeps.
            timeout: longest time in seconds to wait for the first answer of a server.

        Raises:
            ValueError: `uri` or `name` cannot be those of a store, or the store has vectors of another dimension.
            FileNotFoundError: there is no such store, and `create` is false.
            BlockingIOError: another process has the embedded store open, or this process has.
            ConnectionError: the server does not answer in time, or refuses.
            OSError: the store cannot be opened.
        """
        if not (name.isascii() and name.isidentifier() and len(name) <= LONGEST_NAME) or name.endswith(_SPARE):
            raise ValueError(
                f"the name of the collection is {name!r}, it must consist of letters, digits and _, "
                f"and not end in {_SPARE}"
            )
        is_embedded = not is_address(uri)
        client = _open_embedded(uri, create) if is_embedded else _connect(uri, token, timeout)
        store = cls(client, os.path.abspath(os.path.expanduser(uri)) if is_embedded else uri, name, is_embedded)
        try:
            store._prepare(dimension, create, properties or {}, timeout)
        except BaseException:
            store.close()
            raise
        return store

    def _prepare(self, dimension: int | None, create: bool, properties: Mapping[str, str], timeout: float) -> None:
        spare = self.name + _SPARE
        with self._naming_errors():
            exists = self._client.has_collection(self.name, timeout=None if self.is_embedded else timeout)
            self.is_lite = self.engine.startswith("milvus-lite")
            # A purge was interrupted: the copy is complete only if the original is gone.
            if self.is_embedded and self._client.has_collection(spare):
                if exists:
                    self._client.drop_collection(spare)
                else:
                    self._client.rename_collection(spare, self.name)
                    exists = True
        if not exists:
            if not create:
                raise FileNotFoundError(f"{self.uri} has no gallery named {self.name!r}")
            if dimension is None:
                raise ValueError("a new store needs the dimension of its vectors")
            self._make(self.name, dimension, properties)
            self.created = True
        with self._naming_errors():
            fields = self._client.describe_collection(self.name)["fields"]
            found = {field["name"]: field for field in fields}
            if not {"id", "vector", "path", "time"} <= found.keys():
                raise ValueError(f"the collection {self.name!r} of {self.uri} is not a gallery")
            self.dimension = int(found["vector"]["params"]["dim"])
            if dimension is not None and dimension != self.dimension:
                raise ValueError(f"{self.uri} has vectors of {self.dimension} values, the model makes {dimension}")
        # A collection that was closed must be loaded again before it answers.
        try:
            self._load()
        except OSError:
            if not self.is_embedded:
                raise
            # A process that was killed may have left an index half-written. It is made anew from the rows.
            for file in (Path(self.uri) / "collections" / self.name).rglob("*.idx"):
                file.unlink()
            self._load()
        if self.is_embedded and _TO_PURGE in self.properties:
            self.purge()

    def _load(self) -> None:
        with self._naming_errors():
            self._client.load_collection(self.name, timeout=self._timeout)

    def _make(self, name: str, dimension: int, properties: Mapping[str, str]) -> None:
        from pymilvus import DataType, MilvusClient

        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=True)
        schema.add_field("id", DataType.VARCHAR, max_length=64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=dimension)
        schema.add_field("path", DataType.VARCHAR, max_length=LONGEST_PATH)
        schema.add_field("camera", DataType.VARCHAR, max_length=LONGEST_NAME)
        schema.add_field("tracklet", DataType.VARCHAR, max_length=LONGEST_NAME)
        for column in ("time", "added", "size", "modified", "width", "height"):
            schema.add_field(column, DataType.INT64)
        index = MilvusClient.prepare_index_params()
        if self.is_lite:
            # Its graph index loses rows under a narrow filter.
            index.add_index("vector", index_type="FLAT", metric_type="IP")
        else:
            index.add_index("vector", index_type="HNSW", metric_type="IP", params={"M": 16, "efConstruction": 200})
        with self._naming_errors():
            self._client.create_collection(
                name,
                schema=schema,
                index_params=index,
                # This process sees what it has written.
                consistency_level="Session",
                properties={_PREFIX + key: value for key, value in properties.items()},
                timeout=self._timeout,
            )

    @property
    def properties(self) -> dict[str, str]:
        """The texts that the store keeps about itself."""
        with self._lock, self._naming_errors():
            stored = self._client.describe_collection(self.name)["properties"]
        return {key.removeprefix(_PREFIX): value for key, value in stored.items() if key.startswith(_PREFIX)}

    def set_properties(self, changes: Mapping[str, str]) -> None:
        """Changes or adds properties."""
        with self._lock, self._naming_errors():
            self._client.alter_collection_properties(
                self.name, {_PREFIX + key: value for key, value in changes.items()}, timeout=self._timeout
            )

    @property
    def engine(self) -> str:
        """The name and version of the engine."""
        with self._lock, self._naming_errors():
            version = self._client.get_server_version(timeout=self._timeout)
        return version.replace("_", "-") if version.startswith("milvus_lite") else f"Milvus {version.removeprefix('v')}"

    def upsert(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes rows. A row with a known id replaces the old one.

        Args:
            rows: the rows; a column of `None` is removed. (Milvus Lite would keep the old value of a column that is
                missing.)

        Raises:
            ValueError: a vector is not finite, or is not of length 1.
        """
        by_id = {row["id"]: row for row in rows}
        for row in by_id.values():
            length = float(np.linalg.norm(row["vector"]))
            # Also true for NaN.
            if not abs(length - 1) < 1e-3:
                raise ValueError(f"the vector of {row['id']} has the length {length:g}, it must be 1")
        written = [{**row, "vector": np.asarray(row["vector"], dtype=np.float32).tolist()} for row in by_id.values()]
        if not self.is_lite:
            written = [{name: value for name, value in row.items() if value is not None} for row in written]
        with self._lock, self._naming_errors():
            for start in range(0, len(written), _PAGE):
                self._client.upsert(self.name, written[start : start + _PAGE], timeout=self._timeout)

    def get(self, ids: Collection[str], fields: Sequence[str] = ("*",)) -> dict[str, dict[str, Any]]:
        """Reads rows by their ids, as they are now; unknown ids are left out.

        Args:
            ids: the ids.
            fields: the columns to read; `*` stands for all, the vector included.
        """
        return {row["id"]: row for row in self.find("id", ids, fields)}

    def find(
        self, column: str, values: Collection[str], fields: Sequence[str], strong: bool = True
    ) -> list[dict[str, Any]]:
        """Reads the rows that have one of some values in a column.

        Args:
            column: the name of the column.
            values: the values.
            fields: the columns to read; `*` stands for all, the vector included.
            strong: see [`count`].
        """
        wanted, found = list(dict.fromkeys(values)), []
        level = {"consistency_level": "Strong"} if strong else {}
        for start in range(0, len(wanted), _PAGE):
            filter = _render([Condition(column, "in", wanted[start : start + _PAGE])])
            with self._lock, self._naming_errors():
                found += self._client.query(self.name, filter, ["id", *fields], timeout=self._timeout, **level)
        return [dict(row) for row in found]

    def search(
        self, vectors: np.ndarray, limit: int, conditions: Sequence[Condition] = (), fields: Sequence[str] = ()
    ) -> list[list[dict[str, Any]]]:
        """Finds the rows with the highest cosine similarity.

        Args:
            vectors: `(queries, dimension)`, unit vectors.
            limit: number of rows for each query, 1 to 16,384.
            conditions: only rows that fulfil all of them are found.
            fields: the columns to read.

        Returns:
            For each query exactly `min(limit, matching rows)` rows with `id`, `score` and the fields, the best first;
            rows with equal scores are in the order of their ids.
        """
        if not 1 <= limit <= LONGEST_ANSWER:
            raise ValueError(f"a search for {limit} results: it must be between 1 and {LONGEST_ANSWER:,}")
        parameters = {} if self.is_lite else {"ef": max(_EF, limit)}
        with self._lock, self._naming_errors():
            answers = self._client.search(
                self.name,
                data=np.asarray(vectors, dtype=np.float32).tolist(),
                filter=_render(conditions),
                limit=limit,
                output_fields=list(fields),
                search_params={"metric_type": "IP", "params": parameters},
                timeout=self._timeout,
            )
        found = [[{"id": hit["id"], "score": hit["distance"], **hit["entity"]} for hit in hits] for hits in answers]
        if not self.is_lite and (conditions or any(len(rows) < limit for rows in found)):
            matching = self.count(conditions, strong=False)
            # If few rows match, comparing with all of them is quick; until its index is built, a server misses some.
            short = [n for n, rows in enumerate(found) if matching <= _FEW_ROWS or len(rows) < min(limit, matching)]
            for number, rows in zip(
                short, self._search_exactly(vectors[short], limit, conditions, fields), strict=True
            ):
                found[number] = rows
        return [sorted(rows, key=by_score) for rows in found]

    def _search_exactly(
        self, vectors: np.ndarray, limit: int, conditions: Sequence[Condition], fields: Sequence[str]
    ) -> list[list[dict[str, Any]]]:
        """Compares with every matching row: a graph search can miss rows under a filter."""
        best: list[list[dict[str, Any]]] = [[] for _ in vectors]
        if not len(vectors):
            return best
        rows = self.scan(conditions, ["vector", *fields], strong=False)
        while page := list(itertools.islice(rows, _PAGE)):
            scores = np.asarray(vectors, dtype=np.float32) @ np.array([row.pop("vector") for row in page], np.float32).T
            for number, row_scores in enumerate(scores):
                candidates = [{**row, "score": float(score)} for row, score in zip(page, row_scores, strict=True)]
                best[number] = sorted([*best[number], *candidates], key=by_score)[:limit]
        return best

    def count(self, conditions: Sequence[Condition] = (), strong: bool = True) -> int:
        """Counts rows.

        Args:
            conditions: only rows that fulfil all of them are counted.
            strong: also counts what another process has just written to a server.
        """
        level = {"consistency_level": "Strong"} if strong else {}
        with self._lock, self._naming_errors():
            answer = self._client.query(self.name, _render(conditions), ["count(*)"], timeout=self._timeout, **level)
        return int(answer[0]["count(*)"])

    def scan(
        self, conditions: Sequence[Condition] = (), fields: Sequence[str] = (), strong: bool = True
    ) -> Iterator[dict[str, Any]]:
        """Reads all rows that fulfil the conditions, in the order of their ids.

        Args:
            conditions: see [`count`].
            fields: the columns to read; `*` stands for all, the vector included.
            strong: see [`count`].
        """
        level = {"consistency_level": "Strong"} if strong else {}
        with self._lock, self._naming_errors():
            pages = self._client.query_iterator(
                self.name, _PAGE, filter=_render(conditions), output_fields=["id", *fields], **level
            )
        try:
            while True:
                with self._lock, self._naming_errors():
                    page = pages.next()
                if not page:
                    return
                yield from (dict(row) for row in page)
        finally:
            pages.close()

    def delete(self, ids: Collection[str]) -> int:
        """Deletes the rows with these ids, and returns the number of ids. Bytes stay on the disk until [`purge`]."""
        wanted = list(dict.fromkeys(ids))
        with self._lock, self._naming_errors():
            if self.is_lite and wanted:
                # If the purge does not follow, the next process that has the store embedded makes up for it.
                self.set_properties({_TO_PURGE: "1"})
            for start in range(0, len(wanted), _PAGE):
                self._client.delete(self.name, ids=wanted[start : start + _PAGE], timeout=self._timeout)
        return len(wanted)

    def purge(self) -> None:
        """Removes the bytes of deleted rows from the disk.

        The embedded store is written anew, without them. A server is asked to compact its files; it deletes the old
        ones by its own schedule. The server of Milvus Lite does nothing: open the store embedded once.
        """
        if not self.is_embedded:
            with self._naming_errors():
                self._client.flush(self.name, timeout=self._timeout)
                self._client.compact(self.name, timeout=self._timeout)
            return
        spare = self.name + _SPARE
        with self._lock:
            # An earlier attempt may have failed.
            self._client.drop_collection(spare)
            properties = {key: value for key, value in self.properties.items() if key != _TO_PURGE}
            self._make(spare, self.dimension, properties)
            rows = self.scan(fields=["*"])
            with self._naming_errors():
                while page := list(itertools.islice(rows, _PAGE)):
                    self._client.insert(spare, page)
                self._client.flush(spare)
                self._client.drop_collection(self.name)
                self._client.rename_collection(spare, self.name)
                self._client.load_collection(self.name)

    def drop(self) -> None:
        """Deletes the collection with all its rows; the store must be closed then."""
        with self._lock, self._naming_errors():
            self._client.drop_collection(self.name, timeout=self._timeout)

    def bytes_on_disk(self) -> int | None:
        """The size of the embedded store's files; `None` for a server."""
        if not self.is_embedded:
            return None
        return sum(file.stat().st_size for file in Path(self.uri).rglob("*") if file.is_file())

    def close(self) -> None:
        """Closes the store; another process may open it then. A second call does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._client.close()
        if self.is_embedded:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)
            _open_stores.discard(Path(self.uri))

    @contextlib.contextmanager
    def _naming_errors(self) -> Iterator[None]:
        with _naming_errors(self.uri):
            yield


def by_score(row: Mapping[str, Any]) -> tuple[float, str]:
    """A key for sorting: the best row first, rows with equal scores by their ids."""
    return -row["score"], row["id"]


def is_address(uri: str) -> bool:
    """Whether a gallery is on a server; otherwise it is a path."""
    return "://" in uri or uri.startswith("unix:")


def _render(conditions: Sequence[Condition]) -> str:
    """Writes conditions in the language of Milvus. All values are quoted: a caller cannot add code."""
    parts = []
    for column, operator, value in conditions:
        if not (column.isascii() and column.isidentifier()):
            raise ValueError(f"{column!r} cannot be the name of a column: it must consist of letters, digits and _")
        if operator in ("in", "not in"):
            literal = f"[{', '.join(map(_quote, value))}]"
            parts.append(f"{column} in {literal}" if operator == "in" else f"not ({column} in {literal})")
        else:
            parts.append(f"{column} {operator} {_quote(value)}")
    return " and ".join(parts)


def _quote(value: object) -> str:
    # Both engines know the escapes of JSON for quotes, backslashes, tabs and line ends, but none with a number.
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is of type {type(value).__name__}, it must be a text, a number or a truth value")
    if isinstance(value, str) and any(ord(character) < 32 and character not in "\n\r\t" for character in value):
        raise ValueError(f"{value!r} contains a control character")
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _import_client() -> "type[MilvusClient]":
    # It would print a line of its own for each connection that fails.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import milvus_lite  # noqa: F401
        from pymilvus import MilvusClient
    except ImportError as error:
        raise ImportError(f"a gallery needs pymilvus and milvus-lite ({error}): pip install 'eccl[search]'") from error
    # They log a traceback for each error; the caller gets the error.
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("pymilvus", "milvus_lite", "grpc"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return MilvusClient


def _open_embedded(uri: str, create: bool) -> "MilvusClient":
    path = Path(os.path.abspath(os.path.expanduser(uri)))
    if path.suffix != ".db":
        raise ValueError(f"the gallery is {uri}, its name must end in .db, or be the address of a server (http://...)")
    if path.is_file():
        raise ValueError(f"{uri} is a file: a store of milvus-lite before version 3, or no store; index again")
    if not path.exists() and not create:
        raise FileNotFoundError(f"there is no gallery {uri}: make it with eccl-gallery index")
    if path.exists() and any(path.iterdir()) and not (path / "LOCK").exists():
        raise ValueError(f"{uri} is a folder with other files, it is no gallery")
    if path.exists() and not create and not (path / "LOCK").exists():
        raise FileNotFoundError(f"{uri} is an empty folder, it is no gallery")
    if path in _open_stores:
        raise BlockingIOError(f"{uri} is open in this process already: close it first")
    if _is_locked(path / "LOCK"):
        raise BlockingIOError(
            f"another process has {uri} open: end it, or let several processes share the gallery through a server "
            f"(milvus-lite server --data-dir {uri} --host 127.0.0.1, or Milvus)"
        )
    _require_whole(path)
    client_class = _import_client()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming_errors(uri):
        client = client_class(uri=str(path), grpc_options=_CONNECTION)
    _open_stores.add(path)
    return client


def _require_whole(path: Path) -> None:
    """Checks the files of an embedded store: Milvus Lite would take damaged ones for empty, and delete the vectors.

    Raises:
        OSError: a file is damaged or missing.
    """
    for folder in sorted((path / "collections").glob("*")) if path.is_dir() else ():
        advice = "restore a copy of it, or remove it and index again"
        try:
            read_json(folder / "schema.json")
            partitions = read_json(folder / "manifest.json")["partitions"]
            files = [
                folder / "partitions" / name / file
                for name, listed in partitions.items()
                for file in (*listed["data_files"], *listed["delta_files"])
            ]
        except (ValueError, KeyError, AttributeError, TypeError, FileNotFoundError) as error:
            raise OSError(f"{path} is damaged ({error}): {advice}") from error
        for file in files:
            if not file.is_file():
                raise OSError(f"{path} is damaged ({file} is missing): {advice}")


def _is_locked(file: Path) -> bool:
    if sys.platform == "win32" or not file.exists():
        return False
    import fcntl

    descriptor = os.open(file, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _connect(uri: str, token: str | None, timeout: float) -> "MilvusClient":
    client_class = _import_client()
    from pymilvus.exceptions import MilvusException

    if not uri.startswith(_SCHEMES):
        raise ValueError(f"the address of a gallery is {uri}, it must start with {', '.join(_SCHEMES)}")
    if "@" in urlsplit(uri).netloc:
        raise ValueError("the address of a server must not contain a password: give it as the token, user:password")
    try:
        return client_class(uri=uri, token=token or "", timeout=timeout, grpc_options=_CONNECTION)
    except ValueError as error:
        raise ValueError(f"{uri} is no address of a server, such as http://host:19530: {error}") from error
    except MilvusException as error:
        message = " ".join(str(error.message).split())
        raise ConnectionError(
            f"the Milvus server {uri} does not answer within {timeout:g} s, or refuses: {message}"
        ) from error


@contextlib.contextmanager
def _naming_errors(uri: str) -> Iterator[None]:
    """Makes the errors of Milvus name the store."""
    from grpc import RpcError
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        raise OSError(f"{uri}: {' '.join(str(error.message).split())}") from error
    except RpcError as error:
        raise ConnectionError(f"{uri} does not answer: {error}") from error


__all__ = [
    "LONGEST_ANSWER",
    "LONGEST_NAME",
    "LONGEST_PATH",
    "NO_TIME",
    "Condition",
    "VectorStore",
    "by_score",
    "is_address",
]
