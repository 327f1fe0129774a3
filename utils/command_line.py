"""What every command shares: its parser, its common options, and how it reports a user's mistake."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """An argument parser with `--debug`, whose own errors are one line on stderr with exit status 2.

    Args:
        command: how the command is started, for example `python -m eccl.search.gallery`.
        description: the first line becomes the description in `--help`; usually the module's docstring.
        **kwargs: passed on to `argparse.ArgumentParser`.
    """

    def __init__(self, command: str, description: str | None, **kwargs: Any):
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(prog=command, description=(description or "").partition("\n")[0], **kwargs)
        self.add_argument("--debug", action="store_true", help="after an error, show the traceback instead of one line")

    def error(self, message: str) -> NoReturn:
        """Ends the program with one line on stderr and exit status 2."""
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


# The options that several commands have: name, type, default and help text are the same in each of them.
_SHARED_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"required": True, "help": "folder or Hub id of a merged model, an adapter, or a plain CLIP"},
    "data_dir": {"required": True, "help": "the benchmark's folder, or the folder that contains it"},
    "output_dir": {"required": True, "help": "folder to write to"},
    "output": {"help": "picture file to write, for example a .png"},
    "batch_size": {"type": int, "default": 64, "help": "number of images encoded at a time"},
    "num_workers": {"type": int, "default": 0, "help": "number of worker processes that decode images"},
    "seed": {"type": int, "default": 0, "help": "seed of the random choices"},
    "tokenizer": {"help": "folder or Hub id of a CLIP tokenizer (default: CLIP's own, which ships with this package)"},
    "on_bad_image": {
        "choices": ("error", "skip"),
        "default": "error",
        "help": "error: refuse a benchmark with unreadable images; skip: leave these images out and name them",
    },
}


def add_shared_option(parser: argparse.ArgumentParser, name: str, **changes: Any) -> None:
    """Adds one of the options that several commands share.

    Args:
        parser: of the command.
        name: without the dashes, for example `model`.
        **changes: replace keyword arguments of `add_argument`, for example `required=False`.
    """
    parser.add_argument(f"--{name}", **(_SHARED_OPTIONS[name] | changes))


def command(main: Callable[[list[str]], None]) -> Callable[..., None]:
    """Decorates the `main` of a command: a user's mistake becomes one line on stderr and exit status 2.

    `ValueError` and `OSError` count as mistakes of the user: a wrong value, a missing file, a server that refuses.
    With `--debug` among the arguments they keep their traceback. Any other error is a defect and always keeps it.

    Args:
        main: takes the arguments as a list, without the program's name.

    Returns:
        A function that takes the arguments, or by default those of the command line.
    """

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> None:
        arguments = sys.argv[1:] if arguments is None else arguments
        try:
            main(arguments)
        except (ValueError, OSError) as error:
            if "--debug" in arguments:
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run


def say(message: str) -> None:
    """Prints a line of progress on stderr at once: what the command does while nothing else is to be seen."""
    print(message, file=sys.stderr, flush=True)


__all__ = ["CommandParser", "add_shared_option", "command", "say"]
