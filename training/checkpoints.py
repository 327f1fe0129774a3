"""When a run writes checkpoints, and which checkpoints are complete: a run may be killed at any moment."""

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME

COMPLETE_FILE = "complete.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Seconds.
_FORWARDED_WITHIN = 1.0


def mark_complete(checkpoint: Path) -> None:
    """Writes `complete.json` with the size of each file of a checkpoint, after flushing these files to the disk.

    Args:
        checkpoint: a finished folder; nothing is added to it later.
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


def find_incompleteness(checkpoint: Path) -> str | None:
    """Returns the reason why a checkpoint cannot be resumed from; `None` if it is complete."""
    if not checkpoint.is_dir():
        return "the folder does not exist"
    record = checkpoint / COMPLETE_FILE
    if not record.is_file():
        return f"it has no {COMPLETE_FILE}, which is written last"
    try:
        sizes = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        return f"{COMPLETE_FILE} cannot be read: {error}"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, it should have {size}"
    if not (checkpoint / SCHEDULER_NAME).is_file():
        return f"it has no {SCHEDULER_NAME} and no optimiser: --save_only_model leaves them out"
    return None


def delete_older_checkpoints(checkpoint: Path, limit: int | None, best: str | None) -> None:
    """Deletes the checkpoints that a run no longer needs, after a new one is complete.

    The new and the best checkpoint are always kept. If `limit` allows more, the most recently written ones are kept,
    too. Incomplete checkpoints are deleted first. transformers may sort by step number, and so may keep an unfinished
    checkpoint with a higher number.

    Args:
        checkpoint: the checkpoint just written.
        limit: number of checkpoints to keep; `None` or 0 deletes nothing.
        best: the checkpoint with the best metric.
    """
    if not limit or limit < 0:
        return
    kept = {checkpoint.resolve()} | ({Path(best).resolve()} if best else set())
    others = sorted(
        (find_incompleteness(folder) is None, _written_at(folder), number, folder)
        for number, folder in _numbered(checkpoint.parent)
        if folder.resolve() not in kept
    )
    free = max(0, limit - len(kept))
    for *_, folder in others[: max(0, len(others) - free)]:
        shutil.rmtree(folder)


def _written_at(checkpoint: Path) -> int:
    record = checkpoint / COMPLETE_FILE
    return record.stat().st_mtime_ns if record.is_file() else 0


def find_last_complete_checkpoint(output_dir: Path, report: Callable[[str], None]) -> Path | None:
    """Finds the complete checkpoint with the most steps; `None` if there is none.

    Args:
        output_dir: output folder of the run; it may be missing.
        report: called with one line for each incomplete checkpoint.
    """
    for _, checkpoint in sorted(_numbered(output_dir), reverse=True):
        problem = find_incompleteness(checkpoint)
        if problem is None:
            return checkpoint
        report(f"{checkpoint} is incomplete and not used: {problem}")
    return None


def _numbered(output_dir: Path) -> list[tuple[int, Path]]:
    folders = output_dir.iterdir() if output_dir.is_dir() else ()
    return [(int(match[1]), folder) for folder in folders if (match := _NAME.fullmatch(folder.name))]


class CheckpointCallback(TrainerCallback):
    """Chooses when a checkpoint is written, so that a resumed run does exactly what the original would have done.

    A checkpoint due on the last step of an epoch, or of training, is delayed until after the evaluation that follows.
    Before each checkpoint the values since the last log are logged, so that no logged mean mixes steps from before and
    after it. After SIGTERM in any process, or if the launcher is gone, a checkpoint is written after the current step
    and `stopping` is set.

    Args:
        accelerator: `set_trigger` in any process asks for the stop.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.stopping, self._is_due = accelerator, False, False
        # A launcher killed by a signal leaves its single process running, which would write into the next run's folder.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def on_step_end(self, args, state, control, **kwargs):
        if self._launcher is not None and os.getppid() != self._launcher:
            self.accelerator.set_trigger()
        # A collective operation: every process must call it.
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
        # With save_strategy "best", only the evaluation decides whether a checkpoint is written.
        may_save = control.should_save or (args.save_strategy == "best" and control.should_evaluate)
        if may_save and args.logging_strategy != "no":
            control.should_log = True


@contextlib.contextmanager
def on_sigterm(action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` on SIGTERM within the block; does nothing outside the main thread, where Python has no signals."""
    with _handler(signal.SIGTERM, lambda *_: action()):
        yield


@contextlib.contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Calls `action` on the first Ctrl-C (SIGINT) within the block.

    A second one goes to the handler that was there before; Python's own raises `KeyboardInterrupt`. Outside the main
    thread it does nothing, and where Ctrl-C is ignored it stays ignored.
    """
    previous = signal.getsignal(signal.SIGINT)
    first: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if not first:
            first.append(time.monotonic())
            action()
        # A launcher passes on the signal that the terminal has sent to all processes.
        elif time.monotonic() - first[0] > _FORWARDED_WITHIN and callable(previous):
            previous(number, frame)

    with contextlib.nullcontext() if previous is signal.SIG_IGN else _handler(signal.SIGINT, handle):
        yield


@contextlib.contextmanager
def _handler(number: signal.Signals, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, previous)


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
    "delete_older_checkpoints",
    "find_incompleteness",
    "find_last_complete_checkpoint",
    "mark_complete",
    "on_interrupt",
    "on_sigterm",
]
