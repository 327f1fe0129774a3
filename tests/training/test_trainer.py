import dataclasses
import importlib
import inspect
import json
import math
import re
from collections import Counter

import datasets
import pytest
import safetensors.torch
import torch
import yaml
from peft import PeftModel
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, CLIPTokenizer, Trainer, TrainingArguments

from eccl.dataset_scripts.sources import choose_splits
from eccl.eval.benchmarks.training import peak_of_a_step
from eccl.hub.adapter import load_adapter
from eccl.hub.run_folder import TRAINING_LOG
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLImageProcessor, ECCLProcessor
from eccl.training.arguments import ECCLTrainingArguments
from eccl.training.objective import LOSS_TERMS, ECCLObjective, EncodedTrainingSet, PairBatch
from eccl.training.pairs import CaptionPairs
from eccl.training.trainer import OBJECTIVE_FILE, ECCLTrainer
from eccl.utils.shipped import TRAINING_HELP
from helpers import ROOT, TINY_SHAPE, clip_tokenizer, make_trainer, run, train_eccl


def tune(backbone, data_dir, output_dir, *words):
    run(
        f"--dataset_name cuhk_pedes --init_from {backbone} --prompt_depth 2 --per_device_train_batch_size 4",
        "--num_train_epochs 2 --warmup_epochs 1 --logging_steps 1", *words, data_dir=data_dir, output_dir=output_dir,
    )  # fmt: skip


