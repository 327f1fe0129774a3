"""Reads setup.cfg, and the code blocks of README.md and docs/*.md, so that they can be checked and run."""

import configparser
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "setup.cfg", encoding="utf-8")
# The `module:function` of each console script.
SCRIPTS = dict(line.split(" = ") for line in SETTINGS["options.entry_points"]["console_scripts"].split("\n") if line)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced code block of a page.

    Attributes:
        page: path of the page, relative to the repository root.
        line: number of the line that opens the block.
        section: text of the heading above the block.
        language: the word after the fence; empty if there is none.
        text: the lines between the fences.
    """

    page: str
    line: int
    section: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """Returns the code blocks of a page in their order.

    Blocks between `~~~` are left out: they are examples for other programs, or need a server.
    """
    blocks, section, opened = [], "", None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if opened is None and (fence := re.fullmatch(r"```(\w*)", line)):
            opened, language = number, fence[1]
        elif opened is not None and line == "```":
            text = "\n".join(lines[opened : number - 1])
            blocks.append(Block(page.relative_to(ROOT).as_posix(), opened, section, language, text))
            opened = None
        elif opened is None and (heading := re.fullmatch(r"#+ (.+)", line)):
            section = heading[1]
    if opened is not None:
        raise ValueError(f"{page}:{opened}: the code block has no end")
    return blocks


def shell_commands(block: Block) -> Iterator[list[str]]:
    """Yields the words of each command of a shell block. A backslash continues a line; comments are dropped."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words
