"""The recipes: a method on a benchmark is the recipe of the benchmark, and after it the recipe of the method."""

import functools
import json
import re

import pytest
import torch
import yaml

from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.hub.adapter import TARGET_MODULES, load_adapter
from eccl.hub.loading import load_model
from eccl.training.objective import LOSS_TERMS
from helpers import ROOT, run, train_eccl

RECIPES = ROOT / "recipes"
BENCHMARKS = {"cuhk_pedes": "CUHK-PEDES", "icfg_pedes": "ICFG-PEDES", "rstpreid": "RSTPReid"}
METHODS = sorted(path.stem for path in (RECIPES / "baselines").glob("*.yaml"))
# The sizes of a run that takes a second. Everything else comes from the two recipes.
SIZES = (
    "--max_steps 2 --warmup_epochs 0 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --image_size 32 16 "
    "--dataloader_num_workers 0 --logging_steps 1"
)


@functools.cache
def parse(*recipes):
    """Returns all options that the recipes give, by name."""
    return {name: value for part in train_eccl.parse_arguments(list(recipes)) for name, value in vars(part).items()}


def read(recipe):
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())


@functools.cache
def expect(benchmark, method):
    """Returns the options that two recipes name, each with its value in the recipe that decides."""
    first, later = read(f"eccl_{benchmark}"), read(f"baselines/{method}")
    options = {name: parse(f"eccl_{benchmark}")[name] for name in first.keys() - later.keys()}
    return options | {name: parse(f"baselines/{method}")[name] for name in later}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_the_later_recipe_wins_and_the_rest_of_the_first_stays(benchmark, method):
    together, expected = parse(f"eccl_{benchmark}", f"baselines/{method}"), expect(benchmark, method)
    assert {name: together[name] for name in expected} == expected
    # A method does not choose the data, the split or the length of a run.
    assert not read(f"baselines/{method}").keys() & {"dataset_name", "eval_split", "num_train_epochs", "seed"}


def test_the_order_of_recipes_counts_and_options_come_last():
    options = parse("eccl_rstpreid", "baselines/tal")
    assert options["losses"] == ["tal=1"] and options["num_train_epochs"] == 60
    assert parse("baselines/tal", "eccl_rstpreid")["losses"][1:] == ["identity_memory=1", "instance_memory=0.1"]
    three = parse("eccl_cuhk_pedes", "baselines/full_fine_tuning", "baselines/infonce", "--losses", "sdm=1")
    assert (three["tune"], three["learning_rate"], three["losses"]) == ("full", 1e-5, ["sdm=1"])
    assert parse("eccl_rstpreid", "baselines/prompts_only")["tune"] == "prompts"
    lora_only = parse("eccl_rstpreid", "baselines/lora_only")
    assert (lora_only["tune"], lora_only["num_prompt_tokens"]) == ("lora", 0)
    assert train_eccl.name_recipes(["a", "b/c", "--seed", "1"]) == ["a", "b/c"] and train_eccl.name_recipes([]) == []


