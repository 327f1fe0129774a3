"""Sources of pictures for a gallery: folders, globs, files, lists and data sets, with camera, time and other columns.

The columns of a picture come from the columns of a list, from its path by a [`PathPattern`], or from a metadata table.
Each function gives the same pictures in the same order in every process.
"""

import glob
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..dataset_scripts.list_files import LIST_SUFFIXES, has_key_twice, read_list, require_size
from .columns import Picture, read_time

if TYPE_CHECKING:
    from datasets import Dataset

_logger = logging.getLogger(__name__)
# The names that a column of paths may have in a list; the first of them that the list has is read.
PATH_COLUMNS = ("path", "file_path", "image", "file_name", "filename")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Other texts of digits are identifiers: with zeros at the start ("007"), with an exponent alone ("12e4"), or so long
# that a number would not keep all digits.
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+(e[+-]?[0-9]+)?|e[+-][0-9]+)?", re.IGNORECASE)
# What each part of a format of `datetime.strptime` can match. The parts that depend on the language are left out.
_TIME_PARTS = {
    "Y": "[0-9]{4}",
    **dict.fromkeys("ymdHIMS", "[0-9]{1,2}"),
    "j": "[0-9]{1,3}",
    "f": "[0-9]{1,6}",
    "p": "[AaPp][Mm]",
    "z": "(?:Z|[+-][0-9]{2}:?[0-9]{2})",
    "%": "%",
}


class PathPattern:
    """Reads columns from the end of a path, for example `cam{camera}/{time:%Y%m%d_%H%M%S}_*.jpg`.

    - `{camera}`, `{tracklet}` or any other name: a text within the name of a file or folder, as short as possible.
    - `{frame:d}`: a whole number, for any name other than camera, tracklet and time.
    - `{time:FORMAT}`: a time in a format of `datetime.strptime`, UTC unless the format has `%z`. The format may contain
      a slash. The time may come in several pieces, for example `{time:%Y-%m-%d}/cam{camera}_{time:%H%M%S}.jpg`.
    - `*` matches any characters of one file or folder name, `**/` any number of folders. Everything else is literal.

    Args:
        text: the pattern. It must match the whole path from the start of a folder's or file's name on; a pattern that
            starts with `/` must match the absolute path.

    Attributes:
        names: the columns that it reads.

    Raises:
        ValueError: the pattern is malformed, names no column, names one twice, or its time has no date.
    """

    def __init__(self, text: str):
        self.text = text
        self.names: list[str] = []
        self._whole_numbers: set[str] = set()
        self._time_formats: list[str] = []
        expression = ""
        for token in re.findall(r"\{[^{}]*\}|\*\*/|\*|[^{}*]+|[{}]", text):
            if token in ("{", "}"):
                raise ValueError(f"the pattern {text!r} has a brace without its partner")
            if token.startswith("{"):
                expression += self._read_column(token[1:-1])
            else:
                expression += {"**/": "(?:[^/]+/)*", "*": "[^/]*"}.get(token, re.escape(token))
        if "**" in text.replace("**/", ""):
            raise ValueError(f"the pattern {text!r} has ** without a slash behind it: write **/ for any folders")
        if not self.names:
            raise ValueError(f"the pattern {text!r} names no column, such as {{camera}} or {{time:%Y%m%d_%H%M%S}}")
        if self._time_formats:
            try:
                # strptime itself refuses a part that occurs twice.
                datetime.strptime("", "\n".join(self._time_formats))
            except re.error as error:
                raise ValueError(f"the pattern {text!r} has a part of the time twice: {error}") from error
            except ValueError:
                pass  # The empty text has no time, of course.
            parts = set(re.findall("%(.)", "".join(self._time_formats)))
            if not (parts & {"Y", "y"} and ("j" in parts or {"m", "d"} <= parts)):
                raise ValueError(f"the time in the pattern {text!r} has no whole date: it needs %Y, %m and %d")
        start = "" if text.startswith("/") else "(?:.*/)?"
        self._expression = re.compile(start + expression, re.DOTALL)

    def _read_column(self, column: str) -> str:
        """Notes a column of the pattern, and returns the regular expression that finds its value."""
        name, colon, form = column.partition(":")
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"the pattern {self.text!r} has the column {name!r}: a name has only letters, digits and _, and starts "
                "with no digit"
            )
        if name == "time":
            if not form:
                raise ValueError(f"the pattern {self.text!r} needs a format for the time, such as {{time:%Y%m%d}}")
            self.names += [] if self._time_formats else [name]
            self._time_formats.append(form)
            return f"(?P<time_{len(self._time_formats)}>{self._make_time_expression(form)})"
        if name in self.names:
            raise ValueError(f"the pattern {self.text!r} has {{{name}}} twice")
        if colon and (form != "d" or name in ("camera", "tracklet")):
            raise ValueError(
                f"the pattern {self.text!r} has {{{column}}}: only {{time:FORMAT}} has a format, and own columns may "
                "have :d for whole numbers"
            )
        self.names.append(name)
        if colon:
            self._whole_numbers.add(name)
        # The names of the groups have a prefix, so that they differ from those of the time.
        return f"(?P<column_{name}>{'[0-9]{1,18}' if colon else '[^/]+?'})"

    def _make_time_expression(self, form: str) -> str:
        expression = ""
        for token in re.findall("%.?|[^%]+", form, re.DOTALL):
            if not token.startswith("%"):
                expression += re.escape(token)
            elif token[1:] in _TIME_PARTS:
                expression += _TIME_PARTS[token[1:]]
            else:
                known = ", ".join(f"%{part}" for part in _TIME_PARTS)
                raise ValueError(f"the pattern {self.text!r} has {token} in its time, it may have {known}")
        return expression

    def match(self, path: str | Path) -> dict[str, Any] | None:
        """Reads the columns of a path: a dict of texts, whole numbers and a time with its zone; `None`: no match."""
        found = self._expression.fullmatch(Path(os.path.abspath(path)).as_posix())
        if found is None:
            return None
        values: dict[str, Any] = {}
        for name in self.names:
            if name == "time":
                pieces = [found[f"time_{number}"] for number in range(1, len(self._time_formats) + 1)]
                try:
                    time = datetime.strptime("\n".join(pieces), "\n".join(self._time_formats))
                except ValueError:
                    return None  # The thirteenth month, for example.
                values[name] = time if time.tzinfo else time.replace(tzinfo=UTC)
            else:
                value = found[f"column_{name}"]
                values[name] = int(value) if name in self._whole_numbers else value
        return values


