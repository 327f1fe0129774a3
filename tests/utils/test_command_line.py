import argparse
import logging
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest

from eccl.configuration_eccl import ECCLConfig
from eccl.utils.command_line import CommandParser, add_shared_option, at_least, command, end_at_once, say, tell


@command
def main(arguments: list[str]) -> None:
    parser = CommandParser("python -m example", "Does something.\n\nMore words.")
    parser.add_argument("--count", type=at_least(2), default=3, help="number of things")
    parser.add_argument("--name", help="name of the thing")
    kinds = ("value", "file", "defect", "lines", "control", "configuration", "interrupt")
    parser.add_argument("--fail", choices=kinds, help="kind of the error")
    options = parser.parse_args(arguments)
    if options.fail == "value":
        raise ValueError("count is 7, it must be 8")
    if options.fail == "file":
        raise FileNotFoundError(2, "No such file or directory", "missing.json")
    if options.fail == "defect":
        raise KeyError("count")
    if options.fail == "lines":
        raise ValueError("two\n  lines")
    if options.fail == "control":
        logging.getLogger("library").warning("in %s", "\x1b[2J.jpg")
        warnings.warn("about \x1b[2J.jpg\nin two lines", stacklevel=1)
        say("reading \x1b[2J.jpg\nerror: all is well")
        tell("found \x1b[2J.jpg")
        raise ValueError("\x1b[2J.jpg cannot be read")
    if options.fail == "configuration":
        ECCLConfig(projection_dim=-1)
    if options.fail == "interrupt":
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    print(options.count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail", "value"], "error: count is 7, it must be 8"),
        (["--fail", "file"], "error: [Errno 2] No such file or directory: 'missing.json'"),
        (["--fail", "lines"], "error: two lines"),
        (["--fail", "configuration"], "error: Class validation error"),
        (["--colour\x1b[2J", "red"], r"error: unrecognized arguments: --colour\x1b[2J red"),
        (["--count", "1"], "error: argument --count: 1 is too small, it must be at least 2"),
        (["--count", "x"], "error: argument --count: 'x' is not a whole number"),
        (["--fail", "x"], "error: argument --fail: invalid choice: 'x'"),
        (["--colour", "red"], "error: unrecognized arguments: --colour red"),
        # Abbreviated options are refused: a new option could change their meaning.
        (["--cou", "5"], "error: unrecognized arguments: --cou 5"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    captured = capsys.readouterr()
    assert raised.value.code == 2
    assert captured.out == ""
    assert captured.err.startswith(message) and captured.err.count("\n") == 1


def test_an_error_of_the_parser_names_the_help_of_the_command(capsys):
    with pytest.raises(SystemExit):
        main(["--count", "1"])
    assert capsys.readouterr().err.endswith("(python -m example --help lists the options)\n")


def test_debug_keeps_the_traceback_of_a_mistake():
    with pytest.raises(ValueError, match="count is 7"):
        main(["--fail", "value", "--debug"])
    with pytest.raises(FileNotFoundError):
        main(["--debug", "--fail", "file"])


@pytest.mark.parametrize("words", [[], ["--debug"]])
def test_a_defect_always_keeps_its_traceback(words):
    with pytest.raises(KeyError):
        main(["--fail", "defect", *words])


def test_control_characters_never_reach_the_terminal(capsys, caplog):
    with pytest.raises(SystemExit), pytest.warns(UserWarning):
        main(["--fail", "control"])
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err + caplog.text
    assert captured.out == "found \\x1b[2J.jpg\n"
    assert captured.err.splitlines() == [
        r"reading \x1b[2J.jpg\nerror: all is well",
        r"error: \x1b[2J.jpg cannot be read",
    ]
    assert caplog.messages == [r"in \x1b[2J.jpg"]


def test_warnings_are_printed_without_control_characters():
    program = "from test_command_line import main; main(['--fail', 'control'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=os.path.dirname(__file__), timeout=120
    )
    assert done.returncode == 2 and "\x1b" not in done.stderr
    assert "UserWarning: about \\x1b[2J.jpg\nin two lines\n" in done.stderr and "in \\x1b[2J.jpg" in done.stderr


def test_ctrl_c_is_one_line_and_status_130(capsys):
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as raised:
            main(["--fail", "interrupt"])
        # A second one, while Python cleans up, ends the process.
        assert signal.getsignal(signal.SIGINT) is end_at_once
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised.value.code == 130 and capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_the_end_at_once_takes_the_workers_along():
    program = (
        "import multiprocessing, os, signal, time\n"
        "from eccl.utils.command_line import end_at_once, follow_parent\n"
        "def work():\n"
        "    follow_parent()\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(600)\n"
        "multiprocessing.get_context('fork').Process(target=work).start()\n"
        "time.sleep(1)\n"
        "end_at_once(signal.SIGINT, None)\n"
    )
    # The output ends when the worker ends, too.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "stopped at once\n" and done.stdout.strip().isdecimal()


def test_a_worker_ends_when_its_parent_is_killed():
    program = (
        "import multiprocessing, os, signal, time\n"
        "from eccl.utils.command_line import follow_parent\n"
        "def work():\n"
        "    follow_parent()\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "multiprocessing.get_context('fork').Process(target=work).start()\n"
        "time.sleep(1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL and done.stdout.strip().isdecimal()


def test_the_arguments_of_the_command_line_are_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example", "--count", "5"])
    main()
    assert capsys.readouterr().out == "5\n"


def test_help_shows_the_first_line_of_the_description_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    assert "Does something." in text and "More words." not in text
    assert "number of things (default: 3)" in text
    assert "None" not in text and "False" not in text


def test_shared_options_have_the_same_names_types_and_checks_in_every_command(capsys):
    parser = CommandParser("example", "Does something.")
    for name in ("model", "batch_size", "num_workers"):
        add_shared_option(parser, name)
    add_shared_option(parser, "output_dir", required=False, help="folder for the tables")
    options = parser.parse_args(["--model", "folder"])
    assert options == argparse.Namespace(debug=False, model="folder", batch_size=64, num_workers=0, output_dir=None)
    assert "folder for the tables" in parser.format_help()
    for words, message in (
        (["--batch_size", "0"], "0 is too small, it must be at least 1"),
        (["--num_workers", "-1"], "-1 is too small, it must be at least 0"),
    ):
        with pytest.raises(SystemExit) as raised:
            parser.parse_args(["--model", "folder", *words])
        assert raised.value.code == 2 and message in capsys.readouterr().err


def test_only_the_first_process_of_a_machine_reports_its_progress(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    say("one")
    monkeypatch.setenv("LOCAL_RANK", "0")
    say("two")
    monkeypatch.setenv("LOCAL_RANK", "1")
    say("three")
    captured = capsys.readouterr()
    assert captured.err == "one\ntwo\n" and captured.out == ""


# These commands import torch, transformers and datasets only after they have read their arguments.
CHEAP_COMMANDS = (
    *("eccl.search.commands", "eccl.eval.evaluate_eccl", "eccl.eval.heat_map"),
    *("eccl.eval.benchmarks.data", "eccl.eval.benchmarks.metric", "eccl.eval.benchmarks.training"),
    *("eccl.eval.benchmarks.explanation", "eccl.eval.benchmarks.search", "eccl.search.app", "eccl.search.space"),
)


@pytest.mark.parametrize("module", CHEAP_COMMANDS)
def test_help_and_a_wrong_option_need_no_heavy_import(module):
    program = (
        f"import sys, {module}\n"
        f"for words in (['--help'], ['--no_such_option']):\n"
        f"    try:\n"
        f"        {module}.main(words)\n"
        f"    except SystemExit as stop:\n"
        f"        print('status', stop.code)\n"
        f"print('heavy', sorted({{'torch', 'transformers', 'datasets', 'peft'}} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-2:] == ["status 2", "heavy []"] and "status 0" in lines
    assert done.stderr.count("error: ") == 1


@pytest.mark.parametrize("module", CHEAP_COMMANDS)
def test_every_option_has_a_help_text(module):
    parser = __import__(module, fromlist=["make_parser"]).make_parser()
    commands = [
        each for action in parser._actions if isinstance(action.choices, dict) for each in action.choices.values()
    ]
    for action in [action for each in (parser, *commands) for action in each._actions]:
        assert action.help, f"{module}: {action.dest} has no help text"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_launched_process_ends_without_taking_python_apart(processes):
    """The object dies when Python takes its modules apart: a process of a launch of several must not reach that."""
    program = (
        "import atexit, sys, threading\n"
        "from eccl.utils.command_line import end_launched_process\n"
        "class Last:\n"
        "    def __del__(self): print('taken apart', flush=True)\n"
        "sys.modules['last'] = Last()\n"
        "atexit.register(print, 'exit function')\n"
        "threading.Thread(target=print, args=('thread',)).start()\n"
        "end_launched_process()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"WORLD_SIZE": str(processes)}
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.split("\n")[:-1] == ["thread", "exit function", "taken apart"][: 4 - processes]
