"""Reads and checks the raw annotation of a person-retrieval benchmark, before anything is built on it."""

import html
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm.auto import tqdm

SPLITS = ("train", "val", "test")
# The name that the Hugging Face libraries have for it is understood wherever val is.
SPLIT_ALIASES = {"validation": "val"}
_SHOWN_PROBLEMS = 20
_SHOWN_CHARACTERS = 160


class SplitSize(NamedTuple):
    """How large a split is."""

    ids: int
    images: int
    captions: int

    @classmethod
    def of(cls, person_ids: Iterable[int], captions: Iterable[list[str]]) -> "SplitSize":
        """Counts the rows of a split, given their persons and their captions."""
        counts = [len(own) for own in captions]
        return cls(len(set(person_ids)), len(counts), sum(counts))

    def __str__(self) -> str:
        return f"{self.ids:,} ids, {self.images:,} images, {self.captions:,} captions"


@dataclass(frozen=True)
class Layout:
    """How a benchmark lies on a disk: `imgs/` and one annotation file in the same folder.

    Args:
        folder: the benchmark's own name for that folder, looked for inside the folder a user gives.
        annotation_files: accepted names of the annotation, the first being the official one.
        path_keys: the record's key for the image path below `imgs/`; the first one present counts.
        published_sizes: what the benchmark's publications count in each split; empty where nothing was published.
    """

    folder: str
    annotation_files: tuple[str, ...]
    path_keys: tuple[str, ...]
    published_sizes: dict[str, SplitSize] = field(default_factory=dict)


def find_annotation(data_dir: str | Path, layout: Layout) -> Path:
    """The annotation file in `data_dir`, or in the benchmark's own folder within it, as an absolute path.

    Raises:
        FileNotFoundError: there is none; the message says what was looked for and what is there instead.
        ValueError: there are several, and they are not the same.
    """
    # Rows keep the path: it must hold from any working directory.
    root = Path(data_dir).expanduser().absolute()
    candidates = [root, root / layout.folder]
    for folder in candidates:
        found = [folder / name for name in layout.annotation_files if (folder / name).is_file()]
        if len({file.read_bytes() for file in found}) > 1:
            raise ValueError(f"{' and '.join(map(str, found))} are both there and differ: leave the right one")
        if found:
            return found[0]
    names = " or ".join(layout.annotation_files)
    message = f"no {names} in {candidates[0]} nor in {candidates[1]}"
    if any((folder / "caption_all.json").is_file() for folder in candidates):
        message += (
            "; caption_all.json is there, but it has no splits: ask the owners of the data set for "
            f"{layout.annotation_files[0]}"
        )
    elif not candidates[0].is_dir():
        message += f"; {candidates[0]} is not a folder"
    raise FileNotFoundError(message)


