"""Files and folders that appear under their name only when they are complete."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`, and renames it to `path` when the block ends without an error.

    After an error the temporary folder is deleted, and `path` is as it was.

    Args:
        path: does not exist, or is an empty folder. Missing parent folders are made.

    Raises:
        OSError: `path` is not empty when the block ends, or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        folder.replace(path)


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary name beside `path`, and renames that file to `path` when the block ends without an error.

    After an error the temporary file is deleted, and `path` is as it was. Missing parent folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: Pillow and others choose the format by it.
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_new_folder(path: Path) -> None:
    """Checks that a command may write to a folder.

    Raises:
        FileExistsError: `path` is a file, or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder: nothing is overwritten, name another folder")


__all__ = ["complete_file", "complete_folder", "require_new_folder"]