def find_pictures(
    sources: str | Path | Sequence[str | Path],
    pattern: str | PathPattern | None = None,
    metadata: str | Path | None = None,
) -> list[Picture]:
    """Finds the pictures of sources, with their columns. The pictures are not opened.

    Args:
        sources: one or several of these:
            - a folder: all images in it and its subfolders, in the order of their paths;
            - an image file;
            - a glob such as `photos/cam*/**/*.jpg`, where `**` matches any number of folders: images and folders;
            - a text file (.txt) with the path of an image in each line;
            - a table (.csv, .tsv, .json, .jsonl, .parquet) with a column of paths (one of `PATH_COLUMNS`) and further
              columns, which become columns of the pictures.
            Paths in a file are relative to its folder.
        pattern: reads columns from each path. A warning counts the pictures that do not match it.
        metadata: a table as above. Its paths are relative to its folder or to a folder among the sources. A warning
            counts the pictures without a row, and another one the rows without a picture.

    Returns:
        The pictures, in the order of the sources; one that several sources contain comes once.

        Cells of CSV and TSV are texts. A column becomes one of whole numbers or of numbers if all its cells are;
        `camera` and `tracklet` stay texts, and so do numbers with zeros at the start or of more than 15 digits (whole
        numbers: 18). An empty cell is no value.

    Raises:
        ValueError: a source contains no picture, or a file cannot be read as a list; no picture matches the pattern or
            has a row in the metadata; two sources of columns give the same column; or a picture has two rows.
        FileNotFoundError: a source does not exist.
    """
    if isinstance(pattern, str):
        pattern = PathPattern(pattern)
    sources = [sources] if isinstance(sources, (str, Path)) else list(sources)
    if not sources:
        raise ValueError("there are no sources: name a folder, a glob, an image or a list")
    table = _Table.read(Path(metadata)) if metadata is not None else None
    if table and pattern and (both := sorted(set(pattern.names) & set(table.names))):
        raise ValueError(f"the pattern and {metadata} both give {', '.join(both)}: leave it out of one of them")
    found: dict[str, Picture] = {}
    for source in sources:
        for picture in _open_source(os.path.expanduser(source)):
            key = _key(picture.image)
            if key in found and picture.columns and found[key].columns and picture.columns != found[key].columns:
                raise ValueError(f"{picture.image} comes from two sources, with different columns")
            if key not in found or picture.columns:
                found[key] = picture
    if pattern:
        found = _add_columns(found, _match_all(pattern, found), f"the pattern {pattern.text!r}")
    if table:
        folders = [Path(source).expanduser() for source in sources if os.path.isdir(os.path.expanduser(source))]
        found = _add_columns(found, table.assign(found, folders), str(metadata))
    return list(found.values())


