import subprocess
import sys

import pytest

from helpers import PATIENCE, ROOT


@pytest.mark.slow
def test_runs_that_are_killed_and_resumed_end_as_one_that_was_left_alone():
    """The short form of `make soak`."""
    command = [sys.executable, str(ROOT / "tests" / "programs" / "soak.py"), "--cycles", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if line.lstrip().startswith(("1 ", "2 "))]
    assert [(row[0], row[1], row[-1]) for row in rows] == [("1", "2", "0"), ("2", "2", "0")]
