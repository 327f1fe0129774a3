"""Flat lists of images and captions, as APTM, RaSa and MALS use them: JSON, JSON Lines, CSV, TSV or Parquet."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .annotations import SPLIT_ALIASES, Layout, keep_good_captions
from .base import Files, PersonRetrievalBuilder, PersonRetrievalConfig
from .columns import find_columns, parse_columns
from .faults import find_caption_faults, find_path_faults, find_person_faults, find_text_faults
from .image_checks import Record
from .list_files import LIST_SUFFIXES, has_key_twice, read_list
from .messages import shorten
from .paths import walk_files
from .persons import number_persons
from .records import Checks, Parsed, check_records
from .synthetic import LABELS_FILE

METADATA_FILES = ("metadata.csv", "metadata.jsonl")
# Files of the libraries and of this project that are no annotations.
_NO_ANNOTATIONS = {"dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", LABELS_FILE}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SPLIT_NAME = re.compile(r"\w+")
_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


@dataclass(kw_only=True)
class PersonPairsConfig(PersonRetrievalConfig):
    """The arguments of `load_dataset("person_pairs", ...)`.

    Args:
        data_dir: the folder of the images; it also has the annotation files, unless `data_files` names them.
        data_files: annotation files, relative to `data_dir`: a path, or the path or paths of each split.
        columns: the keys or columns that are not named as usual, by role: `{"image": "img", "person_id": "pid"}`.
    """

    columns: Mapping[str, str] = field(default_factory=dict)

    def find_files(self) -> Files:
        """Finds the annotation files and their splits: those of `data_files`, or else those in `data_dir`."""
        files: dict[Path, str | None] = {}
        given: Any = self.data_files or {}
        for split, paths in given.items():
            files |= {Path(path): str(split) for path in paths}
        if self.data_dir is None and not files:
            raise ValueError('data_dir is missing: load_dataset("person_pairs", data_dir="/path/to/a/folder")')
        folder = Path(self.data_dir).expanduser().absolute() if self.data_dir else next(iter(files)).parent
        if list(given) == ["train"] and len(files) == 1:
            # The library says train if no split is given. The records of one file can have splits.
            files = dict.fromkeys(files)
        return Files(files or find_lists(folder), folder)

    def _list_images(self, files: Files) -> Iterable[str]:
        rows = read_rows(files, parse_columns(self.columns))
        given = [(row.start, row.values["image"]) for row in rows.rows]
        paths = [os.path.join(start, path) for start, path in given if _is_short(path)]
        root = os.path.relpath(rows.image_root, files.folder)
        if not all(os.path.lexists(rows.image_root / path) for path in paths):
            # One of the other files may be the one that a path means.
            paths += walk_files(rows.image_root, self.follow_links)
        return (os.path.join(root, path) for path in paths)


def find_lists(folder: Path) -> dict[Path, str | None]:
    """Finds the lists in a folder, and `metadata.csv` or `.jsonl` in its subfolders, with the split of each.

    The split is a word in the file's name (train, val, test, ...), or the name of the subfolder. A single file has no
    split.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there are several files, and their names do not tell their splits.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    lists = [path for path in sorted(folder.iterdir()) if is_list(path)]
    files = {path: _split_of(path.stem) if len(lists) > 1 else None for path in lists}
    if not lists:
        found = (folder / name / file for name in sorted(os.listdir(folder)) for file in METADATA_FILES)
        files = {path: _split_of(path.parent.name) or path.parent.name for path in found if path.is_file()}
    if not files:
        raise FileNotFoundError(
            f"{folder} has no list of images and captions ({', '.join('*' + suffix for suffix in LIST_SUFFIXES)})"
        )
    unclear = [path.name for path, split in files.items() if list(files.values()).count(split) > 1 or split is None]
    if len(files) > 1 and unclear:
        raise ValueError(
            f"{folder} has several lists whose names do not tell one split each ({', '.join(unclear)}): name them with "
            "data_files={'train': ...}, or keep one list per split"
        )
    return files


