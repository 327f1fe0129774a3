"""IRRA's objective: masked captions, the interaction encoder, and learning rates by parameter name."""

import itertools
import random

import datasets
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, CLIPTokenizer

from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor
from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.interaction import CaptionMasker, InteractionEncoder, MaskedStream, mask_tokens
from eccl.training.objective import ECCLObjective
from eccl.training.pairs import CaptionPairs, PairDraw
from eccl.training.parameter_groups import ParameterKind, find_base_rates
from eccl.training.trainer import OBJECTIVE_FILE
from helpers import ROOT, clip_tokenizer, make_trainer, run, train_eccl

LOSSES = {"sdm": 1, "identity_classification": 1, "masked_language_modelling": 1}
FACTORS = {"cross": 5, "bias": 2, "classifier": 5, "mlm_head": 5}
VOCABULARY = 60
MASK, START, END = 57, 58, 59


def test_words_are_masked_with_the_published_shares():
    """100,000 words: each share lies within five standard deviations of its binomial distribution."""
    rng, words = random.Random(0), [START, *range(1, 51), END]
    masked, random_words, kept, total = 0, 0, 0, 0
    for _ in range(2000):
        ids, labels = mask_tokens(words, rng, VOCABULARY)
        for word, new, label in zip(words, ids, labels, strict=True):
            total += word < MASK
            masked += bool(label) and new == MASK
            random_words += bool(label) and new not in (MASK, word)
            kept += bool(label) and new == word
    chosen = masked + random_words + kept

    def deviates(count, trials, share):
        return abs(count - trials * share) > 5 * (trials * share * (1 - share)) ** 0.5

    assert total == 100_000 and not deviates(chosen, total, 0.15)
    # One of the 56 random words is the word itself.
    for count, share in ((masked, 0.8), (random_words, 0.1 * 55 / 56), (kept, 0.1 + 0.1 / 56)):
        assert not deviates(count, chosen, share), share


