"""What `SECURITY.md` promises about whole commands: it names these tests."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel, CLIPConfig, CLIPModel

import eccl
from eccl.configuration_eccl import ECCLConfig, expected_parameters
from eccl.eval import evaluate_eccl
from eccl.eval.reports import hide_paths, make_report
from eccl.hub.adapter import load_adapter
from eccl.hub.loading import load_model
from eccl.hub.model_card import Facts, Result, make_model_card
from eccl.hub.run_folder import is_finished
from eccl.modeling_eccl import ECCLModel
from eccl.training.trainer import ECCLTrainer
from helpers import PATIENCE, ROOT, launch_environment, launch_in_background, run, tiny_config, train_eccl

# -- The page


def test_every_promise_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text()
    promises = [line for line in text.splitlines() if line.startswith("|") and "test" in line.split("|")[-2]]
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(promises) > 25
    for line in promises[1:]:
        names = re.findall("`([^`]+)`", line.split("|")[-2])
        assert names, line
        for name in names:
            assert f"def {name}(" in sources or (ROOT / name).is_file(), name


# -- No code of a checkpoint runs

LOADERS = {
    "load_model": load_model,
    "load_model, adapter": lambda folder: load_model(folder / "adapter"),
    "load_adapter": lambda folder: load_adapter(folder / "adapter"),
    "from_clip": lambda folder: ECCLModel.from_clip(str(folder.parent / "backbone"), (32, 16), prompt_depth=2),
}


@pytest.fixture(scope="module")
def trained(backbone, benchmark, tmp_path_factory):
    """The output folder of a run, with an adapter, and beside it the backbone."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(backbone, folder / "backbone")
    words = f"--dataset_name cuhk_pedes --init_from {folder / 'backbone'} --max_steps 1 --image_size 32 16"
    run(words + " --prompt_depth 2 --per_device_train_batch_size 4", data_dir=benchmark, output_dir=folder / "run")
    return folder


