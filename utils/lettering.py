"""Texts in pictures: broken into lines, cut after a number of lines, and drawn with a font that has the characters."""

import functools
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FONT_FOLDERS = {
    "darwin": ("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    "win32": ("C:/Windows/Fonts",),
}.get(sys.platform, ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"))
_FONT_SUFFIXES = (".ttf", ".otf", ".ttc")
_STYLES = ("bold", "italic", "oblique", "light", "condensed", "mono")
_MOST_CHARACTERS = 100_000
# Reading a thousand fonts takes seconds.
_MAX_FONTS = 300
# No font has a glyph for a code point that is no character.
_NO_CHARACTER = "\U0010ffff"


class Lettering(NamedTuple):
    """A text that is ready to be drawn.

    Attributes:
        lines: the lines.
        font: a font that has the characters of the lines.
        line_height: the distance of two lines in pixels.
    """

    lines: list[str]
    font: Font
    line_height: int

    @property
    def height(self) -> int:
        """The height of all lines in pixels."""
        return len(self.lines) * self.line_height

    def draw(self, draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
        """Draws the lines in black, one below the other."""
        for number, line in enumerate(self.lines):
            draw.text((left, top + number * self.line_height), line, "black", font=self.font)


def set_text(text: str, width: int, font_size: int, max_lines: int = 4) -> Lettering:
    """Breaks a text into lines, and chooses a font.

    Characters that no font of this machine has become question marks, and a note at the end counts them. Lines after
    `max_lines` are cut off, and an ellipsis shows it.

    Args:
        text: any text; control characters become spaces.
        width: the largest width of a line in pixels.
        font_size: size of the font in pixels.
        max_lines: the largest number of lines.
    """
    # More characters than any number of lines shows.
    text = "".join(character if character.isprintable() else " " for character in text[:_MOST_CHARACTERS])
    font, missing = find_font("".join(sorted(set(text))), font_size)
    if missing:
        count = sum(character in missing for character in text)
        text = "".join("?" if character in missing else character for character in text)
        text += f" [no font for {count} characters]"
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    parts = (part for line in wrap_text(draw, text, width, font_size, font) for part in _break_word(line, width, font))
    # Measuring a long word takes seconds: lines that are not shown are not made.
    lines = list(itertools.islice(parts, max_lines + 1))
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] += "..."
    return Lettering(lines, font, round(1.3 * font_size))


def wrap_text(draw: ImageDraw.ImageDraw, text: str, width: int, font_size: int, font: Font | None = None) -> list[str]:
    """Breaks a text into lines of at most `width` pixels; a word that is wider gets a line alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font, font_size=font_size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _break_word(line: str, width: int, font: Font) -> Iterator[str]:
    """Breaks a line that is too wide, because it has one word, between its characters."""
    part = ""
    for character in line:
        if part and font.getlength(part + character) > width:
            yield part
            part = ""
        part += character
    yield part


@functools.lru_cache(maxsize=256)
def find_font(characters: str, size: int) -> tuple[Font, frozenset[str]]:
    """Finds a font that has all characters: Pillow's own, or one of the machine.

    Args:
        characters: each character once.
        size: size of the font in pixels.

    Returns:
        The font with the most of the characters, and the characters that it lacks.
    """
    default = ImageFont.load_default(size)
    best: tuple[Font, frozenset[str]] = default, _missing_characters(default, characters)
    for path in _machine_fonts() if best[1] else ():
        try:
            font = ImageFont.truetype(path, size)
            missing = _missing_characters(font, characters)
        except (OSError, ValueError):  # Some fonts have sizes, or tables, that are not supported.
            continue
        if len(missing) < len(best[1]):
            best = font, missing
        if not missing:
            break
    return best


def _missing_characters(font: Font, characters: str) -> frozenset[str]:
    if not isinstance(font, ImageFont.FreeTypeFont):
        # Pillow was built without FreeType; its other font has Latin-1 alone.
        return frozenset(character for character in characters if ord(character) > 255)
    absent = font.getmask(_NO_CHARACTER)
    return frozenset(
        character
        for character in characters
        if not character.isspace()
        and (mask := font.getmask(character)).size == absent.size
        and bytes(mask) == bytes(absent)
    )


@functools.cache
def _machine_fonts() -> list[str]:
    found: list[str] = []
    for folder in map(os.path.expanduser, _FONT_FOLDERS):
        found += sorted(str(path) for path in Path(folder).rglob("*") if path.suffix.lower() in _FONT_SUFFIXES)
    # Plain fonts first: bold and slanted ones look strange in a sheet.
    return sorted(found, key=lambda path: any(word in path.lower() for word in ("bold", "italic", "oblique")))[
        :_MAX_FONTS
    ]


__all__ = ["Lettering", "find_font", "set_text", "wrap_text"]
