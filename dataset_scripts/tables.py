"""Data sets whose images are inside (Parquet, the Hub, ...): finds the columns, checks all rows, and joins images.

The rows become those of the benchmarks' builders, see [`~eccl.dataset_scripts.base.FEATURES`].
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.table import MemoryMappedTable
from filelock import FileLock

from ..utils.files import complete_folder
from . import CODE_HASH
from .base import FEATURES, describe_file, undecoded_images
from .columns import USUAL_NAMES, find_columns
from .faults import find_person_faults, find_text_faults
from .image_checks import map_images
from .messages import format_problems, shorten
from .persons import number_persons
from .records import Checks

_BATCH = 1_000
_FAULTS_FILE = "faults.json"


@dataclass
class _Faults:
    """The faults of a split.

    Attributes:
        problems: a line for each fault that is never skipped.
        images: a line for each row whose image cannot be used.
        captions: a line for each caption that cannot be used, by its number among the captions of all rows.
    """

    problems: list[str] = field(default_factory=list)
    images: dict[int, str] = field(default_factory=dict)
    captions: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Columns:
    """The columns of a split without its images.

    Attributes:
        persons: the person of each row, as it is stored.
        captions: the captions of all rows, one after the other.
        lengths: `(rows,)`: the number of captions of each row.
        paths: the path of each row; `None` if no column has paths.
    """

    persons: list[Any]
    captions: pa.Array
    lengths: np.ndarray
    paths: pa.Array | None


def prepare_tables(
    splits: Mapping[str, datasets.Dataset],
    source: str,
    columns: Mapping[str, str],
    checks: Checks,
    cache_dir: Path,
    roots: Sequence[Path],
) -> tuple[datasets.DatasetDict, list[str]]:
    """Makes the rows of a data set those of the benchmarks' builders.

    Rows of the same image are joined: those with the same path if there is a column of paths, else those with the same
    bytes, if each row has one caption.

    Args:
        splits: the splits, as the library loads them.
        source: name of the data set, for messages.
        columns: the columns that are not named as usual, by role.
        checks: what happens to faulty images and captions.
        cache_dir: folder that keeps the result of the checks, so that they run once.
        roots: the folders that images may be in if a table names them by their paths.

    Returns:
        The splits, and a line for each caption that was left out.

    Raises:
        ValueError: a column is missing or has a wrong type, or rows have faults; the message has the first 20 of them.
    """
    roles = {
        split: find_roles(dataset.features, columns, f"{source}, split {split},") for split, dataset in splits.items()
    }
    splits = {split: dataset.cast_column(roles[split]["image"], datasets.Image()) for split, dataset in splits.items()}
    digest = _digest(splits, roles, checks)
    folder = cache_dir / "eccl-checked-tables" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Another process may be checking the same data set: this one waits for its result.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            with complete_folder(folder) as unfinished:
                _check_and_write(splits, roles, checks, unfinished, roots)
    content = json.loads((folder / _FAULTS_FILE).read_text(encoding="utf-8"))
    problems = content["problems"]
    if problems:
        raise ValueError(f"{source}: {len(problems)} problems: {format_problems(problems)}")
    for name in ("images", "captions"):
        if lines := content[name]:
            warnings.warn(f"{source}: {len(lines)} {name} are left out: {format_problems(lines)}", stacklevel=3)
    prepared = datasets.DatasetDict()
    for number, (split, dataset) in enumerate(splits.items()):
        others = datasets.Dataset(
            MemoryMappedTable.from_file(str(folder / f"{number}.arrow")), fingerprint=f"{digest[:32]}-{number}"
        )
        prepared[split] = _join(dataset, roles[split]["image"], others, content["rows"][split])
    return prepared, content["captions"]


def stream_rows(
    rows: datasets.IterableDataset, roles: Mapping[str, str], source: str, checks: Checks, roots: Sequence[Path]
) -> datasets.IterableDataset:
    """Makes the rows of a stream those of [`~eccl.dataset_scripts.sources.DataSource.stream`].

    Args:
        rows: the rows of one split.
        roles: the column of each role, from [`find_roles`].
        source: name of the data set, for messages.
        checks: what happens to faulty captions.
        roots: the folders that images may be in if a table names them by their paths.
    """
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "person_id": rows.features[roles["person_id"]],
            "captions": datasets.List(datasets.Value("string")),
            "file_path": datasets.Value("string"),
        }
    )
    rows = rows.select_columns(list(dict.fromkeys(column for role, column in roles.items() if role != "split")))
    rows = rows.cast_column(roles["image"], datasets.Image(decode=False))

    def read(row: dict[str, Any]) -> dict[str, Any]:
        image, person, captions = (row[roles[role]] for role in ("image", "person_id", "captions"))
        # The rows of a stream have no numbers that stay the same: the bytes name an image that has no path.
        content = b"" if image is None else image["bytes"] or str(image["path"]).encode("utf-8", "surrogateescape")
        path = row[roles["file_path"]] if "file_path" in roles else hashlib.sha256(content).hexdigest()[:16]
        captions = captions if isinstance(captions, list) else [captions]
        faults_of = {index: list(find_text_faults(each, roles["captions"])) for index, each in enumerate(captions)}
        good = [each for index, each in enumerate(captions) if not faults_of[index]]
        faults = list(find_person_faults(_to_whole(person), roles["person_id"]))
        if (fault := _find_image_fault(image, roots)) is not None:
            faults.append(f"{roles['image']} {fault}")
        if not captions:
            faults.append(f"{roles['captions']} is empty, it must have at least one caption")
        if checks.on_bad_caption == "error":
            faults += [fault for found in faults_of.values() for fault in found]
        if faults:
            raise ValueError(f"{source}, the row of {shorten(path)}: {'; '.join(faults)}")
        return {"image": image, "person_id": person, "captions": good, "file_path": path}

    rows = rows.map(read, remove_columns=list(rows.features), features=features)
    return rows.filter(lambda row: bool(row["captions"])) if checks.on_bad_caption == "skip" else rows


def _to_whole(person: Any) -> Any:
    """Turns a float without a fraction into a whole number: pandas makes floats if one number is missing."""
    return int(person) if isinstance(person, float) and person.is_integer() else person


def _digest(splits: Mapping[str, datasets.Dataset], roles: Mapping[str, Mapping[str, str]], checks: Checks) -> str:
    """Returns a digest of everything that the result of the checks depends on."""
    digest = hashlib.sha256(repr((sorted(roles.items()), checks, CODE_HASH)).encode())
    for split, dataset in splits.items():
        digest.update(f"{split} {dataset._fingerprint}".encode())
        image = roles[split]["image"]
        for rows in dataset.select_columns(image).with_format("arrow").iter(_BATCH):
            contents = pc.struct_field(rows[image], "bytes")
            if contents.null_count:
                # The images are files, which can change although the table that names them stays the same.
                for path in pc.struct_field(rows[image], "path").filter(pc.is_null(contents)).to_pylist():
                    digest.update(describe_file(Path(path or "")))
    return digest.hexdigest()


def _check_and_write(
    splits: Mapping[str, datasets.Dataset],
    roles: Mapping[str, Mapping[str, str]],
    checks: Checks,
    folder: Path,
    roots: Sequence[Path],
) -> None:
    """Checks all rows, and writes what was found, and the columns without the images of each split as `N.arrow`."""
    parts = {split: _read_columns(dataset, roles[split]) for split, dataset in splits.items()}
    faults = {
        split: _check_split(split, dataset, roles[split], parts[split], roots) for split, dataset in splits.items()
    }
    content: dict[str, Any] = {"problems": [line for each in faults.values() for line in each.problems], "rows": {}}
    for name, choice in (("images", checks.on_bad_image), ("captions", checks.on_bad_caption)):
        lines = [line for each in faults.values() for line in getattr(each, name).values()]
        content["problems"] += lines if choice == "error" else []
        content[name] = lines if choice == "skip" else []
    if not content["problems"]:
        kept: dict[str, tuple[np.ndarray, pa.Table]] = {}
        for split, dataset in splits.items():
            try:
                kept[split] = _assemble(split, dataset, roles[split], parts[split], faults[split])
            except ValueError as error:
                content["problems"].append(str(error))
        persons = {split: [parts[split].persons[row] for row in rows.tolist()] for split, (rows, _) in kept.items()}
        numbers = number_persons(person for part in persons.values() for person in part)
        for number, (split, (rows, table)) in enumerate(kept.items()):
            ids = pa.array([numbers.get(person, person) for person in persons[split]], pa.int32())
            table = table.add_column(0, "person_id", ids)
            # Usually no row was joined or left out, and the list would be long.
            is_whole = len(rows) == len(splits[split])
            content["rows"][split] = None if is_whole else rows.tolist()
            with pa.OSFile(str(folder / f"{number}.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
                out.write_table(table, max_chunksize=_BATCH)
    (folder / _FAULTS_FILE).write_text(json.dumps(content), encoding="utf-8")


def _join(
    dataset: datasets.Dataset, image_column: str, others: datasets.Dataset, rows: list[int] | None
) -> datasets.Dataset:
    """Puts the images, those of `rows` if it is not `None`, and the other columns together."""
    images = dataset.select_columns(image_column)
    if image_column != "image":
        images = images.rename_column(image_column, "image")
    if rows is not None:
        images = images.select(rows)
    joined = datasets.concatenate_datasets([images, others], axis=1)
    return joined.cast(FEATURES) if joined.features != FEATURES else joined


def find_roles(features: datasets.Features, columns: Mapping[str, str], source: str) -> dict[str, str]:
    """Finds the column of each role, by its name, and by its type if there is one column of images.

    Raises:
        ValueError: a column is missing, or has a wrong type.
    """
    schema = features.arrow_schema
    images = [name for name in features if is_image(schema.field(name).type)]
    if len(images) == 1:
        columns = {"image": images[0], **columns}
    if "split" in columns:
        raise ValueError(
            f"columns: split is {columns['split']!r}, but it applies to lists only: {source} has its splits"
        )
    roles = find_columns(list(features), columns, source)
    if "file_path" not in columns:
        # A column of images can have a name that is usual for paths.
        paths = [name for name in USUAL_NAMES["file_path"] if name in features and _is_text(schema.field(name).type)]
        roles = {role: name for role, name in roles.items() if role != "file_path"}
        roles |= {"file_path": paths[0]} if paths else {}
    allowed = {
        "image": (is_image, "a picture (the images of this data set must be inside it, not named by a path)"),
        "person_id": (_is_person, "a whole number or a text"),
        "captions": (lambda type_: _is_text(type_) or _is_text_list(type_), "a text or a list of texts"),
        "file_path": (_is_text, "a text"),
    }
    problems = []
    for role, (fits, needed) in allowed.items():
        if role in roles:
            type_ = schema.field(roles[role]).type
            if not fits(type_):
                problems.append(f"column {roles[role]} ({role}) has type {type_}, it must be {needed}")
    if problems:
        raise ValueError(f"{source} cannot be used: {'; '.join(problems)}")
    return roles


def _is_text(type_: pa.DataType) -> bool:
    return pa.types.is_string(type_) or pa.types.is_large_string(type_)


def _is_text_list(type_: pa.DataType) -> bool:
    return (pa.types.is_list(type_) or pa.types.is_large_list(type_)) and _is_text(type_.value_type)


def _is_person(type_: pa.DataType) -> bool:
    return _is_text(type_) or pa.types.is_integer(type_) or pa.types.is_floating(type_)


def is_image(type_: pa.DataType) -> bool:
    """Whether a column of this type can have images inside: bytes, or what the library makes of an image."""
    if pa.types.is_struct(type_):
        return {type_.field(index).name for index in range(type_.num_fields)} == {"bytes", "path"}
    return pa.types.is_binary(type_) or pa.types.is_large_binary(type_)


def _read_columns(dataset: datasets.Dataset, roles: Mapping[str, str]) -> _Columns:
    names = [roles[role] for role in ("person_id", "captions", "file_path") if role in roles]
    table = dataset.select_columns(list(dict.fromkeys(names))).with_format("arrow")[:].combine_chunks()
    captions = _only_chunk(table[roles["captions"]])
    if _is_text(captions.type):
        lengths = np.ones(len(captions), dtype=np.int64)
    else:
        # A row without captions counts as a row with an empty list.
        lengths = pc.fill_null(pc.list_value_length(captions), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        captions = captions.flatten()
    paths = _only_chunk(table[roles["file_path"]]) if "file_path" in roles else None
    persons = table[roles["person_id"]].to_pylist()
    persons = [_to_whole(each) for each in persons]
    return _Columns(persons, captions.cast(pa.string()), lengths, None if paths is None else paths.cast(pa.string()))


def _only_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _check_split(
    split: str, dataset: datasets.Dataset, roles: Mapping[str, str], part: _Columns, roots: Sequence[Path]
) -> _Faults:
    faults = _Faults()
    for row, person in enumerate(part.persons):
        faults.problems += [
            f"{split} record {row}: {fault}" for fault in find_person_faults(person, roles["person_id"])
        ]
    if part.paths is not None:
        is_missing = pc.fill_null(pc.equal(part.paths, ""), True)
        for row in np.flatnonzero(is_missing.to_numpy(zero_copy_only=False)).tolist():
            value = shorten(part.paths[row].as_py())
            faults.problems.append(f"{split} record {row}: {roles['file_path']} is {value}, it must be a path")
    first_caption = np.cumsum(part.lengths) - part.lengths
    is_list = not _is_text(dataset.data.schema.field(roles["captions"]).type)
    for row in np.flatnonzero(part.lengths == 0).tolist():
        faults.problems.append(f"{split} record {row}: {roles['captions']} is empty, it must have at least one caption")
    row_of_caption = np.repeat(np.arange(len(part.lengths)), part.lengths)
    position = 0
    for start in range(0, len(part.captions), _BATCH):
        for caption in part.captions.slice(start, _BATCH).to_pylist():
            row = int(row_of_caption[position])
            index = f"[{position - first_caption[row]}]" if is_list else ""
            for fault in find_text_faults(caption, f"{roles['captions']}{index}"):
                faults.captions[position] = f"{split} record {row}: {fault}"
            position += 1
    faults.images = dict(_find_bad_images(split, dataset, roles["image"], roots))
    return faults


def _find_image_fault(image: Any, roots: Sequence[Path]) -> str | None:
    """Returns what is wrong with the place of an image: a table of a stranger must not name files of this machine."""
    if image is None or (image["bytes"] is None and not image["path"]):
        return "is missing"
    if image["bytes"] is None and not any(Path(image["path"]).resolve().is_relative_to(root) for root in roots):
        return f"is the path {shorten(image['path'])}, which is outside the data set"
    return None


def _find_bad_images(
    split: str, dataset: datasets.Dataset, column: str, roots: Sequence[Path]
) -> Iterator[tuple[int, str]]:
    """Decodes every image completely; yields the row and a line for each that cannot be used."""
    # Imported here: the module needs transformers, which takes seconds.
    from ..processing_eccl import read_image

    def check(image: Any) -> str | None:
        try:
            if (fault := _find_image_fault(image, roots)) is not None:
                return fault
            read_image(image)
        except ValueError as error:
            return f"cannot be decoded: {shorten(str(error.__cause__ or error))}"
        return None

    images = undecoded_images(dataset, column)[column]
    for row, problem in enumerate(map_images(check, images, f"checking images of {split}")):
        if problem is not None:
            yield row, f"{split} record {row}: {column} {problem}"


def _assemble(
    split: str,
    dataset: datasets.Dataset,
    roles: Mapping[str, str],
    part: _Columns,
    faults: _Faults,
) -> tuple[np.ndarray, pa.Table]:
    """Makes the rows of a split, without the faulty images and captions, the rows of an image joined.

    Returns:
        `(images,)`: the row that has each image; and the other columns but `person_id`.
    """
    row_of_caption = np.repeat(np.arange(len(part.lengths)), part.lengths)
    keep = np.ones(len(part.captions), dtype=bool)
    keep[list(faults.captions)] = False
    keep &= ~np.isin(row_of_caption, list(faults.images))
    lengths = np.bincount(row_of_caption[keep], minlength=len(part.lengths))
    rows = np.flatnonzero(lengths)
    if not len(rows):
        raise ValueError(f"no row of split {split} can be read")
    image_of_row = _find_images(dataset, roles, part, rows)
    # The captions of an image follow each other, in the order of the rows.
    image_of_each_row = np.full(len(part.lengths), -1)
    image_of_each_row[rows] = image_of_row
    kept = np.flatnonzero(keep)
    kept = kept[np.argsort(image_of_each_row[row_of_caption[kept]], kind="stable")]
    counts = np.bincount(image_of_row, weights=lengths[rows]).astype(np.int64)
    first_rows = rows[np.unique(image_of_row, return_index=True)[1]]
    _require_same_image(split, dataset, roles, part, rows, first_rows[image_of_row])
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    if part.paths is None:
        # A row without a path gets a name that no other row has.
        names = pa.array([f"{split}/{number:07d}" for number in range(len(first_rows))])
    else:
        names = part.paths.take(pa.array(first_rows))
    table = pa.table(
        {
            "image_id": pa.array(np.arange(len(first_rows)), pa.int32()),
            "captions": pa.ListArray.from_arrays(offsets, part.captions.take(pa.array(kept))),
            "file_path": names,
        }
    )
    return first_rows, table


def _find_images(dataset: datasets.Dataset, roles: Mapping[str, str], part: _Columns, rows: np.ndarray) -> np.ndarray:
    """Returns the image of each of `rows`, numbered from 0 in the order of their first row."""
    if part.paths is not None:
        keys = part.paths.take(pa.array(rows))
    elif (part.lengths == 1).all():
        keys = pa.array(_digest_images(dataset, roles["image"]))
        keys = keys.take(pa.array(rows))
    else:
        return np.arange(len(rows))
    return keys.dictionary_encode().indices.to_numpy(zero_copy_only=False)


def _digest_images(dataset: datasets.Dataset, column: str) -> list[bytes]:
    """Returns a key of each image: the digest of its bytes, or its path."""

    def digest(image: Any) -> bytes:
        content = (image or {}).get("bytes")
        path = str((image or {}).get("path")).encode("utf-8", "surrogateescape")
        return hashlib.sha256(path if content is None else content).digest()

    return list(map_images(digest, undecoded_images(dataset, column)[column], "comparing images"))


def _require_same_image(
    split: str,
    dataset: datasets.Dataset,
    roles: Mapping[str, str],
    part: _Columns,
    rows: np.ndarray,
    first_rows: np.ndarray,
) -> None:
    """Refuses rows that would be joined but have different persons, or the same path and different pictures.

    Args:
        split, dataset, roles, part: the split.
        rows: `(rows,)`: the rows that are kept.
        first_rows: `(rows,)`: for each of them the first row of the same image.
    """
    is_joined = rows != first_rows
    pairs = list(zip(rows[is_joined].tolist(), first_rows[is_joined].tolist(), strict=True))
    problems = [
        f"{split} record {row} has the image of record {first}, but the person {shorten(part.persons[row])} in place "
        f"of {shorten(part.persons[first])}"
        for row, first in pairs
        if part.persons[row] != part.persons[first]
    ]
    if part.paths is not None and pairs:
        compared = sorted({row for pair in pairs for row in pair})
        pictures = dict(zip(compared, _digest_images(dataset.select(compared), roles["image"]), strict=True))
        problems += [
            f"{split} record {row} has the {roles['file_path']} of record {first}, but another picture"
            for row, first in pairs
            if pictures[row] != pictures[first]
        ]
    if problems:
        raise ValueError(f"{len(problems)} faulty rows: {format_problems(problems)}")


__all__ = ["find_roles", "is_image", "prepare_tables", "stream_rows"]
