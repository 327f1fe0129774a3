"""Kills training at random moments, resumes it, and compares the result with an uninterrupted run.

`python tests/programs/soak.py [--cycles 20] [--seed 0]`: half of the cycles use one process, half use two. If anything
differs, the exit status is 1 and the folders of the runs are kept.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil
import safetensors.torch

from helpers import PATIENCE, launch_in_background, make_backbone, make_benchmark

# 16 pairs, 4 steps per epoch: checkpoints and evaluations happen within epochs and at their ends.
ARGUMENTS = (
    "--dataset_name cuhk_pedes --prompt_depth 2 --num_train_epochs 6 --warmup_epochs 1 --logging_steps 2 --seed 3 "
    "--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 3 "
    "--disable_tqdm True --report_to none --resume_from_checkpoint True"
)
BATCH = 4
KILLS_PER_RUN = 5
# With 1, the default, the last checkpoint is deleted at the end if another one is the best.
LIMITS = (1, 2)
PHASES = ("start", "memories", "step", "between", "evaluation", "checkpoint", "result")
SAVED = ("model.safetensors", "adapter/adapter_model.safetensors")
TIMES = ("runtime", "per_second", "total_flos")


class Run:
    """One training run with its own folder; it is started again until it ends.

    Args:
        folder: of the run.
        processes: how many train.
        limit: how many checkpoints stay.
        inputs: the folder with `data` and `backbone`.
    """

    def __init__(self, folder: Path, processes: int, limit: int, inputs: Path):
        self.folder, self.phases = folder, folder / "phases.txt"
        folder.mkdir(parents=True)
        self.launched = (
            processes, "tests/programs/soak_run.py", self.phases, *ARGUMENTS.split(), "--data_dir", inputs / "data",
            "--init_from", inputs / "backbone", "--output_dir", folder / "out",
            "--per_device_train_batch_size", BATCH // processes, "--save_total_limit", limit,
        )  # fmt: skip

    def start(self) -> subprocess.Popen:
        self.phases.write_text("")
        return launch_in_background(*self.launched, log=self.folder / "log.txt")

    def finish(self) -> None:
        """Starts the run and waits for its end; if it fails, the soak ends and shows the output of the run."""
        process = self.start()
        if process.wait(timeout=PATIENCE):
            raise SystemExit((self.folder / "log.txt").read_text(errors="replace")[-5000:])

    def noted(self) -> list[tuple[float, str]]:
        lines = self.phases.read_text().splitlines()
        return [(float(moment), phase) for moment, phase in (line.split() for line in lines if line.count(" ") == 1)]

    def end(self) -> dict:
        """Returns the result of a run: its tensors by name, and its log without times."""
        out = self.folder / "out"
        last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        files = [out / name for name in SAVED]
        files += [last / "objective.safetensors", last / "adapter_model.safetensors"]
        tensors = {
            f"{file.relative_to(out)}:{name}": value
            for file in files
            for name, value in safetensors.torch.load_file(file).items()
        }
        history = json.loads((last / "trainer_state.json").read_text())["log_history"]
        log = [{key: value for key, value in entry.items() if not key.endswith(TIMES)} for entry in history]
        return {"tensors": tensors, "log": log}


def kill_at_random(run: Run, target: str, rng: random.Random, durations: dict[str, list[float]]) -> str | None:
    """Starts the run and kills it at a random moment of a phase.

    Returns:
        The phase in which the run was killed; `None` if it had ended before.
    """
    occurrence = rng.randint(1, 4)
    delay = rng.uniform(0, max(durations[target]))
    process = run.start()
    deadline = time.time() + PATIENCE
    while process.poll() is None and time.time() < deadline:
        if target == "start":
            break
        if [phase for _, phase in run.noted()].count(target) >= occurrence:
            break
        time.sleep(0.001)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    # All processes at once: one that survives would continue and write checkpoints.
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(everyone)
    noted = run.noted()
    return noted[-1][1] if noted else "start"


def difference(ours: dict, theirs: dict) -> str | None:
    """Describes the differences in one line; empty if there are none."""
    if ours["tensors"].keys() != theirs["tensors"].keys():
        return f"tensors of other names: {sorted(ours['tensors'].keys() ^ theirs['tensors'].keys())}"
    found = []
    unequal = [name for name, value in ours["tensors"].items() if not value.equal(theirs["tensors"][name])]
    if unequal:
        largest = max(float((ours["tensors"][name] - theirs["tensors"][name]).abs().max()) for name in unequal)
        found.append(f"{len(unequal)} of {len(ours['tensors'])} tensors, by {largest:.1e} at the most")
    entries = [entry for entry in zip(ours["log"], theirs["log"], strict=False) if entry[0] != entry[1]]
    if entries or len(ours["log"]) != len(theirs["log"]):
        found.append(f"the log, {len(ours['log'])} entries for {len(theirs['log'])}, first {entries[:1]}")
    return "; ".join(found) or None


def soak(processes: int, cycles: int, rng: random.Random, folder: Path) -> tuple[Counter, list[str], int]:
    """Kills runs until the given number of kills is reached.

    Returns:
        The kills by phase, what differed, and how many incomplete checkpoints were not used.
    """
    durations, expected = defaultdict(list), {}
    for limit in LIMITS:
        reference = Run(folder / f"reference-{limit}", processes, limit, folder.parent)
        began = time.time()
        reference.finish()
        noted = [(began, "start"), *reference.noted()]
        for (moment, phase), (later, _) in itertools.pairwise(noted):
            durations[phase].append(later - moment)
        expected[limit] = reference.end()
    kills, differing, passed_over, number = Counter(), [], 0, 0
    targets: list[str] = []
    while kills.total() < cycles:
        limit = LIMITS[number % len(LIMITS)]
        run = Run(folder / str(number), processes, limit, folder.parent)
        phases: list[str] = []
        while len(phases) < KILLS_PER_RUN and kills.total() < cycles:
            # Every phase occurs, in a random order.
            targets = targets or rng.sample(PHASES, len(PHASES))
            phase = kill_at_random(run, targets.pop(), rng, durations)
            if phase is None:
                break
            kills[phase] += 1
            phases.append(phase)
        run.finish()
        found = difference(run.end(), expected[limit])
        differing += [f"{run.folder}, killed in {', '.join(phases)}: {found}"] if found else []
        passed_over += (run.folder / "log.txt").read_text(errors="replace").count("is incomplete and not used")
        number += 1
    return kills, differing, passed_over


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        make_benchmark(folder / "data")
        make_backbone(folder / "data", folder / "backbone")
    began = time.time()
    print(
        f"{'processes':>9} {'kills':>5}  " + "".join(f"{phase:>11}" for phase in PHASES) + "   incomplete  differences"
    )
    all_differing = []
    for processes, cycles in ((1, arguments.cycles - arguments.cycles // 2), (2, arguments.cycles // 2)):
        rng = random.Random(f"{arguments.seed}/{processes}")
        kills, differing, passed_over = soak(processes, cycles, rng, folder / f"{processes}-processes")
        by_phase = "".join(f"{kills[phase]:>11}" for phase in PHASES)
        print(f"{processes:>9} {kills.total():>5}  {by_phase}  {passed_over:>11}  {len(differing):>11}", flush=True)
        all_differing += differing
    print("\n".join(all_differing) or "every run ended as the one that was left alone, bit for bit")
    print(f"{time.time() - began:.0f} s")
    if not all_differing:
        shutil.rmtree(folder)
    return bool(all_differing)


if __name__ == "__main__":
    sys.exit(main())
