"""The parts that all commands share: the parser, the common options, and the report of a user's mistake."""

import argparse
import atexit
import functools
import io
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each help text, unless the option has none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or action.default is False:
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

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line on stderr and exit status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


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
    "data_dir": {"required": True, "help": "the benchmark's folder, or the folder that contains it"},
    "output_dir": {"required": True, "help": "folder to write to"},
    "output": {"help": "picture file to write, for example a .png"},
    "batch_size": {"type": at_least(1), "default": 64, "help": "number of images encoded at a time"},
    "num_workers": {"type": at_least(0), "default": 0, "help": "number of worker processes that decode images"},
    "seed": {"type": int, "default": 0, "help": "seed of the random choices"},
    "tokenizer": {
        "help": "folder or Hub id of a CLIP tokenizer (default: the tokenizer of CLIP, which ships with this package)"
    },
    "on_bad_image": {
        "choices": ("error", "skip"),
        "default": "error",
        "help": "error: refuse a benchmark with unreadable images; skip: leave these images out and name them",
    },
}


def add_shared_option(parser: argparse.ArgumentParser, name: str, **changes: Any) -> None:
    """Adds an option that several commands share.

    Args:
        parser: the parser of the command.
        name: the name without the dashes, for example `model`.
        **changes: keyword arguments of `add_argument` that replace the shared ones, for example `required=False`.
    """
    parser.add_argument(f"--{name}", **(_SHARED_OPTIONS[name] | changes))


def command(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Decorates the `main` of a command: a user's mistake becomes one line on stderr and exit status 2.

    `ValueError` and `OSError` count as mistakes of the user: a wrong value, a missing file, a server that refuses.
    With `--debug` among the arguments they keep their traceback. Any other error is a defect of the program and always
    keeps its traceback.

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
            main(arguments)
        except (ValueError, OSError) as error:
            if "--debug" in arguments:
                raise
            # Some libraries break their messages into lines.
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)

    return run


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
    """Prints a line of progress on stderr at once; of the processes of a launch, only the first of a machine does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


__all__ = ["CommandParser", "HelpFormatter", "add_shared_option", "at_least", "command", "end_launched_process", "say"]
