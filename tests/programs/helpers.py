"""Functions that several test modules and programs share."""

import gzip
import json
import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import datasets
import torch
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from eccl.configuration_eccl import ECCLConfig
from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.hub.adapter import attach_lora
from eccl.hub.export import export_onnx
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.pairs import CaptionPairs
from eccl.training.trainer import ECCLTrainer

# Seconds after which a test gives up on a process that hangs. No result depends on it: a busy machine may be slow.
PATIENCE = 900
GOLDENS = Path(__file__).parents[1] / "goldens"
ROOT = Path(__file__).parents[2]

# The training command is imported by its path.
sys.path.insert(0, str(ROOT))
import train_eccl  # noqa: E402

TINY_SHAPE = {
    "projection_dim": 16,
    "text_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [32, 16],
        "patch_size": 8,
    },
}


def tiny_config(**changes) -> ECCLConfig:
    """Two layers of width 32 (text) and 48 (images), 4 x 2 patches: a batch takes milliseconds."""
    values = {
        "text_config": {
            "vocab_size": 60,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "bos_token_id": 58,
            "eos_token_id": 59,
            "pad_token_id": 59,
        },
        "vision_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "image_size": [32, 16],
            "patch_size": 8,
        },
        "projection_dim": 24,
        "num_prompt_tokens": 3,
        "prompt_depth": 2,
    }
    return ECCLConfig(**(values | changes))


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """Makes CLIP's tokenizer from the vocabulary file of its published code."""
    lines = gzip.decompress((GOLDENS / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = letters + [f"{letter}</w>" for letter in letters] + ["".join(merge) for merge in merges]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


def make_trainer(backbone, benchmark, output_dir, **changes) -> ECCLTrainer:
    """Makes a trainer for images of 32 x 16 pixels; it evaluates and saves only if `changes` say so."""
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "warmup_epochs": 1, "disable_tqdm": True}
    settings |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "seed": 3}
    args = ECCLTrainingArguments(output_dir=str(output_dir), **(settings | changes))
    torch.manual_seed(0)
    model = attach_lora(ECCLModel.from_clip(str(backbone), image_size=(32, 16), prompt_depth=2))
    processor = ECCLProcessor.for_model(model.config, CLIPTokenizer.from_pretrained(backbone))
    dataset = datasets.load_dataset("cuhk_pedes", data_dir=str(benchmark), split="train")
    pairs = CaptionPairs(dataset, processor, args.augment, args.seed)
    trainer = ECCLTrainer(model, args, train_dataset=pairs, eval_dataset=dataset, processing_class=processor)
    trainer.given_args = args
    return trainer


def run(*words, data_dir, output_dir) -> None:
    """Runs the training command in this process; a user's mistake is raised as an exception."""
    arguments = []
    for word in words:
        arguments += [word] if word.startswith("{") else word.split()
    common = ["--data_dir", str(data_dir), "--output_dir", str(output_dir), "--disable_tqdm", "True", "--debug"]
    train_eccl.main([*arguments, *common])


def make_benchmark(folder: Path) -> None:
    """Draws a benchmark: 4 persons to train on (16 pairs), 2 in val, 2 in test, with two images each."""
    sizes = {"train_ids": 4, "val_ids": 2, "test_ids": 2, "images_per_id": 2}
    write_benchmark(SyntheticBenchmark("cuhk_pedes", **sizes), folder, num_workers=1)


def make_backbone(benchmark: Path, folder: Path) -> None:
    """Trains a model without prompts and its tokenizer with `--tune full`."""
    run(
        "--dataset_name cuhk_pedes --tune full --scratch_config", json.dumps(TINY_SHAPE),
        "--vocab_size 300 --max_steps 2 --per_device_train_batch_size 8 --losses contrastive=1 attribute=1",
        data_dir=benchmark, output_dir=folder,
    )  # fmt: skip


def make_exported(backbone: Path, folder: Path) -> None:
    """Writes a model with prompts and its processor to a folder, and their ONNX export, int8 too, to its subfolder."""
    torch.manual_seed(0)
    model = ECCLModel.from_clip(str(backbone), (32, 16), num_prompt_tokens=3, prompt_depth=2)
    processor = ECCLProcessor.for_model(model.config, CLIPTokenizer.from_pretrained(backbone))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    export_onnx(model, processor, folder / "onnx", int8=True)


def launch_command(processes: int, script: str, *words) -> list[str]:
    """Returns the command that launches a script of this project on CPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--multi_gpu"] if processes > 1 else []  # the launcher's name for several processes, CPUs too
    command += ["--num_machines", "1", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    return [*command, str(ROOT / script), *map(str, words)]


def launch_environment() -> dict[str, str]:
    """Returns the environment of a launched process: it finds the programs of the tests and uses this run's cache."""
    return os.environ | {
        "PYTHONPATH": str(ROOT / "tests" / "programs"),
        "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE),
    }


def launch_in_background(processes: int, script: str, *words, log: Path, **options) -> subprocess.Popen:
    """Launches a script; its output is added to the file `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            launch_command(processes, script, *words), env=launch_environment(), stdin=subprocess.DEVNULL,
            stdout=file, stderr=file, **options,
        )  # fmt: skip


def launch(processes: int, script: str, *words, log: Path, timeout: float = PATIENCE) -> None:
    """Launches a script and waits; fails with its output if the exit status is not 0."""
    returncode = launch_in_background(processes, script, *words, log=log).wait(timeout=timeout)
    assert returncode == 0, log.read_text(errors="replace")[-5000:]


def wait_until(condition, timeout: float = PATIENCE) -> None:
    end = time.time() + timeout
    while not condition():
        assert time.time() < end
        time.sleep(0.1)
