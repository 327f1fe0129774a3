"""The columns of a gallery: what a picture can be described by, and the filter over it."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from os import PathLike
from typing import Any, cast

from PIL import Image

from .store import LONGEST_NAME, NO_TIME, Condition

Value = str | int | float | bool
# The columns that every gallery has, and a caller may set.
_KNOWN_COLUMNS = ("camera", "time", "tracklet")
# What these columns hold if a value is unknown. The store has no value for it in them; an own column has none then.
UNKNOWN = {"camera": "", "tracklet": "", "time": NO_TIME}
# The columns that a gallery fills in by itself.
_RESERVED = ("id", "vector", "path", "width", "height", "added", "size", "modified", "score")
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}
# The longest sentence of a query, in characters.
LONGEST_QUERY = 1_000
# The columns of every gallery that a filter may name, with their types.
_FILTERED = {"camera": "str", "tracklet": "str", "width": "int", "height": "int"}
# Milvus keeps the further columns of a row in one field of at most 65,536 bytes.
_LONGEST_TEXT = 10_000
# The range of times that Python can write as dates, in milliseconds.
_FIRST_TIME, _LAST_TIME = -62_135_596_800_000, 253_402_300_799_999


@dataclass(frozen=True)
class Picture:
    """A picture to add to a gallery.

    Args:
        image: a path, a PIL image, or what `datasets` gives with `Image(decode=False)`: a dict with `bytes` and `path`.
        columns: values by name: `camera` (a text), `time` (a `datetime`, a text in ISO form, or milliseconds since
            1970), `tracklet` (a text), and any others.
        path: the name of a picture that has no file.
    """

    image: str | PathLike[str] | Image.Image | Mapping[str, Any]
    columns: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None


@dataclass(frozen=True)
class Where:
    """A filter. A picture must fulfil all conditions.

    Args:
        camera: a camera, or several; none stands for all.
        start: the earliest time, included: a `datetime`, or a text in ISO form. Without a time zone it is UTC.
        stop: the latest time, excluded.
        columns: by name the value that a column must have, or a list of allowed values.
    """

    camera: str | Sequence[str] = ()
    start: datetime | str | None = None
    stop: datetime | str | None = None
    columns: Mapping[str, Value | Sequence[Value]] = field(default_factory=dict)

    def conditions(self, types: Mapping[str, str]) -> list[Condition]:
        """Makes the conditions for the store.

        Args:
            types: the types of the gallery's own columns, by name.

        Raises:
            ValueError: a column is unknown, a value is of another type than the column, a time cannot be read, or the
                start is not before the stop.
        """
        cameras = _list("camera", self.camera)
        conditions = [Condition("camera", "in", [_read_name("camera", each) for each in cameras])] if cameras else []
        start, stop = (None if time is None else read_time(time) for time in (self.start, self.stop))
        if start is not None and stop is not None and start >= stop:
            raise ValueError(f"the start {self.start} is not before the stop {self.stop}")
        if start is not None:
            conditions.append(Condition("time", ">=", start))
        if stop is not None or start is not None:
            # A picture without a time is in no period.
            conditions.append(Condition("time", "<", NO_TIME if stop is None else stop))
        known = {**types, **_FILTERED}
        for name, allowed in self.columns.items():
            if name not in known:
                raise ValueError(f"the gallery has no column {name!r}, its columns are {', '.join(sorted(known))}")
            values = _list(name, allowed)
            conditions.append(Condition(name, "in", [convert(name, value, known[name]) for value in values]))
        return conditions


def read_time(value: object) -> int:
    """Reads a time as milliseconds since 1970 in UTC.

    Args:
        value: a `datetime`, a text in ISO form (both are UTC if they have no time zone), or the milliseconds.

    Raises:
        ValueError: it is none of these, or not between the years 1 and 9999.
    """
    time = value
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time.strip())
        except ValueError:
            raise ValueError(
                f"{value!r} is no time: it must be in ISO form, for example 2026-05-31T14:30:00+02:00"
            ) from None
    if isinstance(time, datetime):
        time = time if time.tzinfo else time.replace(tzinfo=UTC)
        # With its time zone, a time of the year 1 can lie before it.
        time = (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    if isinstance(time, int) and not isinstance(time, bool) and _FIRST_TIME <= time <= _LAST_TIME:
        return time
    raise ValueError(f"{value!r} is no time: it must be a datetime, a text in ISO form or milliseconds since 1970")


def _list(name: str, allowed: object) -> list[Any]:
    """Makes a list of the allowed values of a column: one value, or several."""
    if isinstance(allowed, (str, int, float)):
        return [allowed]
    if isinstance(allowed, Collection):
        return list(allowed)
    raise ValueError(f"{name} is {allowed!r}, it must be a value or a list of values")


def show_time(milliseconds: int) -> datetime | None:
    """Turns a time of the store into a `datetime` in UTC; `None` if it is unknown."""
    if milliseconds == NO_TIME:
        return None
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=milliseconds)


def read_columns(given: Mapping[str, Any], types: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Checks the columns of a picture, and converts them to what the store keeps.

    Args:
        given: values by name; `None` stands for an unknown value.
        types: the types of the gallery's own columns, by name.

    Returns:
        The values, and the types of columns that the gallery does not have yet.

    Raises:
        ValueError: a name cannot be that of a column, or a value is of a wrong type. The message names both.
    """
    values: dict[str, Any] = {}
    new: dict[str, str] = {}
    for name, value in given.items():
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if name == "time":
            values[name] = read_time(value)
        elif name in _KNOWN_COLUMNS:
            values[name] = _read_name(name, value)
        elif name in _RESERVED or not (name.isascii() and name.isidentifier()):
            raise ValueError(
                f"{name!r} cannot be a column: a name consists of letters, digits and _, and is not one of "
                + ", ".join(_RESERVED)
            )
        else:
            kind = types.get(name) or new.setdefault(name, type(value).__name__)
            values[name] = convert(name, value, kind)
    return values, new


