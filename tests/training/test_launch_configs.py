"""The launch configurations of recipes/accelerate, on CPUs."""

import socket
import subprocess
import sys

import pytest
import safetensors.torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from eccl.training.trainer import OBJECTIVE_FILE
from helpers import PATIENCE, ROOT, launch_environment

CONFIGS = ROOT / "recipes" / "accelerate"
PROCESSES = {"cpu": 1, "one_gpu": 1, "eight_gpus": 8, "two_nodes": 16, "fsdp": 8}


SETTINGS = (
    "--dataset_name cuhk_pedes --prompt_depth 2 --num_train_epochs 2 --warmup_epochs 1 --logging_steps 1 --seed 3 "
    "--disable_tqdm True --report_to none --save_total_limit 9"
)


def command(config, backbone, benchmark, output_dir, *flags, script="train_eccl.py", batch=1, words=()):
    """Returns the command of a launch with a configuration; later words override earlier ones."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    launcher += ["--num_cpu_threads_per_process", 1, "--dynamo_backend", "no", *flags, ROOT / script]
    data = ["--data_dir", benchmark, "--init_from", backbone, "--output_dir", output_dir]
    batch_size = ["--per_device_train_batch_size", batch]
    return [str(word) for word in (*launcher, *SETTINGS.split(), *data, *batch_size, *words)]


def start(words):
    return subprocess.Popen(
        words, env=launch_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(process, timeout=PATIENCE):
    printed, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, printed[-3000:]
    return printed


def weights(folder):
    state = safetensors.torch.load_file(folder / "model.safetensors")
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return state | safetensors.torch.load_file(last / OBJECTIVE_FILE)


def difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[key] - value).abs().max() / value.abs().max().clamp(min=1e-9)) for key, value in theirs.items()
    )


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_one_of_accelerates(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[path.stem]
    assert config.num_machines == (2 if path.stem == "two_nodes" else 1)
    # accelerate fills in missing settings; it must know those that are given.
    assert set(yaml.safe_load(path.read_text())) <= set(vars(config))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["one_gpu", "eight_gpus"])
def test_it_trains_with_as_many_processes_as_it_says(backbone, benchmark, tmp_path, config):
    processes = PROCESSES[config]
    finish(start(command(config, backbone, benchmark, tmp_path, batch=8 // processes)))
    reference = tmp_path / "reference"
    finish(start(command("one_gpu", backbone, benchmark, reference, batch=8)))
    # In bfloat16, as in the configurations.
    assert difference(weights(tmp_path), weights(reference)) < (1e-9 if processes == 1 else 5e-2)
    assert len(list(tmp_path.glob("checkpoint-4/rng_state*.pth"))) == processes


@pytest.mark.slow
def test_two_machines_train_as_one(backbone, benchmark, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = ("--num_processes", 4, "--mixed_precision", "no", "--main_process_port", port)
    nodes = [
        start(command("two_nodes", backbone, benchmark, tmp_path / "two", *shared, "--machine_rank", rank, batch=2))
        for rank in (0, 1)
    ]
    for node in nodes:
        finish(node)
    one = command("one_gpu", backbone, benchmark, tmp_path / "one", "--mixed_precision", "no", batch=8)
    finish(start(one))
    assert difference(weights(tmp_path / "two"), weights(tmp_path / "one")) <= 1e-5


@pytest.mark.slow
def test_shards_train_and_resume_as_whole_copies(backbone, benchmark, tmp_path):
    flags = ("--num_processes", 2, "--mixed_precision", "no")

    def sharded(folder, *words):
        return command(
            "fsdp",
            backbone,
            benchmark,
            tmp_path / folder,
            *flags,
            script="tests/programs/fsdp_run.py",
            batch=3,
            words=words,
        )

    clipped = ("--max_grad_norm", 5)
    finish(start(sharded("shards", *clipped)))
    finish(start(command("eight_gpus", backbone, benchmark, tmp_path / "copies", *flags, batch=3, words=clipped)))
    assert (tmp_path / "shards" / "checkpoint-6" / "pytorch_model_fsdp.bin").is_file()
    assert difference(weights(tmp_path / "shards"), weights(tmp_path / "copies")) <= 1e-5
    resume = (*clipped, "--resume_from_checkpoint", tmp_path / "shards" / "checkpoint-3")
    finish(start(sharded("resumed", *resume)))
    assert difference(weights(tmp_path / "resumed"), weights(tmp_path / "shards")) == 0
    adapters = [
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("shards", "resumed")
    ]
    assert adapters[0] == adapters[1]


@pytest.mark.slow
def test_without_accelerators_shards_are_copies_and_it_says_so(backbone, benchmark, tmp_path):
    words = command("fsdp", backbone, benchmark, tmp_path, "--num_processes", 2, words=("--max_steps", 1))
    printed = finish(start(words))
    assert "FSDP needs accelerators and there are none" in printed
