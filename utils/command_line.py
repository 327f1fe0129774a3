"""The parts that all commands share: the parser, the common options, and the report of a user's mistake."""

import argparse
import atexit
import contextlib
import functools
import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from .text import printable

# The exit status of a command that Ctrl-C has stopped, as shells count it.
_INTERRUPTED = 128 + signal.SIGINT


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, unless the option has none or the text names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        named = "(default: " in str(action.help)
        if action.required or action.default is None or action.default is False or named:
            return action.help
        return super()._get_help_string(action)


class CommandParser(argparse.ArgumentParser):
    """An argument parser with `--debug`. Its errors are one line on stderr, with exit status 2.

    Args:
        command: how the command is started, for example `python -m eccl.search.gallery`.
        description: its first line becomes the description in `--help`; usually the module's docstring.
        **kwargs: passed on to `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, description: str | None, **kwargs: Any):
        kwargs.setdefault("formatter_class", HelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(prog=command, description=(description or "").partition("\n")[0], **kwargs)
        self.add_argument("--debug", action="store_true", help="after an error, show the traceback instead of one line")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            # Python 3.11 makes an empty list of `--option=--`.
            if action.nargs is None and getattr(options, action.dest, None) == [] and action.default != []:
                self.error(f"argument {action.option_strings[0]}: expected one argument")
        return options, others

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line on stderr and exit status 2."""
        self.exit(2, f"error: {printable(message)} ({self.prog} --help lists the options)\n")


def at_least(minimum: int) -> Callable[[str], int]:
    """Makes a `type` for `add_argument` that accepts whole numbers from `minimum` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{number} is too small, it must be at least {minimum}")
        return number

    return parse


# The options that several commands have: name, type, default and help text are the same in each of them.
_SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"required": True, "help": "folder or Hub id of a merged model, an adapter, or a plain CLIP"},
    # A shell leaves the `~` of `--output_dir=~/out` as it is.
    "data_dir": {
        "required": True,
        "type": os.path.expanduser,
        "help": "folder of a benchmark, or the folder that contains it; folder of a format or of images",
    },
    "output_dir": {"required": True, "type": os.path.expanduser, "help": "folder to write to"},
    "output": {"type": os.path.expanduser, "help": "picture file to write, for example a .png"},
    "batch_size": {"type": at_least(1), "default": 64, "help": "number of images encoded at a time"},
    "num_workers": {"type": at_least(0), "default": 0, "help": "number of worker processes that decode images"},
    "seed": {"type": int, "default": 0, "help": "seed of the random choices"},
    "tokenizer": {
        "help": "folder or Hub id of a CLIP tokenizer (default: the tokenizer of CLIP, which ships with this package)"
    },
    "overwrite": {"action": "store_true", "help": "replace the results of an earlier run in the folder"},
    "public": {"action": "store_true", "help": "with --push_to_hub: let everybody read the repository"},
    "on_bad_image": {
        "choices": ("error", "skip"),
        "default": "error",
        "help": "error: refuse a data set with unreadable images; skip: leave these images out and name them",
    },
    "on_bad_caption": {
        "choices": ("error", "skip"),
        "default": "error",
        "help": "error: refuse a data set with captions without a word or of more than 20,000 characters; skip: leave "
        "these captions out and name them",
    },
    "dataset_config": {"help": "configuration of the data set, if it has several"},
    "revision": {"help": "branch, tag or commit of a data set of the Hub"},
    "columns": {
        "nargs": "+",
        "metavar": "ROLE=COLUMN",
        "help": "columns that are not named as usual, for example image=img person_id=pid captions=text file_path=name",
    },
    "fix_paths": {
        "action": "store_true",
        "help": "read the image that a path means although it is written otherwise: backslashes, imgs/ at its start, "
        "blanks around it, another case of letters, another Unicode form",
    },
    "follow_links": {"action": "store_true", "help": "allow images that are links to files outside the data set"},
}
# The options that say how a data set is read.
DATA_OPTIONS = ("dataset_config", "revision", "columns", "on_bad_image", "on_bad_caption", "fix_paths", "follow_links")


def add_shared_option(parser: argparse.ArgumentParser, name: str, **changes: Any) -> None:
    """Adds an option that several commands share.

    Args:
        parser: the parser of the command.
        name: the name without the dashes, for example `model`.
        **changes: keyword arguments of `add_argument` that replace the shared ones, for example `required=False`.
    """
    parser.add_argument(f"--{name}", **(_SHARED_OPTIONS[name] | changes))


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how a data set is read: columns, faults, paths, links."""
    for name in DATA_OPTIONS:
        add_shared_option(parser, name)


