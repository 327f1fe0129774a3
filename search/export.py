"""Writing pictures of a gallery, or matches of a search: a table, a contact sheet, or a folder of pictures."""

import csv
import math
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..utils.files import complete_file, complete_folder, require_new_folder, require_picture_path

if TYPE_CHECKING:
    from .gallery import Gallery, Match

# A larger sheet is more than Pillow's formats hold.
_MOST_ON_A_SHEET = 500
_COLUMNS_OF_SHEET = 10
# A spreadsheet takes a text that starts like this as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def export_matches(gallery: "Gallery", file: Path, matches: Iterable["Match"]) -> None:
    """Writes matches; see [`Gallery.export`]."""
    file = file.expanduser()
    if file.suffix.lower() == ".csv":
        with complete_file(file) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as table:
            write_table(table, matches, gallery.columns)
    elif file.suffix:
        require_picture_path(file)
        _write_sheet(gallery, file, list(matches))
    else:
        require_new_folder(file)
        with complete_folder(file) as folder, open(folder / "pictures.csv", "w", encoding="utf-8", newline="") as table:
            write_table(table, _write_pictures(gallery, folder, matches), gallery.columns)


def write_table(file: TextIO, matches: Iterable["Match"], columns: Iterable[str]) -> None:
    """Writes matches as CSV: `id`, `path`, `score`, the columns of every gallery, and its own.

    A text that a spreadsheet would take as a formula gets an apostrophe in front.

    Args:
        file: an open text file.
        matches: the matches.
        columns: names of the gallery's own columns.
    """
    names = ["camera", "time", "tracklet", "width", "height", "added", *columns]
    writer = csv.writer(file)
    writer.writerow(["id", "path", "score", *names])
    for match in matches:
        score = "" if math.isnan(match.score) else f"{match.score:.6f}"
        cells = [match.columns.get(name) for name in names]
        writer.writerow([match.id, _cell(match.path), score, *map(_cell, cells)])


def defuse(value: Any) -> Any:
    """Puts an apostrophe in front of a text that a spreadsheet would take as a formula; other values stay."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_STARTS) else value


def _cell(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else defuse(value)


def _write_pictures(gallery: "Gallery", folder: Path, matches: Iterable["Match"]) -> Iterator["Match"]:
    for match in matches:
        # A picture that is encoded anew has no metadata, such as the place where it was taken.
        gallery.read_crop(match.id).save(folder / f"{match.id}.jpg", quality=95)
        yield match


def _write_sheet(gallery: "Gallery", file: Path, matches: list["Match"]) -> None:
    from ..utils.sheets import draw_ranked_images

    if not matches:
        raise ValueError("there are no pictures to draw")
    if len(matches) > _MOST_ON_A_SHEET:
        raise ValueError(f"{len(matches):,} pictures are too many for a sheet, at most {_MOST_ON_A_SHEET} fit")
    rows = []
    scores = []
    for start in range(0, len(matches), _COLUMNS_OF_SHEET):
        part = matches[start : start + _COLUMNS_OF_SHEET]
        pictures: list[tuple[Any, None]] = [(gallery.read_crop(match.id), None) for match in part]
        rows.append((f"{start + 1} to {start + len(part)} of {len(matches)}", pictures))
        scores.append([match.score for match in part])
    with complete_file(file) as unfinished:
        has_scores = not math.isnan(matches[0].score)
        draw_ranked_images(rows, scores=scores if has_scores else None).save(unfinished)


__all__ = ["defuse", "export_matches", "write_table"]