def is_list(path: Path) -> bool:
    """Whether a file can be an annotation, by its name."""
    is_hidden = path.name.startswith(".") or path.name in _NO_ANNOTATIONS
    return path.suffix.lower() in LIST_SUFFIXES and not is_hidden and path.is_file()


def _split_of(name: str) -> str | None:
    words = [_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLIT_WORDS]
    return words[-1] if words else None


class PersonPairs(PersonRetrievalBuilder):
    """A user's data set, from a flat list: each record has an image, a person and one or several captions."""

    BUILDER_CONFIG_CLASS = PersonPairsConfig
    BUILDER_CONFIGS = [PersonPairsConfig(name="person_pairs", layout=Layout("person_pairs", (), ()))]

    def _read_records(self) -> list[Record]:
        config: Any = self.config
        files = config.find_files()
        records = read_pairs(files, parse_columns(config.columns), config.checks, self._known)
        numbers = number_persons(record["person_id"] for record in records)
        return [record | {"person_id": numbers.get(record["person_id"], record["person_id"])} for record in records]


def read_pairs(files: Files, columns: Mapping[str, str], checks: Checks, known: Path | None = None) -> list[Record]:
    """Reads flat lists, and checks every record and every image; the records of an image are joined.

    Args:
        files: the lists, and the folder of the images.
        columns: the keys that are not named as usual, by role.
        checks: what happens to faulty images, captions and paths.
        known: see [`check_records`].

    Returns:
        One dict per image, as [`~eccl.dataset_scripts.annotations.read_records`] returns them. `person_id` is what the
        list has, a number or a text.

    Raises:
        ValueError: a column is missing, or there are faults; the message has the first 20 of them.
    """
    rows = read_rows(files, columns)
    parsed = Parsed(rows.source, rows.image_root, joins_images=True)
    first: dict[str, _Row] = {}
    for number, row in enumerate(rows.rows):
        _parse_row(parsed, number, row, rows.roles, first, checks)
    return check_records(parsed, checks, known)


@dataclass(frozen=True)
class _Rows:
    """The records of all lists, before they are checked.

    Attributes:
        source: the list, or the folder of several, for messages.
        image_root: the folder that the paths are relative to.
        roles: the key of each role.
        rows: the records.
    """

    source: str
    image_root: Path
    roles: dict[str, str]
    rows: list["_Row"]


def read_rows(files: Files, columns: Mapping[str, str]) -> _Rows:
    """Reads flat lists without checking their records.

    Raises:
        ValueError: a file cannot be read, a column is missing, or there are no records.
    """
    lists = {file: read_list(file) for file in files.annotations}
    source = str(next(iter(lists))) if len(lists) == 1 else str(files.folder)
    if not any(lists.values()):
        raise ValueError(f"{source} contains no records, it must contain at least one")
    keys = {key: None for entries in lists.values() for entry in entries if isinstance(entry, dict) for key in entry}
    roles = find_columns(list(keys), columns, source)
    rows = []
    for file, entries in lists.items():
        prefix = f"{file.relative_to(files.folder)} " if len(lists) > 1 and file.is_relative_to(files.folder) else ""
        texts = file.suffix.lower() in (".csv", ".tsv")
        values = {
            role: [_value(entry, key, strip=texts and role in ("person_id", "split")) for entry in entries]
            for role, key in roles.items()
        }
        if texts:
            values["person_id"] = _read_numbers(values["person_id"])
        for number, entry in enumerate(entries):
            row = {role: column[number] for role, column in values.items()}
            name = f"{prefix}record {number}"
            rows.append(_Row(name, entry, row, _start(file, files.folder), files.annotations[file]))
    return _Rows(source, _choose_root(files.folder, rows), roles, rows)


@dataclass(frozen=True)
class _Row:
    """One record of a list: `values` has the value of each role, `start` the folder that its path is relative to."""

    name: str
    entry: Any
    values: dict[str, Any]
    start: str
    split: str | None


def _value(entry: Any, key: str, strip: bool) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    return value.strip() if strip and isinstance(value, str) else value


