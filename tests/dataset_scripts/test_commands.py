import subprocess
import sys

import pytest

from eccl.dataset_scripts import describe, export
from eccl.dataset_scripts.synthetic import __main__ as synthetic

COMMANDS = [describe, export, synthetic]


def test_commands_import_no_model_library_before_their_arguments_are_parsed():
    names = ", ".join(command.__name__ for command in COMMANDS)
    code = f"import sys, {names}; print(*sorted({{'torch', 'transformers', 'peft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command):
    assert [action.dest for action in command.make_parser()._actions if not action.help] == []
