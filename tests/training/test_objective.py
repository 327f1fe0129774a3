"""Settings beside the published ones: negatives of the memory, learned weights, starts, temperatures, dropped words."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.losses import (
    image_text_contrastive_loss,
    memory_triplet_alignment_loss,
    triplet_alignment_loss,
)
from eccl.training.objective import ECCLObjective, EncodedTrainingSet, PairBatch
from eccl.training.trainer import ECCLTrainer
from helpers import make_trainer, run


def unit(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def loop_over_triplets(image_features, text_features, persons, image_rows, text_rows, temperature, margin):
    """TAL with the rows of other persons as negatives: one query after the other, in float64."""
    images, texts = unit(image_features.double()), unit(text_features.double())
    total = 0.0
    for queries, answers, rows in ((texts, images, image_rows), (images, texts, text_rows)):
        for query, person in zip(queries, persons.tolist(), strict=True):
            positives = [query @ answer for answer, p in zip(answers, persons.tolist(), strict=True) if p == person]
            weights = torch.tensor([s.item() for s in positives], dtype=torch.float64).div(temperature).softmax(0)
            negatives = [query @ answer for answer, p in zip(answers, persons.tolist(), strict=True) if p != person]
            negatives += [query @ row.double() for p, row in enumerate(rows) if p != person]
            hardest = temperature * torch.stack([s / temperature for s in negatives]).logsumexp(0)
            total = total + (margin - sum(w * s for w, s in zip(weights, positives, strict=True)) + hardest).clamp(
                min=0
            )
    return total


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(6, 5, generator=generator) for _ in range(2)]
    rows = [unit(torch.randn(4, 5, generator=generator)) for _ in range(2)]
    return features, torch.tensor([0, 2, 0, 3, 2, 2]), rows


def test_the_loss_with_negatives_from_the_memory_is_that_of_a_loop(batch):
    features, persons, rows = batch
    ours, reference = ([each.clone().requires_grad_() for each in features] for _ in range(2))
    loss = memory_triplet_alignment_loss(*ours, persons, *rows, 0.05, 0.3)
    expected = loop_over_triplets(*reference, persons, *rows, 0.05, 0.3)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss > 1
    loss.backward()
    expected.backward()
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    # Without rows it is TAL, and each row can only add to it.
    none = [each[:0] for each in rows]
    assert memory_triplet_alignment_loss(*features, persons, *none).equal(triplet_alignment_loss(*features, persons))
    assert loss > triplet_alignment_loss(*features, persons, 0.05, 0.3)
    with pytest.raises(ValueError, match="margin is -1"):
        memory_triplet_alignment_loss(*features, persons, *rows, margin=-1)


def test_a_batch_of_one_person_still_has_the_negatives_of_the_memory(batch):
    features, persons, rows = batch
    assert triplet_alignment_loss(*features, torch.zeros_like(persons)) == 0
    assert memory_triplet_alignment_loss(*features, torch.zeros_like(persons), *rows) > 0


def make_objective(tmp_path, **settings):
    args = ECCLTrainingArguments(output_dir=str(tmp_path), **settings)
    pairs = SimpleNamespace(num_persons=4, person_labels=torch.tensor([0, 1, 2, 3]))
    return ECCLObjective(args, pairs, 5)


def as_pairs(features, persons):
    return PairBatch(*features, torch.tensor(30.0), persons, persons)


def test_the_memory_of_the_negatives_starts_and_follows(batch, tmp_path):
    features, persons, _ = batch
    persons = torch.tensor([0, 2, 0, 3, 1, 2])
    objective = make_objective(tmp_path, losses=["memory_tal=1"])
    objective.start(EncodedTrainingSet(*features, persons, persons))
    memory = objective.memory_tal.memory
    torch.testing.assert_close(memory.text_rows[3], unit(features[1][3:4])[0])
    rows = memory.image_rows.clone(), memory.text_rows.clone()
    total, parts = objective(as_pairs(features, persons))
    assert total.equal(memory_triplet_alignment_loss(*features, persons, *rows)) and list(parts) == ["memory_tal_loss"]
    objective.update(as_pairs([each.flip(0) for each in features], persons))
    assert not torch.equal(memory.image_rows, rows[0])


def test_learned_weights_follow_the_uncertainty(batch, tmp_path):
    features, persons, _ = batch
    losses = ["tal=0.5", "sdm=2"]
    plain, _ = make_objective(tmp_path, losses=losses)(as_pairs(features, persons))
    objective = make_objective(tmp_path, losses=losses, learned_loss_weights=True)
    total, parts = objective(as_pairs(features, persons))
    # All factors start at 1.
    assert total.item() == pytest.approx(plain.item())
    with torch.no_grad():
        objective.log_variances.copy_(torch.tensor([0.7, -0.4]))
    total, parts = objective(as_pairs(features, persons))
    expected = 0.5 * math.exp(-0.7) * parts["tal_loss"] + 0.7 + 2 * math.exp(0.4) * parts["sdm_loss"] - 0.4
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    expected = torch.tensor([1 - 0.5 * math.exp(-0.7) * parts["tal_loss"], 1 - 2 * math.exp(0.4) * parts["sdm_loss"]])
    torch.testing.assert_close(objective.log_variances.grad, expected)


def test_the_temperature_of_infonce_replaces_the_scale_of_the_model(batch, tmp_path):
    features, persons, _ = batch
    own = make_objective(tmp_path, losses=["contrastive=1"])
    fixed = make_objective(tmp_path, losses=["contrastive=1"], contrastive_temperature=0.04)
    assert own.contrastive.trains_logit_scale and not fixed.contrastive.trains_logit_scale
    for objective, scale in ((own, 30.0), (fixed, 25.0)):
        total, _ = objective(as_pairs(features, persons))
        torch.testing.assert_close(total, image_text_contrastive_loss(*features, scale))


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
    torch.testing.assert_close(memory.image_rows, unit(sums), rtol=1e-4, atol=1e-5)
    usual = make_trainer(backbone, benchmark, tmp_path)
    usual.start_objective()
    assert not torch.allclose(usual.objective.identity_memory.memory.image_rows, memory.image_rows, atol=1e-3)


def test_learned_weights_are_trained_and_saved(backbone, benchmark, tmp_path):
    changes = {"learned_loss_weights": True, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(backbone, benchmark, tmp_path, **changes)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "objective.safetensors")["log_variances"]
    assert saved.shape == (3,) and saved.abs().min() > 0
    assert saved.equal(trainer.objective.log_variances.detach().cpu())


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
    features, persons, _ = batch
    tokens = torch.ones(6, 2, 5, requires_grad=True)
    pairs = replace(as_pairs([each.requires_grad_() for each in features], persons), image_tokens=tokens)
    found = pairs.detach()
    assert found.image_tokens is None and not found.image_features.requires_grad and pairs.image_tokens is tokens
