"""A gallery that lasts: it indexes pictures of persons once, and finds them with sentences.

```python
from eccl import Gallery, load_model

with Gallery.open(*load_model("demo/model"), "gallery.db") as gallery:
    gallery.add("photos/")
    for match in gallery.search("a woman in a red coat with a black backpack", top_k=3):
        print(match.score, match.path)
```
"""

import hashlib
import json
import math
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, overload

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..encoding_eccl import embed_captions
from ..hub.digests import digest_encoder, digest_settings
from ..hub.onnx_encoder import OnnxEncoder
from ..modeling_eccl import ECCLModel
from ..processing_eccl import ECCLProcessor, clean_caption, read_image
from .columns import LONGEST_QUERY, UNKNOWN, Picture, Where, read_columns, read_time, show_time
from .indexing import AddReport, add_pictures
from .processes import Processes
from .store import LONGEST_ANSWER, NO_TIME, Condition, VectorStore, by_score, is_address

LONGEST_TOP_K = LONGEST_ANSWER
_FORMAT = "1"
# The columns of a row that a match does not show.
_INTERNAL = ("id", "vector", "path", "score", "size", "modified")
# The weight of a negative sentence, and of pictures that are marked as right and as wrong (Rocchio 1971).
_NEGATIVE, _LIKE, _UNLIKE = 0.5, 0.75, 0.25


@dataclass(frozen=True)
class Match:
    """A picture of the gallery, as a search finds it.

    Attributes:
        id: SHA-256 of the bytes of its file, in hexadecimal.
        path: its file, or the name that it was given.
        score: cosine similarity with the query, -1 to 1.
        columns: `camera`, `tracklet` (both "" if unknown), `time` (a `datetime` in UTC, or `None`), `width`, `height`,
            `added` (a `datetime`), and the columns that were given.
    """

    id: str
    path: str
    score: float
    columns: dict[str, Any]


@dataclass(frozen=True)
class GalleryInfo:
    """What a gallery contains.

    Attributes:
        uri: its path or address.
        name: name of the collection.
        engine: name and version of the store.
        model: name of the model that made the vectors.
        pictures: number of pictures.
        cameras: number of pictures by camera; "" counts those without one.
        oldest, newest: the range of the times, `None` if no picture has one.
        first_added, last_added: when pictures were added; `None` for an empty gallery.
        columns: the types of its own columns.
        threshold: the score from which a match counts, if the gallery is calibrated.
        bytes_on_disk: size of the embedded store and of the crops; of the crops alone for a server.
    """

    uri: str
    name: str
    engine: str
    model: str
    pictures: int
    cameras: dict[str, int]
    oldest: datetime | None
    newest: datetime | None
    first_added: datetime | None
    last_added: datetime | None
    columns: dict[str, str]
    threshold: float | None
    bytes_on_disk: int


@dataclass(frozen=True)
class VerifyReport:
    """The result of checking a gallery.

    Attributes:
        pictures: number of pictures in the gallery.
        missing: ids of pictures whose file is gone.
        changed: ids of pictures whose file has other bytes now, or cannot be read.
        wrong_vectors: ids of pictures that the model now encodes otherwise than the store has them.
        spare_crops: files in the folder of crops that belong to no picture.
    """

    pictures: int
    missing: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    wrong_vectors: list[str] = field(default_factory=list)
    spare_crops: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not (self.missing or self.changed or self.wrong_vectors or self.spare_crops)


@dataclass(frozen=True)
class Calibration:
    """A score that separates right matches from wrong ones, measured on a labelled data set.

    Attributes:
        threshold: matches with at least this score are right with the wanted precision.
        precision: share of right ones among the matches with at least this score, 0 to 1.
        answered: share of the queries that have such a match, 0 to 1.
        queries, pictures: sizes of the data set.
        top_k: number of best matches of each query that were counted.
    """

    threshold: float
    precision: float
    answered: float
    queries: int
    pictures: int
    top_k: int


class _Query(NamedTuple):
    """What a search looks for: unit vectors, and the lowest score that counts."""

    vectors: np.ndarray
    min_score: float | None


