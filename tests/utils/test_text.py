import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eccl.utils.text import code_span, plain_markdown, printable


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a red coat", "a red coat"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("one\ntwo\r\tthree\x00", r"one\ntwo\r\tthree\x00"),
        # It shows the rest of the line from right to left: `gpj.exe` becomes `exe.jpg`.
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("caf\udce9", r"caf\udce9"),
        ("line\u2028break", r"line\u2028break"),
        ("élève 红外套 👩\u200d👧", "élève 红外套 👩\u200d👧"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown
    assert printable(text, keep="\n").replace("\n", r"\n") == shown


@given(st.text())
def test_a_printable_text_is_one_line_that_leaves_the_terminal_alone(text):
    shown = printable(text)
    assert len(shown.splitlines()) <= 1 and not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def unescape(text):
    """What Markdown shows: a backslash before a punctuation mark is not shown."""
    return re.sub(r"\\([\\`*\[\]<>|&:.])", r"\1", text)


@given(st.text())
def test_markdown_shows_a_plain_text_as_it_is(text):
    plain = plain_markdown(text)
    assert unescape(plain) == printable(text)
    # Each mark is behind an odd number of backslashes.
    for match in re.finditer(r"(\\*)[`*\[\]<>|&]", plain):
        assert len(match[1]) % 2 == 1


def test_a_name_does_not_become_a_link_by_itself():
    assert plain_markdown("https://a.b and www.a.b") == r"https\://a.b and www\.a.b"


@given(st.text(alphabet="`a \n"))
def test_nothing_in_a_code_span_ends_it(text):
    span = code_span(text)
    fence = re.match("`+", span)[0]
    inside = span.removeprefix(fence).removesuffix(fence)
    assert fence not in re.findall("`+", inside) and "\n" not in span
