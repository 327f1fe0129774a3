"""Writing files and folders: they appear under their name only when they are complete, and checks come first.

A lock keeps two runs from writing to the same folder. What a killed run has left is removed by the next one.
"""

import contextlib
import errno
import json
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Windows has no such locks; there, two runs can mix.
if sys.platform != "win32":
    import fcntl

_logger = logging.getLogger(__name__)
_LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked_folder(folder: Path, name: Path | None = None) -> Iterator[None]:
    """Keeps other processes from entering the same block for the same folder. It makes the folder if it is missing.

    The lock is a file in the folder. The system releases it when the process ends, however it ends. Forked processes do
    not inherit it. At the end the lock file is removed, and so is every folder that was made and is empty.

    Args:
        folder: the folder to lock.
        name: what the message calls it; by default `folder`.

    Raises:
        BlockingIOError: another process is in such a block.
        OSError: the folder cannot be made or written.
    """
    file = folder / _LOCK_FILE
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    descriptor = _lock(file, name or folder)
    try:
        yield
    finally:
        # While the lock is held: a process that opens the file later sees that it has gone, and makes a new one.
        file.unlink(missing_ok=True)
        os.close(descriptor)
        for parent in made:
            with contextlib.suppress(OSError):  # The folder is not empty.
                parent.rmdir()


def _lock(file: Path, name: Path) -> int:
    while True:
        is_current = False
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # Another process, at its end, has just removed the folder.
        if sys.platform == "win32":
            return descriptor
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(f"another run is writing to {name} ({holder}): name another folder") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            _logger.warning(f"the disk of {name} has no locks: another run could write to it at the same time")
            return descriptor
        # Its holder may have removed the file since it was opened.
        with contextlib.suppress(FileNotFoundError):
            is_current = os.path.samestat(os.fstat(descriptor), file.stat())
        if is_current:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
            return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """Yields an empty temporary folder next to `path`, and renames it to `path` when the block ends without an error.

    After an error the temporary folder is deleted, and `path` is unchanged.

    Args:
        path: a folder that does not exist yet, or an empty one. Missing parent folders are created.

    Raises:
        BlockingIOError: another process is writing the same folder.
        OSError: `path` is not empty when the block ends, or it cannot be written.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    with locked_folder(unfinished, path):
        folder = unfinished / path.name
        try:
            # Left over from a run that was killed.
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
            folder.replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # It is gone already, unless a run that was killed had made it.
        unfinished.rmdir()


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames that file to `path` when the block ends without an error.

    After an error the temporary file is deleted, and `path` is unchanged. Missing parent folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f".{path.stem}-{platform.node()}-"
    _remove_left_over_files(path, start)
    # The suffix stays at the end, because Pillow and others choose the format by it.
    temporary = path.with_name(f"{start}{os.getpid()}{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        # Some libraries make files that only their owner can read.
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_left_over_files(path: Path, start: str) -> None:
    """Removes the temporary files of processes of this machine that were killed."""
    for file in path.parent.iterdir():
        number = file.name.removeprefix(start).removesuffix(path.suffix)
        if file.name == f"{start}{number}{path.suffix}" and number.isdecimal() and not _is_running(int(number)):
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # It is another user's, or no number of a process.
        return True
    return True


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ValueError: it is not JSON, or holds something else. The message names the file.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    # The second error is that of brackets within brackets.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, it must hold an object")
    return content


def require_no_input(
    output: Path,
    inputs: Mapping[str, str | Path | None],
    option: str = "--output_dir",
    may_contain_inputs: bool = False,
) -> None:
    """Checks that nothing that a command reads is overwritten by what it writes.

    Args:
        output: the folder or file to write to.
        inputs: what the command reads, by option; names that are not on this machine, and `None`, are passed over.
        option: the option that gives `output`, for the message.
        may_contain_inputs: whether inputs may be below `output`, for a command that only adds a few files to it.

    Raises:
        ValueError: `output` is an input, or contains one; or `output` is a file that exists within a folder that is an
            input.
    """
    target = output.expanduser().resolve()
    for name, given in inputs.items():
        if given is None or not Path(given).expanduser().exists():
            continue
        source = Path(given).expanduser().resolve()
        contains = source.is_relative_to(target) and not may_contain_inputs
        if source == target or contains or (target.is_file() and target.is_relative_to(source)):
            raise ValueError(f"{option} is {output}, where {name} ({given}) would be overwritten: name another place")


def require_absent(paths: Iterable[Path], overwrite: bool) -> None:
    """Checks that files do not exist, unless they may be overwritten.

    Raises:
        FileExistsError: some exist, and `overwrite` is false.
    """
    existing = [path for path in paths if path.exists()]
    if existing and not overwrite:
        raise FileExistsError(f"{existing[0]} exists: give --overwrite to replace it, or name another folder")


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
    "locked_folder",
    "read_json",
    "require_absent",
    "require_new_folder",
    "require_no_input",
    "require_picture_path",
    "require_writable_folder",
]