def read_records(
    annotation: Path, layout: Layout, on_bad_image: str = "error", known_images: Path | None = None
) -> list[dict]:
    """Reads an annotation and checks every record and every image.

    Args:
        annotation: the JSON file; `imgs/` lies beside it.
        layout: the benchmark's layout.
        on_bad_image: `error`, or `skip` to leave unreadable images out.
        known_images: where to keep what was found out about the images. If the file is there already, no image is
            opened: its name must change whenever an image does.

    Returns:
        A dict a record, in the file's order: `number`, `split`, `captions`, `person_id`, `file_path` (below `imgs/`)
        and `image` (the path on this machine).

    Raises:
        ValueError: anything wrong, all of it together (the first 20 problems and how many there are); no records, or
            none left of a split.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}, it must be error or skip")
    raw = _read_json_list(annotation)
    image_root = annotation.parent / "imgs"
    if not image_root.is_dir():
        raise ValueError(f"{image_root} is not a folder: the images of {annotation.name} must lie there")
    records, problems = [], []
    for number, entry in enumerate(raw):
        found = list(_record_problems(entry, layout))
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
    problems += _set_problems(records)
    images = _recall_or_check(records, image_root, known_images)
    problems += images.same_file
    if on_bad_image == "error":
        problems += _summed_up(images.bad)
    else:
        splits = {record["split"] for record in records}
        records = [record for record in records if record["number"] not in images.bad]
        empty = sorted(splits - {record["split"] for record in records})
        problems += [f"no image of split {split} can be read" for split in empty]
    if problems:
        raise ValueError(f"{annotation}: {len(problems)} problems: {listed(problems)}")
    if not records:
        raise ValueError(f"{annotation}: no records")
    return records


def left_out(known_images: Path) -> tuple[int, list[str]]:
    """How many images `skip` leaves out, and a line for each of them, or for each folder that is missing."""
    images = _recall(known_images)
    return len(images.bad), _summed_up(images.bad)


def size_differences(sizes: dict[str, SplitSize], published: dict[str, SplitSize]) -> list[str]:
    """A line for each split whose size is not the published one, with both."""
    lines = []
    for split in SPLITS:
        ours, theirs = sizes.get(split), published.get(split)
        if published and ours != theirs:
            lines.append(f"{split} has {ours or 'nothing'}; published: {theirs or 'no such split'}")
    return lines


def listed(problems: list[str]) -> str:
    """The first 20 lines, and how many more there are."""
    more = len(problems) - _SHOWN_PROBLEMS
    return "".join(f"\n- {problem}" for problem in problems[:_SHOWN_PROBLEMS]) + (
        f"\n- and {more} more" if more > 0 else ""
    )


class _Repeated(dict):
    """A JSON object with a key that is given twice."""


def _make_object(pairs: list[tuple[str, object]]) -> dict:
    values = dict(pairs)
    return values if len(values) == len(pairs) else _Repeated(values)


def _read_json_list(annotation: Path) -> list:
    try:
        raw = json.loads(annotation.read_text(encoding="utf-8-sig"), object_pairs_hook=_make_object)
    # Not only JSONDecodeError: numbers of thousands of digits and bytes that are no UTF-8 are ValueErrors too.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{annotation} is not JSON: {error}") from error
    if not isinstance(raw, list):
        raise ValueError(f"{annotation} holds a {type(raw).__name__}, it must hold a list of records")
    return raw


def _shown(value: object) -> str:
    """A value in a message: what a user looks for, not all that a file may hold."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}... ({len(text):,} characters)"


def _record_problems(entry: object, layout: Layout) -> Iterator[str]:
    """What is wrong with one record taken by itself."""
    if not isinstance(entry, dict):
        yield f"is a {type(entry).__name__}, it must be an object"
        return
    if isinstance(entry, _Repeated):
        yield "gives a key twice"
        return
    split, person_id, captions = entry.get("split"), entry.get("id"), entry.get("captions")
    path = next((entry[key] for key in layout.path_keys if key in entry), None)
    path_name = " or ".join(layout.path_keys)
    for name, value in (("split", split), ("id", person_id), ("captions", captions), (path_name, path)):
        if value is None:
            yield f"{name} is missing"
    if split is not None and split not in (*SPLITS, *SPLIT_ALIASES):
        yield f"split is {_shown(split)}, it must be one of {', '.join(SPLITS)}"
    if person_id is not None and (not isinstance(person_id, int) or isinstance(person_id, bool)):
        yield f"id is {_shown(person_id)}, it must be a whole number"
    elif person_id is not None and not -(2**31) <= person_id < 2**31:
        yield f"id is {_shown(person_id)}, it must fit into 32 bits"
    if captions is not None:
        if not isinstance(captions, list) or not captions:
            yield f"captions is {_shown(captions)}, it must be a list of at least one caption"
        else:
            for index, caption in enumerate(captions):
                if not isinstance(caption, str) or not any(map(str.isalnum, html.unescape(caption))):
                    yield f"captions[{index}] is {_shown(caption)}, it must be a sentence"
                elif not _is_text(caption):
                    yield f"captions[{index}] is {_shown(caption)}, it must be text that UTF-8 can write"
    if path is not None:
        if not isinstance(path, str) or not path:
            yield f"{path_name} is {_shown(path)}, it must be a path below imgs/"
        elif "\0" in path or not _is_text(path):
            yield f"{path_name} is {_shown(path)}, it must be a path that a file can have"
        elif os.path.isabs(path) or ".." in Path(path).parts:
            yield f"{path_name} is {_shown(path)}, it must stay below imgs/"