@pytest.mark.parametrize("wrong", ["baselines/tall", "tal", "baselines"])
def test_a_wrong_second_recipe_is_an_error_of_one_line(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as raised:
        train_eccl.main(["eccl_rstpreid", wrong, "--output_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert raised.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"there is no recipe '{wrong}'" in error and "baselines/tal," in error


def test_an_option_that_a_second_recipe_misspells_is_named_with_its_file(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("tal_magrin: 0.3")
    with pytest.raises(SystemExit):
        train_eccl.main(["eccl_rstpreid", str(recipe)])
    error = capsys.readouterr().err
    assert f"{recipe}: unknown option tal_magrin" in error and error.count("\n") == 1


@pytest.fixture(scope="session")
def data_dirs(tmp_path_factory):
    """A folder in the layout of each benchmark: 4 persons to train on, 2 in each other split, two images each."""
    folder = tmp_path_factory.mktemp("benchmarks")
    for layout, name in BENCHMARKS.items():
        sizes = {"train_ids": 4, "val_ids": 0 if layout == "icfg_pedes" else 2, "test_ids": 2, "images_per_id": 2}
        write_benchmark(SyntheticBenchmark(layout, **sizes), folder / name, num_workers=1)
    return folder


@pytest.fixture
def recorded(monkeypatch):
    """Records the options, and copies of the weights before the training, of the run of a test."""
    seen = {}
    parse_arguments, build_model = train_eccl.parse_arguments, train_eccl.build_model

    def record_options(arguments):
        parts = parse_arguments(arguments)
        seen["options"] = parts
        return parts

    def record_weights(*arguments):
        model, processor = build_model(*arguments)
        seen["before"] = {name: value.clone() for name, value in model.state_dict().items()}
        return model, processor

    monkeypatch.setattr(train_eccl, "parse_arguments", record_options)
    monkeypatch.setattr(train_eccl, "build_model", record_weights)
    return seen


def count_lora(weights, rank):
    """The number of parameters that LoRA adds to the layers of both encoders."""
    shapes = [value.shape for name, value in weights.items() if is_adapted(name)]
    return sum(rank * (rows + columns) for rows, columns in shapes)


def is_adapted(name):
    return ".encoder.layers." in name and name.endswith(tuple(f".{module}.weight" for module in TARGET_MODULES))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", BENCHMARKS)
def test_a_method_trains_on_a_benchmark(layout, method, backbone, data_dirs, recorded, tmp_path, capsys):
    out = tmp_path / "out"
    recipes = f"eccl_{layout} baselines/{method}"
    run(recipes, SIZES, f"--init_from {backbone}", data_dir=data_dirs / BENCHMARKS[layout], output_dir=out)

    # The options of both recipes are in effect. `expect` parses recipes too, so the options of the run are read before.
    parts = recorded["options"]
    options = {name: value for part in parts for name, value in vars(part).items()}
    expected = expect(layout, method)
    sizes = set(re.findall(r"--(\w+)", SIZES))
    assert {name: options[name] for name in expected.keys() - sizes} == {
        name: value for name, value in expected.items() if name not in sizes
    }
    tune, prompt_tokens = options["tune"], options["num_prompt_tokens"]
    args = parts[2]

    # What was trained: the number that the run prints, and the tensors that differ from the backbone.
    before, (model, _) = recorded["before"], load_model(out)
    after = model.state_dict()
    assert after.keys() == before.keys()
    prompts = {name for name in before if name.startswith("prompt_learner.")}
    assert bool(prompts) == (tune != "full" and prompt_tokens > 0)
    trains_scale = any(LOSS_TERMS[name].trains_logit_scale for name, weight in args.loss_weights.items() if weight)
    # The softmax of attention does not see the bias of the keys, so its gradient is 0 but for rounding.
    may_stay = {name for name in before if name.endswith("k_proj.bias")}
    if tune == "full":
        trained = before.keys() - (set() if trains_scale else {"logit_scale"})
        count = sum(before[name].numel() for name in trained)
    else:
        trained = prompts | ({name for name in before if is_adapted(name)} if tune == "lora" else set())
        count = sum(before[name].numel() for name in prompts)
        count += count_lora(before, options["lora_rank"]) if tune == "lora" else 0
    printed = capsys.readouterr().out
    assert int(re.search(r"([\d,]+) of the [\d,]+ parameters are trained", printed)[1].replace(",", "")) == count
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed <= trained and trained - changed <= may_stay

    # The adapter holds what was trained, and nothing else.
    adapter = out / "adapter"
    assert adapter.is_dir() == (tune == "lora")
    if tune == "lora":
        wrapped = load_adapter(adapter)
        names = {name for name, _ in wrapped.named_parameters() if "lora_" in name or "modules_to_save" in name}
        assert any("prompt_learner" in name for name in names) == (prompt_tokens > 0)
        merged = load_model(adapter)[0].state_dict()
        assert all(torch.allclose(merged[name], value, atol=1e-6) for name, value in after.items())

    # The card names both recipes, the losses and the split that chose the epoch; the log has the losses of the method.
    card = (out / "README.md").read_text()
    losses = ", ".join(f"{name} {weight:g}" for name, weight in args.loss_weights.items())
    assert f"- recipe: eccl_{layout}, {method}\n" in card.replace("\\_", "_")
    assert f"- losses: {losses}\n" in card.replace("\\_", "_")
    assert "the evaluation with the best rank1 on test" in card
    history = json.loads((out / "training_log.json").read_text())["log_history"]
    logged = {name for entry in history for name in entry if "_loss" in name and name != "train_loss"}
    assert {name for name in LOSS_TERMS if any(each.startswith(f"{name}_loss") for each in logged)} == set(
        args.loss_weights
    )
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2]
    assert all(0 <= entry["eval_rank1"] <= 100 for entry in history if "eval_rank1" in entry)
