"""Faults in the middle of a run."""

import os
import shutil
import signal
import time

import psutil
import pytest
import torch

from eccl.training.checkpoints import find_last_complete_checkpoint
from helpers import PATIENCE, launch_in_background, make_trainer, wait_until

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "report_to": "none"}


def test_a_loss_that_is_no_number_stops_with_its_batch(backbone, benchmark, tmp_path, monkeypatch):
    trainer = make_trainer(backbone, benchmark, tmp_path, **SAVING)
    seen = []
    collate = trainer.data_collator

    def spoiling(items):
        seen.append([item["file_path"] for item in items])
        batch = collate(items)
        if len(seen) == 3:
            batch["pixel_values"][1] = torch.inf
        return batch

    monkeypatch.setattr(trainer, "data_collator", spoiling)
    with pytest.raises(FloatingPointError) as raised:
        trainer.train()
    message = str(raised.value)
    assert message.startswith("step 3: the loss is nan (tal_loss nan, identity_memory_loss_i2t nan")
    assert message.endswith(", ".join(seen[2]))
    assert find_last_complete_checkpoint(tmp_path, pytest.fail).name == "checkpoint-2"


def test_a_gradient_that_is_no_number_stops_before_the_step(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, **SAVING)
    name, parameter = next((n, p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    parameter.register_hook(lambda gradient: gradient * (torch.inf if trainer.state.global_step == 1 else 1))
    with pytest.raises(FloatingPointError, match=r"step 2: the norm of the gradient is (inf|nan)\..*batch: "):
        trainer.train()
    assert parameter.isfinite().all(), name
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_folder_that_goes_away_ends_the_run_and_names_the_file(benchmark, backbone, tmp_path, workers):
    data = shutil.copytree(benchmark, tmp_path / "data")
    trainer = make_trainer(
        backbone, data, tmp_path / "out", dataloader_num_workers=workers, num_train_epochs=9, **SAVING
    )
    save = trainer._save_checkpoint

    def removing(*args):
        save(*args)
        if trainer.state.global_step == 2:
            shutil.rmtree(data / "imgs")

    trainer._save_checkpoint = removing
    with pytest.raises(FileNotFoundError, match=str(data / "imgs")):
        trainer.train()
    assert int(find_last_complete_checkpoint(tmp_path / "out", pytest.fail).name.rpartition("-")[2]) >= 2


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run(benchmark, backbone, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, dataloader_num_workers=1, num_train_epochs=9, **SAVING)
    save = trainer._save_checkpoint

    def killing(*args):
        save(*args)
        if trainer.state.global_step == 2:
            for worker in psutil.Process().children():
                worker.kill()

    trainer._save_checkpoint = killing
    with pytest.raises(RuntimeError, match=r"^a DataLoader worker exited unexpectedly"):
        trainer.train()
    assert int(find_last_complete_checkpoint(tmp_path, pytest.fail).name.rpartition("-")[2]) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_the_others(backbone, benchmark, tmp_path, fault):
    words = ["--dataset_name", "cuhk_pedes", "--data_dir", benchmark, "--init_from", backbone, "--prompt_depth", "2"]
    words += ["--per_device_train_batch_size", 2, "--num_train_epochs", "3000", "--eval_strategy", "no"]
    words += ["--load_best_model_at_end", "False", "--save_steps", "20", "--save_strategy", "steps"]
    words += ["--logging_steps", "1", "--disable_tqdm", "True", "--report_to", "none", "--ddp_timeout", "30"]
    words += ["--output_dir", tmp_path / "out"]
    process = launch_in_background(2, "train_eccl.py", *words, log=tmp_path / "log.txt")
    wait_until(lambda: list((tmp_path / "out").glob("checkpoint-*/complete.json")))
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    began = time.time()
    os.kill(max(rank.pid for rank in ranks), fault)
    assert process.wait(timeout=PATIENCE) != 0
    print(f"{fault.name}: the launch ended after {time.time() - began:.0f} s")
    _, alive = psutil.wait_procs(ranks, timeout=PATIENCE)
    assert not alive
    assert find_last_complete_checkpoint(tmp_path / "out", print) is not None
