"""Sheets of pictures: the ranked images of several queries, and a contact sheet of a data set."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ..processing_eccl import read_image
from .lettering import Lettering, set_text, wrap_text

# A sheet is at least this many images wide, so that a sentence has room.
_MIN_COLUMNS = 4
_GREEN, _RED = (20, 160, 60), (210, 40, 40)
# Sizes of the contact sheet in pixels, except the number of columns and of lines.
_COLUMNS, _CELL_WIDTH, _IMAGE_HEIGHT, _GAP, _FONT_SIZE, _MAX_LINES = 3, 400, 300, 16, 14, 200


def draw_ranked_images(
    queries: Sequence[tuple[str, Sequence[tuple[Path | Mapping[str, Any], bool | None]]]],
    height: int = 240,
    scores: Sequence[Sequence[float]] | None = None,
) -> Image.Image:
    """Draws each query as a sentence, with the images found for it below, from the best to the worst.

    A sentence of more than four lines is cut.

    Args:
        queries: for each query its sentence and the images found, as `read_image` takes them. Each image has `True` if
            it shows the right person (green frame), `False` if it does not (red frame), `None` if that is unknown (no
            frame).
        height: height of each image on the sheet, in pixels; the width is a third of it.
        scores: for each query one number per image, written below the image.
    """
    width, gap, score_height = height // 3, 8, 18 if scores else 0
    columns = max(len(found) for _, found in queries)
    sheet_width = gap + max(columns, _MIN_COLUMNS) * (width + gap)
    sentences = [set_text(sentence, sheet_width - 2 * gap, font_size=15) for sentence, _ in queries]
    image_tops, bottom = [], 0
    for sentence in sentences:
        image_tops.append(bottom + sentence.height + 2 * gap)
        bottom = image_tops[-1] + height + score_height + gap
    sheet = Image.new("RGB", (sheet_width, bottom), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (_, found) in enumerate(queries):
        top = image_tops[number]
        sentences[number].draw(draw, gap, top - sentences[number].height - gap)
        for rank, (image, is_right) in enumerate(found):
            left = gap + rank * (width + gap)
            sheet.paste(read_image(image).resize((width, height)), (left, top))
            if is_right is not None:
                box = (left - 3, top - 3, left + width + 2, top + height + 2)
                draw.rectangle(box, outline=_GREEN if is_right else _RED, width=4)
            if scores:
                draw.text((left, top + height + 4), f"{scores[number][rank]:.3f}", "black", font_size=13)
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
    cell_height = max(_IMAGE_HEIGHT, *(sum(text.height for text in texts) for _, texts in cells))
    size = (_GAP + columns * (_CELL_WIDTH + _GAP), _GAP + -(-len(cells) // columns) * (cell_height + _GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, texts) in enumerate(cells):
        left = _GAP + (number % columns) * (_CELL_WIDTH + _GAP)
        top = _GAP + (number // columns) * (cell_height + _GAP)
        sheet.paste(image, (left, top))
        for text in texts:
            text.draw(draw, left + image.width + _GAP // 2, top)
            top += text.height
    return sheet


def _make_cell(item: Mapping[str, Any]) -> tuple[Image.Image, list[Lettering]]:
    """Returns the image of an item at its size on the sheet, and the texts to the right of it."""
    image = read_image(item["image"])
    width = min(_CELL_WIDTH // 2, max(1, round(image.width * _IMAGE_HEIGHT / image.height)))
    texts = [set_text(f"person {item['person_id']}", _CELL_WIDTH, _FONT_SIZE)]
    for caption in item["captions"]:
        lettering = set_text(caption, _CELL_WIDTH - width - _GAP, _FONT_SIZE, _MAX_LINES)
        texts.append(lettering._replace(lines=["", *lettering.lines]))
    return image.resize((width, _IMAGE_HEIGHT)), texts


__all__ = ["draw_contact_sheet", "draw_ranked_images", "wrap_text"]
