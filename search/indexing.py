"""Adding pictures to a gallery: read, hash, look up, encode what is new, write."""

import contextlib
import hashlib
import io
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..encoding_eccl import gather_objects
from ..pipeline_eccl import open_images
from ..processing_eccl import read_image
from .columns import UNKNOWN, Picture, read_columns, spread_columns
from .processes import Processes
from .store import LONGEST_PATH

if TYPE_CHECKING:
    from .gallery import Gallery

# Pictures that are looked up together.
_CHUNK = 256
# Seconds for which a picture of a stream waits for others.
_LONGEST_WAIT = 5.0
# In bytes.
_TOO_LARGE = 512 * 2**20 + 1


@dataclass(frozen=True)
class AddReport:
    """The result of adding pictures.

    Attributes:
        added: number of pictures that are new in the gallery.
        known: number of pictures that it had already; two files with the same bytes are one picture.
        updated: number of known pictures that got other columns.
        replaced: number of pictures that were removed because their file has other content now.
        skipped: for each picture that cannot be read, a line with its name and the reason.
    """

    added: int
    known: int
    skipped: list[str] = field(default_factory=list)
    updated: int = 0
    replaced: int = 0


class _Entry(NamedTuple):
    """A picture before it is read.

    Attributes:
        picture: the picture.
        path: the path in the store.
        file: its file; `None` if there is none.
        size, modified: those of the file, the second in nanoseconds; 0 without a file.
        values: its columns, as the store keeps them.
    """

    picture: Picture
    path: str
    file: Path | None
    size: int
    modified: int
    values: dict[str, Any]

    def is_file_of(self, row: Mapping[str, Any] | None) -> bool:
        """Whether this is the file of a row, unchanged."""
        return bool(row and self.file and (row["size"], row["modified"]) == (self.size, self.modified))


class _Content(NamedTuple):
    """A picture that was read.

    Attributes:
        id: SHA-256 of the bytes of its file.
        data: the bytes, for a picture without a file.
        size: width and height of the upright picture.
        pixels: what the model takes, `(channels, height, width)`.
    """

    id: str
    data: bytes | None
    size: tuple[int, int]
    pixels: torch.Tensor


def add_pictures(
    gallery: "Gallery",
    images: Any,
    columns: Mapping[str, Any] | None,
    batch_size: int,
    on_bad_image: str,
    progress: bool,
) -> AddReport:
    """Adds pictures to a gallery; see [`Gallery.add`]."""
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}, it must be error or skip")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, it must be at least 1")
    images = open_images(images)
    total = len(images) if isinstance(images, Sized) else None
    if total is not None:
        # Columns of a wrong length are found before the work.
        for _ in spread_columns(columns, range(total)):
            pass
    job = _Job(gallery, batch_size, on_bad_image)
    with tqdm(total=total, desc="indexing", unit="picture", disable=not progress or job.processes.rank > 0) as bar:
        pictures = (
            (number, _make_picture(image, values, number))
            for number, (image, values) in enumerate(spread_columns(columns, images), start=1)
        )
        is_stream = total is None and job.processes.size == 1
        for chunk in _split(pictures, batch_size if total is None else max(_CHUNK, batch_size), is_stream):
            job.add(chunk)
            bar.update(len(chunk))
    job.finish()
    return AddReport(job.added, job.known, job.skipped, job.updated, job.replaced)


def _split(pictures: Iterable[tuple[int, Picture]], size: int, is_stream: bool) -> Iterator[list[tuple[int, Picture]]]:
    """Splits pictures into chunks. Those of a stream, which may be slow or be interrupted, do not wait for others."""
    chunk: list[tuple[int, Picture]] = []
    last = time.monotonic()
    try:
        for picture in pictures:
            chunk.append(picture)
            if len(chunk) >= size or (is_stream and time.monotonic() - last > _LONGEST_WAIT):
                yield chunk
                chunk, last = [], time.monotonic()
    except (Exception, KeyboardInterrupt):
        if chunk and is_stream:
            yield chunk
        raise
    if chunk:
        yield chunk


def _make_picture(image: Any, values: Mapping[str, Any], number: int) -> Picture:
    if isinstance(image, Mapping) and "image" in image:
        image = Picture(image["image"], path=image.get("file_path"))
    elif isinstance(image, Mapping) and not {"bytes", "path"} <= image.keys():
        raise ValueError(f"picture {number} has no field 'image', it has only {', '.join(map(str, image))}")
    if isinstance(image, Picture):
        return Picture(image.image, {**image.columns, **values}, image.path)
    if isinstance(image, (str, PathLike, Image.Image, Mapping)):
        return Picture(image, values)
    raise ValueError(f"picture {number} is of type {type(image).__name__}, it must be a path or a PIL image")


