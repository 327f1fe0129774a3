"""Reads the raw annotation of a person-retrieval benchmark and checks all its records and images."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .faults import find_caption_faults, find_path_faults, find_text_faults
from .image_checks import Record
from .list_files import has_key_twice, read_json_list, require_size
from .messages import shorten
from .records import Checks, Parsed, check_records

SPLITS = ("train", "val", "test")
# The Hugging Face libraries say `validation`. It is accepted everywhere instead of `val`.
SPLIT_ALIASES = {"validation": "val"}


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
            require_size(file)
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
    annotation: Path, layout: Layout, checks: Checks | None = None, known: Path | None = None
) -> list[Record]:
    """Reads an annotation file, and checks every record and every image.

    Args:
        annotation: the JSON file; `imgs/` is in the same folder.
        layout: the layout of the benchmark.
        checks: what happens to faulty images, captions and paths; by default, each is an error.
        known: see [`check_records`].

    Returns:
        One dict per record, in the order of the file, with the keys `number` and `name` (of the record), `split`,
        `captions`, `person_id`, `file_path` (below `imgs/`) and `image` (absolute path).

    Raises:
        ValueError: there are faults, no records, or no readable images of a split. The message has the number of
            faults and the first 20 of them.
    """
    checks = checks or Checks()
    entries = read_json_list(annotation)
    parsed = Parsed(str(annotation), annotation.parent / "imgs", bool(layout.published_sizes))
    if not parsed.image_root.is_dir():
        raise ValueError(f"{parsed.image_root} is not a folder: it must contain the images of {annotation.name}")
    for number, entry in enumerate(entries):
        _parse_record(parsed, number, entry, layout, checks)
    return check_records(parsed, checks, known)


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


def _parse_record(parsed: Parsed, number: int, entry: object, layout: Layout, checks: Checks) -> None:
    """Adds a record, or its faults, to what is parsed already."""
    name = f"record {number}"
    if checks.on_bad_caption == "skip" and isinstance(entry, dict) and isinstance(entry.get("captions"), list):
        entry = type(entry)(entry, captions=keep_good_captions(parsed, name, entry["captions"]))
        if not entry["captions"]:
            return
    if faults := list(_find_faults(entry, layout)):
        parsed.problems += [f"{name}: {fault}" for fault in faults]
        return
    values: Any = entry
    path = next(values[key] for key in layout.path_keys if key in values)
    parsed.records.append(
        {
            "number": number,
            "name": name,
            "split": SPLIT_ALIASES.get(values["split"], values["split"]),
            "captions": values["captions"],
            "person_id": values["id"],
            "file_path": path,
            "image": str(parsed.image_root / path),
        }
    )


def keep_good_captions(parsed: Parsed, name: str, captions: list[Any]) -> list[str]:
    """Returns the captions without a fault; the faults of the others are added to `parsed.bad_captions`."""
    good = []
    for index, caption in enumerate(captions):
        faults = list(find_text_faults(caption, f"captions[{index}]"))
        parsed.bad_captions += [f"{name}: {fault}" for fault in faults]
        good += [] if faults else [caption]
    if not good:
        parsed.bad_captions.append(f"{name}: no caption is left, so the image is left out, too")
    return good


def _find_faults(entry: object, layout: Layout) -> Iterator[str]:
    """Finds the faults of one record without looking at the others."""
    if not isinstance(entry, dict):
        yield f"is a {type(entry).__name__}, it must be an object"
        return
    if has_key_twice(entry):
        yield "contains a key twice"
        return
    split, person_id, captions = entry.get("split"), entry.get("id"), entry.get("captions")
    path = next((entry[key] for key in layout.path_keys if key in entry), None)
    path_name = " or ".join(layout.path_keys)
    for name, value in (("split", split), ("id", person_id), ("captions", captions), (path_name, path)):
        if value is None:
            yield f"{name} is missing"
    if split is not None and split not in (*SPLITS, *SPLIT_ALIASES):
        yield f"split is {shorten(split)}, it must be one of {', '.join(SPLITS)}"
    if person_id is not None and (not isinstance(person_id, int) or isinstance(person_id, bool)):
        yield f"id is {shorten(person_id)}, it must be a whole number"
    elif person_id is not None and not -(2**31) <= person_id < 2**31:
        yield f"id is {shorten(person_id)}, it must fit into 32 bits"
    if captions is not None:
        yield from find_caption_faults(captions)
    if path is not None:
        yield from find_path_faults(path, path_name)
