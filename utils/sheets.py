"""Sheets of pictures: the ranked images of several queries, and a contact sheet of a data set."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..processing_eccl import read_image

_GREEN, _RED = (20, 160, 60), (210, 40, 40)
# Sizes of the contact sheet in pixels, except the number of columns.
_COLUMNS, _CELL_WIDTH, _IMAGE_HEIGHT, _GAP, _FONT_SIZE, _LINE_HEIGHT = 3, 400, 300, 16, 14, 18


def wrap_text(draw: ImageDraw.ImageDraw, text: str, width: int, font_size: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels; a word that is wider gets a line alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font_size=font_size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_ranked_images(
    queries: Sequence[tuple[str, Sequence[tuple[Path, bool | None]]]],
    height: int = 240,
    scores: Sequence[Sequence[float]] | None = None,
) -> Image.Image:
    """Draws each query as a sentence, with the images found for it below, from the best to the worst.

    Args:
        queries: for each query its sentence and the images found. Each image has `True` if it shows the right person
            (green frame), `False` if it does not (red frame), `None` if that is unknown (no frame).
        height: height of each image on the sheet, in pixels; the width is a third of it.
        scores: for each query one number per image, written below the image.
    """
    width, gap, text_height, score_height = height // 3, 8, 52, 18 if scores else 0
    columns = max(len(found) for _, found in queries)
    query_height = height + text_height + score_height + gap
    sheet = Image.new("RGB", (gap + columns * (width + gap), len(queries) * query_height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (sentence, found) in enumerate(queries):
        top = number * query_height
        lines = wrap_text(draw, sentence, sheet.width - 2 * gap, font_size=15)
        draw.multiline_text((gap, top + 6), "\n".join(lines), font_size=15, fill="black")
        for rank, (path, is_right) in enumerate(found):
            left = gap + rank * (width + gap)
            sheet.paste(read_image(path).resize((width, height)), (left, top + text_height))
            if is_right is not None:
                box = (left - 3, top + text_height - 3, left + width + 2, top + text_height + height + 2)
                draw.rectangle(box, outline=_GREEN if is_right else _RED, width=4)
            if scores:
                draw.text((left, top + text_height + height + 4), f"{scores[number][rank]:.3f}", "black", font_size=13)
    return sheet


def draw_contact_sheet(dataset: Sequence[Mapping[str, Any]], count: int = 12, seed: int = 0) -> Image.Image:
    """Draws random images of a data set, each with its person and all its captions.

    Args:
        dataset: a split; each item has `image`, `person_id` and `captions`.
        count: number of images to draw; all of them if there are fewer.
        seed: decides which images are drawn.
    """
    chosen = sorted(random.Random(seed).sample(range(len(dataset)), min(count, len(dataset))))
    cells = [_make_cell(dataset[index]) for index in chosen]
    columns = min(_COLUMNS, len(cells))
    cell_height = max(_IMAGE_HEIGHT, _LINE_HEIGHT * max(len(lines) for _, lines in cells))
    size = (_GAP + columns * (_CELL_WIDTH + _GAP), _GAP + -(-len(cells) // columns) * (cell_height + _GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(cells):
        left = _GAP + (number % columns) * (_CELL_WIDTH + _GAP)
        top = _GAP + (number // columns) * (cell_height + _GAP)
        sheet.paste(image, (left, top))
        for line_number, line in enumerate(lines):
            place = (left + image.width + _GAP // 2, top + line_number * _LINE_HEIGHT)
            draw.text(place, line, font_size=_FONT_SIZE, fill="black")
    return sheet


def _make_cell(item: Mapping[str, Any]) -> tuple[Image.Image, list[str]]:
    """Returns the image of an item at its size on the sheet, and the lines of text to the right of it."""
    image = read_image(item["image"])
    width = min(_CELL_WIDTH // 2, max(1, round(image.width * _IMAGE_HEIGHT / image.height)))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    lines = [f"person {item['person_id']}"]
    for caption in item["captions"]:
        lines += ["", *wrap_text(draw, caption, _CELL_WIDTH - width - _GAP, _FONT_SIZE)]
    return image.resize((width, _IMAGE_HEIGHT)), lines


__all__ = ["draw_contact_sheet", "draw_ranked_images", "wrap_text"]
