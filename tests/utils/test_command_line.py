import argparse
import os
import subprocess
import sys

import pytest

from eccl.utils.command_line import CommandParser, add_shared_option, at_least, command, say


@command
def main(arguments: list[str]) -> None:
    parser = CommandParser("python -m example", "Does something.\n\nMore words.")
    parser.add_argument("--count", type=at_least(2), default=3, help="number of things")
    parser.add_argument("--name", help="name of the thing")
    parser.add_argument("--fail", choices=("value", "file", "defect", "lines"), help="kind of the error")
    options = parser.parse_args(arguments)
    if options.fail == "value":
        raise ValueError("count is 7, it must be 8")
    if options.fail == "file":
        raise FileNotFoundError(2, "No such file or directory", "missing.json")
    if options.fail == "defect":
        raise KeyError("count")
    if options.fail == "lines":
        raise ValueError("two\n  lines")
    print(options.count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fail", "value"], "error: count is 7, it must be 8"),
        (["--fail", "file"], "error: [Errno 2] No such file or directory: 'missing.json'"),
        (["--fail", "lines"], "error: two lines"),
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
    *("eccl.search.gallery", "eccl.eval.evaluate_eccl", "eccl.eval.heat_map"),
    *("eccl.eval.benchmarks.data", "eccl.eval.benchmarks.metric", "eccl.eval.benchmarks.training"),
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
    for action in parser._actions:
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