@pytest.mark.parametrize("loader", LOADERS)
def test_no_code_of_the_checkpoint_runs(loader, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    marker = tmp_path / "it ran"
    evil = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    for folder in (tmp_path / "copy").rglob("*"):
        if folder.is_dir() and (folder / "config.json").is_file():
            code = [*folder.glob("*.py")] or [folder / "modeling_eccl.py"]
            for file in [*code, folder / "__init__.py", folder / "conftest.py"]:
                file.write_text(evil)
            config = json.loads((folder / "config.json").read_text())
            config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel"), "modeling_eccl.ECCLModel")
            (folder / "config.json").write_text(json.dumps(config))
    adapter = tmp_path / "copy" / "run" / "adapter"
    (adapter / "base_folder.txt").write_text(str(tmp_path / "copy" / "backbone"))
    before = set(sys.modules)
    LOADERS[loader](tmp_path / "copy" / "run")
    assert not marker.exists()
    assert not [name for name in set(sys.modules) - before if name.startswith("transformers_modules")]


# -- Limits


@pytest.mark.parametrize(
    "config, model_class",
    [
        (tiny_config(), ECCLModel),
        (tiny_config(num_prompt_tokens=0), ECCLModel),
        (ECCLConfig(), ECCLModel),
        (CLIPConfig(), CLIPModel),
        (CLIPConfig(text_config={"hidden_size": 64, "num_attention_heads": 4}, projection_dim=30), CLIPModel),
    ],
)
def test_the_number_of_parameters_follows_from_the_configuration(config, model_class):
    with torch.device("meta"):
        model = model_class(config)
    assert expected_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


def test_no_loader_makes_a_large_model_for_a_small_file(tmp_path):
    ECCLModel(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 1024, "vocab_size": 1_000_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert eccl.ECCLModel is ECCLModel  # This registers the class.
    for load in (load_model, ECCLModel.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="they do not belong together"):
            load(tmp_path)


# -- What is given away has no paths of the machine, and shows hostile names as they are


def test_nothing_that_is_given_away_has_a_path_of_the_machine(trained, benchmark, tmp_path):
    words = ["--model", trained / "run", "--model", trained / "run" / "adapter", "--dataset", "synthetic_pedes"]
    words += ["--data_dir", benchmark, "--output_dir", tmp_path]
    evaluate_eccl.main([str(word) for word in words])
    given = [*tmp_path.iterdir(), *(trained / "run").iterdir(), *(trained / "run" / "adapter").iterdir()]
    given = [path for path in given if path.is_file() and path.name != "base_folder.txt"]
    assert {"results.json", "results.md", "README.md", "adapter_config.json"} <= {path.name for path in given}
    for path in given:
        content = path.read_bytes()
        for secret in (trained, benchmark, tmp_path, Path.home() / "x", ROOT):
            assert str(secret.parent).encode() not in content or secret.parent == Path("/"), path
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [each["model"] for each in results] == ["run", "adapter"] and results[0]["data_dir"] == benchmark.name
    assert all(
        re.fullmatch("[0-9a-f]{64}", each[name]) for each in results for name in ("weights_sha256", "data_sha256")
    )
    assert (
        json.loads((trained / "run" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "./backbone"
    )


def make_result(**changes) -> Result:
    metrics = dict.fromkeys(("rank1", "rank5", "rank10", "mAP", "mINP"), 50.0)
    values = {"model": "m", "dataset": "rstpreid", "data_dir": "d", "split": "val", "direction": "text_to_image"}
    return Result(**values | {"reranked": False, "queries": 2, "gallery": 1, "metrics": metrics} | changes)


def test_models_of_one_name_are_told_apart_without_their_whole_paths(tmp_path):
    for name in ("a/one/model", "a/two/model", "data"):
        (tmp_path / name).mkdir(parents=True)
    results = [
        make_result(model=str(tmp_path / "a" / name / "model"), data_dir=str(tmp_path / "data"))
        for name in ("one", "two")
    ]
    results.append(make_result(model="me/model", data_dir=str(tmp_path / "data")))
    hidden = hide_paths(results)
    assert [each.model for each in hidden] == ["model", "model (2)", "me/model"]
    assert {each.data_dir for each in hidden} == {"data"}


HOSTILE = "x](http://evil)![](http://evil/p.png)<script>alert(1)</script>|`a`|\n# title\n```\n---\n\x1b[2J\u202e"


def test_a_card_shows_hostile_names_as_plain_text(tmp_path):
    facts = Facts(HOSTILE, HOSTILE, "A method.", "3 ids", {"recipe": HOSTILE}, 1.0, HOSTILE, [make_result()])
    for adapter in (False, True):
        facts.is_adapter = adapter
        card = make_model_card(facts)
        check_plain(card.partition("\n---\n")[2].replace(json.dumps(HOSTILE), ""))
        assert yaml.safe_load(card.split("\n---\n")[0])["base_model"] == HOSTILE
        # The code to copy has the name as a string, and nothing of it as code.
        code = ast.parse(re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1])
        assert HOSTILE in [node.value for node in ast.walk(code) if isinstance(node, ast.Constant)]
    check_plain(make_report([make_result(model=HOSTILE, data_dir=HOSTILE)]))


def check_plain(text: str) -> None:
    """No line of the hostile text starts a block, and none of its marks is a mark of Markdown."""
    assert "\x1b" not in text and "\u202e" not in text and "\n# title" not in text and "\n---\n" not in text
    # In a code span everything is plain.
    text = re.sub("(`+) .*? \\1", "", text)
    assert not re.search(r"(?<!\\)(<script|\]\(http://evil)", text)
    for line in text.splitlines():
        if line.startswith("|") and "evil" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 7


# -- Folders


@pytest.fixture
def finished(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--overwrite True --resume_from_checkpoint {elsewhere}/nothing",
        "--overwrite True --resume_from_checkpoint {elsewhere}/checkpoint-1 --seed 9",
        "--overwrite True --resume_from_checkpoint {run}/checkpoint-1",
        "--overwrite True --resume_from_checkpoint {run}/checkpoint-7",
        "--overwrite True --eval_split other",
        "--overwrite True --learning_rate nan",
    ],
)
def test_a_mistake_loses_nothing_of_an_earlier_run(options, finished, backbone, benchmark, tmp_path):
    shutil.copytree(finished, tmp_path / "elsewhere")
    (finished / "checkpoint-7").symlink_to(tmp_path / "elsewhere" / "checkpoint-1")
    before = state_of(tmp_path)
    options = options.format(run=finished, elsewhere=tmp_path / "elsewhere")
    words = f"--dataset_name cuhk_pedes --init_from {backbone} --max_steps 2 --image_size 32 16 --prompt_depth 2"
    with pytest.raises((ValueError, OSError)):
        run(f"{words} --per_device_train_batch_size 4 {options}", data_dir=benchmark, output_dir=finished)
    assert state_of(tmp_path) == before


@pytest.mark.parametrize("content", [None, "{}", '{"precious": 1}'])
def test_an_evaluation_overwrites_only_results_of_an_evaluation(content, trained, benchmark, tmp_path, capsys):
    (tmp_path / "rankings.png").write_text("mine")
    if content:
        (tmp_path / "results.json").write_text(content)
    before = state_of(tmp_path)
    words = ["--model", trained / "run", "--dataset", "cuhk_pedes", "--data_dir", benchmark, "--output_dir", tmp_path]
    with pytest.raises(SystemExit):
        evaluate_eccl.main([*map(str, words), "--overwrite"])
    assert "has files that no evaluation wrote" in capsys.readouterr().err and state_of(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_last_step_finishes_the_run_and_publishes_nothing(
    number, backbone, benchmark, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(train_eccl, "require_publishable", lambda *_: None)
    monkeypatch.setattr(train_eccl, "publish", lambda *_: pytest.fail("it is published"))
    log = ECCLTrainer.log

    def stop_after_the_last_step(self, logs, *args, **kwargs):
        log(self, logs, *args, **kwargs)
        if "train_runtime" in logs:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(ECCLTrainer, "log", stop_after_the_last_step)
    words = f"--dataset_name cuhk_pedes --init_from {backbone} --max_steps 1 --image_size 32 16 --prompt_depth 2"
    words += " --per_device_train_batch_size 4 --push_to_hub True --hub_model_id me/x --eval_strategy no"
    with pytest.raises(SystemExit) as raised:
        run(f"{words} --load_best_model_at_end False", data_dir=benchmark, output_dir=tmp_path / "out")
    assert raised.value.code == 128 + number and is_finished(tmp_path / "out")
    assert "the run is finished, and nothing is published" in capfd.readouterr().err


# -- Two runs


@pytest.mark.slow
def test_two_runs_cannot_use_one_folder(backbone, benchmark, tmp_path):
    """Both are started at the same time: one trains, and the other one says who is training."""
    words = ["--dataset_name", "cuhk_pedes", "--data_dir", benchmark, "--init_from", backbone, "--max_steps", "3"]
    words += ["--image_size", "32", "16", "--prompt_depth", "2", "--per_device_train_batch_size", "4"]
    words += ["--output_dir", tmp_path / "run", "--disable_tqdm", "True", "--eval_strategy", "no"]
    words += ["--load_best_model_at_end", "False"]
    logs = [tmp_path / f"{seed}.log" for seed in (1, 2)]
    processes = [
        launch_in_background(1, "train_eccl.py", *words, "--seed", seed, log=log)
        for seed, log in zip((1, 2), logs, strict=True)
    ]
    ends = [process.wait(timeout=PATIENCE) for process in processes]
    texts = [log.read_text() for log in logs]
    winner = ends.index(0)
    assert ends[1 - winner] != 0, texts
    # If the second one comes late, the first one has finished.
    assert re.search(r"error: .*(another run is writing to|has a finished run)", texts[1 - winner])
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"- seed: {winner + 1}\n" in card and load_model(tmp_path / "run")


def test_a_second_run_is_refused_while_the_first_one_holds_the_folder(backbone, benchmark, tmp_path, capsys):
    program = (
        "import sys, time; from pathlib import Path; from eccl.utils.files import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])):\n    print('inside', flush=True); time.sleep(600)"
    )

    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdout=subprocess.PIPE, text=True, env=launch_environment(),
    )  # fmt: skip
    assert holder.stdout.readline() == "inside\n"
    try:
        for command, words in (
            (train_eccl, ["--dataset_name", "cuhk_pedes", "--data_dir", benchmark, "--init_from", backbone]),
            (evaluate_eccl, ["--model", backbone, "--dataset", "cuhk_pedes", "--data_dir", benchmark]),
        ):
            with pytest.raises(SystemExit) as raised:
                command.main([*map(str, words), "--output_dir", str(tmp_path / "run")])
            assert raised.value.code == 2
            assert f"another run is writing to {tmp_path / 'run'} (process {holder.pid} on" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