def test_a_folder_made_by_hand_trains_for_two_steps(make_raw, backbone, tmp_path, capsys):
    root, _ = make_raw()
    tune(backbone, root, tmp_path / "out", "--max_steps 2")
    printed = capsys.readouterr().out
    assert "3 persons, 4 images, 8 pairs" in printed and "evaluating on cuhk_pedes val: 1 images" in printed
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_set_with_a_train_split_alone_trains_without_evaluation(make_raw, backbone, tmp_path, capsys):
    root, records = make_raw()
    for record in records:
        record["split"] = "train"
    (root / "reid_raw.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="has no test split, only train"):
        tune(backbone, root, tmp_path / "out", "--max_steps 1 --eval_split test")
    # Without an evaluation there is no best model to load.
    tune(backbone, root, tmp_path / "out", "--max_steps 1 --eval_strategy no")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "evaluating on" not in capsys.readouterr().out


def test_it_starts_from_a_clip_of_transformers(backbone, benchmark, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained(backbone)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = TINY_SHAPE["text_config"] | {"vocab_size": len(tokenizer)} | special
    vision = TINY_SHAPE["vision_config"] | {"image_size": 32}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    tune(tmp_path / "clip", benchmark, tmp_path / "out", "--image_size 48 16 --max_steps 2")
    trained = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert trained.config.vision_config.image_size == [48, 16] and trained.config.num_prompt_tokens == 4


def test_a_base_in_bfloat16_trains_and_leaves_a_float32_model(backbone, benchmark, tmp_path, capsys):
    tune(backbone, benchmark, tmp_path / "out", "--base_dtype bfloat16")
    assert "- base_dtype: bfloat16" in (tmp_path / "out" / "README.md").read_text()
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    # The weights of the base are rounded; the product of LoRA, which is far smaller, is not.
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    rounded = safetensors.torch.load_file(backbone / "model.safetensors")[name].bfloat16().float()
    adapter = safetensors.torch.load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    down, up = (adapter[f"base_model.model.{name.removesuffix('weight')}lora_{matrix}.weight"] for matrix in ("A", "B"))
    assert 0 < (up @ down).abs().max() < 1e-3
    torch.testing.assert_close(weights[name], rounded + up @ down, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="base_dtype is bfloat16, but with tune full no weight is frozen"):
        tune(backbone, benchmark, tmp_path / "full", "--base_dtype bfloat16 --tune full")


def test_pretraining_leaves_a_plain_model_without_its_heads(backbone):
    model = AutoModel.from_pretrained(backbone, trust_remote_code=True)
    assert model.prompt_learner is None
    assert not any("attribute" in name for name in safetensors.torch.load_file(backbone / "model.safetensors"))


def test_the_result_loads_anywhere_and_equals_backbone_plus_adapter(backbone, benchmark, tmp_path):
    tune(backbone, benchmark, tmp_path / "out")
    merged = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    base = ECCLModel.from_clip(str(backbone), image_size=(32, 16), num_prompt_tokens=4, prompt_depth=2)
    rows = datasets.load_dataset("cuhk_pedes", data_dir=str(benchmark), split="test")
    inputs = processor(images=rows[0]["image"], text=rows[0]["captions"], return_tensors="pt")
    untrained = base(**inputs).text_embeds
    # The adapter names its base; another name, or a loaded model, can be given.
    for given in (None, base, str(backbone)):
        attached = load_adapter(tmp_path / "out" / "adapter", given).eval()
        with torch.no_grad():
            ours, theirs = merged(**inputs), attached(**inputs)
        torch.testing.assert_close(ours.text_embeds, theirs.text_embeds, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.image_embeds, theirs.image_embeds, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours.text_embeds, untrained)


def test_only_prompts_maps_and_lora_change(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    expected = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert changed == expected


def test_groups_have_their_rates_stepped_per_epoch(backbone, benchmark, tmp_path):
    trainer = make_trainer(
        backbone, benchmark, tmp_path, num_train_epochs=6, warmup_epochs=2, logging_steps=1, lora_learning_rate=3e-4
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 6 * 4
    factors = [0.1, 0.55] + [0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    # The logged rate is the rate with which the step was taken.
    expected = [factors[step // 4] for step in range(24)]
    assert [entry["learning_rate"] for entry in logs] == pytest.approx([1e-3 * factor for factor in expected])
    assert [entry["lora_learning_rate"] for entry in logs] == pytest.approx([3e-4 * factor for factor in expected])


def test_the_parts_make_the_total(backbone, benchmark, tmp_path):
    trainer = make_trainer(
        backbone, benchmark, tmp_path, logging_steps=1, losses=["tal=1", "identity_memory=1", "instance_memory=0.3"]
    )
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        total = (
            entry["tal_loss"]
            + entry["identity_memory_loss_i2t"]
            + entry["identity_memory_loss_t2i"]
            + 0.3 * (entry["instance_memory_loss_i2t"] + entry["instance_memory_loss_t2i"])
        )
        assert entry["loss"] == pytest.approx(total, rel=1e-3)


def test_the_memories_start_from_one_pass_over_the_training_set(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path)
    trainer.start_objective()
    model, processor, rows = trainer.model.eval(), trainer.processing_class, trainer.pairs.dataset
    person = rows["person_id"][0]
    images, texts = [], []
    with torch.no_grad():
        for row in rows:
            if row["person_id"] == person:
                inputs = processor(images=row["image"], text=row["captions"], return_tensors="pt")
                output = model(**inputs)
                images += [output.image_embeds[0]] * len(row["captions"])
                texts += list(output.text_embeds)
    memory = trainer.objective.identity_memory.memory
    for stored, own in ((memory.image_rows, images), (memory.text_rows, texts)):
        mean = torch.stack(own).mean(0)
        torch.testing.assert_close(stored[0], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert len(trainer.objective.instance_memory.memory.image_rows) == len(rows)


def test_the_memories_are_written_after_each_step(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, max_steps=1)
    trainer.start_objective()
    start = trainer.objective.identity_memory.memory.image_rows.clone()
    trainer.start_objective = lambda: None
    seen = set()
    update = trainer.objective.update
    trainer.objective.update = lambda batch: seen.update(batch.person_labels.tolist()) or update(batch)
    trainer.train()
    changed = (trainer.objective.identity_memory.memory.image_rows != start).any(dim=1)
    assert set(changed.nonzero()[:, 0].tolist()) == seen


def test_a_resumed_run_ends_where_the_whole_run_ends(backbone, benchmark, tmp_path):
    whole = make_trainer(backbone, benchmark, tmp_path / "whole")
    whole.train()
    make_trainer(backbone, benchmark, tmp_path / "half", save_strategy="epoch", save_total_limit=None).train()
    checkpoint = tmp_path / "half" / "checkpoint-4"
    assert (checkpoint / OBJECTIVE_FILE).is_file()
    resumed = make_trainer(backbone, benchmark, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for ours, theirs in ((resumed.model, whole.model), (resumed.objective, whole.objective)):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name


def test_the_command_resumes_from_the_last_checkpoint(backbone, benchmark, tmp_path, capsys):
    tune(backbone, benchmark, tmp_path / "out", "--max_steps 4 --num_train_epochs 3")
    state = tmp_path / "out" / "checkpoint-4" / "trainer_state.json"
    assert json.loads(state.read_text())["global_step"] == 4
    tune(backbone, benchmark, tmp_path / "out", "--max_steps 8 --resume_from_checkpoint True --save_total_limit 3")
    history = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, 9))


def test_the_log_lies_beside_the_final_model_and_an_overwritten_run_loses_it(
    backbone, benchmark, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    tune(backbone, benchmark, out, "--losses tal=1 instance_memory=0.1 --seed 1")
    history = json.loads((out / TRAINING_LOG).read_text())["log_history"]
    steps = [entry for entry in history if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 9))
    parts = {"tal_loss", "instance_memory_loss_i2t", "instance_memory_loss_t2i"}
    assert all({name for name in entry if name.endswith(("_loss", "_i2t", "_t2i"))} == parts for entry in steps)
    evaluations = [entry for entry in history if "eval_rank1" in entry]
    assert [entry["step"] for entry in evaluations[:2]] == [4, 8]
    assert all({"eval_rank5", "eval_rank10", "eval_mAP", "eval_mINP"} <= entry.keys() for entry in evaluations)
    # The first evaluations are those of the last checkpoint, too; the final one comes after it.
    state = json.loads((out / "checkpoint-8" / "trainer_state.json").read_text())
    assert history[: len(state["log_history"])] == state["log_history"]
    # A run that overwrites this one removes the log at its start, and writes its own at the end.
    seen = []
    training_step = ECCLTrainer.training_step

    def step(*arguments):
        seen.append((out / TRAINING_LOG).exists())
        return training_step(*arguments)

    monkeypatch.setattr(ECCLTrainer, "training_step", step)
    tune(backbone, benchmark, out, "--max_steps 2 --losses sdm=1 --overwrite True")
    assert seen == [False, False]
    history = json.loads((out / TRAINING_LOG).read_text())["log_history"]
    assert [entry["sdm_loss"] > 0 for entry in history if "loss" in entry] == [True, True]


@pytest.mark.parametrize("kind", ["lora", "prompts"])
def test_random_weights_are_not_frozen(kind, benchmark, tmp_path):
    with pytest.raises(ValueError, match=rf"init_from is missing: with tune {kind}, the weights .* give --tune full"):
        run(f"--dataset_name cuhk_pedes --tune {kind}", data_dir=benchmark, output_dir=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_prompts_alone_need_prompts(backbone, benchmark, tmp_path):
    with pytest.raises(ValueError, match=r"has no prompts \(num_prompt_tokens is 0\)"):
        tune(backbone, benchmark, tmp_path / "out", "--tune prompts --num_prompt_tokens 0")


def test_a_recipe_is_read_like_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    # In YAML 1.1, 1e-3 is a text.
    recipe.write_text(
        "learning_rate: 1e-3\nlosses: {tal: 1, identity_memory: 0.5}\nimage_size: [32, 16]\naugment: false\n"
        "eval_split: null\nscratch_config: {projection_dim: 8}\noutput_dir: --out\n"
    )
    _, model, args = train_eccl.parse_arguments([str(recipe)])
    assert args.learning_rate == 1e-3 and args.loss_weights == {"tal": 1.0, "identity_memory": 0.5}
    assert model.image_size == [32, 16] and args.augment is False and args.eval_split is None
    assert json.loads(model.scratch_config) == {"projection_dim": 8} and args.output_dir == "--out"
    words = "--learning_rate 2e-3 --losses tal=2 --image_size 64 32 --eval_split test"
    _, model, args = train_eccl.parse_arguments([str(recipe), *words.split()])
    assert args.learning_rate == 2e-3 and args.loss_weights == {"tal": 2.0} and model.image_size == [64, 32]
    assert args.eval_split == "test" and args.augment is False


def test_flags_override_the_recipe_and_unknown_keys_are_named(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"dataset_name": "rstpreid", "tal_margin": 0.3, "augment": False}))
    data, _, args = train_eccl.parse_arguments([str(recipe), "--tal_margin", "0.4", "--output_dir", str(tmp_path)])
    assert (data.dataset_name, args.tal_margin, args.augment) == ("rstpreid", 0.4, False)
    recipe.write_text("tal_magrin: 0.3")
    with pytest.raises(ValueError, match=r"recipe.yaml: unknown option tal_magrin"):
        train_eccl.parse_arguments([str(recipe)])


def test_a_wrong_choice_in_a_recipe_is_refused_before_the_work(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for name, value in (("save_dtype", "float8"), ("on_bad_image", "ignore"), ("attn_implementation", "fast")):
        recipe.write_text(yaml.safe_dump({name: value}))
        with pytest.raises(ValueError, match=rf"recipe.yaml: {name} is '{value}', it must be one of"):
            train_eccl.parse_arguments([str(recipe)])
    for value in (384, [384], [384, 128, 3]):
        recipe.write_text(yaml.safe_dump({"image_size": value}))
        with pytest.raises(ValueError, match=r"image_size is .*, it must be two whole numbers"):
            train_eccl.parse_arguments([str(recipe)])


def test_a_recipe_alone_is_enough_and_debug_has_two_meanings(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"dataset_name": "rstpreid"}))
    for words, debug in (([], []), (["--debug"], []), (["--debug", "underflow_overflow"], ["underflow_overflow"])):
        data, _, args = train_eccl.parse_arguments([str(recipe), *words])
        assert data.dataset_name == "rstpreid" and [option.value for option in args.debug] == debug
    with pytest.raises(ValueError, match=r"image_size is \[384\], it must be two whole numbers"):
        train_eccl.parse_arguments([str(recipe), "--image_size", "384"])


def test_help_shows_the_options_of_this_project_and_help_all_those_of_transformers(capsys):
    shown = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as raised:
            train_eccl.main([flag])
        assert raised.value.code in (None, 0)
        shown[flag] = capsys.readouterr().out
    options = {flag: set(re.findall(r"^  (--\w+)", text, re.MULTILINE)) for flag, text in shown.items()}
    classes = (train_eccl.DataArguments, train_eccl.ModelArguments)
    assert {f"--{field.name}" for cls in classes for field in dataclasses.fields(cls)} <= options["--help"]
    theirs = {f"--{field.name}" for field in dataclasses.fields(TrainingArguments) if field.init}
    changed = {f"--{name}" for name in vars(ECCLTrainingArguments)["__annotations__"]}
    assert changed - {"--remove_unused_columns", "--ddp_find_unused_parameters"} <= options["--help"]
    assert not {"--adam_beta1", "--fsdp", "--deepspeed"} & options["--help"]
    assert theirs <= options["--help_all"] and options["--help"] < options["--help_all"]
    assert "{lora,prompts,full}" in shown["--help"] and "(default: None)" not in shown["--help_all"]
    # After a change of the options: TRAINING_HELP.write_text(train_eccl.format_help(train_eccl.make_parser(), False))
    assert f"{TRAINING_HELP.read_text()}\n" == shown["--help"]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe, tmp_path):
    _, model, args = train_eccl.parse_arguments([str(recipe), "--output_dir", str(tmp_path)])
    if recipe.stem.startswith("eccl_"):
        assert (args.num_train_epochs, args.adam_epsilon, args.weight_decay, args.lora_rank) == (60, 1e-3, 4e-5, 4)
        assert (model.image_size, args.eval_split) == ([384, 128], "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "some"}, "tune is 'some'"),
        ({"losses": ["tal=-1"]}, "losses: the weight of 'tal' is '-1'"),
        ({"losses": ["tal"]}, "losses: the weight of 'tal' is '', it must be a number of at least 0"),
        ({"losses": ["tal=1", "tal=2"]}, "losses: 'tal' is given twice"),
        ({"losses": {"tal": 1, "triplet": 1}}, "losses: unknown triplet; the known losses are tal, identity_memory"),
        ({"tal_temperature": 0}, "tal_temperature is 0"),
        ({"sdm_temperature": 0}, "sdm_temperature is 0, it must be positive"),
        ({"interaction_depth": 0}, "interaction_depth is 0, it must be at least 1"),
        ({"mask_probability": 0}, "mask_probability is 0, it must be more than 0 and at most 1"),
        ({"mask_probability": math.nan}, "mask_probability is nan"),
        (
            {"losses": ["masked_language_modelling=1"], "embed_chunk_size": 4},
            "embed_chunk_size is 4, but masked_language_modelling needs the tokens of the whole batch",
        ),
        ({"learning_rate_factors": ["bias=fast"]}, "learning_rate_factors: the factor of 'bias' is 'fast'"),
        ({"learning_rate_factors": ["bias=1", "bias=2"]}, "learning_rate_factors: 'bias' is given twice"),
        ({"learning_rate_factors": ["=2"]}, "learning_rate_factors: an entry has no text before its factor"),
        ({"no_weight_decay": "bias"}, "no_weight_decay is 'bias', it must be a list of texts"),
        ({"no_weight_decay": [""]}, r"no_weight_decay is \[''\], it must be a list of texts"),
        ({"losses": {"tal": 0, "contrastive": 0}}, "nothing to train"),
        ({"optim": "sgd"}, "optim is .*sgd"),
        ({"warmup_steps": 10}, "set warmup_epochs"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"embed_chunk_size": 0}, "embed_chunk_size is 0, it must be at least 1"),
        ({"fp16": True}, "fp16 needs an accelerator"),
        (
            {"label_smoothing_factor": 0.1},
            "label_smoothing_factor is 0.1: it would do nothing",
        ),
        ({"optim_args": "foreach=True"}, "optim_args is 'foreach=True'"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'sequential'"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "lr_scheduler_kwargs is {'power': 2}"),
        ({"bf16_full_eval": True}, "bf16_full_eval and fp16_full_eval must be False"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size must be False"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint must be False"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches must be off"),
    ],
)
def test_bad_arguments_are_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ECCLTrainingArguments(output_dir=str(tmp_path), **changes)


def test_wrong_data_is_refused_before_anything_is_trained(benchmark, tmp_path):
    for words, message in (
        ("--dataset_name market", "dataset_name is 'market', it must be one of cuhk_pedes, .*, a file, a folder"),
        ("--dataset_name cuhk_pedes --eval_split query", "has no query split, only train, val, test"),
    ):
        with pytest.raises(ValueError, match=message):
            run(words, data_dir=benchmark, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_peft_wraps_what_the_trainer_saves(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path)
    assert isinstance(trainer.model, PeftModel)


def test_identity_batches_train_with_as_many_steps_as_they_make(backbone, benchmark, tmp_path):
    changes = {"per_device_train_batch_size": 6, "dataloader_drop_last": True}
    trainer = make_trainer(backbone, benchmark, tmp_path, sampler="identity", pairs_per_person=3, **changes)
    seen = []
    collate = trainer.data_collator
    trainer.data_collator = lambda items: seen.append([item["person_label"] for item in items]) or collate(items)
    trainer.train()
    # 16 pairs make three whole batches of six: no batch is dropped.
    assert trainer.state.global_step == len(seen) == 2 * 3
    assert all(sorted(Counter(labels).values()) == [3, 3] for labels in seen)
    # The schedule counts the epochs of this sampler.
    assert trainer.lr_scheduler.get_last_lr()[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "balanced"}, "sampler is 'balanced', it must be random or identity"),
        ({"sampler": "identity", "pairs_per_person": 3}, "pairs_per_person is 3, it must divide the 4 pairs"),
        ({"sampler": "identity", "pairs_per_person": 0}, "pairs_per_person is 0"),
    ],
)
def test_a_sampler_that_cannot_be_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ECCLTrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4, **changes)


def test_a_batch_with_more_persons_than_there_are_is_refused_before_anything_is_encoded(backbone, benchmark, tmp_path):
    with pytest.raises(ValueError, match=r"a batch of 64 pairs with pairs_per_person 2 needs 32 persons, .* has 4"):
        make_trainer(backbone, benchmark, tmp_path, sampler="identity", per_device_train_batch_size=64)


def test_the_split_to_evaluate_on_goes_by_either_name(benchmark):
    source = train_eccl.DataArguments(dataset_name="cuhk_pedes", data_dir=str(benchmark)).make_source()
    for name in ("val", "validation", None):
        splits = choose_splits(source, eval_split=name)
        assert splits.eval_split == "val" and len(splits.evaluation) == 4


def test_save_model_gives_what_anyone_loads_and_training_goes_on(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.save_model(tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "pipeline_eccl.py"} <= names
    assert "adapter_model.safetensors" not in names
    merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    pixels = torch.randn(2, 3, 32, 16)
    with torch.no_grad():
        ours = trainer.model.eval().get_image_features(pixels).pooler_output
        torch.testing.assert_close(merged.get_image_features(pixels).pooler_output, ours, rtol=1e-4, atol=1e-5)
    assert isinstance(trainer.model, PeftModel)
    trainer.train()


def test_the_card_of_a_run_says_what_it_was(backbone, benchmark, tmp_path):
    tune(backbone, benchmark, tmp_path / "out", "--seed 11 --eval_split test")
    for folder in ("out", "out/adapter"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "- Data: cuhk_pedes train: 4 ids, 8 images, 16 captions" in card and "- seed: 11" in card
        assert "On cuhk_pedes, split test: 8 queries, 4 in the gallery" in card
        assert "- Chosen: the evaluation with the best rank1 on test, the split that is scored below" in card
        assert (
            "cannot be compared with the published ones: test has 2 ids, 4 images, 8 captions; published: 1,000 ids"
            in card
        )
        assert "| ECCL (published)" in card and str(tmp_path) not in card
    figures = [line for line in card.splitlines() if "out, measured" in line]
    state = json.loads(next((tmp_path / "out").glob("checkpoint-*/trainer_state.json")).read_text())
    best = max(entry["eval_rank1"] for entry in state["log_history"] if "eval_rank1" in entry)
    assert float(figures[0].split("|")[2]) == pytest.approx(best, abs=0.01)


def test_the_last_step_is_not_evaluated_twice(backbone, benchmark, tmp_path, monkeypatch):
    every_two = {"num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(backbone, benchmark, tmp_path / "one", **every_two)
    trainer.train()
    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate", lambda: pytest.fail("the model was evaluated before"))
        figures = trainer.evaluate_result()
    assert figures == trainer.evaluate()
    other = make_trainer(backbone, benchmark, tmp_path / "two", **every_two | {"eval_strategy": "no"})
    other.train()
    assert not any("eval_rank1" in entry for entry in other.state.log_history)
    assert other.evaluate_result() == figures


def test_publishing_needs_a_name_and_happens_once_at_the_end(backbone, benchmark, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="push_to_hub needs hub_model_id"):
        tune(backbone, benchmark, tmp_path / "out", "--max_steps 1 --push_to_hub True")
    push = "--max_steps 1 --push_to_hub True --hub_model_id me/x"
    # Offline mode, and a public repository, are recognised before the work.
    with pytest.raises(ConnectionError, match="me/x could not be published: offline mode is set"):
        tune(backbone, benchmark, tmp_path / "out", push)
    assert not (tmp_path / "out").exists()
    calls = []
    monkeypatch.setattr(train_eccl, "require_publishable", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(train_eccl, "publish", lambda *arguments: calls.append(arguments) or "me/x")
    tune(backbone, benchmark, tmp_path / "out", push)
    assert calls == [("me/x", "model", False), (str(tmp_path / "out"), "me/x", False)]
    assert "published: me/x" in capsys.readouterr().out
    tune(backbone, benchmark, tmp_path / "public", f"{push} --public True")
    assert calls[2:] == [("me/x", "model", True), (str(tmp_path / "public"), "me/x", True)]
    for words, message in (
        ("--public True", "public only applies"),
        (f"{push} --hub_private_repo False", "set public"),
    ):
        with pytest.raises(ValueError, match=message):
            tune(backbone, benchmark, tmp_path / "none", words)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 100])
def test_a_batch_in_chunks_has_the_gradients_of_the_whole(backbone, benchmark, tmp_path, chunk_size):
    gradients = []
    for embed_chunk_size in (None, chunk_size):
        trainer = make_trainer(
            backbone, benchmark, tmp_path, per_device_train_batch_size=7, embed_chunk_size=embed_chunk_size
        )
        trainer.start_objective()
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer.training_step(trainer.model, next(iter(trainer.get_train_dataloader())))
        parameters = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
        gradients.append({"loss": loss, **{name: value.grad for name, value in parameters.items()}})
    whole, chunked = gradients
    for name, value in whole.items():
        assert (chunked[name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.slow
def test_a_batch_in_chunks_trains_in_the_memory_of_one_of_them(monkeypatch):
    """ViT-B/16: each peak is measured in its own process, which returns freed memory at once."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    chunk, whole, in_chunks = (peak_of_a_step(*sizes)[0] for sizes in ((4, None), (16, None), (16, 4)))
    assert whole > 1.7 * chunk
    assert in_chunks < 1.1 * chunk


def test_accumulated_batches_are_one_where_the_loss_is_a_mean_over_items(backbone, benchmark, tmp_path):
    """Accumulation as transformers does it; the triplet loss is a sum over the pairs of a batch, and is left out."""
    ends = []
    for batch_size, steps in ((8, 1), (4, 2)):
        trainer = make_trainer(
            backbone, benchmark, tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=steps,
            num_train_epochs=3, losses={"identity_memory": 1, "instance_memory": 0.1}, augment=False,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == 6
        ends.append({**dict(trainer.model.named_parameters()), **trainer.objective.state_dict()})
    for name, value in ends[0].items():
        assert (ends[1][name] - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_bfloat16_is_for_the_encoders_alone(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, bf16=True, max_steps=2)
    seen = []
    encoder = trainer.model.base_model.model.vision_model.encoder.layers[1]
    encoder.mlp.fc1.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    trainer.start_objective()
    assert set(seen) == {torch.float32}
    seen.clear()
    trainer.start_objective = lambda: None
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in trainer.objective.state_dict().values()} == {torch.float32, torch.int64}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_the_objective_is_in_float32_under_autocast(benchmark, tmp_path):
    losses = {name: 1.0 for name in LOSS_TERMS}
    args = ECCLTrainingArguments(
        output_dir=str(tmp_path), losses=losses, eval_strategy="no", save_strategy="no", load_best_model_at_end=False
    )
    dataset = datasets.load_dataset("synthetic_pedes", data_dir=str(benchmark), split="train")
    pairs = CaptionPairs(dataset, ECCLProcessor(ECCLImageProcessor(), clip_tokenizer()))
    objective = ECCLObjective(args, pairs, 8)
    start = torch.randn(2, 16, 8)
    labels, image_of_pair = pairs.person_labels[pairs.image_of_pair], pairs.image_of_pair
    objective.start(EncodedTrainingSet(*start, labels, image_of_pair))
    image, text = torch.randn(2, 5, 8).bfloat16()
    attributes = torch.zeros(5, 2, len(objective.attribute.num_values), dtype=torch.long)
    extra = {"attribute_labels": attributes, "masked_labels": torch.tensor([[0, 9, 0, 7]] * 5)}
    shared = (torch.tensor(50.0), labels[:5], image_of_pair[:5], extra)
    tokens = torch.randn(2, 5, 4, 8).bfloat16()
    total, parts = objective(PairBatch(image.float(), text.float(), *shared, *tokens.float()))
    assert len(parts) == 13
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, other_parts = objective(PairBatch(image, text, *shared, *tokens))
    assert under_autocast.dtype == torch.float32 and under_autocast.equal(total)
    assert all(value.equal(other_parts[name]) for name, value in parts.items())
    weighted = ECCLObjective(ECCLTrainingArguments(output_dir=str(tmp_path), losses={"tal": 2, "sdm": 0.5}), pairs, 8)
    expected = 2 * parts["tal_loss"] + 0.5 * parts["sdm_loss"]
    torch.testing.assert_close(weighted(PairBatch(image, text, *shared))[0], expected)


@pytest.mark.parametrize(
    "losses",
    [
        "sdm=1",
        "cmpm=0.1 tal=1",
        "identity_classification=1 contrastive=0.5",
        "cmpm=1 projection_classification=1",
        "masked_language_modelling=1",
    ],
)
def test_every_loss_trains_and_resumes_by_its_name(backbone, benchmark, tmp_path, losses):
    settings = {"losses": losses.split(), "logging_steps": 1}
    saving = {"save_strategy": "epoch", "save_total_limit": None}
    whole = make_trainer(backbone, benchmark, tmp_path / "whole", **saving, **settings)
    whole.train()
    first = whole.state.log_history[0]
    assert {f"{entry.partition('=')[0]}_loss" for entry in losses.split()} <= first.keys()
    resumed = make_trainer(backbone, benchmark, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for ours, theirs in ((resumed.model, whole.model), (resumed.objective, whole.objective)):
        assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_the_new_loss_of_the_documentation_trains(backbone, benchmark, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "your_own.md").read_text()
    example = re.search(r"## A new loss.*?```python\n(.*?)```", page, re.DOTALL)[1]
    assert len(example.splitlines()) <= 16
    (tmp_path / "new_loss.py").write_text(example)
    monkeypatch.setitem(LOSS_TERMS, "cosine", None)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("new_loss")
    losses = {"tal": 1, "cosine": 0.5}
    trainer = make_trainer(backbone, benchmark, tmp_path / "out", losses=losses, max_steps=2, logging_steps=1)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        assert 0 < entry["cosine_loss"] < 2
        assert entry["loss"] == pytest.approx(entry["tal_loss"] + 0.5 * entry["cosine_loss"], rel=1e-3)


def test_a_checkpoint_of_other_losses_is_refused(backbone, benchmark, tmp_path):
    make_trainer(backbone, benchmark, tmp_path / "first", save_strategy="epoch", save_total_limit=None).train()
    other = make_trainer(backbone, benchmark, tmp_path / "other", losses={"tal": 1})
    with pytest.raises(ValueError, match=r"objective.safetensors has the tensors identity_memory.* resume with"):
        other.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))


def test_each_overridden_method_exists_in_transformers_with_its_parameters():
    own = {name: value for name, value in vars(ECCLTrainer).items() if inspect.isfunction(value)}
    overridden = {name for name in own if hasattr(Trainer, name)} - {"__init__"}
    assert {name for name in overridden if name.startswith("_")} == {"_save_checkpoint", "_determine_best_metric"}
    assert overridden >= {"get_train_dataloader", "create_optimizer", "create_scheduler", "train", "get_batch_samples"}
    assert overridden >= {"compute_loss", "training_step", "log", "evaluate", "save_model"}
    for name in overridden:
        theirs = inspect.signature(getattr(Trainer, name)).parameters
        ours = inspect.signature(own[name]).parameters
        takes_anything = any(value.kind in (value.VAR_KEYWORD, value.VAR_POSITIONAL) for value in ours.values())
        assert takes_anything or list(ours) == list(theirs), name
    # The private names of transformers that the trainer reads or calls.
    assert "self._created_lr_scheduler" in inspect.getsource(Trainer.create_scheduler)
    assert list(inspect.signature(Trainer._get_output_dir).parameters) == ["self", "trial"]


def test_the_arguments_that_were_given_are_not_changed(backbone, benchmark, tmp_path):
    trainer = make_trainer(backbone, benchmark, tmp_path, save_strategy="epoch", save_total_limit=3, eval_on_start=True)
    assert trainer.given_args.save_total_limit == 3 and trainer.given_args.eval_on_start
    trainer.train()
    assert trainer.given_args.save_total_limit == 3 and trainer.given_args.eval_on_start


def test_activation_checkpointing_encodes_twice_and_trains_the_same(backbone, benchmark, tmp_path):
    ends, calls = [], []
    for activation_checkpointing in (False, True):
        settings = {"activation_checkpointing": activation_checkpointing, "max_steps": 2}
        trainer = make_trainer(backbone, benchmark, tmp_path, **settings)
        trainer.start_objective()
        trainer.start_objective = lambda: None
        attention = trainer.model.base_model.model.vision_model.encoder.layers[0].self_attn
        entered = []
        attention.register_forward_pre_hook(lambda *_, entered=entered: entered.append(1))
        trainer.train()
        calls.append(len(entered))
        ends.append(dict(trainer.model.named_parameters()))
    assert calls == [2, 4]
    for name, value in ends[0].items():
        assert (ends[1][name] - value).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.slow
def test_a_compiled_model_trains_the_same_and_loads(backbone, benchmark, tmp_path):
    ends = []
    for torch_compile in (False, True):
        output_dir = tmp_path / str(torch_compile)
        tune(backbone, benchmark, output_dir, f"--max_steps 4 --torch_compile {torch_compile} --augment False")
        ends.append(safetensors.torch.load_file(output_dir / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert (ends[1][name] - value).abs().max() <= 1e-4 * value.abs().max(), name


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_schedule_counts_the_steps_of_accumulated_batches(backbone, benchmark, tmp_path, drop_last):
    """16 pairs in batches of 3, three batches per step, the last batch dropped or not: two steps per epoch."""
    trainer = make_trainer(
        backbone, benchmark, tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=3, logging_steps=1,
        num_train_epochs=4, dataloader_drop_last=drop_last,
    )  # fmt: skip
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    factors = [0.1] + [0.5 * (1 + math.cos(math.pi * epoch / 3)) for epoch in range(3)]
    assert rates == pytest.approx([1e-3 * factor for factor in factors for _ in range(2)])
