from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

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
