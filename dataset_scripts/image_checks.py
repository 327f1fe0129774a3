"""Checks the images of a data set: that each is a file of the data set, and can be decoded."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm.auto import tqdm

from .messages import shorten

_BATCH = 1_000
Result = TypeVar("Result")

Record = dict[str, Any]
"""One checked record, which is one image: see [`~eccl.dataset_scripts.annotations.read_records`]."""


class BadImage(NamedTuple):
    """The reason why an image cannot be used.

    Attributes:
        problem: a line for a message.
        kind: `folder` if the image's folder does not exist, `link` if the file is a link out of the data set, else
            empty. Several images of the same kind and place share a line.
        place: the missing folder.
        name: the record, for that line.
    """

    problem: str
    kind: str = ""
    place: str = ""
    name: str = ""


class Images(NamedTuple):
    """The result of the image checks.

    Attributes:
        bad: the unusable images, by the number of their record.
        same_file: a line for each record that shares its file with another one.
    """

    bad: dict[int, BadImage]
    same_file: list[str]


def map_images(function: Callable[[Any], Result], images: Sequence[Any], description: str) -> Iterator[Result]:
    """Calls a function that decodes an image for each image, in threads, and yields the results in order.

    Args:
        function: takes an item of `images`.
        images: a slice of it is read at a time.
        description: what the progress bar shows.
    """
    # Pillow decodes without the interpreter's lock, so threads run in parallel.
    with ThreadPoolExecutor() as pool, tqdm(total=len(images), desc=description, unit="image", leave=False) as bar:
        # A pool keeps an object for each task that it is given at once.
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            yield from pool.map(function, batch)
            bar.update(len(batch))


def check_images(records: Sequence[Record], image_root: Path, follow_links: bool) -> Images:
    """Decodes every image completely.

    Args:
        records: each has `number`, `name` (of the record, for messages), `file_path` and `image` (absolute path).
        image_root: the folder that the paths are relative to.
        follow_links: allow links to files outside this folder.
    """
    root = image_root.resolve()
    results = list(map_images(lambda record: _check_image(record, root, follow_links), records, "checking images"))
    bad: dict[int, BadImage] = {}
    same_file: list[str] = []
    first_use: dict[Path, Record] = {}
    for record, result in zip(records, results, strict=True):
        if isinstance(result, BadImage):
            bad[record["number"]] = result
            continue
        if _is_blob(result, root):
            # The Hub's cache stores two images with the same bytes once.
            continue
        first = first_use.setdefault(result, record)
        # A path that occurs twice is reported elsewhere. Here, different paths lead to one file.
        if first is not record and os.path.normpath(first["image"]) != os.path.normpath(record["image"]):
            path, other = shorten(record["file_path"]), shorten(first["file_path"])
            same_file.append(f"{record['name']}: {path} links to the same file as {other} of {first['name']}")
    return Images(bad, same_file)


def _check_image(record: Record, root: Path, follow_links: bool) -> BadImage | Path:
    """Decodes one image; `root` is the folder of the images with links resolved.

    Returns:
        The path of the image's file with links resolved, or the reason why it cannot be used.
    """
    # Imported here: the module needs transformers, which takes seconds.
    from ..processing_eccl import read_image

    name = f"{record['name']}: {shorten(record['file_path'])}"
    try:
        path = Path(record["image"])
        target = path.resolve()
        if not (follow_links or target.is_relative_to(root) or _is_blob(target, root)):
            return BadImage(f"{name} is a link to a file outside {root.name}/", "link", "", record["name"])
        if not path.is_file():
            folder = next((parent for parent in reversed(path.parents) if not parent.is_dir()), None)
            if folder:
                problem = f"{name} does not exist, nor does its folder {folder}"
                return BadImage(problem, "folder", str(folder), record["name"])
            kind = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
            return BadImage(f"{name} {kind}")
        if not path.stat().st_size:
            return BadImage(f"{name} is empty (0 bytes)")
        read_image(path)
    except ValueError as error:
        return BadImage(f"{name} cannot be decoded: {shorten(str(error.__cause__ or error))}")
    # A path can be too long, and links can form a circle.
    except (OSError, RuntimeError) as error:
        return BadImage(f"{name} cannot be opened: {shorten(str(error))}")
    return target


def _is_blob(target: Path, root: Path) -> bool:
    """Whether a file is in the Hub's cache next to the snapshot that contains `root`.

    `huggingface_hub.snapshot_download` makes `snapshots/COMMIT/`, with a link into `blobs/` for each file.
    """
    repositories = [folder.parent for folder in root.parents if folder.name == "snapshots"]
    return any(target.parent == repository / "blobs" for repository in repositories)


def summarise_bad_images(bad_images: dict[int, BadImage], image_root: Path, is_download: bool) -> list[str]:
    """Makes a line for each bad image; the images of a missing folder, and links out of the data set, share one line.

    Args:
        bad_images: by the number of the record.
        image_root: the folder of the images.
        is_download: whether the data set is a benchmark, of which newer downloads lack folders.
    """
    shared = Counter((bad.kind, bad.place) for bad in bad_images.values() if bad.kind)
    lines, reported = [], set()
    for bad in bad_images.values():
        count = shared[bad.kind, bad.place]
        if bad.kind and (bad.kind, bad.place) in reported:
            continue
        reported.add((bad.kind, bad.place))
        if bad.kind == "link":
            others = f", and so are the images of {count - 1:,} other records" if count > 1 else ""
            lines.append(f"{bad.problem}{others}; follow_links=True (--follow_links) allows such links")
        elif count > 1:
            line = (
                f"the folder {bad.place} does not exist: {count:,} records have images there, the first is {bad.name}"
            )
            if is_download and Path(bad.place).parent == image_root:
                line += "; newer downloads lack some folders, ask the owners of the data set for them"
            lines.append(line)
        else:
            lines.append(bad.problem)
    return lines


__all__ = ["BadImage", "Images", "Record", "check_images", "map_images", "summarise_bad_images"]
