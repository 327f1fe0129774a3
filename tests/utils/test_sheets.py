from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from eccl.utils import lettering
from eccl.utils.lettering import find_font, set_text
from eccl.utils.sheets import draw_contact_sheet, draw_ranked_images, wrap_text

DRAW = ImageDraw.Draw(Image.new("RGB", (1, 1)))


@settings(deadline=None)
@given(
    text=st.text(st.sampled_from("abcW, .\n\té"), max_size=80), width=st.integers(1, 200), font_size=st.integers(8, 20)
)
def test_wrapped_lines_keep_the_words_and_the_width(text, width, font_size):
    lines = wrap_text(DRAW, text, width, font_size)
    assert [word for line in lines for word in line.split()] == text.split()
    for line in lines:
        assert DRAW.textlength(line, font_size=font_size) <= width or len(line.split()) == 1
    # No line is shorter than it needs to be: the first word of the next line does not fit.
    for line, following in pairwise(lines):
        assert DRAW.textlength(f"{line} {following.split()[0]}", font_size=font_size) > width


def test_the_frames_show_which_images_are_right(tmp_path):
    Image.new("RGB", (10, 30), "white").save(tmp_path / "a.png")
    sheet = draw_ranked_images([("a query", [(tmp_path / "a.png", True), (tmp_path / "a.png", False)])], height=90)
    colours = {colour for _, colour in sheet.getcolors(100000)}
    assert (20, 160, 60) in colours and (210, 40, 40) in colours


def test_a_contact_sheet_has_every_image_that_it_is_asked_for():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    items = [
        {"image": Image.new("RGB", (20, 60), colour), "person_id": 7, "captions": ["a man in a coat"]}
        for colour in colours
    ]
    for count, shown in ((2, 2), (4, 4), (9, 4)):
        sheet = draw_contact_sheet(items, count=count, seed=1)
        assert len({colour for _, colour in sheet.getcolors(100000)} & set(colours)) == shown


@settings(deadline=None, max_examples=40)
@given(text=st.text(max_size=200), width=st.integers(60, 300), max_lines=st.integers(1, 6))
def test_a_text_stays_within_its_width_and_its_lines(text, width, max_lines):
    lettering = set_text(text, width, 14, max_lines)
    assert len(lettering.lines) <= max_lines and lettering.height == len(lettering.lines) * lettering.line_height
    for line in lettering.lines:
        assert lettering.font.getlength(line) <= width or len(line.removesuffix("...")) <= 1


@pytest.mark.parametrize("query", ["a woman in a red coat " * 200, "x" * 3000, "a man"])
def test_the_images_begin_below_the_text(tmp_path, query):
    """The sheet of a query without text is white above its images; the text of no query covers them."""
    Image.new("RGB", (10, 30), (1, 2, 3)).save(tmp_path / "a.png")
    sheet = draw_ranked_images([(query, [(tmp_path / "a.png", None)] * 6)] * 2, height=90)
    assert [colour for _, colour in sheet.getcolors(100000) if colour == (1, 2, 3)]
    assert sum(count for count, colour in sheet.getcolors(100000) if colour == (1, 2, 3)) == 2 * 6 * 90 * 30


def test_a_text_that_is_cut_shows_it():
    assert set_text("a woman in a red coat " * 200, 300, 14).lines[-1].endswith("...")
    assert not set_text("a woman in a red coat", 300, 14).lines[-1].endswith("...")


def test_another_script_gets_a_font_that_has_it_or_a_note(monkeypatch):
    greek = "\u03b3\u03c5\u03bd\u03b1\u03af\u03ba\u03b1"
    find_font.cache_clear()
    monkeypatch.setattr(lettering, "_machine_fonts", list)
    without = set_text(f"a {greek}", 600, 14)
    assert without.lines == ["a ??????? [no font for 7 characters]"] or without.lines == [f"a {greek}"]
    find_font.cache_clear()
    monkeypatch.undo()
    font, missing = find_font("".join(sorted(set(greek))), 14)
    text = set_text(greek, 600, 14)
    assert (text.lines == [greek]) == (not missing)
    if not missing:
        # Each character has another picture than the box of a character that no font has.
        assert len({bytes(font.getmask(character)) for character in greek}) == len(set(greek))
    assert "no font for" in set_text("\U0001f9ff\U000e0100", 600, 14).lines[0]
