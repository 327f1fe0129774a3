"""The values that a run logs, and that they reach tensorboard and trackio."""

import json
import math
import sqlite3

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eccl.training.memory import CrossModalMemory
from eccl.training.monitor import StepMonitor
from helpers import launch, make_trainer

REPORTED = {
    *("loss", "tal_loss", "grad_norm", "learning_rate", "lora_learning_rate", "pairs_per_second"),
    *(f"{memory}_memory_loss_{way}" for memory in ("identity", "instance") for way in ("i2t", "t2i")),
    *(f"{memory}_memory_drift_{side}" for memory in ("identity", "instance") for side in ("image", "text")),
}


def test_means_and_speed_are_of_the_steps_since_the_last_report():
    now = [100.0]
    monitor = StepMonitor(clock=lambda: now[0])
    now[0] += 7
    monitor.start()
    for pairs, value in ((8, 1.0), (4, 3.0)):
        now[0] += 0.5
        monitor.add({"loss": torch.tensor(value)})
        monitor.finish_step(pairs)
    monitor.add({"drift": torch.tensor(5.0)})
    now[0] += 50
    monitor.start()
    assert monitor.report() == {"loss": 2, "drift": 5, "pairs_per_second": 12}
    assert monitor.report() == {}


def test_the_drift_of_rows_is_how_far_those_that_were_written_turned():
    memory = CrossModalMemory(torch.eye(4), torch.eye(4), torch.arange(4), temperature=0.1, momentum=0.5)
    # Row 2 is written twice with its own direction. Row 0 is written once with a perpendicular one: it turns by 45
    # degrees.
    images = torch.stack([torch.eye(4)[2], torch.eye(4)[1], torch.eye(4)[2]])
    image_drift, text_drift = memory.update(images, torch.eye(4)[[2, 0, 2]], torch.tensor([2, 0, 2]))
    assert float(image_drift) == pytest.approx((1 - math.cos(math.pi / 4)) / 2, abs=1e-6)
    assert float(text_drift) == pytest.approx(0, abs=1e-6)


def test_every_figure_reaches_tensorboard(backbone, benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(backbone, benchmark, tmp_path / "out", logging_steps=2, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 4 and logged[0].keys() >= REPORTED
    for name in REPORTED:
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == {entry["step"]: pytest.approx(entry[name], rel=1e-6) for entry in logged}


@pytest.mark.slow
def test_every_figure_reaches_trackio(backbone, benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    words = ["--dataset_name", "cuhk_pedes", "--data_dir", benchmark, "--init_from", backbone, "--prompt_depth", "2"]
    words += ["--per_device_train_batch_size", "4", "--max_steps", "2", "--logging_steps", "1", "--project", "pedes"]
    launch(1, "train_eccl.py", *words, "--report_to", "trackio", "--output_dir", tmp_path / "out", log=tmp_path / "log")
    with sqlite3.connect(tmp_path / "trackio" / "pedes.db") as database:
        rows = [json.loads(row[0]) for row in database.execute("select metrics from metrics order by id")]
    assert len([row for row in rows if {f"train/{name}" for name in REPORTED} <= row.keys()]) == 2
    assert any("eval/rank1" in row for row in rows)