@settings(deadline=None)
@given(
    words=st.lists(st.integers(0, MASK), max_size=20),
    padding=st.integers(0, 5),
    probability=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_only_words_are_masked_and_labels_give_them_back(words, padding, probability, seed):
    input_ids = [START, *words, END, *[0] * padding]
    masked, labels = mask_tokens(input_ids, random.Random(seed), VOCABULARY, probability)
    assert (masked, labels) == mask_tokens(input_ids, random.Random(seed), VOCABULARY, probability)
    assert len(masked) == len(labels) == len(input_ids)
    for word, new, label in zip(input_ids, masked, labels, strict=True):
        assert label in (0, word)
        assert new == word if label == 0 else 1 <= new <= MASK
        if word in (0, MASK, START, END):
            assert label == 0
    assert any(labels) == any(0 < word < MASK for word in words)
    if probability == 1:
        assert all(label for word, label in zip(input_ids, labels, strict=True) if 0 < word < MASK)


def test_a_caption_without_a_chosen_word_has_its_first_word_masked():
    masked, labels = mask_tokens([START, MASK, 8, 9, END], random.Random(0), VOCABULARY, 0.0)
    assert masked == [START, MASK, MASK, 9, END] and labels == [0, 0, 8, 0, 0]


def test_a_masked_item_depends_on_seed_pair_and_draw_alone(backbone, benchmark):
    processor = ECCLProcessor(ECCLImageProcessor(), CLIPTokenizer.from_pretrained(backbone), max_text_length=30)
    dataset = datasets.load_dataset("cuhk_pedes", data_dir=str(benchmark), split="train")

    def items(seed):
        pairs = CaptionPairs(dataset, processor, seed=seed)
        args = ECCLTrainingArguments(output_dir="unused", losses={"masked_language_modelling": 1})
        wrapped = ECCLObjective(args, pairs, 16).wrap_pairs(pairs)
        assert len(wrapped) == len(pairs)
        return [wrapped[PairDraw(pair, draw)] for pair, draw in ((5, 0), (5, 1), (2, 0), (5, 0))]

    first, again, later = items(0), items(0), items(1)
    for one, other in zip(first, again, strict=True):
        assert one["masked_input_ids"].equal(other["masked_input_ids"])
    assert first[0]["masked_labels"].equal(first[3]["masked_labels"])
    assert not first[0]["masked_input_ids"].equal(first[1]["masked_input_ids"])
    assert any(not one["masked_labels"].equal(other["masked_labels"]) for one, other in zip(first, later, strict=True))
    for item in first:
        masked, labels = item["masked_input_ids"], item["masked_labels"]
        assert masked.shape == labels.shape == (30,) and masked.dtype == labels.dtype == torch.int64
        caption = torch.tensor(processor(text=item["caption"])["input_ids"])
        restored = masked.where(labels == 0, labels)
        assert restored[: len(caption)].equal(caption) and not restored[len(caption) :].any()


def test_a_stream_is_masked_as_it_is_read():
    processor = ECCLProcessor(ECCLImageProcessor(), clip_tokenizer())
    stream = ({"caption": "a man in a red coat", "seed": f"0/{epoch}/1"} for epoch in itertools.count())
    items = list(itertools.islice(MaskedStream(stream, CaptionMasker(processor, 0.5)), 20))
    assert len({tuple(item["masked_input_ids"].tolist()) for item in items}) > 5
    masks = {int(token) for item in items for token in item["masked_input_ids"] if 49400 < token < 49406}
    assert masks == {49405}


def test_a_vocabulary_of_another_kind_is_refused():
    class Tokenizer:
        bos_token_id, eos_token_id = 0, 2

        def __len__(self):
            return 60

    class Processor:
        tokenizer = Tokenizer()

    with pytest.raises(ValueError, match=r"start and end tokens are 0 and 2; .* ends with them, .*: 58 and 59"):
        CaptionMasker(Processor(), 0.15)


def test_the_heads_start_as_the_published_ones():
    torch.manual_seed(0)
    encoder = InteractionEncoder(128, 3, 500)
    parameters = dict(encoder.named_parameters())
    inner, narrow, wide = 128**-0.5, 128**-0.5 * 6**-0.5, 256**-0.5
    expected = {"cross_attn.in_proj_weight": inner, "cross_attn.out_proj.weight": narrow, "mlm_head.dense.weight": wide}
    expected |= {"mlm_head.fc.weight": narrow}
    for block in range(3):
        name = f"cross_modal_transformer.resblocks.{block}"
        expected |= {f"{name}.attn.in_proj_weight": inner, f"{name}.attn.out_proj.weight": narrow}
        expected |= {f"{name}.mlp.c_fc.weight": wide, f"{name}.mlp.c_proj.weight": narrow}
    for name, deviation in expected.items():
        assert parameters[name].std().item() == pytest.approx(deviation, rel=0.03), name
    matrices = {name for name, value in parameters.items() if value.ndim == 2}
    assert matrices == expected.keys() and encoder.cross_attn.num_heads == 2
    with pytest.raises(ValueError, match="projection_dim is 200, masked_language_modelling needs a multiple of 3"):
        InteractionEncoder(200, 1, 500)


def test_a_missing_place_of_a_text_loses_its_label(backbone, benchmark, tmp_path):
    """With prompts, a model can return fewer text tokens than it got."""
    trainer = make_trainer(backbone, benchmark, tmp_path, losses=LOSSES, interaction_depth=1)
    batch = next(iter(trainer.get_train_dataloader()))
    term, seen = trainer.objective.masked_language_modelling, []
    term.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    trainer.compute_loss(trainer.model, batch)
    (pairs,) = seen
    length = trainer.processing_class.max_text_length
    assert pairs.masked_text_tokens.shape == (4, length, 16) and pairs.image_tokens.shape == (4, 1 + 8, 16)
    # The class token is the feature of the image.
    torch.testing.assert_close(pairs.image_tokens[:, 0], pairs.image_features)
    short = type(pairs)(**{**vars(pairs), "masked_text_tokens": pairs.masked_text_tokens[:, :5]})
    assert term(short)["loss"].isfinite()
    nothing = type(pairs)(**{**vars(pairs), "extra": {"masked_labels": torch.zeros(4, length, dtype=torch.long)}})
    assert term(nothing)["loss"].item() == 0


def test_a_run_resumes_bit_for_bit_and_its_model_has_no_heads(backbone, benchmark, tmp_path):
    settings = {"losses": LOSSES, "interaction_depth": 2, "logging_steps": 1, "no_weight_decay": ["bias"]}
    settings["learning_rate_factors"] = FACTORS
    saving = {"save_strategy": "epoch", "save_total_limit": None}
    whole = make_trainer(backbone, benchmark, tmp_path / "whole", **saving, **settings)
    whole.train()
    state = safetensors.torch.load_file(tmp_path / "whole" / "checkpoint-4" / OBJECTIVE_FILE)
    term = "masked_language_modelling."
    assert {"cross_attn.in_proj_weight", "ln_pre_i.bias", "mlm_head.fc.weight"} <= {
        name.removeprefix(term) for name in state
    }
    resumed = make_trainer(backbone, benchmark, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for ours, theirs in ((resumed.model, whole.model), (resumed.objective, whole.objective)):
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert not state[f"{term}mlm_head.fc.weight"].equal(whole.objective.state_dict()[f"{term}mlm_head.fc.weight"])
    whole.save_model(tmp_path / "final")
    names = safetensors.torch.load_file(tmp_path / "final" / "model.safetensors")
    assert not [name for name in names if "mlm" in name or "cross" in name or "classifier" in name]


def test_the_recipe_has_the_published_settings_and_trains(backbone, benchmark, tmp_path):
    recipe = ROOT / "recipes" / "baselines" / "irra.yaml"
    _, _, args = train_eccl.parse_arguments([str(recipe), "--output_dir", str(tmp_path)])
    assert (args.tune, args.loss_weights) == ("full", dict.fromkeys(LOSSES, 1.0))
    assert (args.per_device_train_batch_size, args.sdm_temperature, args.interaction_depth) == (64, 0.02, 4)
    assert args.rate_factors == FACTORS and list(args.rate_factors) == list(FACTORS)
    assert (args.no_weight_decay, args.learning_rate, args.adam_epsilon) == (["bias"], 1e-5, 1e-3)
    run(
        f"{recipe} --dataset_name cuhk_pedes --init_from {backbone} --image_size 32 16 --max_steps 2",
        "--per_device_train_batch_size 4 --interaction_depth 1", data_dir=benchmark, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).prompt_learner is None


def groups_of(trainer):
    """The rate, the decay and the names of each group of the optimiser."""
    names = {id(value): name for name, value in trainer._trained_parameters(trainer.model)}
    return [
        (group["lr"], group["weight_decay"], [names[id(value)] for value in group["params"]])
        for group in trainer.create_optimizer().param_groups
    ]


def test_without_factors_there_are_the_two_groups_of_earlier_versions(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, losses=LOSSES)
    named = [name for name, _ in trainer._trained_parameters(trainer.model)]
    lora, others = groups_of(trainer)
    assert lora == (1e-4, 4e-5, [name for name in named if "lora_" in name])
    assert others == (1e-3, 4e-5, [name for name in named if "lora_" not in name])
    options = {"params", "lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable"}
    assert set(trainer.optimizer.param_groups[0]) <= options | {"differentiable", "fused", "decoupled_weight_decay"}


def test_the_last_text_that_fits_a_name_gives_its_factor(backbone, benchmark, tmp_path):
    trainer = make_trainer(
        backbone, benchmark, tmp_path, losses=LOSSES, learning_rate_factors=[*["cross=5", "bias=2"], "lora_B=16"],
        no_weight_decay=["bias"], logging_steps=1,
    )  # fmt: skip
    found = groups_of(trainer)
    rates = {name: (rate, decay) for rate, decay, names in found for name in names}
    assert len(rates) == sum(len(names) for *_, names in found) == len(trainer._trained_parameters(trainer.model))
    for name, (rate, decay) in rates.items():
        factor = 2 if "bias" in name else 5 if "cross" in name else 16 if "lora_B" in name else 1
        assert rate == pytest.approx(factor * (1e-4 if "lora_" in name else 1e-3)), name
        assert decay == (0 if "bias" in name else 4e-5), name
    assert ["lora_" in names[0] for *_, names in found] == [True, True, False, False, False]
    trainer.train()
    # The log has the rates without factors.
    first = trainer.state.log_history[0]
    assert (first["learning_rate"], first["lora_learning_rate"]) == pytest.approx((1e-4, 1e-5))


def test_an_optimiser_that_is_given_keeps_its_groups(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, losses={"tal": 1}, max_steps=1, logging_steps=1)
    trained = [value for _, value in trainer._trained_parameters(trainer.model)]
    trainer.optimizer = torch.optim.SGD(trained, lr=0.5)
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(0.05)


def test_base_rates_are_those_without_a_factor():
    kinds = [ParameterKind(True, 16.0), ParameterKind(False, 5.0), ParameterKind(False), ParameterKind(False, 0.0)]
    assert find_base_rates(kinds, [1.6, 0.5, 0.1, 0.0]) == [pytest.approx(0.1), 0.1]
    assert find_base_rates(kinds[1:2], [0.5]) == [pytest.approx(0.1)]
    assert find_base_rates(kinds[3:], [0.0]) == [0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate_factors": {"crossing": 5}}, "learning_rate_factors: no trained parameter has 'crossing'"),
        # Frozen parameters do not count.
        ({"no_weight_decay": ["embeddings"]}, "no_weight_decay: no trained parameter has 'embeddings' in its name"),
    ],
)
def test_a_text_without_a_parameter_is_named_before_training(backbone, benchmark, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(backbone, benchmark, tmp_path, losses=LOSSES, **changes)
