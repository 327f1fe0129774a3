"""The faults of single values: captions, paths of images, ids of persons. Each function yields a line per fault."""

from collections.abc import Iterator

from .messages import shorten
from .paths import leaves_folder


def find_caption_faults(captions: object, name: str = "captions") -> Iterator[str]:
    """Finds the faults of the captions of an image; `name` is the key or the column that a message quotes."""
    if not isinstance(captions, list) or not captions:
        yield f"{name} is {shorten(captions)}, it must be a list of at least one caption"
        return
    for index, caption in enumerate(captions):
        yield from find_text_faults(caption, f"{name}[{index}]")


def find_text_faults(caption: object, name: str) -> Iterator[str]:
    """Finds the fault of one caption, if it has one."""
    # Imported here, because the module needs transformers.
    from ..processing_eccl import LONGEST_CAPTION, unescape

    if isinstance(caption, str) and len(caption) > LONGEST_CAPTION:
        yield f"{name} has {len(caption):,} characters, the limit is {LONGEST_CAPTION:,}"
    elif not isinstance(caption, str) or not any(map(str.isalnum, unescape(caption))):
        yield f"{name} is {shorten(caption)}, it must be a sentence"
    elif not _is_valid_text(caption):
        yield f"{name} is {shorten(caption)}, it must be text that UTF-8 can encode"


def find_path_faults(path: object, name: str, folder: str = "imgs/") -> Iterator[str]:
    """Finds the fault of an image's path, if it has one.

    Args:
        path: the path.
        name: the key or the column that a message quotes.
        folder: the folder that the path is relative to, for a message.
    """
    if not isinstance(path, str) or not path:
        yield f"{name} is {shorten(path)}, it must be a path below {folder}"
    elif "\0" in path or not _is_valid_text(path):
        yield f"{name} is {shorten(path)}, it must be a valid file path"
    elif leaves_folder(path.strip()):
        yield f"{name} is {shorten(path)}, it must stay below {folder}"


def find_person_faults(person: object, name: str) -> Iterator[str]:
    """Finds the fault of the id of a person in a user's data set, if it has one."""
    is_number = isinstance(person, int) and not isinstance(person, bool)
    is_text = isinstance(person, str) and bool(person.strip()) and _is_valid_text(person)
    if not (is_number or is_text):
        yield f"{name} is {shorten(person)}, it must be a whole number or a text that is not empty"


def _is_valid_text(text: str) -> bool:
    """Whether a text has no lone surrogates, which JSON can contain (`\\ud800`) but UTF-8 cannot encode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


__all__ = ["find_caption_faults", "find_path_faults", "find_person_faults", "find_text_faults"]
