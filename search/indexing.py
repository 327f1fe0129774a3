"""Adding pictures to a gallery: read, hash, look up, encode what is new, write."""

import contextlib
import hashlib
import io
import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..pipeline_eccl import leave_undecoded
from ..processing_eccl import list_images, read_image
from .columns import Picture, read_columns, spread_columns
from .processes import Processes
from .store import LONGEST_PATH, NO_TIME

if TYPE_CHECKING:
    from .gallery import Gallery

# Pictures that are looked up together.
_CHUNK = 256
# In bytes.
_TOO_LARGE = 512 * 2**20 + 1


@dataclass(frozen=True)
class AddReport:
    """The result of adding pictures.

    Attributes:
        added: number of pictures that are new in the gallery.
        known: number of pictures that it had already; two files with the same bytes are one picture.
        skipped: for each picture that cannot be read, a line with its name and the reason.
    """

    added: int
    known: int
    skipped: list[str] = field(default_factory=list)


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
    if isinstance(images, (str, Path)):
        images = list_images(images)
    images = leave_undecoded(images)
    if not isinstance(images, Iterable):
        raise ValueError(f"images is of type {type(images).__name__}, it must be a folder or a list of pictures")
    total = len(images) if isinstance(images, Sized) else None
    if total is not None:
        # Columns of a wrong length are found before the work.
        for _ in spread_columns(columns, range(total)):
            pass
    job = _Job(gallery, batch_size, on_bad_image)
    with tqdm(total=total, desc="indexing", unit="picture", disable=not progress or job.processes.rank > 0) as bar:
        entries = enumerate(spread_columns(columns, images), start=1)
        # A source without a length may be slow, as a video is: its pictures are written without delay.
        size = batch_size if total is None else max(_CHUNK, batch_size)
        while chunk := list(itertools.islice(entries, size)):
            job.add([(number, _make_picture(image, values, number)) for number, (image, values) in chunk])
            bar.update(len(chunk))
    return AddReport(job.added, job.known, job.skipped)


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
        self.added = self.known = 0
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
        unchanged = self.processes.share(lambda: self._find_unchanged(entries))
        changed = [entry for entry in entries if entry.path not in unchanged or entry.file is None]
        self.known += len(entries) - len(changed)
        ids = self._read(changed)
        known = self.processes.share(lambda: self._find_known(changed, ids))
        seen: set[str] = set(known)
        first: list[int] = []
        for index, identity in sorted(ids.items()):
            if identity not in seen:
                first.append(index)
            seen.add(identity)
        self.known += len(ids) - len(first)
        rows = self._encode(changed, first)
        self.processes.share(lambda: self._write(rows, new_types))
        self.gallery.columns.update(new_types)
        self.added += len(rows)
        self.has_written |= bool(rows)

    def _skip(self, line: str) -> None:
        if self.on_bad_image == "error":
            raise ValueError(line)
        self.skipped.append(line)

    def _find_unchanged(self, entries: Sequence[_Entry]) -> set[str]:
        """Finds the files that the store has with this path, size and time of change: they are not read again."""
        files = {entry.path: entry for entry in entries if entry.file is not None}
        rows = self.gallery.store.find("path", list(files), ["path", "size", "modified"], not self.has_written)
        return {
            row["path"]
            for row in rows
            if (row["size"], row["modified"]) == (files[row["path"]].size, files[row["path"]].modified)
        }

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
        for some_ids, some_failures in self.processes.gather((ids, failures)):
            merged |= some_ids
            merged_failures |= some_failures
        for _, line in sorted(merged_failures.items()):
            self._skip(line)
        return merged

    def _find_known(self, entries: Sequence[_Entry], ids: Mapping[int, str]) -> set[str]:
        """Finds the pictures that the store has; one whose file has moved or was touched gets the new path."""
        store = self.gallery.store
        rows = {row["id"]: row for row in store.find("id", list(ids.values()), ["path"], not self.has_written)}
        moved = {}
        for index, identity in ids.items():
            entry, row = entries[index], rows.get(identity)
            has_moved = row and entry.file and (entry.path == row["path"] or not os.path.exists(row["path"]))
            if has_moved and not self.gallery.crop_file(identity).exists():
                moved[identity] = {"path": entry.path, "size": entry.size, "modified": entry.modified}
        if moved:
            store.upsert(row | moved[identity] for identity, row in store.get(moved).items())
        return set(rows)

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
        return [row for part in self.processes.gather(rows) for row in part]

    def _make_row(self, entry: _Entry, index: int, vector: np.ndarray) -> dict[str, Any]:
        content = self._contents[index]
        if content.data is not None:
            self.gallery.keep_crop(content.id, content.data)
        width, height = content.size
        return {
            **{"camera": "", "tracklet": "", "time": NO_TIME},
            **entry.values,
            **{"id": content.id, "vector": vector, "path": entry.path, "width": width, "height": height},
            **{"added": time.time_ns() // 1_000_000, "size": entry.size, "modified": entry.modified},
        }

    def _write(self, rows: Sequence[Mapping[str, Any]], new_types: Mapping[str, str]) -> None:
        if rows:
            self.gallery.remember_columns(new_types, {row["camera"] for row in rows} - {""})
            self.gallery.store.upsert(rows)


class _BadPicture(ValueError):
    """A picture that can be skipped."""


def _describe(picture: Picture, types: Mapping[str, str], new_types: dict[str, str]) -> _Entry:
    source, label = picture.image, picture.path
    if isinstance(source, Mapping):
        label = label or source["path"]
        source = source if source["bytes"] is not None else source["path"]
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
