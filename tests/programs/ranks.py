"""Trains some scenarios in each process of a launch, and writes the final state of each process.

`accelerate launch ... tests/programs/ranks.py scenarios.json BACKBONE DATA OUT`

The JSON file maps the name of each scenario to its training arguments.
"""

import json
import sys
from pathlib import Path

import safetensors.torch

import eccl.training.trainer
from eccl.utils.command_line import end_launched_process
from helpers import make_trainer


def main(scenarios: Path, backbone: Path, benchmark: Path, output_dir: Path) -> None:
    for name, settings in json.loads(scenarios.read_text()).items():
        gather = eccl.training.trainer._gather_features
        if settings.pop("without_gather", False):
            eccl.training.trainer._gather_features = lambda _, features: features.repeat(2, 1)
        checkpoint = settings.pop("resume_from", None)
        settings = {"augment": False, "logging_steps": 1, "report_to": "none", **settings}
        trainer = make_trainer(backbone, benchmark, output_dir / name, **settings)
        trainer.train(resume_from_checkpoint=checkpoint and str(output_dir / checkpoint))
        eccl.training.trainer._gather_features = gather
        rank = trainer.args.process_index
        state = {f"objective.{key}": value for key, value in trainer.objective.state_dict().items()}
        state |= {key: value.detach() for key, value in trainer.model.named_parameters() if value.requires_grad}
        output_dir.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(state, output_dir / f"{name}-{rank}.safetensors")
        (output_dir / f"{name}-{rank}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    end_launched_process()