class _Job:
    """One call of `add`, in one process of a launch or in a process alone. The first process alone uses the store."""

    def __init__(self, gallery: "Gallery", batch_size: int, on_bad_image: str):
        self.gallery, self.batch_size, self.on_bad_image = gallery, batch_size, on_bad_image
        self.processes = Processes()
        self.added = self.known = self.updated = self.replaced = 0
        self.skipped: list[str] = []
        # A server may answer from before the last write of another process, for example one that was killed. After
        # this process has written, its own consistency level is enough.
        self.has_written = False

    def add(self, pictures: Sequence[tuple[int, Picture]]) -> None:
        entries: list[_Entry] = []
        new_types: dict[str, str] = {}
        for number, picture in pictures:
            try:
                entry = _describe(picture, self.gallery.columns | new_types, new_types)
            except _BadPicture as error:
                self._skip(f"picture {number}: {error}")
            else:
                entries.append(entry)
        old = self.processes.share(lambda: self._find_files(entries))
        changed = [entry for entry in entries if not entry.is_file_of(old.get(entry.path))]
        self.known += len(entries) - len(changed)
        ids = self._read(changed)
        # The content of these files is another one now: the pictures that were in them are gone.
        gone = {old[changed[index].path]["id"] for index in ids if changed[index].path in old} - set(ids.values())
        known = self.processes.share(lambda: self._find_known(ids))
        seen: set[str] = set(known)
        first: list[int] = []
        for index, identity in sorted(ids.items()):
            if identity not in seen:
                first.append(index)
            seen.add(identity)
        self.known += len(ids) - len(first)
        rows = self._encode(changed, first)
        changes = self.processes.share(lambda: self._find_changes(entries, old, changed, ids))
        self.gallery.columns = self.processes.share(lambda: self._write(rows, new_types, changes, gone))
        self.added += len(rows)
        self.updated += len(changes)
        self.replaced += len(gone)
        self.has_written |= bool(rows)

    def finish(self) -> None:
        """Removes the traces of pictures whose files have other content now."""
        if self.replaced:
            self.processes.share(self.gallery.store.purge)

    def _skip(self, line: str) -> None:
        if self.on_bad_image == "error":
            raise ValueError(line)
        self.skipped.append(line)

    def _find_files(self, entries: Sequence[_Entry]) -> dict[str, dict[str, Any]]:
        """Finds the rows of files, by their paths. A file with the size and time of its row is not read again."""
        files = [entry.path for entry in entries if entry.file is not None]
        names = {name for entry in entries for name in entry.values}
        fields = ["path", "size", "modified", *names]
        return {row["path"]: row for row in self.gallery.store.find("path", files, fields, not self.has_written)}

    def _read(self, entries: Sequence[_Entry]) -> dict[int, str]:
        """Reads pictures, each process a part of them, and returns the ids of all, by position."""
        self._contents: dict[int, _Content] = {}
        failures: dict[int, str] = {}

        def read(index: int) -> _Content | str:
            try:
                return _read_content(entries[index], self.gallery)
            except (ValueError, OSError) as error:
                return str(error)

        mine = range(self.processes.rank, len(entries), self.processes.size)
        # Pillow decodes without the interpreter's lock, so threads run in parallel.
        with ThreadPoolExecutor() as pool:
            for index, result in zip(mine, pool.map(read, mine), strict=True):
                if isinstance(result, str):
                    failures[index] = result
                else:
                    self._contents[index] = result
        ids = {index: content.id for index, content in self._contents.items()}
        merged: dict[int, str] = {}
        merged_failures: dict[int, str] = {}
        for some_ids, some_failures in gather_objects((ids, failures)):
            merged |= some_ids
            merged_failures |= some_failures
        for _, line in sorted(merged_failures.items()):
            self._skip(line)
        return merged

    def _find_known(self, ids: Mapping[int, str]) -> set[str]:
        """Finds the pictures that the store has."""
        return {row["id"] for row in self.gallery.store.find("id", list(ids.values()), [], not self.has_written)}

    def _find_changes(
        self,
        entries: Sequence[_Entry],
        old: Mapping[str, Mapping[str, Any]],
        read: Sequence[_Entry],
        ids: Mapping[int, str],
    ) -> dict[str, dict[str, Any]]:
        """Finds the columns that known pictures get, and the new places of files that have moved or were touched."""
        changes: dict[str, dict[str, Any]] = {}
        known = {old[entry.path]["id"]: entry for entry in entries if entry.is_file_of(old.get(entry.path))}
        moved = {identity: read[index] for index, identity in sorted(ids.items(), reverse=True)}
        fields = ["path", "size", "modified", *{name for entry in entries for name in entry.values}]
        for row in self.gallery.store.find("id", [*known, *moved], fields, not self.has_written):
            entry = known.get(row["id"]) or moved[row["id"]]
            given = dict(entry.values)
            is_there = os.path.exists(row["path"]) or self.gallery.crop_file(row["id"]).exists()
            if entry.file and (entry.path == row["path"] or not is_there):
                given |= {"path": entry.path, "size": entry.size, "modified": entry.modified}
            if any(row.get(name) != value for name, value in given.items()):
                changes[row["id"]] = given
        return changes

    def _encode(self, entries: Sequence[_Entry], indices: Sequence[int]) -> list[dict[str, Any]]:
        """Encodes new pictures, each process those that it has read, and returns the rows of all."""
        mine = [index for index in indices if index in self._contents]
        rows: list[dict[str, Any]] = []
        for start in range(0, len(mine), self.batch_size):
            batch = mine[start : start + self.batch_size]
            vectors = self.gallery.encode_pixels(torch.stack([self._contents[index].pixels for index in batch]))
            rows += [
                self._make_row(entries[index], index, vector) for index, vector in zip(batch, vectors, strict=True)
            ]
        return [row for part in gather_objects(rows) for row in part]

    def _make_row(self, entry: _Entry, index: int, vector: np.ndarray) -> dict[str, Any]:
        content = self._contents[index]
        if content.data is not None:
            self.gallery.keep_crop(content.id, content.data)
        width, height = content.size
        return {
            **UNKNOWN,
            **entry.values,
            **{"id": content.id, "vector": vector, "path": entry.path, "width": width, "height": height},
            **{"added": time.time_ns() // 1_000_000, "size": entry.size, "modified": entry.modified},
        }

    def _write(
        self,
        rows: Sequence[Mapping[str, Any]],
        new_types: Mapping[str, str],
        changes: Mapping[str, Mapping[str, Any]],
        gone: Collection[str],
    ) -> dict[str, str]:
        """Writes a chunk, and returns the types of the gallery's columns."""
        store = self.gallery.store
        written = [*rows, *changes.values()]
        used = {name: kind for name, kind in new_types.items() if any(name in row for row in written)}
        self.gallery.remember_columns(used, {row["camera"] for row in written if row.get("camera")})
        store.upsert(rows)
        if changes or gone:
            with self.gallery.lock:
                # Read again: a row that was removed meanwhile does not return.
                store.upsert(row | dict(changes[identity]) for identity, row in store.get(changes).items())
                store.delete(gone)
        return self.gallery.columns


class _BadPicture(ValueError):
    """A picture that can be skipped."""


def _describe(picture: Picture, types: Mapping[str, str], new_types: dict[str, str]) -> _Entry:
    source, label = picture.image, picture.path
    if isinstance(source, Mapping) and {"bytes", "path"} <= source.keys():
        label = label or source["path"]
        source = source if source["bytes"] is not None else source["path"]
    if not isinstance(source, (str, PathLike, Image.Image, Mapping)) or not source:
        raise _BadPicture(f"{label or 'a picture without a name'} is {source!r}, it must be a path or a PIL image")
    file = Path(os.path.abspath(os.path.expanduser(source))) if isinstance(source, (str, PathLike)) else None
    if isinstance(source, Image.Image):
        label = label or getattr(source, "filename", None)
    path = str(file or label or "")
    try:
        values, new = read_columns(picture.columns, types)
    except ValueError as error:
        raise ValueError(f"{path or 'a picture without a name'}: {error}") from error
    new_types.update(new)
    with contextlib.suppress(UnicodeEncodeError):
        if len(path.encode()) > LONGEST_PATH or not path.isprintable():
            raise _BadPicture(f"{path[:200]!r}: a path has at most {LONGEST_PATH:,} bytes and no control characters")
        if file is None:
            return _Entry(picture, path, None, 0, 0, values)
        try:
            status = os.stat(file)
        except OSError as error:
            raise _BadPicture(f"{file} cannot be read: {error.strerror}") from error
        return _Entry(picture, path, file, status.st_size, status.st_mtime_ns, values)
    raise _BadPicture(f"{path!r}: the name of the file is not valid text")


def _read_content(entry: _Entry, gallery: "Gallery") -> _Content:
    source = entry.picture.image
    if entry.file is not None:
        # The check of the kind comes first: a pipe without a writer would block for ever.
        if not entry.file.is_file():
            raise ValueError(f"{entry.file} cannot be read as an image: it is not a regular file")
        with open(entry.file, "rb") as handle:
            # `read_image` refuses a file of this size.
            data = handle.read(_TOO_LARGE)
    elif isinstance(source, Image.Image):
        file = io.BytesIO()
        read_image(source).save(file, "PNG")
        data = file.getvalue()
    else:
        data = dict(source)["bytes"]  # type: ignore[arg-type]
    image = read_image({"bytes": data, "path": entry.path})
    pixels = gallery.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    return _Content(hashlib.sha256(data).hexdigest(), None if entry.file else data, image.size, pixels)


__all__ = ["AddReport", "add_pictures"]
