"""Runs a command in a fresh process with limits, and reports what it did: for tests with hostile input.

The processes are forked from a server that has imported the package, so a case costs a fraction of a second.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

# The commands, by the module that has their `main`. Importing them here also imports torch and transformers.
MODULES = {
    "gallery": "eccl.search.commands",
    "evaluate": "eccl.eval.evaluate_eccl",
    "heat_map": "eccl.eval.heat_map",
    "describe": "eccl.dataset_scripts.describe",
    "convert": "eccl.hub.convert",
    "publish": "eccl.hub.publish",
    "train": "train_eccl",
}
# These modules are imported by the functions that need them.
_ALSO_NEEDED = ("eccl.hub.loading", "eccl.eval.scoring", "eccl.hub.original_checkpoints", "eccl.training.trainer")
for _name in (*MODULES.values(), *_ALSO_NEEDED):
    importlib.import_module(_name)
_IMPORTED_BY = os.getpid()

GIBIBYTE = 2**30
# What a case may take: processor time, and memory beyond what the process had at its start.
MAX_SECONDS, MAX_BYTES = 10, 2 * GIBIBYTE
# Seconds after which a process that waits is ended. A busy machine may be slow.
_PATIENCE = 60
# Messages of Python, numpy, torch and the system about a request beyond the limit of memory.
_OUT_OF_MEMORY = re.compile(r"MemoryError|not enough memory|[Cc]an(no|')t allocate memory|Unable to allocate|bad_alloc")
# tqdm moves the cursor up one line.
_MOVES = re.compile(r"\x1b\[A")
_LARGEST_DIGESTED = 2**26
_HARMLESS = "\n\r\t\u200c\u200d"
_CONTROLS = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@dataclass(frozen=True)
class Outcome:
    """What a case did.

    Attributes:
        status: the exit status; the negative number of a signal that ended the process.
        seconds: processor time.
        num_bytes: the most memory that the process had, minus the memory that it had at its start.
        stdout, stderr: what it wrote.
        changes: the files outside the output folder that it wrote, changed or removed, each with what happened.
    """

    status: int
    seconds: float
    num_bytes: int
    stdout: str
    stderr: str
    changes: tuple[str, ...]

    def find_problems(self) -> list[str]:
        """Returns how the outcome differs from success, or from one line about a mistake of the user."""
        problems = []
        if self.status == -signal.SIGXCPU or self.seconds > MAX_SECONDS:
            problems.append(f"it takes more than {MAX_SECONDS} seconds of processor time")
        elif self.status == -signal.SIGKILL:
            problems.append(f"it does not end within {_PATIENCE} seconds")
        elif self.status not in (0, 2):
            problems.append(f"the exit status is {self.status}")
        if self.num_bytes > MAX_BYTES or _OUT_OF_MEMORY.search(self.stderr):
            problems.append("it asks for more than 2 GiB of memory")
        if "Traceback" in self.stderr:
            problems.append("it prints a traceback")
        errors = [line for line in re.split("[\r\n]", self.stderr) if line.startswith("error: ")]
        if self.status == 2 and len(errors) != 1:
            problems.append(f"{len(errors)} lines start with error:")
        for name in ("stdout", "stderr"):
            if found := _find_controls(getattr(self, name)):
                problems.append(f"{name} has control characters: {found}")
        problems += [f"outside the output folder, {change}" for change in self.changes]
        return problems


def _find_controls(text: str) -> str:
    """Returns the control characters of an output as escapes; those of a progress bar are allowed."""
    text = _MOVES.sub("", text)
    found = {each for each in text if unicodedata.category(each) in _CONTROLS and each not in _HARMLESS}
    return " ".join(sorted(each.encode("unicode_escape").decode() for each in found))


class Laboratory:
    """A folder in which cases run, and the server that forks their processes.

    Args:
        folder: everything below it is watched, besides caches: what a case reads belongs there, too.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        # Some levels deep, so that a path with some `..` ends in a watched folder.
        self._case = folder / "a" / "b" / "c" / "case"
        self._caches = folder / "caches"
        for each in (self._caches, folder / "home", folder / "temporary"):
            each.mkdir(parents=True)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["fuzzing"])
        changes = {
            "HOME": str(folder / "home"),
            "HF_HOME": str(folder / "home" / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(self._caches),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1",
        }
        with _environment(changes):
            multiprocessing.forkserver.ensure_running()

    @contextlib.contextmanager
    def case(self) -> Iterator[Path]:
        """Yields an empty folder for the inputs of one case, and removes it at the end."""
        (self._case / "inputs").mkdir(parents=True)
        (self._case / "current").mkdir()
        try:
            yield self._case / "inputs"
        finally:
            shutil.rmtree(self._case)

    def run(self, command: str, words: Sequence[str]) -> Outcome:
        """Runs a command in the current case. `OUT` in its words becomes the output folder, which does not exist.

        Args:
            command: one of `MODULES`.
            words: its arguments.
        """
        output = self._case / "out"
        words = [word.replace("OUT", str(output)) if word.startswith("OUT") else word for word in words]
        before = self._list_files()
        process = self._context.Process(target=_run_case, args=(MODULES[command], words, self._case, self.folder))
        process.start()
        process.join(_PATIENCE)
        # The process made a group: its workers end with it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        after = self._list_files()
        changes = [f"{name} is {_describe(name, before, after)}" for name in sorted(before.keys() | after.keys())
                   if before.get(name) != after.get(name)]  # fmt: skip
        report = self._case / "report.json"
        numbers = json.loads(report.read_text()) if report.is_file() else {"seconds": 0, "num_bytes": 0}
        stdout, stderr = (
            (self._case / name).read_bytes().decode("utf-8", "backslashreplace") for name in ("stdout", "stderr")
        )
        status = process.exitcode
        process.close()
        return Outcome(status, **numbers, stdout=stdout, stderr=stderr, changes=tuple(changes))

    def _list_files(self) -> dict[str, str]:
        """Returns a digest of each watched file, by its path."""
        found = {}
        own = {self._case / name for name in ("report.json", "stdout", "stderr")}
        for parent, folders, files in os.walk(self.folder):
            hidden = {self._caches, self._case / "out"}
            folders[:] = [name for name in folders if Path(parent, name) not in hidden]
            for path in (Path(parent, name) for name in (*folders, *files)):
                if path not in own:
                    found[str(path.relative_to(self.folder))] = _digest(path)
        return found


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    if not path.is_file():
        return "folder"
    status = path.stat()
    # A sparse file takes no place on the disk, and as much memory as its size says.
    if status.st_size > _LARGEST_DIGESTED:
        return f"{status.st_size} bytes, written at {status.st_mtime_ns}"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _describe(name: str, before: dict[str, str], after: dict[str, str]) -> str:
    return "written" if name not in before else "removed" if name not in after else "changed"


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    previous = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(previous)


def _run_case(module: str, words: list[str], folder: Path, scratch: Path) -> None:
    """Is the whole life of the forked process."""
    os.setsid()
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)
    assert os.getpid() != _IMPORTED_BY, "the server has not imported this module: a case would take seconds"
    os.chdir(folder / "current")
    os.environ["TMPDIR"] = str(scratch / "temporary")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The pages that are reserved, and those that are used; both in pages.
    reserved, used = map(int, Path("/proc/self/statm").read_text().split()[:2])
    page = resource.getpagesize()
    limit = reserved * page + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    started = time.process_time()
    status = 0
    try:
        importlib.import_module(module).main(words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used * page
    (folder / "report.json").write_text(json.dumps({"seconds": time.process_time() - started, "num_bytes": peak}))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
