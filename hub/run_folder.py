"""The folder of a training run: one run at a time writes to it, and only `overwrite` removes an earlier run."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..utils.files import complete_file, locked_folder, read_json, require_writable_folder
from .publish import MODEL_FILES, matches

RECORD_FILE = "eccl_run.json"
# What a run writes besides its final model. `runs` has the logs of TensorBoard.
_RUN_FILES = (RECORD_FILE, "checkpoint-*", "adapter", "runs")
# A run writes no such files, and a user may send its output to one of them.
_LOG_FILES = ("*.log", "*.out", "*.err", ".*")


class RunFolder:
    """A folder that this process has locked for a run.

    Args:
        path: the folder.
        overwrites: whether [`start`] removes what an earlier run wrote.
    """

    def __init__(self, path: Path, overwrites: bool):
        self.path, self._overwrites = path, overwrites

    def start(self) -> None:
        """Removes the files of an earlier run, if they are to be overwritten, and records that a run has started."""
        if self._overwrites:
            for path in list(self.path.iterdir()):
                if matches(path.name, (*_RUN_FILES, *MODEL_FILES)):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._record(finished=False)

    def finish(self) -> None:
        """Records that the final model is complete."""
        self._record(finished=True)

    def _record(self, **facts: Any) -> None:
        with complete_file(self.path / RECORD_FILE) as unfinished:
            unfinished.write_text(json.dumps(facts) + "\n", encoding="utf-8")


@contextlib.contextmanager
def claim_run_folder(path: Path, has_checkpoints: bool, resumes: bool, overwrite: bool) -> Iterator[RunFolder]:
    """Locks the folder of a run, until the block ends. Nothing in it is changed before [`RunFolder.start`].

    Args:
        path: the folder; it may be missing.
        has_checkpoints: whether it has a complete checkpoint of a run.
        resumes: whether the run continues from the checkpoints there.
        overwrite: whether the files of an earlier run are replaced.

    Raises:
        FileExistsError: the folder has files of something else than a run; or it has a finished run, or checkpoints,
            and the run neither resumes nor overwrites.
        BlockingIOError: another run is writing to the folder.
        OSError: the folder cannot be written.
    """
    require_writable_folder(path)
    with locked_folder(path):
        record = path / RECORD_FILE
        foreign = sorted(file.name for file in path.iterdir() if not matches(file.name, _LOG_FILES))
        if foreign and not (record.is_file() or has_checkpoints):
            more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
            raise FileExistsError(
                f"{path} has files that no training run wrote ({', '.join(foreign[:3])}{more}): nothing is "
                "overwritten, name another folder"
            )
        if (has_checkpoints or _is_finished(record)) and not (resumes or overwrite):
            raise FileExistsError(
                f"{path} has {'a finished run' if _is_finished(record) else 'checkpoints of a run'}: continue it with "
                "--resume_from_checkpoint True, replace it with --overwrite True, or name another folder"
            )
        yield RunFolder(path, overwrite)


def _is_finished(record: Path) -> bool:
    if not record.is_file():
        return False
    finished = read_json(record).get("finished")
    if not isinstance(finished, bool):
        raise ValueError(f"{record} is not the record of a run: it has no finished, true or false")
    return finished


__all__ = ["RECORD_FILE", "RunFolder", "claim_run_folder"]
