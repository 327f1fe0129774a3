"""Several processes train like one, on CPUs over gloo."""

import json

import pytest
import safetensors.torch

from helpers import launch

# 16 pairs: in the last batch of 14 the second process has only padding; in the last batch of 6 it has some pairs.
SCENARIOS = {
    "uneven": {"batch": 6, "num_train_epochs": 7},
    "empty": {"batch": 14, "num_train_epochs": 10},
    "drop_last": {"batch": 6, "num_train_epochs": 10, "dataloader_drop_last": True},
    "accumulation": {"batch": 4, "num_train_epochs": 10, "gradient_accumulation_steps": 3},
    "chunks": {"batch": 8, "num_train_epochs": 10, "embed_chunk_size": 3},
    "identity": {"batch": 4, "num_train_epochs": 5, "sampler": "identity"},
    "tokens": {
        "batch": 6,
        "num_train_epochs": 7,
        "losses": {"sdm": 1, "identity_classification": 1, "masked_language_modelling": 1},
        "interaction_depth": 1,
        "learning_rate_factors": ["mlm_head=5"],
    },
}
STEPS = {"uneven": 21, "empty": 20, "drop_last": 20, "accumulation": 20, "chunks": 20, "identity": 20, "tokens": 21}
# Times, and total_flos, which transformers computes from the padded captions.
UNEQUAL_BY_NATURE = {
    "pairs_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
}


@pytest.fixture(scope="module")
def runs(backbone, benchmark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for processes in (1, 2):
        scenarios = {}
        for name, settings in SCENARIOS.items():
            batch = settings["batch"] // processes
            scenarios[name] = {"per_device_train_batch_size": batch, **settings}
            del scenarios[name]["batch"]
        if processes == 2:
            scenarios["without_gather"] = {"per_device_train_batch_size": 4, "without_gather": True}
            resumable = {"per_device_train_batch_size": 2, "augment": True, "num_train_epochs": 3}
            scenarios["whole"] = {**resumable, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 9}
            scenarios["resumed"] = {**resumable, "resume_from": "whole/checkpoint-6"}
        (folder / "scenarios.json").write_text(json.dumps(scenarios))
        words = (folder / "scenarios.json", backbone, benchmark, folder / str(processes))
        launch(processes, "tests/programs/ranks.py", *words, log=folder / f"log-{processes}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_step_by_step_as_one_with_twice_the_batch(runs, name):
    one, two = (json.loads((runs / str(processes) / f"{name}-0.json").read_text()) for processes in (1, 2))
    assert len(one) == len(two) == STEPS[name] + 1
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - UNEQUAL_BY_NATURE:
            # Values close to 0 are differences of larger numbers. A temperature of 0.015 multiplies the rounding of a
            # similarity by 67.
            assert theirs[key] == pytest.approx(ours[key], rel=3e-5, abs=1e-6), (key, ours["step"])
    state = safetensors.torch.load_file(runs / "1" / f"{name}-0.safetensors")
    other = safetensors.torch.load_file(runs / "2" / f"{name}-0.safetensors")
    for key, value in state.items():
        assert (other[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


@pytest.mark.slow
def test_every_rank_holds_the_same_memories_and_would_not_without_the_gather(runs):
    def states(name):
        return [safetensors.torch.load_file(runs / "2" / f"{name}-{rank}.safetensors") for rank in (0, 1)]

    for name in SCENARIOS:
        first, second = states(name)
        assert all(value.equal(second[key]) for key, value in first.items()), name
    first, second = states("without_gather")
    rows = [key for key in first if key.startswith("objective.") and key.endswith("_rows")]
    assert len(rows) == 4
    assert all((first[key] - second[key]).abs().max() > 1e-3 for key in rows)


@pytest.mark.slow
def test_two_processes_resume_within_an_epoch_bit_for_bit(runs):
    for rank in (0, 1):
        whole, resumed = (
            safetensors.torch.load_file(runs / "2" / f"{name}-{rank}.safetensors") for name in ("whole", "resumed")
        )
        assert not [key for key, value in whole.items() if not value.equal(resumed[key])]
