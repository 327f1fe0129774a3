"""Reads the raw annotation of a person-retrieval benchmark and checks all its records and images."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ..utils.files import complete_file

SPLITS = ("train", "val", "test")
# The Hugging Face libraries say `validation`. It is accepted everywhere instead of `val`.
SPLIT_ALIASES = {"validation": "val"}
# Bytes: about a million images.
_LARGEST_ANNOTATION = 512 * 2**20
_MAX_PROBLEMS_IN_MESSAGE = 20
_MAX_CHARACTERS_IN_MESSAGE = 160

Record = dict[str, Any]
"""One checked record, which is one image: see [`read_records`]."""


class SplitSize(NamedTuple):
    """The numbers of persons (ids), images and captions of a split."""

    ids: int
    images: int
    captions: int

    @classmethod
    def of(cls, person_ids: Iterable[int], captions: Iterable[list[str]]) -> "SplitSize":
        """Counts a split.

        Args:
            person_ids: the person of each image.
            captions: the captions of each image.
        """
        captions_per_image = [len(captions_of_image) for captions_of_image in captions]
        return cls(len(set(person_ids)), len(captions_per_image), sum(captions_per_image))

    def __str__(self) -> str:
        return f"{self.ids:,} ids, {self.images:,} images, {self.captions:,} captions"


@dataclass(frozen=True)
class Layout:
    """The files of a benchmark on a disk: a folder with `imgs/` and one annotation file.

    Args:
        folder: the usual name of this folder. It is also looked for inside the folder that a user gives.
        annotation_files: accepted names of the annotation file; the first one is the official name.
        path_keys: accepted keys of the image's path (below `imgs/`) in a record; the first one that is present is read.
        published_sizes: the published size of each split; empty if no size was published.
    """

    folder: str
    annotation_files: tuple[str, ...]
    path_keys: tuple[str, ...]
    published_sizes: dict[str, SplitSize] = field(default_factory=dict)


def find_annotation(data_dir: str | Path, layout: Layout) -> Path:
    """Finds the annotation file in `data_dir`, or in the folder `layout.folder` inside it.

    Returns:
        The absolute path of the file.

    Raises:
        FileNotFoundError: there is no such file; the message says where it was expected and what was found instead.
        ValueError: there are several such files, and they differ; or one has more than 512 MiB.
    """
    # The rows of the data set keep this path, and it must be valid from every working directory.
    root = Path(data_dir).expanduser().absolute()
    folders = [root, root / layout.folder]
    for folder in folders:
        found = [folder / name for name in layout.annotation_files if (folder / name).is_file()]
        for file in found:
            if file.stat().st_size > _LARGEST_ANNOTATION:
                raise ValueError(f"{file} has {file.stat().st_size:,} bytes, the limit is {_LARGEST_ANNOTATION:,}")
        if len({file.read_bytes() for file in found}) > 1:
            raise ValueError(
                f"{' and '.join(map(str, found))} are different files: keep the right one, remove the others"
            )
        if found:
            return found[0]
    message = f"no {' or '.join(layout.annotation_files)} in {folders[0]} or in {folders[1]}"
    if any((folder / "caption_all.json").is_file() for folder in folders):
        message += (
            f"; caption_all.json was found, but it has no splits: ask the owners of the data set for "
            f"{layout.annotation_files[0]}"
        )
    elif not folders[0].is_dir():
        message += f"; {folders[0]} is not a folder"
    raise FileNotFoundError(message)


def read_records(
    annotation: Path, layout: Layout, on_bad_image: str = "error", known_images: Path | None = None
) -> list[Record]:
    """Reads an annotation file, and checks every record and every image.

    Args:
        annotation: the JSON file; `imgs/` is in the same folder.
        layout: the layout of the benchmark.
        on_bad_image: `error`, or `skip` to leave unreadable images out.
        known_images: file that keeps the result of the image checks. If it exists, its content is used and no image
            is opened; so the caller must choose another name when an image has changed.

    Returns:
        One dict per record, in the order of the file, with the keys `number` (of the record), `split`, `captions`,
        `person_id`, `file_path` (below `imgs/`) and `image` (absolute path).

    Raises:
        ValueError: there are faults, no records, or no readable images of a split. The message has the number of
            faults and the first 20 of them.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}, it must be error or skip")
    image_root = annotation.parent / "imgs"
    entries = _read_json_list(annotation)
    if not image_root.is_dir():
        raise ValueError(f"{image_root} is not a folder: it must contain the images of {annotation.name}")
    records, problems = _parse_records(entries, layout, image_root)
    problems += _find_conflicts(records)
    images = _recall_or_check(records, image_root, known_images)
    problems += images.same_file
    if on_bad_image == "error":
        problems += _summarise_bad_images(images.bad)
    else:
        splits = {record["split"] for record in records}
        records = [record for record in records if record["number"] not in images.bad]
        empty_splits = sorted(splits - {record["split"] for record in records})
        problems += [f"no image of split {split} can be read" for split in empty_splits]
    if problems:
        raise ValueError(f"{annotation}: {len(problems)} problems: {format_problems(problems)}")
    if not records:
        raise ValueError(f"{annotation} contains no records, it must contain at least one")
    return records


