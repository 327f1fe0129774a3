"""Reads lists of records from JSON, JSON Lines, CSV, TSV and Parquet; a fault of a file is an error that names it."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LIST_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# Bytes: more than a million images.
_LARGEST_FILE = 512 * 2**20
# Characters. Python's own limit of 131,072 would hide which record has such a field.
_LARGEST_FIELD = 2**28


def read_list(file: Path) -> list[Any]:
    """Reads the records of a file, by its suffix.

    Args:
        file: JSON (a list of objects), JSON Lines (one object a line), CSV or TSV with a header, or Parquet.

    Raises:
        ValueError: the file is not in this format, is not UTF-8, or has more than 512 MiB.
    """
    require_size(file)
    suffix = file.suffix.lower()
    if suffix == ".json":
        return read_json_list(file)
    if suffix == ".jsonl":
        return list(_read_json_lines(file))
    if suffix in (".csv", ".tsv"):
        return _read_table(file, "," if suffix == ".csv" else "\t")
    if suffix == ".parquet":
        read_parquet_schema(file)
        return pq.read_table(file).to_pylist()
    raise ValueError(f"{file} cannot be read as a list: its name must end in {', '.join(LIST_SUFFIXES)}")


def read_parquet_schema(file: Path) -> pa.Schema:
    """Reads the names and the types of the columns of a Parquet file.

    Raises:
        ValueError: it is no Parquet file.
    """
    try:
        return pq.read_schema(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not Parquet: {error}") from error


def require_size(file: Path) -> None:
    """Refuses a file of more than 512 MiB."""
    if (size := file.stat().st_size) > _LARGEST_FILE:
        raise ValueError(f"{file} has {size:,} bytes, the limit is {_LARGEST_FILE:,}")


def read_json_list(file: Path) -> list[Any]:
    """Reads a JSON file that contains a list of records."""
    content = _parse_json(_read_text(file), str(file))
    if not isinstance(content, list):
        raise ValueError(f"{file} contains a {type(content).__name__}, it must contain a list of records")
    return content


def has_key_twice(entry: object) -> bool:
    """Whether a key occurs twice in the object of a JSON file."""
    return isinstance(entry, _RepeatedKeys)


class _RepeatedKeys(dict[str, Any]):
    """A JSON object in which a key occurs twice."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _RepeatedKeys(values)


def _parse_json(text: str, name: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_make_object)
    # ValueError is more than JSONDecodeError: a number can have thousands of digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file} is not JSON: line {line} is not UTF-8: {error}") from error


def _read_json_lines(file: Path) -> Iterator[Any]:
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        if line.strip():
            yield _parse_json(line, f"{file}, line {number},")


def _read_table(file: Path, delimiter: str) -> list[dict[str, Any]]:
    """Reads a table; a file that is not UTF-8 or has a broken quote is an error with the number of the line."""
    limit = csv.field_size_limit(_LARGEST_FIELD)
    # Without strict, Python reads a quote that is never closed as one field up to the end of the file.
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            return _read_rows(file, reader)
    except UnicodeDecodeError as error:
        content = file.read_bytes()
        line = next(number for number, each in enumerate(content.split(b"\n"), start=1) if not _is_utf8(each))
        raise ValueError(f"{file}: line {line} is not UTF-8: {error.reason}; save the file as UTF-8") from error
    finally:
        csv.field_size_limit(limit)


def _read_rows(file: Path, reader: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    start = 1
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{file}: the record that starts in line {start} has a broken quote or field: {error}"
            ) from error
        if row is None:
            break
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header):
                raise ValueError(f"{file}: a column occurs twice in the header: {', '.join(header)}")
        elif len(row) != len(header):
            raise ValueError(f"{file}: line {start} has {len(row)} fields, the header has {len(header)}")
        else:
            rows.append(dict(zip(header, row, strict=True)))
    return rows


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


__all__ = ["LIST_SUFFIXES", "has_key_twice", "read_json_list", "read_list", "read_parquet_schema", "require_size"]
