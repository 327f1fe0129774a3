"""When a run writes checkpoints, and which of them are whole: a run may be killed at any moment."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME

COMPLETE_FILE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def mark_complete(checkpoint: Path) -> None:
    """Writes `complete.json`, the size of each file of a checkpoint by name, when all of them are on the disk.

    Args:
        checkpoint: a folder to which nothing will be added.
    """
    sizes = {}
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        _flush(file)
        sizes[file.relative_to(checkpoint).as_posix()] = file.stat().st_size
    unfinished = checkpoint / f"{COMPLETE_FILE}.tmp"
    unfinished.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(checkpoint / COMPLETE_FILE)
    _flush(checkpoint)


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from; `None` where it is whole."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    record = checkpoint / COMPLETE_FILE
    if not record.is_file():
        return f"it has no {COMPLETE_FILE}, which is written last"
    for name, size in json.loads(record.read_text(encoding="utf-8")).items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes in place of {size}"
    if not (checkpoint / SCHEDULER_NAME).is_file():
        return f"it has no {SCHEDULER_NAME}, and no optimiser: save_only_model leaves them out"
    return None


def delete_older(checkpoint: Path, limit: int | None, best: str | None) -> None:
    """Deletes what a run no longer needs, once a checkpoint is whole.

    The checkpoint itself and the best stay, then those written last; what is not whole goes first. transformers goes by
    numbers where times lie close together, and would keep a later one that was never finished.

    Args:
        checkpoint: the one just written.
        limit: how many stay; `None` or 0 deletes nothing.
        best: the checkpoint with the best metric.
    """
    if not limit or limit < 0:
        return
    kept = {checkpoint.resolve()} | ({Path(best).resolve()} if best else set())
    others = sorted(
        (what_is_missing(folder) is None, _written_at(folder), number, folder)
        for number, folder in _numbered(checkpoint.parent)
        if folder.resolve() not in kept
    )
    free = max(0, limit - len(kept))
    for *_, folder in others[: max(0, len(others) - free)]:
        shutil.rmtree(folder)


def _written_at(checkpoint: Path) -> int:
    record = checkpoint / COMPLETE_FILE
    return record.stat().st_mtime_ns if record.is_file() else 0


def last_complete_checkpoint(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint with the most steps that is whole; `None` where there is none.

    Args:
        output_dir: of the run; it need not be there.
        report: is given a line for each checkpoint that is passed over.
    """
    for _, checkpoint in sorted(_numbered(output_dir), reverse=True):
        missing = what_is_missing(checkpoint)
        if missing is None:
            return checkpoint
        report(f"{checkpoint} is incomplete and passed over: {missing}")
    return None


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    return [(int(match[1]), folder) for folder in folders if (match := _NAME.fullmatch(folder.name))]


class CheckpointCallback(TrainerCallback):
    """Moves the moments at which a checkpoint is written, so that a run resumed from it does what it would have done.

    One that is due with the last step of an epoch, or of training, waits for the evaluation that follows. A log comes
    before each, so that no mean goes over steps before and after. Once SIGTERM has reached any process, or the launcher
    has gone, one is written after the step, and `stopping` is set.

    Args:
        accelerator: `set_trigger` of any process asks for the stop.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.stopping, self._is_due = accelerator, False, False
        # A launcher that ends by a signal leaves its one process behind, to write where the next run writes.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def on_step_end(self, args, state, control, **kwargs):
        if self._launcher is not None and os.getppid() != self._launcher:
            self.accelerator.set_trigger()
        # All processes take part in the check.
        self.stopping = self.accelerator.check_trigger() or self.stopping
        if self.stopping or control.should_save:
            self._is_due = state.epoch == int(state.epoch) or control.should_training_stop
            control.should_save = not self._is_due
        self._log_first(args, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save = control.should_save or self._is_due
        self._is_due = False
        self._log_first(args, control)

    def _log_first(self, args, control):
        # Whether the best is saved shows only after its evaluation.
        may_save = control.should_save or (args.save_strategy == "best" and control.should_evaluate)
        if may_save and args.logging_strategy != "no":
            control.should_log = True


@contextlib.contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` at SIGTERM meanwhile; outside the main thread, where Python takes no signals, does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _flush(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "COMPLETE_FILE",
    "CheckpointCallback",
    "delete_older",
    "last_complete_checkpoint",
    "mark_complete",
    "on_sigterm",
    "what_is_missing",
]
