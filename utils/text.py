"""Texts from outside, made safe to show: in a terminal, and in Markdown.

Names of files, captions and messages of a server can have control characters that move the cursor, or marks that are
code on a page.
"""

import re
import unicodedata

# Characters that change how others are shown, or that end a line. Persian words and emoji need the two exceptions.
_ESCAPED_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_HARMLESS = {"\u200c", "\u200d"}
# A page that shows Markdown takes these as links, pictures, HTML, code, emphasis or the border of a cell.
_MARKDOWN = frozenset("\\`*[]<>|&")


def printable(text: object, keep: str = "") -> str:
    r"""Replaces control characters by their escapes, for example the escape character by `\x1b`.

    Args:
        text: any object; its `str` is taken.
        keep: control characters that stay, for example a newline.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _ESCAPED_CATEGORIES and character not in _HARMLESS | set(keep)
        else character
        for character in str(text)
    )


def plain_markdown(text: object) -> str:
    """Escapes a text so that Markdown shows it as it is, in one line: no link, picture, HTML, code or cell border."""
    plain = "".join(f"\\{character}" if character in _MARKDOWN else character for character in printable(text))
    # These make a link by themselves.
    return plain.replace("://", "\\://").replace("www.", "www\\.")


def code_span(text: object) -> str:
    """Makes a text a code span of Markdown, which nothing in the text can end."""
    content = printable(text)
    longest = max((len(run) for run in re.findall("`+", content)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {content} {fence}" if longest else f"`{content}`"


__all__ = ["code_span", "plain_markdown", "printable"]