class Gallery:
    """A persistent index of pictures, searched with sentences, pictures, or both. Threads may share one.

    Open it with [`Gallery.open`]. In a launch of several processes, the first process alone opens the store, and
    [`add`] divides the pictures; the other methods are for the first process.

    Attributes:
        columns: the types of the gallery's own columns by name: `str`, `int`, `float` or `bool`.
        crops: the folder of pictures that have no file, `None` if there is none.
        lock: held while rows are changed.
        threshold: the score from which a match counts, `None` if the gallery is not calibrated.
    """

    def __init__(
        self,
        model: ECCLModel | OnnxEncoder | None,
        processor: ECCLProcessor | None,
        store: VectorStore | None,
        crops: Path | None,
    ):
        self._model, self._processor, self.crops = model and model.eval(), processor, crops
        self._store = store
        # It is held while rows are read, changed and written: otherwise a row that is removed meanwhile would return.
        self.lock = threading.RLock()
        properties = store.properties if store else {}
        self.columns: dict[str, str] = json.loads(properties.get("columns", "{}"))
        self._cameras: list[str] = json.loads(properties.get("cameras", "[]"))
        calibration = json.loads(properties.get("calibration", "null"))
        self.threshold: float | None = calibration and calibration["threshold"]
        # That of the pictures. Galleries of earlier versions do not name it.
        self._precision = properties.get("precision", "float32")

    @classmethod
    def open(
        cls,
        model: ECCLModel | OnnxEncoder | None,
        processor: ECCLProcessor | None,
        uri: str | os.PathLike[str] = "gallery.db",
        name: str = "gallery",
        *,
        token: str | None = None,
        create: bool = True,
        crops: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Opens a gallery, and makes it if it is missing.

        Args:
            model, processor: an `ECCLModel` and its processor, from `load_model`, or an ONNX export of them, from
                `load_onnx`; both `None` to open a gallery that is not searched and gets no pictures, for example to
                remove some. The export in float32 makes the vectors of the model, so both can open the same gallery.
                With int8, an export can search it, too, but only add to a gallery that was made with int8.
            uri: a path that ends in `.db` for a store in this process, or the address of a Milvus server.
            name: name of the collection, if a store has several galleries.
            token: `user:password`, or a key of the server.
            create: makes the gallery if it is missing.
            crops: folder for pictures that have no file; each gallery has a subfolder with its name. By default it is
                next to the embedded store: `gallery.crops`.

        Raises:
            ValueError: the gallery was made with another model, or with another format; or see [`VectorStore.open`].
            OSError: see [`VectorStore.open`].
        """
        address = os.fspath(uri)
        processes = Processes()
        model_name = str((model and model.config._name_or_path) or "a model without a name")
        identity = _identify(model, processor) if model is not None and processor is not None else None
        opened: list[VectorStore] = []

        def open_store() -> None:
            try:
                store = VectorStore.open(address, name, token=token, create=False)
            except FileNotFoundError:
                if not create or model is None or identity is None:
                    raise
                made = {"format": _FORMAT, "model": model_name, "weights": identity, "columns": "{}", "cameras": "[]"}
                made["precision"] = _precision_of(model)
                dimension = model.config.projection_dim
                store = VectorStore.open(address, name, dimension=dimension, token=token, properties=made)
            try:
                _require_own(store, model_name, identity)
            except BaseException:
                store.close()
                raise
            opened.append(store)

        processes.share(open_store)
        store = opened[0] if opened else None
        if crops is None and not is_address(address):
            crops = Path(os.path.expanduser(address)).with_suffix(".crops")
        folder = None if crops is None else Path(crops).expanduser().absolute() / name
        gallery = cls(model, processor, store, folder)
        gallery.columns, gallery._cameras, gallery._precision = processes.share(
            lambda: (gallery.columns, gallery._cameras, gallery._precision)
        )
        return gallery

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the store; another process may open the gallery then."""
        if self._store:
            self._store.close()

    @property
    def model(self) -> ECCLModel | OnnxEncoder:
        """The model that encodes pictures and sentences, or its ONNX export.

        Raises:
            ValueError: the gallery was opened without one.
        """
        if self._model is None:
            raise ValueError("the gallery was opened without its model")
        return self._model

    @property
    def processor(self) -> ECCLProcessor:
        """The processor of the model; it raises as [`model`] does."""
        if self._processor is None:
            raise ValueError("the gallery was opened without its model")
        return self._processor

    @property
    def store(self) -> VectorStore:
        """The store; only the first process of a launch has one."""
        if self._store is None:
            raise ValueError("only the first process of a launch has the store of the gallery")
        return self._store

    @property
    def cameras(self) -> list[str]:
        """The names of the cameras that pictures were added from, in alphabetical order."""
        return list(self._cameras)

    def __len__(self) -> int:
        return self.store.count()

    def count(self, where: Where) -> int:
        """Counts the pictures that pass a filter."""
        return self.store.count(where.conditions(self.columns))

    # -- Adding

    def add(
        self,
        images: Any,
        *,
        columns: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        on_bad_image: Literal["error", "skip"] = "error",
        progress: bool = True,
    ) -> AddReport:
        """Adds pictures. It encodes only those that the gallery does not have yet, so a second call is quick.

        A run that was killed goes on when it is started again: no picture is lost, and none is in twice. In a launch of
        several processes, every process makes the call with the same pictures.

        Args:
            images: a folder, with all its subfolders; or pictures in a list, a generator, a `datasets.Dataset` with an
                `image` column, or anything else that can be iterated. A picture is a path, a PIL image, a dict with
                `bytes` and `path`, or a [`Picture`]. Pictures without a file are kept in the folder of crops.
            columns: columns of the pictures by name: one value for all, or a list with a value for each.
            batch_size: number of pictures encoded at a time.
            on_bad_image: `error`, or `skip` to leave unreadable pictures out; the report names them.
            progress: shows a progress bar with the rate and the time left.

        Raises:
            ValueError: a picture cannot be read, or a column has a wrong name or type, and the message names the
                picture; or the pictures of the gallery have another precision.
        """
        self._require_precision()
        return add_pictures(self, images, columns, batch_size, on_bad_image, progress)

    @torch.no_grad()
    def encode_pixels(self, pixels: torch.Tensor) -> np.ndarray:
        """Encodes pictures as unit vectors.

        Args:
            pixels: `(pictures, channels, height, width)`, from the image processor.

        Returns:
            `(pictures, dimension)`, float32.
        """
        features = self.model.get_image_features(
            pixels.to(self.model.device, self.model.dtype), pooled_only=True, return_dict=True
        ).pooler_output
        return nn.functional.normalize(features.float(), dim=-1).cpu().numpy()

    def _require_precision(self) -> None:
        """Refuses an encoder whose vectors are not comparable with those of the pictures to the last digits."""
        precision = _precision_of(self.model)
        if precision != self._precision:
            raise ValueError(
                f"the pictures of the gallery were encoded in {self._precision}, the encoder computes in {precision}: "
                "it can search the gallery, but not add to it, verify it or calibrate it"
            )

    def crop_file(self, id: str) -> Path:
        """The place of the picture in the folder of crops; only pictures without a file of their own are there."""
        return (self.crops or Path(os.devnull)) / id

    def keep_crop(self, id: str, data: bytes) -> None:
        """Writes a picture that has no file to the folder of crops.

        Raises:
            ValueError: the gallery has no folder of crops.
        """
        if self.crops is None:
            raise ValueError("a picture without a file needs a folder to be kept in: give crops=FOLDER")
        self.crops.mkdir(parents=True, exist_ok=True)
        unfinished = self.crops / f".{id}"
        unfinished.write_bytes(data)
        unfinished.replace(self.crop_file(id))

    def remember_columns(self, types: Mapping[str, str], cameras: Collection[str]) -> None:
        """Stores the types of new columns and the names of new cameras.

        Raises:
            ValueError: another process has given a column another type meanwhile.
        """
        if not types and set(cameras) <= set(self._cameras):
            return
        stored = self.store.properties
        columns: dict[str, str] = json.loads(stored["columns"])
        for name, kind in types.items():
            if columns.setdefault(name, kind) != kind:
                raise ValueError(f"the column {name} has the type {columns[name]} by now, not {kind}")
        self.columns, self._cameras = columns, sorted({*json.loads(stored["cameras"]), *cameras})
        self.store.set_properties({"columns": json.dumps(columns), "cameras": json.dumps(self._cameras)})

    # -- Searching

    @overload
    def search(self, query: str | None, *args: Any, **kwargs: Any) -> list[Match]: ...

    @overload
    def search(self, query: list[str] | tuple[str, ...], *args: Any, **kwargs: Any) -> list[list[Match]]: ...

    def search(
        self,
        query: str | Sequence[str] | None,
        top_k: int = 10,
        where: Where | None = None,
        *,
        negative: str | None = None,
        image: Any = None,
        group_by: str | None = None,
        min_score: float | None = None,
        order: Literal["score", "time"] = "score",
        offset: int = 0,
    ) -> list[Match] | list[list[Match]]:
        """Finds the pictures that fit a sentence, a picture, or both.

        Args:
            query: a sentence, or several; `None` if `image` is the whole query.
            top_k: largest number of matches, 1 to 16,384 together with `offset`.
            where: a filter over cameras, times and columns.
            negative: a sentence that describes who is not wanted.
            image: a picture of whom to find, as `read_image` takes it. With a sentence, the query is the mean of both.
            group_by: name of a column, for example `tracklet`: only the best match of each of its values is returned.
                Pictures without a value each stand alone.
            min_score: matches with a lower score are left out. By default it is the calibrated threshold, if the
                gallery has one, and if the query is one sentence without a picture or a negative sentence.
            order: `score`, the best first; or `time`, the oldest first: the same matches in another order.
            offset: number of best matches to leave out, for the next page.

        Returns:
            The matches; for several sentences a list of them for each. Without `min_score`, exactly as many as wanted,
            or all that the filter keeps.

        Raises:
            ValueError: the query is empty or too long, a number is out of range, a column is unknown, or the picture
                cannot be read. The message names what is wrong.
        """
        conditions = self._check(top_k, where, group_by, order, offset)
        sentences: list[str | None] = list(query) if isinstance(query, (list, tuple)) else [query]  # type: ignore[list-item]
        if len(sentences) > 1 and None in sentences:
            raise ValueError("a list of queries must contain sentences only")
        if not sentences:
            return []
        asked = self._make_query(sentences, negative, image, min_score)
        found = self._find(asked, top_k, conditions, group_by, order, offset)
        return found if isinstance(query, (list, tuple)) else found[0]

    def refine(
        self,
        query: str | None,
        like: Sequence[str] = (),
        unlike: Sequence[str] = (),
        top_k: int = 10,
        where: Where | None = None,
        *,
        negative: str | None = None,
        image: Any = None,
        group_by: str | None = None,
        min_score: float | None = None,
        order: Literal["score", "time"] = "score",
        offset: int = 0,
    ) -> list[Match]:
        """Searches again with matches that are marked as right or as wrong.

        The query is moved towards the mean of the right ones, and away from the mean of the wrong ones (Rocchio,
        "Relevance feedback in information retrieval", 1971): `unit(q + 0.75 mean(like) - 0.25 mean(unlike))`.

        Args:
            query: see [`search`].
            like, unlike: ids of pictures that show whom you look for, and of pictures that do not.
            top_k, where, negative, image, group_by, min_score, order, offset: see [`search`]. A calibrated threshold is
                not used, because the scores have another range.

        Raises:
            ValueError: as in [`search`]; or the gallery does not have one of the pictures.
        """
        both = sorted(set(like) & set(unlike))
        if both:
            raise ValueError(f"the picture {both[0]} is marked as right and as wrong")
        conditions = self._check(top_k, where, group_by, order, offset)
        (vector,), lowest = self._make_query([query], negative, image, min_score)
        marked = bool(like or unlike)
        for ids, weight in ((like, _LIKE), (unlike, -_UNLIKE)):
            if ids:
                rows = self.store.get(ids, ["vector"])
                _require_known(ids, rows)
                vector = vector + weight * np.mean([row["vector"] for row in rows.values()], axis=0)
        asked = _Query(_unit(vector[None]), min_score if marked else lowest)
        return self._find(asked, top_k, conditions, group_by, order, offset)[0]

    def _make_query(
        self, sentences: Sequence[str | None], negative: str | None, image: Any, min_score: float | None
    ) -> _Query:
        # Also true for NaN.
        if min_score is not None and not -1 <= min_score <= 1:
            raise ValueError(f"min_score is {min_score}, it must be a number from -1 to 1")
        given = [sentence for sentence in sentences if sentence is not None]
        if len(given) < len(sentences) and image is None:
            raise ValueError("the query is empty: give a sentence, a picture, or both")
        texts = [*map(self._check_sentence, given), *([self._check_sentence(negative)] if negative is not None else [])]
        features = _unit(embed_captions(self.model, self.processor, texts, progress=False).numpy()) if texts else None
        vectors = np.zeros((len(sentences), self.model.config.projection_dim), dtype=np.float32)
        if features is not None and given:
            vectors += features[: len(given)]
        if image is not None:
            picture = read_image(image)
            vectors += self.encode_pixels(self.processor.image_processor(picture, return_tensors="pt")["pixel_values"])
        if features is not None and negative is not None:
            vectors -= _NEGATIVE * features[-1]
        return _Query(_unit(vectors), choose_cut_off(min_score, self.threshold, image is None and negative is None))

    def _check_sentence(self, sentence: str) -> str:
        if not isinstance(sentence, str) or not clean_caption(sentence).strip():
            raise ValueError(f"the query is {sentence!r}, it must be a sentence")
        if len(sentence) > LONGEST_QUERY:
            raise ValueError(f"the query has {len(sentence):,} characters, at most {LONGEST_QUERY:,} are allowed")
        tokens, limit = self.processor.count_tokens(sentence), self.processor.max_text_length
        if tokens > limit:
            raise ValueError(f"the query has {tokens} tokens, the model reads only {limit}: shorten it")
        return sentence

    def _check(self, top_k: int, where: Where | None, group_by: str | None, order: str, offset: int) -> list[Condition]:
        """Checks numbers and names of a search before the query is encoded, and returns the filter's conditions."""
        for name, value, least in (("top_k", top_k, 1), ("offset", offset, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} is {value!r}, it must be a whole number, at least {least}")
        if top_k + offset > LONGEST_TOP_K:
            count = f"top_k is {top_k:,}" if not offset else f"top_k and offset are {top_k + offset:,} together"
            raise ValueError(f"{count}, at most {LONGEST_TOP_K:,} are allowed")
        if order not in ("score", "time"):
            raise ValueError(f"order is {order!r}, it must be score or time")
        if group_by is not None:
            self._require_column(group_by)
        return (where or Where()).conditions(self.columns)

    def _find(
        self, query: _Query, top_k: int, conditions: list[Condition], group_by: str | None, order: str, offset: int
    ) -> list[list[Match]]:
        if group_by is None:
            answers = self.store.search(query.vectors, top_k + offset, conditions, self._fields)
        else:
            answers = [self._find_groups(vector, top_k + offset, conditions, group_by) for vector in query.vectors]
        lowest = -math.inf if query.min_score is None else query.min_score
        found = [[make_match(row) for row in rows[offset:] if row["score"] >= lowest] for rows in answers]
        if order == "time":
            for matches in found:
                matches.sort(key=by_time)
        return found

    def _find_groups(
        self, vector: np.ndarray, count: int, conditions: Sequence[Condition], column: str
    ) -> list[dict[str, Any]]:
        """Finds the best row of each value of a column.

        Milvus has such a search, but a server of version 2.3 ignores the request. Each round leaves out the values that
        are found already, so that one large group cannot hide the others.
        """
        best: list[dict[str, Any]] = []
        values: list[Any] = []
        single: list[str] = []
        while len(best) < count:
            exclude = [Condition("id", "not in", single)] if single else []
            if values:
                exclude.append(Condition(column, "not in", values))
            limit = min(LONGEST_ANSWER, 4 * (count - len(best)))
            (rows,) = self.store.search(vector[None], limit, [*conditions, *exclude], self._fields)
            for row in rows:
                value = row.get(column)
                if value in (None, "", NO_TIME):
                    single.append(row["id"])
                elif value in values:
                    continue
                else:
                    values.append(value)
                best.append(row)
            if len(rows) < limit:
                break
        return sorted(best, key=by_score)[:count]

    def _require_column(self, name: str) -> None:
        known = {"camera", "time", "tracklet", *self.columns}
        if name not in known:
            raise ValueError(f"the gallery has no column {name!r}, its columns are {', '.join(sorted(known))}")

    @property
    def _fields(self) -> list[str]:
        return ["path", "camera", "time", "tracklet", "width", "height", "added", *self.columns]

    def get(self, ids: Collection[str]) -> dict[str, Match]:
        """Reads pictures by their ids; unknown ids are left out. Their score is 0."""
        return {id: make_match(row | {"score": 0.0}) for id, row in self.store.get(ids, self._fields).items()}

    def read_crop(self, id: str) -> Image.Image:
        """Reads a picture of the gallery.

        Returns:
            Upright 8-bit RGB.

        Raises:
            KeyError: the gallery does not have this picture.
            ValueError: the file is gone, or is another picture now.
        """
        rows = self.store.get([id], ["path"])
        if id not in rows:
            raise KeyError(f"the gallery has no picture {id}")
        return read_image({"bytes": self.read_bytes(id, rows[id]["path"]), "path": rows[id]["path"]})

    def read_bytes(self, id: str, path: str) -> bytes:
        """Reads the file of a picture, and checks that it is the one that was indexed.

        Raises:
            FileNotFoundError: the file is gone.
            ValueError: the file has other bytes now.
        """
        file = self.crop_file(id) if self.crops and self.crop_file(id).exists() else Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"the file of the picture is gone: {path or id}")
        data = file.read_bytes()
        if hashlib.sha256(data).hexdigest() != id:
            raise ValueError(f"the file is another picture than the one that was indexed: {path or id}")
        return data

    # -- Changing and removing

    def update(self, id: str, **columns: Any) -> None:
        """Changes columns of a picture; `None` removes a value.

        Raises:
            ValueError: the gallery does not have the picture, or a column has a wrong name or type.
        """
        values, new = read_columns(columns, self.columns)
        for name in (name for name, value in columns.items() if value is None):
            self._require_column(name)
            values[name] = UNKNOWN.get(name)
        with self.lock:
            rows = self.store.get([id])
            _require_known([id], rows)
            self.remember_columns(new, {values["camera"]} - {""} if "camera" in values else ())
            self.store.upsert([rows[id] | values])

    def remove(
        self,
        ids: Collection[str] | None = None,
        where: Where | None = None,
        path: str | os.PathLike[str] | None = None,
    ) -> int:
        """Removes pictures: their rows, and their crops. In the embedded store no trace is left on the disk.

        Files that you have indexed are yours, and stay. A server keeps deleted rows in its files for some time.

        Args:
            ids: ids of pictures.
            where: a filter with at least one condition.
            path: a file, a folder with all that is in it, or a video. Exactly one of the three must be given.

        Returns:
            The number of pictures that were removed.

        Raises:
            ValueError: not exactly one is given, the filter has no condition, or an id is unknown.
        """
        if sum(each is not None for each in (ids, where, path)) != 1:
            raise ValueError("give either ids, or where, or path: this decides which pictures are removed")
        if ids is not None:
            wanted = list(dict.fromkeys(ids))
            _require_known(wanted, self.store.get(wanted, ["path"]))
        elif where is not None:
            conditions = where.conditions(self.columns)
            if not conditions:
                raise ValueError("the filter has no condition: it would remove every picture")
            wanted = [row["id"] for row in self.store.scan(conditions)]
        else:
            path = os.fspath(path or "")
            if not path.strip():
                raise ValueError("path is empty, it must be a file, a folder or a video")
            place = os.path.abspath(os.path.expanduser(path))
            named = {place, path}
            # What is in a folder, and the crops of a video.
            starts = (os.path.join(place, ""), f"{place}#frame=", f"{path}#frame=")
            wanted = [
                row["id"]
                for row in self.store.scan(fields=["path"])
                if row["path"] in named or row["path"].startswith(starts)
            ]
        return self._remove(wanted)

    def expire(self, older_than: timedelta | datetime) -> int:
        """Removes pictures that are too old. A picture without a time is as old as its place in the gallery.

        Args:
            older_than: an age above 0, or the moment before which a picture is too old, not in the future.

        Returns:
            The number of pictures that were removed.
        """
        now = datetime.now(UTC)
        try:
            limit = read_time(now - older_than if isinstance(older_than, timedelta) else older_than)
        except OverflowError:
            raise ValueError(f"older_than is {older_than}, which is before the year 1") from None
        if limit > read_time(now) or older_than == timedelta(0):
            raise ValueError(f"older_than is {older_than}: every picture would be too old")
        old = [
            *self.store.scan([Condition("time", "<", limit)]),
            *self.store.scan([Condition("time", "==", NO_TIME), Condition("added", "<", limit)]),
        ]
        count = self._remove([row["id"] for row in old])
        # Left over from a process that was killed before it wrote the rows, and that nobody has started again.
        for name in self.spare_crops():
            if self.crop_file(name).stat().st_mtime < limit / 1000:
                self.crop_file(name).unlink()
        return count

    def _remove(self, ids: Sequence[str]) -> int:
        if not ids:
            return 0
        if self.crops is None:
            kept = sum(not row["modified"] for row in self.store.get(ids, ["modified"]).values())
            if kept:
                raise ValueError(f"{kept:,} of these pictures are in the folder of crops: give crops=FOLDER")
        with self.lock:
            # The crops go first: if the process is killed, the rows are still there to be removed again.
            for id in ids if self.crops else ():
                self.crop_file(id).unlink(missing_ok=True)
            self.store.delete(ids)
            self.store.purge()
        return len(ids)

    def spare_crops(self) -> list[str]:
        """The names of the files in the folder of crops that belong to no picture."""
        if self.crops is None or not self.crops.is_dir():
            return []
        names = sorted(file.name for file in self.crops.iterdir())
        known = self.store.get(names, ["path"])
        return [name for name in names if name not in known]

    # -- Looking after a gallery

    def info(self) -> GalleryInfo:
        """Counts what the gallery contains."""
        cameras: dict[str, int] = {}
        times: list[int] = []
        added: list[int] = []
        for row in self.store.scan(fields=["camera", "time", "added"]):
            cameras[row["camera"]] = cameras.get(row["camera"], 0) + 1
            added.append(row["added"])
            if row["time"] != NO_TIME:
                times.append(row["time"])
        crops = sum(file.stat().st_size for file in self.crops.iterdir()) if self.crops and self.crops.is_dir() else 0
        return GalleryInfo(
            uri=self.store.uri,
            name=self.store.name,
            engine=self.store.engine,
            model=self.store.properties["model"],
            pictures=len(added),
            cameras=dict(sorted(cameras.items())),
            oldest=show_time(min(times, default=NO_TIME)),
            newest=show_time(max(times, default=NO_TIME)),
            first_added=show_time(min(added, default=NO_TIME)),
            last_added=show_time(max(added, default=NO_TIME)),
            columns=dict(self.columns),
            threshold=self.threshold,
            bytes_on_disk=(self.store.bytes_on_disk() or 0) + crops,
        )

    def verify(self, samples: int = 32) -> VerifyReport:
        """Checks that every picture is still there, byte for byte, and that the model still makes the same vectors.

        Args:
            samples: number of pictures, of those that are there, that are encoded again.
        """
        self._require_precision()
        missing: list[str] = []
        changed: list[str] = []
        wrong: list[str] = []
        count = checked = 0
        for row in self.store.scan(fields=["path", "vector"]):
            count += 1
            try:
                data = self.read_bytes(row["id"], row["path"])
                picture = read_image({"bytes": data, "path": row["path"]}) if checked < samples else None
            except FileNotFoundError:
                missing.append(row["id"])
            except ValueError:
                changed.append(row["id"])
            else:
                if picture is not None:
                    checked += 1
                    pixels = self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
                    if float(self.encode_pixels(pixels)[0] @ np.asarray(row["vector"])) < 0.999:
                        wrong.append(row["id"])
        return VerifyReport(count, missing, changed, wrong, self.spare_crops())

    def calibrate(self, dataset: Any, precision: float = 0.9, top_k: int = 10) -> Calibration:
        """Finds the score above which a match is right with a wanted precision, and stores it with the gallery.

        [`search`] then leaves out matches with a lower score. The threshold holds for galleries of about the size of
        the data set, with pictures like its own: among more pictures, more wrong ones score high.

        Args:
            dataset: a labelled split with the columns `image`, `captions` and `person_id`, for example that of
                `load_dataset("rstpreid", ..., split="val")`.
            precision: the wanted share of right matches, above 0 and at most 1.
            top_k: number of best matches of each caption that are counted, as a search shows them.

        Raises:
            ValueError: a number is out of range, or no score reaches the precision.
        """
        from .calibration import find_threshold

        self._require_precision()
        calibration = find_threshold(self.model, self.processor, dataset, precision, top_k)
        self.store.set_properties({"calibration": json.dumps(asdict(calibration))})
        self.threshold = calibration.threshold
        return calibration

    def export(
        self, file: str | os.PathLike[str], matches: Sequence[Match] | None = None, where: Where | None = None
    ) -> None:
        """Writes a table, a sheet of pictures, or the pictures themselves.

        Args:
            file: a name that ends in `.csv` (a table), like a picture (a contact sheet), or a folder, which must be new
                or empty (the pictures, encoded anew without their metadata, and the table).
            matches: the matches to write; by default all pictures that `where` keeps.
            where: a filter.

        Raises:
            ValueError: both `matches` and `where` are given, a column is unknown, or a picture cannot be read.
            FileExistsError: the folder is not empty.
        """
        from .export import export_matches

        if matches is None:
            conditions = (where or Where()).conditions(self.columns)
            rows = self.store.scan(conditions, self._fields)
            export_matches(self, Path(file), (make_match(row | {"score": float("nan")}) for row in rows))
        elif where is None:
            export_matches(self, Path(file), matches)
        else:
            raise ValueError("give either matches or where, not both")


def _identify(model: ECCLModel | OnnxEncoder, processor: ECCLProcessor) -> str:
    if isinstance(model, OnnxEncoder):
        return digest_settings(model.weights, model.config, processor)
    return digest_encoder(model, processor)


def _precision_of(model: ECCLModel | OnnxEncoder) -> str:
    return model.precision if isinstance(model, OnnxEncoder) else "float32"


def choose_cut_off(min_score: float | None, threshold: float | None, is_plain: bool) -> float | None:
    """Returns the lowest score of a match: the given one, or the calibrated one; `None` if every match counts.

    Args:
        min_score: the given one.
        threshold: the calibrated one. It is that of a sentence alone: the scores of other queries have another range.
        is_plain: whether the query is a sentence alone.
    """
    return threshold if min_score is None and is_plain else min_score


def make_match(row: Mapping[str, Any]) -> Match:
    """Makes a match of a row of the store."""
    columns = {name: value for name, value in row.items() if name not in _INTERNAL and value is not None}
    columns |= {"time": show_time(row["time"]), "added": show_time(row["added"])}
    return Match(row["id"], row["path"], float(row["score"]), columns)


def by_time(match: Match) -> tuple[bool, Any, str]:
    """A key for sorting: the oldest match first, matches without a time at the end."""
    time = match.columns["time"]
    return time is None, time or 0, match.id


def _require_own(store: VectorStore, name: str, identity: str | None) -> None:
    properties = store.properties
    if properties.get("format") != _FORMAT:
        raise ValueError(
            f"{store.uri} has the format {properties.get('format', 'of something else')}, this version reads the "
            f"format {_FORMAT}: index again"
        )
    if identity is not None and properties["weights"] != identity:
        raise ValueError(
            f"{store.uri} was made with the model {properties['model']} ({properties['weights'][:12]}), this is {name} "
            f"({identity[:12]}): weights or processor differ; open the gallery with its own model, or index again"
        )


def _require_known(ids: Collection[str], rows: Mapping[str, Any]) -> None:
    unknown = [id for id in ids if id not in rows]
    if unknown:
        raise ValueError(f"the gallery has no picture {unknown[0]} ({len(unknown)} of {len(ids)} ids are unknown)")


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    if not lengths.all():
        raise ValueError("the parts of the query cancel each other out")
    return (vectors / lengths).astype(np.float32)


__all__ = [
    "LONGEST_QUERY",
    "LONGEST_TOP_K",
    "AddReport",
    "Calibration",
    "Gallery",
    "GalleryInfo",
    "Match",
    "Picture",
    "VerifyReport",
    "Where",
    "by_time",
    "choose_cut_off",
]


if __name__ == "__main__":
    from .commands import main

    main()
