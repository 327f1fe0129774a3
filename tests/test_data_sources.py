"""The same data set from ten sources trains the same model; the figures are those of the raw benchmark."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hub_server import LoopbackHub
from ten_sources import HUB_NAME, make_sources

from eccl.dataset_scripts.annotations import SplitSize
from eccl.dataset_scripts.export import main as export
from eccl.dataset_scripts.rstpreid import RstpReid
from eccl.dataset_scripts.sources import DataSource
from eccl.eval import evaluate_eccl
from helpers import ROOT, launch_environment, train_eccl

TRAINING = ["--image_size", "32", "16", "--prompt_depth", "2", "--max_steps", "2", "--per_device_train_batch_size", "4"]
TRAINING += ["--warmup_epochs", "0", "--learning_rate", "0.01", "--use_cpu", "True", "--disable_tqdm", "True"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The options of the ten sources, by their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def hub():
    hub = LoopbackHub()
    yield hub
    hub.close()


def environment(hub, folder, **changes) -> dict[str, str]:
    variables = launch_environment() | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    return variables | {"HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"} | changes


def call(hub, folder, module, *words, **changes) -> subprocess.CompletedProcess:
    """Runs a command of the package in a new process, which asks the Hub of this test."""
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        env=environment(hub, folder, **changes),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def weights_of(folder) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def push(hub, sources, tmp_path) -> None:
    """Publishes the folder of Parquet as a private data set."""
    if ("dataset", HUB_NAME) not in hub.repositories:
        done = call(hub, tmp_path, "eccl.hub.publish", sources["a folder of Parquet"][1], HUB_NAME)
        assert done.returncode == 0, done.stderr
    assert hub.repositories["dataset", HUB_NAME]["private"]


@pytest.mark.slow
@pytest.mark.xdist_group("data_sources")
def test_ten_sources_give_the_same_weights_after_two_steps(sources, hub, backbone, tmp_path):
    assert len(sources) == 10
    push(hub, sources, tmp_path)
    weights = {}
    for number, (form, words) in enumerate(sources.items()):
        output = tmp_path / f"run-{number}"
        words = [*words, "--init_from", str(backbone), "--output_dir", str(output), *TRAINING]
        if form == "the Hub":
            done = call(hub, tmp_path, "eccl.train_eccl", *words)
            assert done.returncode == 0, done.stderr
        else:
            train_eccl.main([*words, "--debug"])
        weights[form] = weights_of(output)
    assert len(set(weights.values())) == 1, weights
    # The comparison can fail: another seed gives other weights.
    words = [*sources["rstpreid"], "--init_from", str(backbone), "--output_dir", str(tmp_path / "other"), *TRAINING]
    train_eccl.main([*words, "--seed", "1"])
    assert weights_of(tmp_path / "other") not in weights.values()


@pytest.mark.slow
@pytest.mark.xdist_group("data_sources")
def test_an_export_on_the_hub_is_scored_as_the_raw_folder(sources, hub, backbone, tmp_path):
    push(hub, sources, tmp_path)
    model = tmp_path / "model"
    train_eccl.main([*sources["rstpreid"], "--init_from", str(backbone), "--output_dir", str(model), *TRAINING])
    figures = {}
    for form in ("rstpreid", "the Hub", "a folder of Parquet"):
        words = [word.replace("--dataset_name", "--dataset") for word in sources[form]]
        output = tmp_path / f"scores {form}"
        done = call(hub, tmp_path, "eccl.eval.evaluate_eccl", "--model", model, *words, "--output_dir", output)
        assert done.returncode == 0, done.stderr
        (result,) = json.loads((output / "results.json").read_text())["results"]
        figures[form] = (result["metrics"], result["weights_sha256"], result["data_sha256"], result["queries"])
        assert result["dataset"] == {"the Hub": HUB_NAME, "a folder of Parquet": "parquet"}.get(form, form)
        assert str(tmp_path) not in (output / "results.md").read_text()
    assert figures["rstpreid"] == figures["the Hub"] == figures["a folder of Parquet"]


@pytest.mark.slow
@pytest.mark.xdist_group("data_sources")
def test_a_data_set_that_needs_a_login_or_a_consent_says_so_in_one_line(sources, hub, backbone, tmp_path):
    push(hub, sources, tmp_path)
    common = ["--init_from", backbone, "--output_dir", tmp_path / "out", *TRAINING]
    cases = {HUB_NAME: {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, "me/gated": {}, "me/missing": {}}
    hub.repositories["dataset", "me/gated"] = hub.repositories["dataset", HUB_NAME] | {"private": False}
    hub.gated.add("me/gated")
    # The library would take a data set that it has loaded before from its cache.
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for name, changes in cases.items():
        done = call(hub, tmp_path, "eccl.train_eccl", "--dataset_name", name, *common, **changes, **cache)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        assert f"dataset_name is '{name}'" in line and "needs a login (hf auth login)" in line, line
        assert ("gated" in line.partition("Hub cannot give it")[2]) >= (name == "me/gated")
        assert not (tmp_path / "out").exists()
    done = call(hub, tmp_path, "eccl.train_eccl", "--dataset_name", HUB_NAME, "--revision", "none", *common, **cache)
    assert done.returncode == 2 and len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_published_rows_appear_where_the_sizes_agree(sources, backbone, tmp_path, monkeypatch, capsys):
    words = ["--model", str(backbone), "--dataset", sources["a folder of Parquet"][1]]
    evaluate_eccl.main(words)
    assert "(published)" not in capsys.readouterr().out
    layout = RstpReid.BUILDER_CONFIGS[0].layout
    monkeypatch.setitem(layout.published_sizes, "test", SplitSize(2, 4, 8))
    evaluate_eccl.main([*words, "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "| ECCL (published)" in printed and "parquet, split test, text to image: " in printed
    assert "cannot be compared" not in printed
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert result["benchmark"] == "rstpreid" and result["dataset"] == "parquet"


def test_a_folder_with_the_name_of_a_benchmark_is_no_benchmark(sources, backbone, tmp_path, capsys):
    """Its figures stand without the published ones: in the report, and on the card of a model trained on it."""
    copy = tmp_path / "rstpreid"
    shutil.copytree(sources["a folder of Parquet"][1], copy)
    evaluate_eccl.main(["--model", str(backbone), "--dataset", str(copy)])
    printed = capsys.readouterr().out
    assert "rstpreid, split test" in printed and "(published)" not in printed
    words = ["--dataset_name", str(copy), "--init_from", str(backbone), "--output_dir", str(tmp_path / "run")]
    train_eccl.main([*words, *TRAINING])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "On rstpreid, split test" in card and "(published)" not in card


def test_each_option_of_a_data_set_reaches_every_command(sources, backbone, tmp_path, capsys):
    """The CSV file has a column with another name, and its paths are written with a prefix and backslashes."""
    file = tmp_path / "set" / "mine.csv"
    folder = os.path.dirname(sources["a CSV file"][1])
    (tmp_path / "set").mkdir()
    os.symlink(f"{folder}/imgs", tmp_path / "set" / "imgs")
    lines = Path(sources["a CSV file"][1]).read_text().splitlines()
    header, rows = lines[0], [line.replace("/", "\\") for line in lines[1:]]
    file.write_text("\n".join([header, *rows]))
    options = ["--columns", "person_id=pid", "--fix_paths", "--follow_links"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluate_eccl.main(["--model", str(backbone), "--dataset", str(file), *options])
        assert "4 images in the gallery" in capsys.readouterr().out
        export([str(file), *options, "--output_dir", str(tmp_path / "parquet")])
        rows = DataSource(str(tmp_path / "parquet")).load().splits
        assert {split: len(part) for split, part in rows.items()} == {"train": 8, "test": 4}
        card = (tmp_path / "parquet" / "README.md").read_text()
        assert "terms-of-the-owners" in card and str(tmp_path) not in card and "# mine.csv" in card
    with pytest.raises(SystemExit):
        evaluate_eccl.main(["--model", str(backbone), "--dataset", str(file), *options[:2]])
    assert "--fix_paths" in capsys.readouterr().err


def test_an_evaluation_scores_the_persons_that_a_training_has_cut_off(sources, backbone, tmp_path, capsys):
    """A set with one split: training and evaluation cut off the same persons."""
    lines = Path(sources["one file a split"][1], "train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    folder = tmp_path / "set"
    folder.mkdir()
    os.symlink(f"{sources['one file a split'][1]}/imgs", folder / "imgs")
    (folder / "all.jsonl").write_text("\n".join(json.dumps({**row, "split": None}) for row in rows))
    words = ["--dataset_name", str(folder), "--follow_links", "True", "--eval_fraction", "0.5", "--seed", "3"]
    words += ["--init_from", str(backbone), "--output_dir", str(tmp_path / "run"), *TRAINING]
    train_eccl.main(words)
    printed = capsys.readouterr().out
    assert re.search(r"evaluating on .*set val \(50% of the persons of train, chosen with seed 3\): 4 images", printed)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "50% of the persons of train, chosen with seed 3" in card
    trained = {name: float(value) for name, value in re.findall(r"'eval_(\w+)': '([\d.]+)'", printed)}
    words = ["--model", str(tmp_path / "run"), "--dataset", str(folder), "--follow_links", "--split", "train"]
    evaluate_eccl.main([*words, "--eval_fraction", "0.5", "--seed", "3", "--output_dir", str(tmp_path / "scores")])
    metrics = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert metrics["mAP"] == pytest.approx(trained["mAP"], abs=0.01)
    assert metrics["results"][0]["gallery"] == 4 and "50% of the persons" in metrics["results"][0]["split"]


def test_the_table_of_the_page_has_the_ten_sources(sources):
    """Each command of the table is accepted, and names its source as the test above does."""
    text = (ROOT / "docs" / "data.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|") and "--dataset_name" in line]
    assert len(rows) == 10
    for (_, cell), words in zip(rows, sources.values(), strict=True):
        written = shlex.split(cell.strip().strip("`"))
        train_eccl.parse_arguments(written)
        assert written[::2] == words[::2], (written, words)
        kinds = [os.path.isabs(word) for word in words[1::2]]
        assert [word.startswith("/data/") for word in written[1::2]] == kinds, (written, words)