def from_dataset(dataset: "Dataset", columns: Sequence[str] = ()) -> Sequence[Picture]:
    """Makes the rows of a data set pictures; a row is read when its picture is wanted, and its image is not decoded.

    Args:
        dataset: a `datasets.Dataset` with a column `image`. Its column `file_path`, if there is one, names the
            pictures; otherwise they have the names of their files.
        columns: the columns that the pictures keep. A class label becomes its name, `None` is no value.

    Raises:
        ValueError: the data set has no images, or a column is missing or holds something else than texts, numbers,
            truth values, times or class labels.
    """
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"a data set of several splits: choose one of {', '.join(dataset)}")
    features = dataset.features
    if not isinstance(features.get("image"), datasets.Image):
        raise ValueError(f"the data set has no column image with images, it has {', '.join(features)}")
    for name in columns:
        if name not in features:
            raise ValueError(f"the data set has no column {name}, it has {', '.join(features)}")
        if not isinstance(features[name], (datasets.Value, datasets.ClassLabel)):
            raise ValueError(f"column {name} of the data set holds {features[name]}, it must hold single values")
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    wanted = {"image", "file_path", *columns} & set(features)
    return _DatasetPictures(undecoded.select_columns(sorted(wanted)), tuple(columns))


class _DatasetPictures(Sequence[Picture]):
    """The rows of a data set as pictures."""

    def __init__(self, dataset: "Dataset", columns: tuple[str, ...]):
        self._dataset, self._columns = dataset, columns

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | Sequence[Picture]:
        if isinstance(index, slice):
            return _DatasetPictures(self._dataset.select(range(len(self))[index]), self._columns)
        row = self._dataset[index]
        values = {name: row[name] for name in self._columns if row[name] is not None}
        for name in values:
            if hasattr(self._dataset.features[name], "int2str"):
                values[name] = self._dataset.features[name].int2str(values[name])
        image = row["image"]
        if image is None:
            raise ValueError(f"row {index} of the data set has no image")
        if image["bytes"] is None:
            return Picture(image["path"], values)
        return Picture(image, values, row.get("file_path") or image["path"])


def _key(image: Any) -> str:
    return os.path.abspath(image)


def _add_columns(
    pictures: Mapping[str, Picture], values: Mapping[str, Mapping[str, Any]], source: str
) -> dict[str, Picture]:
    """Adds columns to pictures, by their keys; both may not give the same column."""
    result = {}
    for key, picture in pictures.items():
        more = values.get(key, {})
        if both := sorted(picture.columns.keys() & more.keys()):
            raise ValueError(f"{source} and the list of {picture.image} both give {', '.join(both)}")
        result[key] = replace(picture, columns={**picture.columns, **more})
    return result


def _match_all(pattern: PathPattern, pictures: Mapping[str, Picture]) -> dict[str, dict[str, Any]]:
    values = {key: columns for key in pictures if (columns := pattern.match(key)) is not None}
    if missing := [key for key in pictures if key not in values]:
        if not values:
            raise ValueError(f"no path matches the pattern {pattern.text!r}, for example {missing[0]}")
        _logger.warning(
            f"{len(missing):,} of {len(pictures):,} pictures do not match the pattern {pattern.text!r} and get no "
            f"{', '.join(pattern.names)}, the first: {missing[0]}"
        )
    return values


def _open_source(source: str) -> list[Picture]:
    from ..processing_eccl import IMAGE_SUFFIXES, list_images

    suffix = os.path.splitext(source)[1].lower()
    if os.path.isdir(source):
        return [Picture(path) for path in list_images(source)]
    if os.path.exists(source):
        if suffix in IMAGE_SUFFIXES:
            return [Picture(Path(source))]
        if suffix == ".txt":
            return _read_paths(Path(source))
        if suffix in LIST_SUFFIXES:
            return _Table.read(Path(source)).make_pictures()
        raise ValueError(
            f"{source} is no source of pictures: its name must end in {', '.join((*IMAGE_SUFFIXES, '.txt'))} or "
            f"{', '.join(LIST_SUFFIXES)}"
        )
    if not glob.has_magic(source):
        raise FileNotFoundError(f"{source} does not exist")
    paths: list[Path] = []
    left_out: Counter[str] = Counter()
    for match in sorted(glob.glob(source, recursive=True)):
        if os.path.isdir(match):
            # `a/**` matches the folders below `a`, and their files as well.
            paths += [] if source.endswith("**") else list_images(match)
        elif (suffix := os.path.splitext(match)[1].lower()) in IMAGE_SUFFIXES:
            paths.append(Path(match))
        else:
            left_out[suffix or "files without a suffix"] += 1
    parts = ", ".join(f"{kind}: {count:,}" for kind, count in sorted(left_out.items()))
    if not paths:
        raise ValueError(f"{source} matches no image" + (f", only {parts}" if parts else ""))
    if parts:
        _logger.warning(f"{source} matches {len(paths):,} images; left out: {parts}")
    return [Picture(path) for path in paths]


