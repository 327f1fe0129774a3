"""Settings beside the published ones: starts of the memories, temperatures, dropped words."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.losses import image_text_contrastive_loss
from eccl.training.objective import ECCLObjective, PairBatch
from eccl.training.trainer import ECCLTrainer
from helpers import make_trainer, run


def make_objective(tmp_path, **settings):
    args = ECCLTrainingArguments(output_dir=str(tmp_path), **settings)
    pairs = SimpleNamespace(num_persons=4, person_labels=torch.tensor([0, 1, 2, 3]))
    return ECCLObjective(args, pairs, 5)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(6, 5, generator=generator, requires_grad=True) for _ in range(2)]
    persons = torch.tensor([0, 2, 0, 3, 2, 2])
    return PairBatch(*features, torch.tensor(30.0), persons, persons)


def test_the_temperature_of_infonce_replaces_the_scale_of_the_model(batch, tmp_path):
    own = make_objective(tmp_path, losses=["contrastive=1"])
    fixed = make_objective(tmp_path, losses=["contrastive=1"], contrastive_temperature=0.04)
    assert own.contrastive.trains_logit_scale and not fixed.contrastive.trains_logit_scale
    for objective, scale in ((own, 30.0), (fixed, 25.0)):
        total, _ = objective(batch)
        torch.testing.assert_close(total, image_text_contrastive_loss(batch.image_features, batch.text_features, scale))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrastive_temperature": 0.0}, "contrastive_temperature is 0.0, it must be positive"),
        ({"memory_start": "late"}, "memory_start is 'late', it must be evaluation or augmented"),
        ({"memory_start": "augmented", "augment": False}, "memory_start is augmented, but augment is False"),
        ({"memory_start": "augmented", "losses": ["tal=1"]}, "memory_start is augmented, but no loss has a memory"),
        ({"word_drop_probability": 0.3, "augment": False}, "word_drop_probability is 0.3, but augment is False"),
        ({"word_drop_probability": 1.5}, "word_drop_probability is 1.5, it must be between 0 and 1"),
    ],
)
def test_impossible_settings_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ECCLTrainingArguments(output_dir=str(tmp_path), **settings)


def test_memories_can_start_from_the_augmented_pairs(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, memory_start="augmented")
    trainer.start_objective()
    memory, model, pairs = trainer.objective.identity_memory.memory, trainer.model, trainer.pairs
    sums = torch.zeros_like(memory.image_rows)
    for index in range(len(pairs)):
        item = pairs[index]
        with torch.no_grad():
            sums[item["person_label"]] += model(
                pixel_values=item["pixel_values"][None].to(trainer.args.device)
            ).image_embeds[0]
    torch.testing.assert_close(memory.image_rows, torch.nn.functional.normalize(sums), rtol=1e-4, atol=1e-5)
    usual = make_trainer(backbone, benchmark, tmp_path)
    usual.start_objective()
    assert not torch.allclose(usual.objective.identity_memory.memory.image_rows, memory.image_rows, atol=1e-3)


@pytest.mark.parametrize(("probability", "kept"), [(0.0, True), (0.9, False)])
def test_words_are_dropped_with_the_given_probability(probability, kept, backbone, benchmark, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(ECCLTrainer, "train", lambda self, **_: trainers.append(self) or sys.exit())
    words = f"--dataset_name cuhk_pedes --init_from {backbone} --word_drop_probability {probability}"
    with pytest.raises(SystemExit):
        run(words, data_dir=benchmark, output_dir=tmp_path / "out")
    pairs = trainers[0].pairs
    captions = [caption for row in pairs.dataset for caption in row["captions"]]
    found = [pairs[index]["caption"] for index in range(len(pairs))]
    assert (found == captions) == kept
    if not kept:
        assert sum(len(text.split()) for text in found) < 0.4 * sum(len(text.split()) for text in captions)


def test_lora_alone_logs_its_rate_by_its_name(backbone, benchmark, tmp_path):
    for prompts, names in (("0", {"lora_learning_rate"}), ("2", {"learning_rate", "lora_learning_rate"})):
        words = f"--dataset_name cuhk_pedes --init_from {backbone} --image_size 32 16 --num_prompt_tokens {prompts}"
        words += " --max_steps 1 --logging_steps 1 --eval_strategy no --lora_learning_rate 0.5"
        run(words, "--per_device_train_batch_size 4", data_dir=benchmark, output_dir=tmp_path / prompts)
        log = json.loads((tmp_path / prompts / "training_log.json").read_text())["log_history"][0]
        assert {name for name in log if name.endswith("learning_rate")} == names
        card = (tmp_path / prompts / "README.md").read_text()
        assert ("A CLIP for images of people with LoRA." in card) == (prompts == "0")


def test_the_update_gets_no_tokens(batch):
    tokens = torch.ones(6, 2, 5, requires_grad=True)
    pairs = replace(batch, image_tokens=tokens)
    found = pairs.detach()
    assert found.image_tokens is None and not found.image_features.requires_grad and pairs.image_tokens is tokens
