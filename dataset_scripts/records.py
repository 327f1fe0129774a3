"""Checks the records of any annotation once they are parsed: conflicts between them, their paths and images."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..utils.files import complete_file
from .image_checks import BadImage, Images, Record, check_images, summarise_bad_images
from .messages import format_problems, shorten
from .paths import find_variants

_CHOICES = ("error", "skip")


@dataclass(frozen=True)
class Checks:
    """The treatment of faulty images, captions and paths.

    Args:
        on_bad_image: `error`, or `skip` to leave unreadable images out.
        on_bad_caption: `error`, or `skip` to leave out captions that are refused otherwise (without a word, too long),
            and images without another caption.
        fix_paths: read the file that a path means although it is written otherwise, see [`find_variants`].
        follow_links: allow images that are links to files outside the data set.

    Raises:
        ValueError: a choice is unknown.
    """

    on_bad_image: str = "error"
    on_bad_caption: str = "error"
    fix_paths: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        for name in ("on_bad_image", "on_bad_caption"):
            if (value := getattr(self, name)) not in _CHOICES:
                raise ValueError(f"{name} is {value!r}, it must be {' or '.join(_CHOICES)}")


@dataclass
class Parsed:
    """The content of an annotation before its images are looked at.

    Attributes:
        source: the file, for messages.
        image_root: the folder that the paths are relative to.
        is_download: whether the data set is a published benchmark.
        joins_images: whether records with the same path are one image; otherwise the second one is a fault.
        records: the records without faults.
        problems: a line for each fault in the others.
        bad_captions: a line for each caption that was left out.
    """

    source: str
    image_root: Path
    is_download: bool = False
    joins_images: bool = False
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    bad_captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LeftOut:
    """How a data set differs from its annotation: each list has a line for each difference.

    Attributes:
        images: the unreadable images; those of a missing folder share a line.
        num_images: number of unreadable images.
        captions: the captions that were left out.
        paths: the paths that were read as written otherwise.
    """

    images: list[str]
    num_images: int
    captions: list[str]
    paths: list[str]


def check_records(parsed: Parsed, checks: Checks, known: Path | None = None) -> list[Record]:
    """Checks records against each other and against the files.

    Args:
        parsed: the content of an annotation.
        checks: what happens to faults.
        known: file that keeps the result. If it exists, no image is opened; so the caller must choose another name when
            an image has changed.

    Returns:
        The records, without those that are skipped.

    Raises:
        ValueError: there are faults, no records, or no readable images of a split. The message has the number of
            faults and the first 20 of them.
    """
    problems = list(parsed.problems)
    fixed = _fix_paths(parsed, checks)
    problems += fixed.problems
    if parsed.joins_images:
        problems += _join_images(parsed)
    problems += _find_conflicts(parsed.records)
    images = _recall_or_check(parsed, checks, known, fixed.changed)
    problems += images.same_file
    records = parsed.records
    if checks.on_bad_image == "error":
        # A path with a variant has its line already.
        bad = {number: image for number, image in images.bad.items() if number not in fixed.numbers}
        problems += summarise_bad_images(bad, parsed.image_root, parsed.is_download)
    else:
        splits = {record["split"] for record in records}
        records = [record for record in records if record["number"] not in images.bad]
        empty_splits = sorted(splits - {record["split"] for record in records})
        problems += [f"no image of split {split} can be read" for split in empty_splits]
    if problems:
        raise ValueError(f"{parsed.source}: {len(problems)} problems: {format_problems(problems)}")
    if not records:
        raise ValueError(f"{parsed.source} contains no records, it must contain at least one")
    return records


def read_left_out(known: Path) -> LeftOut:
    """Reads from the file `known` of [`check_records`] how the data set differs from its annotation."""
    content = json.loads(known.read_text(encoding="utf-8"))
    return LeftOut(content["images"], len(content["bad"]), content["captions"], content["paths"])


class _FixedPaths(NamedTuple):
    """What [`_fix_paths`] has found.

    Attributes:
        changed: a line for each kind of path that was changed.
        problems: a line for each kind of path that would have to be changed.
        numbers: the numbers of the records behind `problems`.
    """

    changed: list[str]
    problems: list[str]
    numbers: set[int]


def _fix_paths(parsed: Parsed, checks: Checks) -> _FixedPaths:
    """Looks for the files of the paths that do not exist; with `fix_paths`, changes the records."""
    missing = [record for record in parsed.records if not os.path.lexists(record["image"])]
    variants = find_variants(
        (record["file_path"] for record in missing), parsed.image_root, follow_links=checks.follow_links
    )
    of_difference: dict[str, list[Record]] = {}
    for record in missing:
        if record["file_path"] in variants:
            of_difference.setdefault(variants[record["file_path"]].difference, []).append(record)
    fixed = _FixedPaths([], [], set())
    for difference, records in of_difference.items():
        first = records[0]
        found = variants[first["file_path"]].path
        count = f"{len(records):,} record{'s' if len(records) > 1 else ''}"
        example = f"{first['name']}: {shorten(first['file_path'])}"
        if checks.fix_paths:
            fixed.changed.append(f"{count} with {difference}, the first is {example}, read as {shorten(found)}")
            continue
        fixed.problems.append(
            f"{count} with {difference} in the path of the image, the first is {example}; the file {shorten(found)} "
            "exists, fix_paths=True (--fix_paths) reads it"
        )
        fixed.numbers.update(record["number"] for record in records)
    if checks.fix_paths:
        for record in (record for records in of_difference.values() for record in records):
            record["file_path"] = variants[record["file_path"]].path
            record["image"] = str(parsed.image_root / record["file_path"])
    return fixed


def _join_images(parsed: Parsed) -> list[str]:
    """Joins the records with the same path into one that has the captions of all; returns a line for each fault."""
    first_use: dict[str, Record] = {}
    problems = []
    for record in parsed.records:
        first = first_use.setdefault(os.path.normpath(record["file_path"]), record)
        if first is record:
            continue
        for key, title in (("person_id", "person"), ("split", "split")):
            if record[key] != first[key]:
                problems.append(
                    f"{record['name']}: {shorten(record['file_path'])} is of {title} {shorten(record[key])}, but of "
                    f"{title} {shorten(first[key])} in {first['name']}"
                )
        first["captions"] += record["captions"]
    parsed.records = list(first_use.values())
    return problems


def _find_conflicts(records: list[Record]) -> Iterator[str]:
    """Finds faults between records: the same path twice, or a person in two splits."""
    first_use: dict[str, Record] = {}
    split_of: dict[object, Record] = {}
    for record in records:
        path, person = os.path.normpath(record["file_path"]), record["person_id"]
        first = first_use.setdefault(path, record)
        if first is not record:
            yield f"{record['name']}: {shorten(record['file_path'])} is already the image of {first['name']}"
        first = split_of.setdefault(person, record)
        if first["split"] != record["split"]:
            yield (
                f"{record['name']}: id {shorten(person)} is in split {record['split']}, but in split {first['split']} "
                f"in {first['name']}"
            )


def _recall_or_check(parsed: Parsed, checks: Checks, known: Path | None, paths: list[str]) -> Images:
    if known is not None and known.is_file():
        content = json.loads(known.read_text(encoding="utf-8"))
        return Images({int(number): BadImage(*bad) for number, bad in content["bad"].items()}, content["same_file"])
    images = check_images(parsed.records, parsed.image_root, checks.follow_links)
    if known is not None:
        left_out = {
            "images": summarise_bad_images(images.bad, parsed.image_root, parsed.is_download),
            "captions": parsed.bad_captions,
            "paths": paths,
        }
        with complete_file(known) as file:
            file.write_text(json.dumps(images._asdict() | left_out), encoding="utf-8")
    return images


__all__ = ["Checks", "LeftOut", "Parsed", "check_records", "read_left_out"]