def _read_paths(file: Path) -> list[Picture]:
    require_size(file)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error.reason} at byte {error.start:,}") from error
    paths = [Path(line.strip()).expanduser() for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"{file} contains no path")
    return [Picture(file.parent / path) for path in paths]


@dataclass
class _Table:
    """A table of pictures: the path of each row as it is written, and its other columns."""

    file: Path
    paths: list[str]
    rows: list[dict[str, Any]] = field(repr=False)

    @property
    def names(self) -> set[str]:
        return {name for row in self.rows for name in row}

    @classmethod
    def read(cls, file: Path) -> "_Table":
        file = file.expanduser()
        if not file.exists():
            raise FileNotFoundError(f"{file} does not exist")
        rows = read_list(file)
        if not rows:
            raise ValueError(f"{file} has no rows")
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or has_key_twice(row):
                raise ValueError(f"record {number} of {file} is not an object with different keys")
        column = next((name for name in PATH_COLUMNS if name in rows[0]), None)
        if column is None:
            raise ValueError(
                f"{file} has no column of paths ({', '.join(PATH_COLUMNS)}), it has {', '.join(map(str, rows[0]))}"
            )
        paths = []
        for number, row in enumerate(rows, start=1):
            path = row.pop(column, None)
            if not isinstance(path, str) or not path.strip():
                raise ValueError(f"record {number} of {file} has no path in the column {column}")
            paths.append(path.strip())
            for name, value in row.items():
                if isinstance(value, (list, dict)):
                    raise ValueError(f"record {number} of {file} has {json.dumps(value)[:60]} as {name}, not one value")
        if file.suffix.lower() in (".csv", ".tsv"):
            rows = _find_types(rows)
        for number, row in enumerate(rows, start=1):
            _read_fixed_columns(row, f"record {number} of {file}")
        return cls(file, paths, rows)

    def make_pictures(self) -> list[Picture]:
        pictures: dict[str, Picture] = {}
        for path, row in zip(self.paths, self.rows, strict=True):
            picture = Picture(self.file.parent / Path(path).expanduser(), row)
            if pictures.setdefault(_key(picture.image), picture) is not picture:
                raise ValueError(f"{self.file} has two rows for {path}")
        return list(pictures.values())

    def assign(self, pictures: Mapping[str, Picture], folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
        """Finds the picture of each row, below the folder of the table or below another one."""
        values: dict[str, dict[str, Any]] = {}
        unused: list[str] = []
        for path, row in zip(self.paths, self.rows, strict=True):
            keys = {_key(folder / Path(path).expanduser()) for folder in (self.file.parent, *folders)} & pictures.keys()
            if len(keys) > 1:
                raise ValueError(f"{self.file} has a row for {path}, which is in several folders: {sorted(keys)}")
            if not keys:
                unused.append(path)
            for key in keys:
                if key in values:
                    raise ValueError(f"{self.file} has two rows for {path}")
                values[key] = row
        if not values:
            raise ValueError(
                f"{self.file} has a row for none of the {len(pictures):,} pictures: its first row is for {unused[0]}, "
                f"the first picture is {next(iter(pictures))}"
            )
        if unused:
            _logger.warning(
                f"{len(unused):,} rows of {self.file} are for no picture among the sources, the first: {unused[0]}"
            )
        if missing := [key for key in pictures if key not in values]:
            _logger.warning(
                f"{len(missing):,} of {len(pictures):,} pictures have no row in {self.file}, the first: {missing[0]}"
            )
        return values


def _find_types(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leaves empty cells out, and makes the columns of numbers among columns of texts numbers."""
    rows = [{name: value.strip() for name, value in row.items() if value.strip()} for row in rows]
    types: dict[str, type] = {}
    for name in {name for row in rows for name in row} - {"camera", "tracklet", "time"}:
        cells = [row[name] for row in rows if name in row]
        if all(_WHOLE_NUMBER.fullmatch(cell) for cell in cells):
            types[name] = int
        elif all(_NUMBER.fullmatch(cell) for cell in cells):
            types[name] = float
    return [{name: types.get(name, str)(value) for name, value in row.items()} for row in rows]


def _read_fixed_columns(row: dict[str, Any], place: str) -> None:
    """Checks `camera`, `tracklet` and `time` of a row, makes the last milliseconds, and leaves `null` out."""
    for name in [name for name, value in row.items() if value is None]:
        del row[name]
    for name in {"camera", "tracklet"} & row.keys():
        if not isinstance(row[name], (str, int)) or isinstance(row[name], bool):
            raise ValueError(f"{place} has {row[name]!r} as {name}, it must be a text")
        row[name] = str(row[name])
    if "time" in row:
        time = row["time"]
        try:
            row["time"] = read_time(int(time) if isinstance(time, str) and _WHOLE_NUMBER.fullmatch(time) else time)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error


__all__ = ["PATH_COLUMNS", "PathPattern", "find_pictures", "from_dataset"]
