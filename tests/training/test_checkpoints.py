import json
import os
import resource
import shutil
import signal
import threading
import time

import pytest
import safetensors.torch
import torch

from eccl.modeling_eccl import ECCLModel
from eccl.training.checkpoints import (
    COMPLETE_FILE,
    delete_older_checkpoints,
    find_incompleteness,
    find_last_complete_checkpoint,
    mark_complete,
    on_interrupt,
    on_sigterm,
)
from eccl.training.fingerprint import RUN_FILE, find_changes, read_run_id
from eccl.training.trainer import OBJECTIVE_FILE
from helpers import PATIENCE, launch_in_background, make_trainer, run, wait_until

SAVING = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None, "logging_steps": 1, "report_to": "none"}


def end_of(trainer):
    state = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    return state | trainer.objective.state_dict()


def assert_equal_ends(ours, theirs):
    ours, theirs = end_of(ours), end_of(theirs)
    assert ours.keys() == theirs.keys()
    assert not [name for name, value in ours.items() if not value.equal(theirs[name])]


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "out" / "checkpoint-4"
    (folder / "part").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "part" / "state").write_bytes(b"")
    (folder / "scheduler.pt").write_bytes(b"1")
    mark_complete(folder)
    return folder


def test_a_checkpoint_is_whole_when_every_file_has_its_size(checkpoint):
    assert json.loads((checkpoint / COMPLETE_FILE).read_text()) == {"part/state": 0, "scheduler.pt": 1, "weights": 5}
    assert find_incompleteness(checkpoint) is None
    (checkpoint / "weights").write_bytes(b"123")
    assert find_incompleteness(checkpoint) == "weights has 3 bytes, it should have 5"
    (checkpoint / "weights").unlink()
    assert find_incompleteness(checkpoint) == "weights is missing"
    (checkpoint / COMPLETE_FILE).unlink()
    assert "has no complete.json" in find_incompleteness(checkpoint)


def test_the_last_whole_checkpoint_is_by_number_and_others_are_named(checkpoint):
    output_dir = checkpoint.parent
    (output_dir / "checkpoint-10").mkdir()
    shutil.copytree(checkpoint, output_dir / "checkpoint-9")
    (output_dir / "checkpoint-old").mkdir()
    lines = []
    assert find_last_complete_checkpoint(output_dir, lines.append) == output_dir / "checkpoint-9"
    assert len(lines) == 1 and "checkpoint-10 is incomplete and not used" in lines[0]
    assert find_last_complete_checkpoint(output_dir / "nowhere", lines.append) is None


def test_what_is_not_whole_is_deleted_first_then_what_is_oldest(checkpoint):
    output_dir = checkpoint.parent
    # The order of the numbers does not matter: 12 is from an earlier run, 7 was never finished.
    for moment, number in enumerate((12, 2, 3, 6)):
        shutil.copytree(checkpoint, output_dir / f"checkpoint-{number}")
        os.utime(output_dir / f"checkpoint-{number}" / COMPLETE_FILE, ns=(moment, moment))
    (output_dir / "checkpoint-7").mkdir()

    def left(limit):
        delete_older_checkpoints(checkpoint, limit, str(output_dir / "checkpoint-2"))
        return sorted(int(path.name.rpartition("-")[2]) for path in output_dir.iterdir())

    assert left(None) == left(0) == [2, 3, 4, 6, 7, 12]
    assert left(5) == [2, 3, 4, 6, 12]
    assert left(4) == [2, 3, 4, 6]
    assert left(3) == [2, 4, 6]
    assert left(1) == [2, 4]


