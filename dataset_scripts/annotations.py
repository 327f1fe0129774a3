"""Reads and checks the raw annotation of a person-retrieval benchmark, before anything is built on it."""

import json
import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm.auto import tqdm

SPLITS = ("train", "val", "test")
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Layout:
    """How a benchmark lies on a disk: `imgs/` and one annotation file in the same folder.

    Args:
        folder: the benchmark's own name for that folder, looked for inside the folder a user gives.
        annotation_files: accepted names of the annotation, the first being the official one.
        path_keys: the record's key for the image path below `imgs/`; the first one present counts.
    """

    folder: str
    annotation_files: tuple[str, ...]
    path_keys: tuple[str, ...]


def find_annotation(data_dir: str | Path, layout: Layout) -> Path:
    """The annotation file in `data_dir`, or in the benchmark's own folder within it.

    Raises:
        FileNotFoundError: there is none; the message says what was looked for and what is there instead.
    """
    candidates = [Path(data_dir).expanduser(), Path(data_dir).expanduser() / layout.folder]
    for folder in candidates:
        for name in layout.annotation_files:
            if (folder / name).is_file():
                return folder / name
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


def read_records(annotation: Path, layout: Layout, on_bad_image: str = "error") -> list[dict]:
    """Reads an annotation and checks every record and every image.

    Args:
        annotation: the JSON file; `imgs/` lies beside it.
        layout: the benchmark's layout.
        on_bad_image: `error`, or `skip` to drop unreadable images with a warning that names them.

    Returns:
        A dict a record, in the file's order: `split`, `captions`, `person_id`, `file_path` (below `imgs/`) and
        `image` (the path on this machine).

    Raises:
        ValueError: anything wrong, all of it together (the first 20 problems and how many there are).
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
                "split": entry["split"],
                "captions": entry["captions"],
                "person_id": entry["id"],
                "file_path": path,
                "image": str(image_root / path),
            }
        )
    problems += _set_problems(records)
    bad_images = _image_problems(records, image_root)
    if on_bad_image == "skip" and bad_images:
        warnings.warn(
            f"{annotation}: {len(bad_images)} unreadable images are left out: {_listed(list(bad_images.values()))}",
            stacklevel=2,
        )
        records = [record for record in records if record["number"] not in bad_images]
    else:
        problems += bad_images.values()
    if problems:
        raise ValueError(f"{annotation}: {len(problems)} problems: {_listed(problems)}")
    if not records:
        raise ValueError(f"{annotation}: no records")
    return records


def _listed(problems: list[str]) -> str:
    more = len(problems) - _SHOWN_PROBLEMS
    return "".join(f"\n- {problem}" for problem in problems[:_SHOWN_PROBLEMS]) + (
        f"\n- and {more} more" if more > 0 else ""
    )


def _read_json_list(annotation: Path) -> list:
    try:
        raw = json.loads(annotation.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{annotation} is not JSON: {error}") from error
    if not isinstance(raw, list):
        raise ValueError(f"{annotation} holds a {type(raw).__name__}, it must hold a list of records")
    return raw


def _record_problems(entry: object, layout: Layout) -> Iterator[str]:
    """What is wrong with one record taken by itself."""
    if not isinstance(entry, dict):
        yield f"is a {type(entry).__name__}, it must be an object"
        return
    split, person_id, captions = entry.get("split"), entry.get("id"), entry.get("captions")
    path = next((entry[key] for key in layout.path_keys if key in entry), None)
    path_name = " or ".join(layout.path_keys)
    for name, value in (("split", split), ("id", person_id), ("captions", captions), (path_name, path)):
        if value is None:
            yield f"{name} is missing"
    if split is not None and split not in SPLITS:
        yield f"split is {split!r}, it must be one of {', '.join(SPLITS)}"
    if person_id is not None and (not isinstance(person_id, int) or isinstance(person_id, bool)):
        yield f"id is {person_id!r}, it must be a whole number"
    elif person_id is not None and not -(2**31) <= person_id < 2**31:
        yield f"id is {person_id}, it must fit into 32 bits"
    if captions is not None:
        if not isinstance(captions, list) or not captions:
            yield f"captions is {captions!r}, it must be a list of at least one caption"
        else:
            for index, caption in enumerate(captions):
                if not isinstance(caption, str) or not caption.strip():
                    yield f"captions[{index}] is {caption!r}, it must be a sentence"
    if path is not None:
        if not isinstance(path, str) or not path:
            yield f"{path_name} is {path!r}, it must be a path below imgs/"
        elif os.path.isabs(path) or ".." in Path(path).parts:
            yield f"{path_name} is {path!r}, it must stay below imgs/"


def _set_problems(records: list[dict]) -> Iterator[str]:
    """What is wrong between records: a path twice, a person in two splits."""
    first_use: dict[str, int] = {}
    split_of: dict[int, tuple[str, int]] = {}
    for record in records:
        number, path, person = record["number"], os.path.normpath(record["file_path"]), record["person_id"]
        if path in first_use:
            yield f"record {number}: {record['file_path']!r} is the image of record {first_use[path]} already"
        first_use.setdefault(path, number)
        split, first = split_of.setdefault(person, (record["split"], number))
        if split != record["split"]:
            yield f"record {number}: id {person} is in split {record['split']}, but in {split} in record {first}"


def _image_problems(records: list[dict], image_root: Path) -> dict[int, str]:
    """The problem of each unreadable image by record number; every image is decoded whole, once."""
    root = image_root.resolve()

    def check(record: dict) -> str | None:
        path = Path(record["image"])
        name = f"record {record['number']}: {record['file_path']!r}"
        if not path.resolve().is_relative_to(root):
            return f"{name} is a link that leads out of {image_root}"
        if not path.is_file():
            folder = next((parent for parent in reversed(path.parents) if not parent.is_dir()), None)
            return f"{name} does not exist" + (f", nor does its folder {folder}" if folder else "")
        if not path.stat().st_size:
            return f"{name} is empty (0 bytes)"
        try:
            with Image.open(path) as image:
                image.load()
        # Pillow raises SyntaxError and struct.error on some damaged files; whatever it is, it is reported.
        except Exception as error:
            return f"{name} cannot be decoded: {error}"
        return None

    # Pillow decodes outside the interpreter's lock.
    with ThreadPoolExecutor() as pool:
        results = list(
            tqdm(pool.map(check, records), total=len(records), desc="checking images", unit="image", leave=False)
        )
    return {record["number"]: problem for record, problem in zip(records, results, strict=True) if problem}