def read_skipped_images(known_images: Path) -> tuple[int, list[str]]:
    """Reads from the file `known_images` of [`read_records`] which images `skip` leaves out.

    Returns:
        The number of these images, and a line for each of them; the images of a missing folder share one line.
    """
    images = _recall(known_images)
    return len(images.bad), _summarise_bad_images(images.bad)


def size_differences(sizes: dict[str, SplitSize], published: dict[str, SplitSize]) -> list[str]:
    """Compares the sizes of splits with the published sizes.

    Returns:
        One line with both sizes for each split where they differ; empty if `published` is empty.
    """
    lines = []
    for split in SPLITS:
        size, published_size = sizes.get(split), published.get(split)
        if published and size != published_size:
            lines.append(f"{split} has {size or 'nothing'}; published: {published_size or 'no such split'}")
    return lines


def format_problems(problems: list[str]) -> str:
    """Returns the first 20 problems, one on each line, and the number of the others."""
    more = len(problems) - _MAX_PROBLEMS_IN_MESSAGE
    return "".join(f"\n- {problem}" for problem in problems[:_MAX_PROBLEMS_IN_MESSAGE]) + (
        f"\n- and {more} more" if more > 0 else ""
    )


class _RepeatedKeys(dict[str, Any]):
    """A JSON object in which a key occurs twice."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _RepeatedKeys(values)


def _read_json_list(annotation: Path) -> list[Any]:
    try:
        content = json.loads(annotation.read_text(encoding="utf-8-sig"), object_pairs_hook=_make_object)
    # ValueError is more than JSONDecodeError: numbers with thousands of digits, and bytes that are not UTF-8.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{annotation} is not JSON: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{annotation} contains a {type(content).__name__}, it must contain a list of records")
    return content


def _parse_records(entries: list[Any], layout: Layout, image_root: Path) -> tuple[list[Record], list[str]]:
    """Returns the records without faults, and a line for each fault in the others."""
    records: list[Record] = []
    problems: list[str] = []
    for number, entry in enumerate(entries):
        found = list(_find_faults(entry, layout))
        if found:
            problems.extend(f"record {number}: {problem}" for problem in found)
            continue
        path = next(entry[key] for key in layout.path_keys if key in entry)
        records.append(
            {
                "number": number,
                "split": SPLIT_ALIASES.get(entry["split"], entry["split"]),
                "captions": entry["captions"],
                "person_id": entry["id"],
                "file_path": path,
                "image": str(image_root / path),
            }
        )
    return records, problems


def _shorten(value: object) -> str:
    """Returns a value as a message quotes it: a file may contain a text of any length."""
    text = repr(value)
    if len(text) <= _MAX_CHARACTERS_IN_MESSAGE:
        return text
    return f"{text[:_MAX_CHARACTERS_IN_MESSAGE]}... ({len(text):,} characters)"


def _find_faults(entry: object, layout: Layout) -> Iterator[str]:
    """Finds the faults of one record without looking at the others."""
    if not isinstance(entry, dict):
        yield f"is a {type(entry).__name__}, it must be an object"
        return
    if isinstance(entry, _RepeatedKeys):
        yield "contains a key twice"
        return
    split, person_id, captions = entry.get("split"), entry.get("id"), entry.get("captions")
    path = next((entry[key] for key in layout.path_keys if key in entry), None)
    path_name = " or ".join(layout.path_keys)
    for name, value in (("split", split), ("id", person_id), ("captions", captions), (path_name, path)):
        if value is None:
            yield f"{name} is missing"
    if split is not None and split not in (*SPLITS, *SPLIT_ALIASES):
        yield f"split is {_shorten(split)}, it must be one of {', '.join(SPLITS)}"
    if person_id is not None and (not isinstance(person_id, int) or isinstance(person_id, bool)):
        yield f"id is {_shorten(person_id)}, it must be a whole number"
    elif person_id is not None and not -(2**31) <= person_id < 2**31:
        yield f"id is {_shorten(person_id)}, it must fit into 32 bits"
    if captions is not None:
        yield from _find_caption_faults(captions)
    if path is not None:
        yield from _find_path_faults(path, path_name)


def _find_caption_faults(captions: object) -> Iterator[str]:
    # Imported here, because the module needs transformers.
    from ..processing_eccl import LONGEST_CAPTION, unescape

    if not isinstance(captions, list) or not captions:
        yield f"captions is {_shorten(captions)}, it must be a list of at least one caption"
        return
    for index, caption in enumerate(captions):
        if not isinstance(caption, str) or not any(map(str.isalnum, unescape(caption))):
            yield f"captions[{index}] is {_shorten(caption)}, it must be a sentence"
        elif len(caption) > LONGEST_CAPTION:
            yield f"captions[{index}] has {len(caption):,} characters, the limit is {LONGEST_CAPTION:,}"
        elif not _is_valid_text(caption):
            yield f"captions[{index}] is {_shorten(caption)}, it must be text that UTF-8 can encode"


def _find_path_faults(path: object, name: str) -> Iterator[str]:
    """Finds the faults of an image's path; `name` is the key that a message quotes."""
    if not isinstance(path, str) or not path:
        yield f"{name} is {_shorten(path)}, it must be a path below imgs/"
    elif "\0" in path or not _is_valid_text(path):
        yield f"{name} is {_shorten(path)}, it must be a valid file path"
    elif os.path.isabs(path) or ".." in Path(path).parts:
        yield f"{name} is {_shorten(path)}, it must stay below imgs/"


