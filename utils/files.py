"""Writing files and folders: they appear under their name only when they are complete, and checks come first."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder next to `path`, and renames it to `path` when the block ends without an error.

    After an error the temporary folder is deleted, and `path` is unchanged.

    Args:
        path: a folder that does not exist yet, or an empty one. Missing parent folders are created.

    Raises:
        OSError: `path` is not empty when the block ends, or it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as temporary:
        folder = Path(temporary) / path.name
        folder.mkdir()
        yield folder
        folder.replace(path)


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames that file to `path` when the block ends without an error.

    After an error the temporary file is deleted, and `path` is unchanged. Missing parent folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays at the end, because Pillow and others choose the format by it.
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        # Some libraries make files that only their owner can read.
        temporary.chmod(mode)
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


def require_writable_folder(path: Path) -> None:
    """Checks that files can be written to a folder, which may not exist yet; nothing is created.

    Raises:
        NotADirectoryError: `path` or one of its parents is a file.
        PermissionError: the folder, or its first parent that exists, is not writable.
    """
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{path} cannot be a folder: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: {existing} is not writable")


def require_picture_path(path: Path) -> None:
    """Checks that a picture can be written to a path.

    Raises:
        ValueError: Pillow writes no format with this suffix.
        IsADirectoryError: `path` is a folder.
        NotADirectoryError, PermissionError: the folder of the picture cannot be written.
    """
    # Imported here, because no other function of this file needs Pillow.
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{path} does not end like a picture file: give a name that ends in .png or .jpg, for example")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a picture file")
    require_writable_folder(path.parent)


__all__ = [
    "complete_file",
    "complete_folder",
    "require_new_folder",
    "require_picture_path",
    "require_writable_folder",
]
