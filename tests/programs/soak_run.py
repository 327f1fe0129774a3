"""Runs the training command and writes a line `time phase` to the file PHASES at each change of phase.

`accelerate launch ... tests/programs/soak_run.py PHASES ARGUMENTS...`
"""

import sys
import time

from eccl.training.trainer import ECCLTrainer
from eccl.utils.command_line import end_launched_process
from helpers import train_eccl


def noting(owner, name: str, phase: str, file) -> None:
    """Makes a function of `owner` note its phase when it begins, and the phase `between` when it ends."""
    function = getattr(owner, name)

    def noted(*args, **kwargs):
        note(phase, file)
        result = function(*args, **kwargs)
        note("between", file)
        return result

    setattr(owner, name, noted)


def note(phase: str, file) -> None:
    file.write(f"{time.time()} {phase}\n")
    file.flush()


def main(phases: str, arguments: list[str]) -> None:
    with open(phases, "a", encoding="utf-8") as file:
        for name, phase in (
            ("start_objective", "memories"),
            ("training_step", "step"),
            ("evaluate", "evaluation"),
            ("_save_checkpoint", "checkpoint"),
        ):
            noting(ECCLTrainer, name, phase, file)
        noting(train_eccl, "save_result", "result", file)
        train_eccl.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    end_launched_process()
