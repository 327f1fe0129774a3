"""The folder of a training run: one run at a time writes to it, and only `overwrite` removes an earlier run."""

import contextlib
import fnmatch
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..utils.files import complete_file, locked_folder, read_json, require_writable_folder
from .bases import BASE_FOLDER_FILE

RECORD_FILE = "eccl_run.json"
# What transformers has logged in each step and evaluation.
TRAINING_LOG = "training_log.json"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
# What a run writes at its end. It writes no licence, and its tokenizer is in two files.
_RUN_FILES = {
    *("README.md", "config.json", "model.safetensors", "model.safetensors.index.json", "processor_config.json"),
    *("configuration_eccl.py", "modeling_eccl.py", "processing_eccl.py", "pipeline_eccl.py"),
    *("tokenizer.json", "tokenizer_config.json", TRAINING_LOG),
}
_ADAPTER_FILES = {"README.md", "config.json", "adapter_config.json", "adapter_model.safetensors", BASE_FOLDER_FILE}
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
        """Removes the files of an earlier run, if they are to be overwritten, and marks the folder as that of a run."""
        if self._overwrites:
            adapter = self.path / "adapter"
            for path in (*self.path.iterdir(), adapter):
                # Of a link, only the link is removed.
                if path.is_symlink() and (path == adapter or _CHECKPOINT.fullmatch(path.name)):
                    path.unlink()
                elif path.is_dir() and _CHECKPOINT.fullmatch(path.name):
                    shutil.rmtree(path)
            for folder, names in ((adapter, _ADAPTER_FILES), (self.path, {*_RUN_FILES, RECORD_FILE})):
                for name in names:
                    (folder / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # There is no such folder, or it has files of somebody else.
                adapter.rmdir()
        if not (self.path / RECORD_FILE).is_file():
            self._record(finished=False)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Marks the final model as unfinished while the block writes it, and then as finished."""
        self._record(finished=False)
        yield
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
            and the run neither resumes from them nor overwrites.
        BlockingIOError: another run is writing to the folder.
        OSError: the folder cannot be written.
    """
    require_writable_folder(path)
    with locked_folder(path):
        record = path / RECORD_FILE
        foreign = sorted(
            file.name for file in path.iterdir() if not any(fnmatch.fnmatchcase(file.name, each) for each in _LOG_FILES)
        )
        if foreign and not (record.is_file() or has_checkpoints):
            more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
            raise FileExistsError(
                f"{path} has files that no training run wrote ({', '.join(foreign[:3])}{more}): nothing is "
                "overwritten, name another folder"
            )
        finished = is_finished(path)
        if (has_checkpoints or finished) and not overwrite and not (resumes and has_checkpoints):
            raise FileExistsError(
                f"{path} has {'a finished run' if finished else 'checkpoints of a run'}"
                + (" without a complete checkpoint" if resumes else "")
                + ": continue it with --resume_from_checkpoint True if it has checkpoints, replace it with --overwrite "
                "True, or name another folder"
            )
        yield RunFolder(path, overwrite)


def is_finished(path: Path) -> bool | None:
    """Returns whether the run in a folder has written its final model; `None` if it is not the folder of a run.

    Raises:
        ValueError: the record of the run is damaged.
    """
    record = path / RECORD_FILE
    if not record.is_file():
        return None
    finished = read_json(record).get("finished")
    if not isinstance(finished, bool):
        raise ValueError(f"{record} is not the record of a run: it has no finished, true or false")
    return finished


__all__ = ["RECORD_FILE", "TRAINING_LOG", "RunFolder", "claim_run_folder", "is_finished"]