def _is_text(text: str) -> bool:
    """Whether it has no halves of characters, as `\\ud800` in JSON makes them."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _set_problems(records: list[dict]) -> Iterator[str]:
    """What is wrong between records: a path twice, a person in two splits."""
    first_use: dict[str, int] = {}
    split_of: dict[int, tuple[str, int]] = {}
    for record in records:
        number, path, person = record["number"], os.path.normpath(record["file_path"]), record["person_id"]
        if path in first_use:
            yield f"record {number}: {_shown(record['file_path'])} is the image of record {first_use[path]} already"
        first_use.setdefault(path, number)
        split, first = split_of.setdefault(person, (record["split"], number))
        if split != record["split"]:
            yield f"record {number}: id {person} is in split {record['split']}, but in {split} in record {first}"


class _BadImage(NamedTuple):
    """Why an image cannot be used, and which folder is missing, if that is why."""

    problem: str
    missing_folder: str | None


class _Images(NamedTuple):
    """What was found out about images: the unreadable ones by record number, and records that share a file."""

    bad: dict[int, _BadImage]
    same_file: list[str]


def _recall(known_images: Path) -> _Images:
    known = json.loads(known_images.read_text(encoding="utf-8"))
    return _Images({int(number): _BadImage(*bad) for number, bad in known["bad"].items()}, known["same_file"])


def _recall_or_check(records: list[dict], image_root: Path, known_images: Path | None) -> _Images:
    if known_images is not None and known_images.is_file():
        return _recall(known_images)
    images = _check_images(records, image_root)
    if known_images is not None:
        known_images.parent.mkdir(parents=True, exist_ok=True)
        unfinished = known_images.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(images._asdict()), encoding="utf-8")
        unfinished.replace(known_images)
    return images


def _check_images(records: list[dict], image_root: Path) -> _Images:
    """Every image is decoded whole, once."""
    root = image_root.resolve()

    def check(record: dict) -> _BadImage | Path:
        name = f"record {record['number']}: {_shown(record['file_path'])}"
        try:
            path = Path(record["image"])
            target = path.resolve()
            if not target.is_relative_to(root):
                return _BadImage(f"{name} is a link that leads out of {image_root}", None)
            if not path.is_file():
                folder = next((parent for parent in reversed(path.parents) if not parent.is_dir()), None)
                if folder:
                    return _BadImage(f"{name} does not exist, nor does its folder {folder}", str(folder))
                kind = "is a folder" if path.is_dir() else "is no file" if path.exists() else "does not exist"
                return _BadImage(f"{name} {kind}", None)
            if not path.stat().st_size:
                return _BadImage(f"{name} is empty (0 bytes)", None)
            with Image.open(path) as image:
                image.load()
        # Pillow raises SyntaxError and struct.error on some damaged files, and a path can be too long or go in a
        # circle; whatever it is, it is reported.
        except Exception as error:
            return _BadImage(f"{name} cannot be decoded: {_shown(str(error))}", None)
        return target

    # Pillow decodes outside the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        results = list(
            tqdm(pool.map(check, records), total=len(records), desc="checking images", unit="image", leave=False)
        )
    bad, same_file, first_use = {}, [], {}
    for record, result in zip(records, results, strict=True):
        if isinstance(result, _BadImage):
            bad[record["number"]] = result
            continue
        first = first_use.setdefault(result, record)
        # The same path twice is told without looking at files.
        if first is not record and os.path.normpath(first["image"]) != os.path.normpath(record["image"]):
            path, other = _shown(record["file_path"]), _shown(first["file_path"])
            same_file.append(
                f"record {record['number']}: {path} is by a link the file {other} of record {first['number']}"
            )
    return _Images(bad, same_file)


def _summed_up(bad_images: dict[int, _BadImage]) -> list[str]:
    """A line for each bad image, but one for all images of a folder that is missing."""
    missing = Counter(bad.missing_folder for bad in bad_images.values() if bad.missing_folder)
    lines, told = [], set()
    for number, (problem, folder) in bad_images.items():
        if folder is None or missing[folder] == 1:
            lines.append(problem)
        elif folder not in told:
            told.add(folder)
            lines.append(
                f"the folder {folder} does not exist: {missing[folder]:,} records point there, record {number} first; "
                "newer downloads leave folders out, ask the owners of the data set for them"
            )
    return lines
