"""How messages about data show values and lists of problems."""

from collections.abc import Sequence

_MAX_PROBLEMS = 20
_MAX_CHARACTERS = 160


def shorten(value: object) -> str:
    """Returns a value as a message quotes it: a file may contain a text of any length."""
    if isinstance(value, str) and len(value) > _MAX_CHARACTERS:
        # `repr` of a long text takes as much memory again.
        return f"{value[:_MAX_CHARACTERS]!r}"[:-1] + f"... ({len(value) + 2:,} characters)"
    text = repr(value)
    if len(text) <= _MAX_CHARACTERS:
        return text
    return f"{text[:_MAX_CHARACTERS]}... ({len(text):,} characters)"


def format_problems(problems: Sequence[str]) -> str:
    """Returns the first 20 problems, one on each line, and the number of the others."""
    more = len(problems) - _MAX_PROBLEMS
    return "".join(f"\n- {problem}" for problem in problems[:_MAX_PROBLEMS]) + (
        f"\n- and {more} more" if more > 0 else ""
    )


__all__ = ["format_problems", "shorten"]