def test_a_checkpoint_without_an_optimiser_is_not_resumed_from(backbone, benchmark, tmp_path, caplog):
    make_trainer(backbone, benchmark, tmp_path, **SAVING, save_only_model=True).train()
    resumed = make_trainer(backbone, benchmark, tmp_path, max_steps=1)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-8 is incomplete and not used: it has no scheduler.pt" in caplog.text
    assert resumed.state.global_step == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "epoch", "max_steps": 6},
        {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6},
        {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "metric_for_best_model": "mAP"},
        {"eval_strategy": "epoch", "eval_on_start": True},
    ],
    ids=["max_steps", "steps", "best", "on_start"],
)
@pytest.mark.parametrize("how", ["killed", "sigterm"])
def test_no_evaluation_is_lost_or_made_twice(backbone, benchmark, tmp_path, monkeypatch, settings, how):
    """The run is killed right after its last checkpoint, or gets SIGTERM in the last step."""
    settings = {**SAVING, "logging_steps": 5, **settings}
    whole = make_trainer(backbone, benchmark, tmp_path / "whole", **settings)
    whole.train()
    run = make_trainer(backbone, benchmark, tmp_path / "run", **settings)
    last = whole.state.max_steps
    step, save = run.training_step, run._save_checkpoint
    if how == "sigterm":

        def signalled(*args, **kwargs):
            if run.state.global_step == last - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*args, **kwargs)

        run.training_step = signalled
        with pytest.raises(SystemExit):
            run.train()
    else:

        def killed(*args):
            save(*args)
            number = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "whole").glob("checkpoint-*"))
            if run.state.global_step == number:
                raise KeyboardInterrupt

        run._save_checkpoint = killed
        with pytest.raises(KeyboardInterrupt):
            run.train()
    resumed = make_trainer(backbone, benchmark, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_ends(resumed, whole)
    evaluations = [
        [entry for entry in trainer.state.log_history if "eval_rank1" in entry] for trainer in (whole, resumed)
    ]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("broken", ["complete.json", "optimizer.pt", OBJECTIVE_FILE])
def test_training_goes_on_from_the_last_whole_checkpoint(backbone, benchmark, tmp_path, caplog, broken):
    whole = make_trainer(backbone, benchmark, tmp_path / "whole", **SAVING)
    whole.train()
    begun = make_trainer(backbone, benchmark, tmp_path / "run", **SAVING)
    begun.train()
    # As if the run had been killed while it wrote the third checkpoint.
    (tmp_path / "run" / "checkpoint-8" / COMPLETE_FILE).unlink()
    (tmp_path / "run" / "checkpoint-6" / broken).unlink()
    resumed = make_trainer(backbone, benchmark, tmp_path / "run", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert caplog.text.count("is incomplete and not used") == 2
    assert resumed.state.global_step == 8 and resumed._initial_global_step == 3
    assert_equal_ends(resumed, whole)
    times = ("pairs_per_second",)
    logs = [
        [{key: value for key, value in entry.items() if key not in times} for entry in trainer.state.log_history[:-1]]
        for trainer in (whole, resumed)
    ]
    assert logs[0] == logs[1]


def test_a_named_checkpoint_must_be_whole(backbone, benchmark, tmp_path):
    make_trainer(backbone, benchmark, tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-3" / "scheduler.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint-3 cannot be resumed from: scheduler.pt has 0 bytes"):
        make_trainer(backbone, benchmark, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"checkpoint-5 cannot be resumed from: the folder does not exist"):
        make_trainer(backbone, benchmark, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_without_a_checkpoint_training_starts_from_the_beginning(backbone, benchmark, tmp_path, caplog):
    whole = make_trainer(backbone, benchmark, tmp_path / "whole")
    whole.train()
    resumed = make_trainer(backbone, benchmark, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    assert "has no complete checkpoint: training starts from the beginning" in caplog.text
    assert_equal_ends(resumed, whole)


def test_all_files_of_a_checkpoint_have_the_permissions_of_new_files(backbone, benchmark, tmp_path):
    make_trainer(backbone, benchmark, tmp_path, **SAVING, max_steps=3).train()
    (tmp_path / "neighbour").touch()
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "checkpoint-3").iterdir() if path.is_file()}
    assert {OBJECTIVE_FILE, "adapter_model.safetensors", "trainer_state.json"} <= modes.keys()
    assert set(modes.values()) == {(tmp_path / "neighbour").stat().st_mode}


def test_a_run_that_has_taken_its_last_step_takes_no_more(backbone, benchmark, tmp_path):
    settings = {**SAVING, "max_steps": 3}
    first = make_trainer(backbone, benchmark, tmp_path, **settings)
    first.train()
    again = make_trainer(backbone, benchmark, tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 3
    assert_equal_ends(again, first)


def test_a_start_over_an_earlier_run_is_remarked_on(backbone, benchmark, tmp_path, caplog):
    make_trainer(backbone, benchmark, tmp_path, **SAVING, max_steps=3).train()
    assert "holds checkpoints of another run" not in caplog.text
    make_trainer(backbone, benchmark, tmp_path, max_steps=1).train()
    assert "holds checkpoints of another run" in caplog.text


def test_a_checkpoint_at_the_end_of_an_epoch_comes_after_its_evaluation(backbone, benchmark, tmp_path):
    settings = {**SAVING, "save_steps": 4, "eval_strategy": "epoch"}
    make_trainer(backbone, benchmark, tmp_path, **settings).train()
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_rank1" in entry] == [4]


def test_older_checkpoints_go_only_when_the_new_one_is_whole(backbone, benchmark, tmp_path, monkeypatch):
    kept = []

    def noting(folder):
        kept.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        mark_complete(folder)

    monkeypatch.setattr("eccl.training.trainer.mark_complete", noting)
    make_trainer(backbone, benchmark, tmp_path, **{**SAVING, "save_total_limit": 1}).train()
    assert kept == [["checkpoint-3"], ["checkpoint-3", "checkpoint-6"], ["checkpoint-6", "checkpoint-8"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.parametrize("file", ["objective.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(backbone, benchmark, tmp_path, monkeypatch, file):
    """A limit on the size of files fails like a full disk: the write gives an error."""
    whole = make_trainer(backbone, benchmark, tmp_path / "whole", **SAVING)
    whole.train()
    limit = (tmp_path / "whole" / "checkpoint-6" / file).stat().st_size - 1
    trainer = make_trainer(backbone, benchmark, tmp_path / "run", **{**SAVING, "save_total_limit": 1})
    save = trainer._save_checkpoint

    def with_little_space(*args):
        if trainer.state.global_step < 6:
            return save(*args)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(trainer, "_save_checkpoint", with_little_space)
    with pytest.raises(OSError, match=r"checkpoint-6 could not be written, earlier checkpoints are still there"):
        trainer.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = make_trainer(backbone, benchmark, tmp_path / "run", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_ends(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("moment", [(2, "step"), (4, "step"), (4, "evaluation")])
def test_sigterm_writes_a_checkpoint_and_leaves(backbone, benchmark, tmp_path, monkeypatch, moment):
    settings = {**SAVING, "save_strategy": "epoch", "eval_strategy": "epoch", "dataloader_num_workers": 1}
    whole = make_trainer(backbone, benchmark, tmp_path / "whole", **settings)
    whole.train()
    trainer = make_trainer(backbone, benchmark, tmp_path / "run", **settings)
    step, phase = moment
    name = "training_step" if phase == "step" else "evaluate"
    function = getattr(trainer, name)

    def signalled(*args, **kwargs):
        if trainer.state.global_step == step - (phase == "step"):
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*args, **kwargs)

    monkeypatch.setattr(trainer, name, signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised:
        trainer.train()
    assert raised.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
    # A running evaluation is finished, and one more step follows.
    last = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    assert last == step + (phase == "evaluation")
    resumed = make_trainer(backbone, benchmark, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_ends(resumed, whole)
    evaluations = [[entry for entry in run.state.log_history if "eval_rank1" in entry] for run in (whole, resumed)]
    assert evaluations[0] == evaluations[1]


@pytest.mark.parametrize("watch, number", [(on_sigterm, signal.SIGTERM), (on_interrupt, signal.SIGINT)])
def test_outside_the_main_thread_signals_are_left_alone(watch, number):
    seen = []

    def work():
        with watch(lambda: None):
            seen.append(signal.getsignal(number))

    before = signal.getsignal(number)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def press_ctrl_c_at(trainer, steps):
    """Makes the trainer's process get SIGINT at the start of each of these steps."""
    function = trainer.training_step

    def interrupted(*args, **kwargs):
        if trainer.state.global_step in steps:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **kwargs)

    trainer.training_step = interrupted


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_and_leaves(backbone, benchmark, tmp_path, capfd):
    settings = {"num_train_epochs": 2, "save_strategy": "epoch"}
    whole = make_trainer(backbone, benchmark, tmp_path / "whole", **settings)
    whole.train()
    trainer = make_trainer(backbone, benchmark, tmp_path / "run", **settings)
    press_ctrl_c_at(trainer, [2])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as raised:
        trainer.train()
    assert raised.value.code == 130 and signal.getsignal(signal.SIGINT) == before
    captured = capfd.readouterr()
    assert "Ctrl-C: stopping after this step, with a checkpoint; a second Ctrl-C stops at once" in captured.err
    assert "Ctrl-C: stopped after step 3, saved in" in captured.out
    resumed = make_trainer(backbone, benchmark, tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal_ends(resumed, whole)


def test_a_second_ctrl_c_goes_to_the_earlier_handler_unless_a_launcher_has_passed_the_first_one_on():
    asked = []
    with on_interrupt(lambda: asked.append("stop")):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.1)
        assert asked == ["stop"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_interrupt(lambda: asked.append("stop")):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == ["stop"]


# -- Two runs cannot mix


def test_the_best_checkpoint_of_another_run_is_refused(backbone, benchmark, tmp_path, monkeypatch):
    """Without the lock of the command, another run writes to the same folder while this one trains."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "rank1", "num_train_epochs": 2}
    other = make_trainer(backbone, benchmark, tmp_path / "out", **settings | {"load_best_model_at_end": False})
    other.train()
    mixed = make_trainer(backbone, benchmark, tmp_path / "out", **settings)

    def choose_other(metrics, trial=None):
        mixed.state.best_model_checkpoint = str(tmp_path / "kept")
        return True

    shutil.copytree(next((tmp_path / "out").glob("checkpoint-*")), tmp_path / "kept")
    monkeypatch.setattr(mixed, "_determine_best_metric", choose_other)
    with pytest.raises(
        RuntimeError, match=r"kept, the best checkpoint, was written by another run: two runs have used"
    ):
        mixed.train()


def test_a_resumed_run_keeps_its_id_and_another_run_gets_another(backbone, benchmark, tmp_path):
    settings = {"save_strategy": "epoch", "num_train_epochs": 1, "save_total_limit": None}
    first = make_trainer(backbone, benchmark, tmp_path / "out", **settings)
    first.train()
    resumed = make_trainer(backbone, benchmark, tmp_path / "out", **settings | {"num_train_epochs": 2})
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run_id == first.run_id
    assert {read_run_id(path) for path in (tmp_path / "out").glob("checkpoint-*")} == {first.run_id}
    again = make_trainer(backbone, benchmark, tmp_path / "again", **settings)
    again.train()
    assert again.run_id != first.run_id


# -- A checkpoint knows its run


def changed_trainer(change, backbone, benchmark, tmp_path, **settings):
    """A trainer for the run in `out`, with one thing changed."""
    if change == "training data":
        shutil.copytree(benchmark, tmp_path / "changed")
        file = tmp_path / "changed" / "reid_raw.json"
        file.write_text(file.read_text().replace("man", "person", 1))
        benchmark = tmp_path / "changed"
    elif change == "base model":
        model = ECCLModel.from_pretrained(backbone)
        with torch.no_grad():
            model.text_projection.weight.mul_(1.1)
        shutil.copytree(backbone, tmp_path / "base")
        model.save_pretrained(tmp_path / "base")
        backbone = tmp_path / "base"
    elif change == "pairs per step":
        settings |= {"per_device_train_batch_size": 2}
    elif change == "seed":
        settings |= {"seed": 4}
    elif change == "sampler":
        settings |= {"sampler": "identity"}
    elif change == "base_dtype":
        settings |= {"base_dtype": "bfloat16"}
    return make_trainer(backbone, benchmark, tmp_path / "out", save_strategy="epoch", **settings)


@pytest.mark.parametrize("change", ["training data", "base model", "base_dtype", "pairs per step", "seed", "sampler"])
def test_a_run_is_resumed_only_as_it_was(change, backbone, benchmark, tmp_path, caplog):
    make_trainer(backbone, benchmark, tmp_path / "out", save_strategy="epoch", num_train_epochs=1).train()
    with pytest.raises(ValueError, match=rf"checkpoint-4 was written by another run: {change}") as error:
        changed_trainer(change, backbone, benchmark, tmp_path).train(resume_from_checkpoint=True)
    assert ";" not in str(error.value).split(". Resume")[0]
    shutil.rmtree(tmp_path / "base", ignore_errors=True)
    shutil.rmtree(tmp_path / "changed", ignore_errors=True)
    trainer = changed_trainer(change, backbone, benchmark, tmp_path, allow_changed_run=True)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.epoch == 2 and "was written by another run, which is allowed" in caplog.text


def test_another_number_of_processes_is_another_run(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path / "out", save_strategy="epoch", num_train_epochs=1)
    trainer.train()
    file = tmp_path / "out" / "checkpoint-4" / RUN_FILE
    run = json.loads(file.read_text())
    assert find_changes(file.parent, run) == []
    assert find_changes(file.parent, run | {"number of processes": 2}) == [
        "number of processes: 1 in the checkpoint, 2 now"
    ]


def test_a_resumed_run_says_where_it_goes_on_and_keeps_its_last_checkpoint(backbone, benchmark, tmp_path, caplog):
    """The first epoch is the best one; a longer run goes on from the last one all the same."""
    settings = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "rank1", "save_total_limit": 1}

    def train(epochs, resume):
        trainer = make_trainer(backbone, benchmark, tmp_path / "out", num_train_epochs=epochs, **settings)
        figures = iter([90.0, 80.0, 70.0] if not resume else [60.0])
        score = lambda embeds, *_: {"rank1": next(figures)}  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("eccl.training.trainer.score_embeddings", score)
            trainer.train(resume_from_checkpoint=resume)
        return trainer

    kept = lambda: sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))  # noqa: E731
    train(3, None)
    assert kept() == ["checkpoint-12", "checkpoint-4"]
    train(3, True)
    assert kept() == ["checkpoint-12", "checkpoint-4"]
    assert "checkpoint-12: after step 12, epoch 3" in caplog.text and "that run was finished after 12" in caplog.text
    trainer = train(4, True)
    assert trainer.state.global_step == 16 and trainer.state.best_metric == 90.0
    assert kept() == ["checkpoint-16", "checkpoint-4"]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "whom"), [(1, "launcher"), (1, "group"), (2, "launcher"), (2, "group")])
def test_sigterm_to_a_launch_leaves_a_checkpoint_to_resume_from(backbone, benchmark, tmp_path, processes, whom):
    words = ["--dataset_name", "cuhk_pedes", "--data_dir", benchmark, "--init_from", backbone, "--prompt_depth", "2"]
    words += ["--per_device_train_batch_size", 4 // processes, "--num_train_epochs", "3000", "--save_strategy", "steps"]
    words += ["--save_steps", "10000", "--eval_strategy", "no", "--load_best_model_at_end", "False"]
    words += ["--dataloader_num_workers", "1", "--logging_steps", "1", "--disable_tqdm", "True", "--report_to", "none"]
    words += ["--output_dir", tmp_path / "out"]
    log = tmp_path / "log.txt"
    process = launch_in_background(processes, "train_eccl.py", *words, log=log, start_new_session=True)
    wait_until(lambda: "'loss'" in log.read_text())
    (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGTERM)
    process.wait(timeout=PATIENCE)
    wait_until(lambda: "SIGTERM: stopped after step" in log.read_text())
    found = find_last_complete_checkpoint(tmp_path / "out", pytest.fail)
    assert (found / OBJECTIVE_FILE).is_file() and safetensors.torch.load_file(found / "adapter_model.safetensors")


@pytest.mark.parametrize("change", [lambda state: state.popitem(), lambda state: state.update(more=torch.zeros(1))])
def test_a_checkpoint_of_a_whole_model_that_does_not_fit_is_refused(change, backbone, benchmark, tmp_path):
    words = f"--dataset_name cuhk_pedes --tune full --init_from {backbone} --losses contrastive=1 --eval_strategy no"
    words += " --load_best_model_at_end False --per_device_train_batch_size 8 --save_strategy epoch"
    run(words + " --num_train_epochs 1", data_dir=benchmark, output_dir=tmp_path / "out")
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    file = checkpoint / "model.safetensors"
    state = safetensors.torch.load_file(file)
    change(state)
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    (checkpoint / COMPLETE_FILE).unlink()
    mark_complete(checkpoint)
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be used; tensors (missing|not of this model): "):
        run(
            words + " --num_train_epochs 2 --resume_from_checkpoint True",
            data_dir=benchmark, output_dir=tmp_path / "out",
        )  # fmt: skip
