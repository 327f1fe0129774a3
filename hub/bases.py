"""The base that an adapter names: an id of the Hub, or a folder, whose path only this machine knows."""

import re
from pathlib import Path

# Beside an adapter whose base is a folder: the path of that folder, for this machine alone. It is never published.
BASE_FOLDER_FILE = "base_folder.txt"


def is_path(base: str) -> bool:
    """Returns whether the name of a base is a folder of this machine, or of another one, and no Hub id."""
    return Path(base).is_dir() or re.match(r"[./~\\]|[A-Za-z]:", base) is not None


def resolve_base(name: str | Path, base: str | None) -> str | None:
    """Returns the base that an adapter names; the path of the folder if it is `./NAME` and the adapter knows the path.

    Args:
        name: folder or Hub id of the adapter.
        base: the base as `adapter_config.json` has it.
    """
    file = Path(name, BASE_FOLDER_FILE)
    if base and is_path(base) and file.is_file():
        return file.read_text("utf-8", "surrogateescape").strip() or base
    return base


__all__ = ["BASE_FOLDER_FILE", "is_path", "resolve_base"]