def command(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Decorates the `main` of a command: a user's mistake becomes one line on stderr and exit status 2.

    `ValueError`, `OSError`, `ImportError`, `FloatingPointError` and the error of a wrong configuration count as a
    mistake of the user: a wrong value, a missing file or package, a server that refuses, a loss that is not finite.
    With `--debug` among the arguments they keep their traceback. Any other error is a defect of the program and always
    keeps its traceback. Ctrl-C becomes one line and exit status 130; a second Ctrl-C ends the process at once. Control
    characters in errors, warnings and log messages are escaped.

    Args:
        main: a function of the list of arguments, without the name of the program.

    Returns:
        A function that takes this list; by default it takes the arguments of the command line.
    """

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> None:
        arguments = sys.argv[1:] if arguments is None else arguments
        for stream in (sys.stdout, sys.stderr):
            # The name of a file need not be text in any encoding. A test may have replaced the stream.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _printable_messages(), _interrupts():
                main(arguments)
        except KeyboardInterrupt:
            if "--debug" in arguments:
                raise
            say("stopped by Ctrl-C")
            sys.exit(_INTERRUPTED)
        except Exception as error:
            if "--debug" in arguments or not _is_mistake(error):
                raise
            # A progress bar ends its line when the frame that shows it has gone.
            traceback.clear_frames(error.__traceback__)
            # Some libraries break their messages into lines.
            print(f"error: {printable(' '.join(_message_of(error).split()))}", file=sys.stderr)
            sys.exit(2)

    return run


def _message_of(error: Exception) -> str:
    """Returns the message of an error; that of a worker of a `DataLoader` comes with the worker's traceback."""
    text = str(error)
    if not (text.startswith("Caught ") and "in DataLoader worker process" in text.partition("\n")[0]):
        return text
    start = f"\n{type(error).__name__}: "
    return text[text.rindex(start) + len(start) :] if start in text else text


def _is_mistake(error: Exception) -> bool:
    # A configuration that has a wrong value; a command may not import the library for its class alone.
    is_configuration = any(each.__name__ == "StrictDataclassError" for each in type(error).__mro__)
    # An option can need a package that is not installed; wrong settings can make a loss that is not finite.
    return isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) or is_configuration


def require_push(parser: CommandParser, options: argparse.Namespace) -> None:
    """Refuses `--public` without `--push_to_hub`."""
    if options.public and not options.push_to_hub:
        parser.error("--public only applies to --push_to_hub, which is missing")


@contextlib.contextmanager
def _printable_messages() -> Iterator[None]:
    """Escapes control characters in the messages of loggers and warnings: they can contain names of files."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def make_printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        with contextlib.suppress(TypeError, ValueError):  # A wrong format: logging reports it itself.
            message = record.getMessage()
            if (clean := printable(message, keep="\n\t")) != message:
                record.msg, record.args = clean, ()
        return record

    def format_printable_warning(*args: Any, **kwargs: Any) -> str:
        return printable(format_warning(*args, **kwargs), keep="\n\t")

    logging.setLogRecordFactory(make_printable_record)
    warnings.formatwarning = format_printable_warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Makes the first Ctrl-C raise `KeyboardInterrupt`, and a second one end the process, while it cleans up.

    It does nothing outside the main thread, where Python has no signals, or where Ctrl-C is ignored, as under nohup.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is signal.SIG_IGN:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, end_at_once)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        # After Ctrl-C, Python still waits for threads and worker processes.
        if signal.getsignal(signal.SIGINT) is not end_at_once:
            signal.signal(signal.SIGINT, previous)


def end_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ends this process and its workers without a traceback; a handler of signals."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os.write(2, b"stopped at once\n")
    os._exit(128 + number)


def follow_parent() -> None:
    """Prepares a worker process: it ignores Ctrl-C, which its parent handles, and ends when its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_launched_process() -> None:
    """Ends a process of a launch of several processes after its command has succeeded; alone, it does nothing.

    It waits for threads and calls the exit functions, as Python does at its end, but it does not take Python apart. A
    thread of the process group can release a tensor late. If Python is being taken apart at that moment, the process
    aborts, and the launcher reports that a run has failed which has written its result.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    # Python calls these two functions at its end. The type information does not list them.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def say(message: str) -> None:
    """Prints a line of progress on stderr at once; of the processes of a launch, only the first of a machine does.

    Control characters are escaped, also by [`tell`].
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(printable(message), file=sys.stderr, flush=True)


def tell(message: str = "") -> None:
    """Prints a line of a command's result on stdout."""
    try:
        print(printable(message), flush=True)
    except BrokenPipeError:  # The reader, `head` for example, has gone.
        os._exit(128 + signal.SIGPIPE)


__all__ = [
    "DATA_OPTIONS",
    "CommandParser",
    "HelpFormatter",
    "add_data_options",
    "add_shared_option",
    "at_least",
    "command",
    "end_at_once",
    "end_launched_process",
    "follow_parent",
    "require_push",
    "say",
    "tell",
]