def _is_valid_text(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can contain (`\\ud800`) but UTF-8 cannot encode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _find_conflicts(records: list[Record]) -> Iterator[str]:
    """Finds faults between records: the same path twice, or a person in two splits."""
    first_use: dict[str, int] = {}
    split_of: dict[int, tuple[str, int]] = {}
    for record in records:
        number, path, person = record["number"], os.path.normpath(record["file_path"]), record["person_id"]
        if path in first_use:
            yield f"record {number}: {_shorten(record['file_path'])} is already the image of record {first_use[path]}"
        first_use.setdefault(path, number)
        split, first = split_of.setdefault(person, (record["split"], number))
        if split != record["split"]:
            yield f"record {number}: id {person} is in split {record['split']}, but in split {split} in record {first}"


class _BadImage(NamedTuple):
    """The reason why an image cannot be used; `missing_folder` is set if its folder does not exist."""

    problem: str
    missing_folder: str | None


class _Images(NamedTuple):
    """The result of the image checks.

    `bad` has the unreadable images by record number; `same_file` has a line for each record that shares its file with
    another one.
    """

    bad: dict[int, _BadImage]
    same_file: list[str]


def _recall(known_images: Path) -> _Images:
    known = json.loads(known_images.read_text(encoding="utf-8"))
    return _Images({int(number): _BadImage(*bad) for number, bad in known["bad"].items()}, known["same_file"])


def _recall_or_check(records: list[Record], image_root: Path, known_images: Path | None) -> _Images:
    if known_images is not None and known_images.is_file():
        return _recall(known_images)
    images = _check_images(records, image_root)
    if known_images is not None:
        with complete_file(known_images) as file:
            file.write_text(json.dumps(images._asdict()), encoding="utf-8")
    return images


def _check_images(records: list[Record], image_root: Path) -> _Images:
    """Decodes every image completely."""
    root = image_root.resolve()
    # Pillow decodes without the interpreter's lock, so threads run in parallel.
    with ThreadPoolExecutor() as pool:
        results = list(
            tqdm(
                pool.map(lambda record: _check_image(record, root), records),
                total=len(records),
                desc="checking images",
                unit="image",
                leave=False,
            )
        )
    bad: dict[int, _BadImage] = {}
    same_file: list[str] = []
    first_use: dict[Path, Record] = {}
    for record, result in zip(records, results, strict=True):
        if isinstance(result, _BadImage):
            bad[record["number"]] = result
            continue
        first = first_use.setdefault(result, record)
        # `_find_conflicts` reports a path that occurs twice. Here, different paths lead to one file.
        if first is not record and os.path.normpath(first["image"]) != os.path.normpath(record["image"]):
            path, other = _shorten(record["file_path"]), _shorten(first["file_path"])
            same_file.append(
                f"record {record['number']}: {path} links to the same file as {other} of record {first['number']}"
            )
    return _Images(bad, same_file)


def _check_image(record: Record, root: Path) -> _BadImage | Path:
    """Decodes one image; `root` is `imgs/` with links resolved.

    Returns:
        The path of the image's file with links resolved, or the reason why it cannot be used.
    """
    # Imported here: the module needs transformers, which takes seconds.
    from ..processing_eccl import read_image

    name = f"record {record['number']}: {_shorten(record['file_path'])}"
    try:
        path = Path(record["image"])
        target = path.resolve()
        if not target.is_relative_to(root):
            return _BadImage(f"{name} is a link to a file outside imgs/", None)
        if not path.is_file():
            folder = next((parent for parent in reversed(path.parents) if not parent.is_dir()), None)
            if folder:
                return _BadImage(f"{name} does not exist, nor does its folder {folder}", str(folder))
            kind = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
            return _BadImage(f"{name} {kind}", None)
        if not path.stat().st_size:
            return _BadImage(f"{name} is empty (0 bytes)", None)
        read_image(path)
    except ValueError as error:
        return _BadImage(f"{name} cannot be decoded: {_shorten(str(error.__cause__ or error))}", None)
    # A path can be too long, and links can form a circle.
    except (OSError, RuntimeError) as error:
        return _BadImage(f"{name} cannot be opened: {_shorten(str(error))}", None)
    return target


def _summarise_bad_images(bad_images: dict[int, _BadImage]) -> list[str]:
    """Returns a line for each bad image; the images of a missing folder share one line."""
    missing = Counter(bad.missing_folder for bad in bad_images.values() if bad.missing_folder)
    lines, reported = [], set()
    for number, (problem, folder) in bad_images.items():
        if folder is None or missing[folder] == 1:
            lines.append(problem)
        elif folder not in reported:
            reported.add(folder)
            lines.append(
                f"the folder {folder} does not exist: {missing[folder]:,} records have images there, the first is "
                f"record {number}; newer downloads lack some folders, ask the owners of the data set for them"
            )
    return lines