def _read_numbers(persons: list[Any]) -> list[Any]:
    """Reads the persons of a table as whole numbers if all of them are; `1` and `01` must not become one person."""
    texts = set(persons)
    if all(isinstance(text, str) and _WHOLE_NUMBER.fullmatch(text) for text in texts):
        numbers = {text: int(text) for text in texts}
        if len(set(numbers.values())) == len(texts):
            return [numbers[person] for person in persons]
    return persons


def _start(file: Path, folder: Path) -> str:
    """Returns the folder that the paths of a list are relative to; a `metadata.csv` has those of its own folder."""
    if file.name in METADATA_FILES and file.parent != folder and file.is_relative_to(folder):
        return str(file.parent.relative_to(folder))
    return ""


def _choose_root(folder: Path, rows: Iterable[_Row]) -> Path:
    """Chooses `imgs/` if there is such a folder, unless the paths of the list are relative to the folder above it."""
    images = folder / "imgs"
    some = [row.values.get("image") for row in list(rows)[:100] if not row.start]
    is_above = any(isinstance(path, str) and path and (folder / path).is_file() for path in some if _is_short(path))
    return images if images.is_dir() and some and not is_above else folder


def _is_short(path: Any) -> bool:
    return isinstance(path, str) and len(path) < 1000 and "\0" not in path


def _parse_row(
    parsed: Parsed, number: int, row: _Row, roles: Mapping[str, str], first: dict[str, _Row], checks: Checks
) -> None:
    """Adds a record, or its faults, to what is parsed already; `first` has the first sound row of each role."""
    captions, path = row.values["captions"], row.values["image"]
    if checks.on_bad_caption == "skip" and captions is not None:
        captions = keep_good_captions(parsed, row.name, captions if isinstance(captions, list) else [captions])
        if not captions:
            return
    faults = list(_find_faults(row, roles, captions))
    for role in () if faults else ("captions", "person_id"):
        kind = _kind(row.values[role])
        other = first.setdefault(role, row)
        if kind != _kind(other.values[role]):
            faults.append(
                f"{roles[role]} is {shorten(row.values[role])}, {kind}, but {other.name} has "
                f"{_kind(other.values[role])} there: all records must have the same type"
            )
    if faults:
        parsed.problems += [f"{row.name}: {fault}" for fault in faults]
        return
    split = row.values.get("split") or row.split or "train"
    full_path = os.path.join(row.start, path)
    parsed.records.append(
        {
            "number": number,
            "name": row.name,
            "split": SPLIT_ALIASES.get(split, split),
            "captions": list(captions) if isinstance(captions, list) else [captions],
            "person_id": row.values["person_id"],
            "file_path": full_path,
            "image": str(parsed.image_root / full_path),
        }
    )


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else "a text" if isinstance(value, str) else "a number"


def _find_faults(row: _Row, roles: Mapping[str, str], captions: object) -> Iterator[str]:
    """Finds the faults of one record without looking at the others."""
    if not isinstance(row.entry, dict):
        yield f"is a {type(row.entry).__name__}, it must be an object"
        return
    if has_key_twice(row.entry):
        yield "contains a key twice"
        return
    missing = [key for role, key in roles.items() if role not in ("split", "file_path") and key not in row.entry]
    yield from (f"{key} is missing" for key in missing)
    if roles["captions"] not in missing:
        find = find_caption_faults if isinstance(captions, list) else find_text_faults
        yield from find(captions, roles["captions"])
    if roles["person_id"] not in missing:
        yield from find_person_faults(row.values["person_id"], roles["person_id"])
    if roles["image"] not in missing:
        yield from find_path_faults(row.values["image"], roles["image"], "the folder of the images")
    split = row.values.get("split")
    if split not in (None, "") and not (isinstance(split, str) and _SPLIT_NAME.fullmatch(split)):
        yield f"{roles['split']} is {shorten(split)}, it must be the name of a split: letters, digits and _"


__all__ = ["METADATA_FILES", "PersonPairs", "PersonPairsConfig", "find_lists", "is_list", "read_pairs"]
