"""Paths as people write them: finds the file that a path means, and says in which way the path differs from it."""

import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

_PREFIX = "imgs/"


class Variant(NamedTuple):
    """The file that a path means although it is written otherwise.

    Attributes:
        path: the path of the file, relative to the folder of the images.
        difference: how the given path differs from it, for a message, for example "backslashes".
    """

    path: str
    difference: str


def find_variants(missing: Iterable[str], root: Path, follow_links: bool = False) -> dict[str, Variant]:
    """Finds files whose paths differ from the given ones only in the way that they are written.

    The ways are backslashes, `./` or `imgs/` at the start, blanks around the path, the case of letters, and the Unicode
    form (NFC or NFD). A path that could mean several files has no variant.

    Args:
        missing: paths that do not exist below `root`.
        root: folder of the images.
        follow_links: also look into linked folders.

    Returns:
        The variant of each path that has one.
    """
    missing = list(dict.fromkeys(missing))
    if not missing:
        return {}
    files: defaultdict[str, list[str]] = defaultdict(list)
    for path in walk_files(root, follow_links):
        files[_key(path)].append(path)
    found = {}
    for path in missing:
        plain = _simplify(path)
        candidates = files.get(_key(plain), [])
        exact = [candidate for candidate in candidates if candidate == plain]
        if len(chosen := exact or candidates) == 1:
            found[path] = Variant(chosen[0], _describe(path, plain, chosen[0]))
    return found


def walk_files(root: Path, follow_links: bool = False) -> Iterator[str]:
    """Yields the path of each file below a folder, relative to it, in a fixed order.

    With `follow_links`, linked folders are entered, but not those that contain the link itself.
    """
    for folder, subfolders, files in os.walk(root, followlinks=follow_links):
        subfolders.sort()
        start = os.path.relpath(folder, root)
        if follow_links and any(os.path.islink(os.path.join(folder, name)) for name in subfolders):
            parents = [Path(root, start), *Path(root, start).parents]
            around = {os.path.realpath(parent) for parent in parents}
            subfolders[:] = [name for name in subfolders if os.path.realpath(os.path.join(folder, name)) not in around]
        for name in sorted(files):
            yield name if start == "." else os.path.join(start, name)


def leaves_folder(path: str) -> bool:
    """Whether a path is absolute or has `..`, also if it is written as on Windows."""
    # For Windows, both / and \ separate parts, so these two checks hold for POSIX, too.
    windows = PureWindowsPath(path)
    return bool(windows.anchor) or ".." in windows.parts


def _simplify(path: str) -> str:
    path = path.strip().replace("\\", "/")
    while path.startswith("./"):
        path = path[2:]
    if path[: len(_PREFIX)].lower() == _PREFIX:
        path = path[len(_PREFIX) :]
    return os.path.normpath(path) if path else path


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _describe(path: str, plain: str, found: str) -> str:
    differences = []
    if path != path.strip():
        differences.append("blanks around the path")
    if "\\" in path:
        differences.append("backslashes")
    if path.strip().replace("\\", "/").removeprefix("./").lower().startswith(_PREFIX):
        differences.append(f"the prefix {_PREFIX}")
    if plain != found:
        same_form = unicodedata.normalize("NFC", plain) == unicodedata.normalize("NFC", found)
        differences.append("another Unicode form" if same_form else "another case of letters")
    return " and ".join(differences) or "the prefix ./"


__all__ = ["Variant", "find_variants", "leaves_folder", "walk_files"]