def convert(name: str, value: object, kind: str) -> Value:
    """Converts a value to the type of a column; only whole numbers are converted, to `float`.

    Raises:
        ValueError: it is of another type, or a text is too long.
    """
    if kind not in _TYPES:
        raise ValueError(f"{name} is {value!r} of type {kind}, it must be a text, a number or a truth value")
    if kind == "float" and type(value) is int:
        value = float(value)
    if type(value) is not _TYPES[kind]:
        raise ValueError(f"{name} is {value!r} of type {type(value).__name__}, the column has the type {kind}")
    if isinstance(value, str):
        return _check_text(name, value, _LONGEST_TEXT)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, it must be finite")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} is {value!r}, it must fit in 64 bits")
    return cast(Value, value)


def parse(name: str, text: str, kind: str) -> Value:
    """Reads a value of a column from a text, as commands and links have it.

    Raises:
        ValueError: the text is no value of the column's type.
    """
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        return cast(Value, _TYPES[kind](text))
    except (KeyError, ValueError):
        raise ValueError(f"{name} is {text[:80]!r}, the column has the type {kind}") from None


def _read_name(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r} of type {type(value).__name__}, it must be a text")
    return _check_text(name, value, LONGEST_NAME)


def _check_text(name: str, text: str, longest: int) -> str:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {text!r}, which is not valid text") from None
    if size > longest:
        raise ValueError(f"{name} has {size:,} bytes, at most {longest:,} are allowed: {text[:60]!r} ...")
    if any(ord(character) < 32 and character not in "\n\r\t" for character in text):
        raise ValueError(f"{name} is {text!r}, it must not contain control characters")
    return text


def spread_columns(columns: Mapping[str, Any] | None, pictures: Iterable[Any]) -> Iterable[tuple[Any, dict[str, Any]]]:
    """Gives each picture its values of columns that are constant, or lists with a value for each picture.

    Raises:
        ValueError: a list has another length than the pictures.
    """
    lists = {
        name: value
        for name, value in (columns or {}).items()
        if isinstance(value, Sequence) and not isinstance(value, str)
    }
    constants = {name: value for name, value in (columns or {}).items() if name not in lists}
    count = 0
    for count, picture in enumerate(pictures, start=1):
        for name, values in lists.items():
            if len(values) < count:
                raise ValueError(f"the column {name} has {len(values):,} values, but there are more pictures")
        yield picture, constants | {name: values[count - 1] for name, values in lists.items()}
    for name, values in lists.items():
        if len(values) > count:
            raise ValueError(f"the column {name} has {len(values):,} values, but there are only {count:,} pictures")


__all__ = [
    "LONGEST_QUERY",
    "UNKNOWN",
    "Picture",
    "Where",
    "convert",
    "parse",
    "read_columns",
    "read_time",
    "show_time",
    "spread_columns",
]
