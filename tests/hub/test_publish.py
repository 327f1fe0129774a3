import json
import os
import subprocess
import sys
from pathlib import Path

import hub_check
import pytest
import yaml
from hub_server import LoopbackHub
from huggingface_hub import ModelCard, constants

from eccl.eval.reports import published_rows
from eccl.hub.model_card import Facts, Result, make_model_card
from eccl.hub.publish import kind_of, main, plan_upload, publish
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"

PUBLISHED = {name: published_rows(name) for name in ("cuhk_pedes", "rstpreid")}


@pytest.fixture
def hub():
    hub = LoopbackHub()
    yield hub
    hub.close()


def push(hub, folder, name, *more):
    """Runs the command in a new process, because the client reads the Hub's address when it is imported."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "eccl.hub.publish", str(folder), name, *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def read_files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.slow
def test_an_upload_sends_every_file_and_can_be_repeated_after_a_failure(hub):
    before = read_files(BACKBONE)
    # The client repeats a failed commit a few times. After 100 failures it has given up.
    hub.fail_commits = 100
    broken = push(hub, BACKBONE, "me/backbone")
    assert broken.returncode == 2 and broken.stderr.splitlines()[-1].startswith("error: me/backbone could not be")
    assert broken.stderr.splitlines()[-2] == f"to repeat the upload: eccl-publish {BACKBONE} me/backbone"
    assert set(hub.files("model", "me/backbone")) == {".gitattributes"} and read_files(BACKBONE) == before
    hub.fail_commits = 0
    done = push(hub, BACKBONE, "backbone", "--private")
    assert done.stdout == "published: me/backbone\n"
    files = dict(hub.files("model", "me/backbone"))
    assert files.pop(".gitattributes") == b"" and files == before
    # The second upload has nothing new to send, and deletes nothing.
    assert push(hub, BACKBONE, "me/backbone").returncode == 0
    assert set(hub.files("model", "me/backbone")) == {".gitattributes", *before}


def test_a_refusal_of_the_server_is_reported_in_one_line(hub):
    hub.forbidden.add("them/backbone")
    done = push(hub, BACKBONE, "them/backbone")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: them/backbone could not be published: You don't have the rights to create them/backbone"
    )


def test_a_hub_that_cannot_be_reached_is_reported_in_one_line(hub):
    hub.close()
    done = push(hub, BACKBONE, "me/backbone")
    assert done.returncode == 2 and "error: me/backbone could not be published: " in done.stderr.splitlines()[-1]


# What a folder can have besides the files of its kind: a name, and what is in it.
PLANTED = {
    ".env": "HF_TOKEN=hf_secret",
    ".git/config": "[remote]",
    "notes.txt": "do not show this to anyone",
    "train.log": "/home/me/private",
    "id_rsa": "-----BEGIN",
    "training_args.bin": "x",
    "optimizer.pt": "x",
    "eccl_run.json": json.dumps({"finished": True}),
    "results.json": "{}",
    "photo.jpg": "x",
    "checkpoint-3/optimizer.pt": "x",
    "checkpoint-3/model.safetensors": "x",
    "runs/events.out": "x",
    "imgs/a.jpg": "x",
    "adapter/base_folder.txt": "/home/me/backbone",
    "adapter/notes.txt": "x",
    "data/photo.jpg": "x",
    "data/salaries.parquet": "x",
    "model.safetensors.bak": "x",
    "my_eccl.py": "x",
}


def plant(folder):
    for name, content in PLANTED.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return {*PLANTED}


def make_adapter(folder, base="me/backbone"):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_model.safetensors", "config.json", "README.md"):
        (folder / name).write_text("{}")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


def make_kind(kind, folder):
    """Makes a folder of a kind, and returns the names of its files."""
    if kind == "model":
        folder.mkdir()
        for name, data in read_files(BACKBONE).items():
            (folder / name).write_bytes(data)
        make_adapter(folder / "adapter")
    elif kind == "adapter":
        make_adapter(folder)
    elif kind == "data set":
        (folder / "data").mkdir(parents=True)
        for name in ("README.md", "contact_sheet.jpg", "data/train-00000-of-00001.parquet"):
            (folder / name).write_text("x")
    elif kind == "metric":
        folder.mkdir()
        for name in (f"{folder.name}.py", "README.md"):
            (folder / name).write_text("x")
    else:
        folder.mkdir()
        (folder / "README.md").write_text("---\ntitle: Search\nsdk: gradio\n---\n")
        (folder / "app.py").write_text("x")
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["model", "adapter", "data set", "metric", "Space"])
def test_only_the_files_of_a_kind_are_listed(kind, tmp_path, capsys):
    folder = tmp_path / "thing"
    expected = make_kind(kind, folder)
    plant(folder)
    main([str(folder), "me/thing", "--dry_run"])
    first, *lines = capsys.readouterr().out.splitlines()
    total = sum((folder / name).stat().st_size for name in expected)
    assert first == f"me/thing ({kind}, private): {len(expected)} files, {total:,} bytes"
    sizes = {name: f"{(folder / name).stat().st_size:,}" for name in expected}
    assert {line.split()[1]: line.split()[0] for line in lines if "not published" not in line} == sizes
    left_out = [line.split()[2].rstrip("/") for line in lines if "  not published: " in line]
    assert all(any(name == path or name.startswith(f"{path}/") for path in left_out) for name in PLANTED)
    main([str(folder), "me/thing", "--dry_run", "--public"])
    assert f"me/thing ({kind}, public: everybody can read it): " in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["model", "data set"])
def test_only_the_files_of_a_kind_are_sent(kind, hub, tmp_path):
    folder = tmp_path / "thing"
    expected = make_kind(kind, folder)
    plant(folder)
    done = push(hub, folder, "me/thing")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["model" if kind == "model" else "dataset", "me/thing"]
    assert repository["private"] and set(repository["commits"][-1][1]) == {".gitattributes", *expected}
    # The list comes first.
    assert done.stderr.startswith(f"me/thing ({kind}, private): {len(expected)} files")


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    make_kind("model", tmp_path / "thing")
    (tmp_path / "secret").write_text("x")
    # Within the folder, a link is as good as a file.
    (tmp_path / "thing" / "LICENSE").symlink_to("README.md")
    assert "LICENSE" in plan_upload(tmp_path / "thing", "me/thing").sizes
    for name, target in (
        ("merges.txt", "../secret"),
        ("notes", tmp_path / "secret"),
        ("adapter/x", "/etc"),
        ("runs", ".."),
    ):
        (tmp_path / "thing" / name).symlink_to(target)
        with pytest.raises(ValueError, match=rf"{name} is a link that leads out of the folder"):
            plan_upload(tmp_path / "thing", "me/thing")
        (tmp_path / "thing" / name).unlink()


@pytest.mark.parametrize("public", [False, True])
def test_a_repository_of_the_other_visibility_is_refused_before_any_byte_is_sent(public, hub):
    hub.repositories["model", "me/backbone"] = {"private": public, "commits": [("0" * 40, {})]}
    done = push(hub, BACKBONE, "backbone", *(["--public"] if public else []))
    message = "is a private repository and stays private" if public else "is a public repository"
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]
    assert len(hub.repositories["model", "me/backbone"]["commits"]) == 1 and not hub.blobs


def test_a_public_repository_needs_the_option(hub):
    assert push(hub, BACKBONE, "me/backbone", "--public").returncode == 0
    assert not hub.repositories["model", "me/backbone"]["private"]
    assert push(hub, BACKBONE, "me/backbone").returncode == 2
    both = push(hub, BACKBONE, "me/x", "--public", "--private")
    assert both.returncode == 2 and "not allowed with argument" in both.stderr


def test_a_hub_that_makes_a_repository_public_gets_no_files(hub):
    hub.always_public = True
    done = push(hub, BACKBONE, "me/backbone")
    assert done.returncode == 2 and "the Hub made it public: nothing was uploaded" in done.stderr
    assert len(hub.repositories["model", "me/backbone"]["commits"]) == 1


@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_a_link_to_a_file_that_is_left_out_is_refused(name, tmp_path):
    make_kind("model", tmp_path / "thing")
    (tmp_path / "thing" / ".env").write_text("HF_TOKEN=hf_secret")
    (tmp_path / "thing" / name).unlink(missing_ok=True)
    (tmp_path / "thing" / name).symlink_to(".env")
    with pytest.raises(ValueError, match=rf"{name} is a link to \.env, which does not belong to what is published"):
        plan_upload(tmp_path / "thing", "me/thing")


def test_an_unfinished_run_and_a_checkpoint_are_not_published(tmp_path):
    make_kind("model", tmp_path / "thing")
    (tmp_path / "thing" / "eccl_run.json").write_text('{"finished": false}')
    with pytest.raises(ValueError, match="has an unfinished run"):
        plan_upload(tmp_path / "thing", "me/thing")
    (tmp_path / "thing" / "eccl_run.json").write_text('{"finished": true}')
    assert plan_upload(tmp_path / "thing", "me/thing").sizes
    make_kind("adapter", tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="is a checkpoint of a training"):
        plan_upload(tmp_path / "checkpoint-3", "me/thing")


def test_only_the_weights_that_the_index_names_are_sent(tmp_path):
    make_kind("model", tmp_path / "thing")
    (tmp_path / "thing" / "model.safetensors").unlink()
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*shards, "model-secret-of-me.safetensors"):
        (tmp_path / "thing" / name).write_text("x")
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    (tmp_path / "thing" / "model.safetensors.index.json").write_text(json.dumps(index))
    upload = plan_upload(tmp_path / "thing", "me/thing")
    assert {name for name in upload.sizes if name.startswith("model-")} == {*shards}
    assert "model-secret-of-me.safetensors" in upload.left_out


@pytest.mark.parametrize("base", ["/home/me/base", "./base", "home/me/secret/base", "file:///home/me/base", "~/base"])
@pytest.mark.parametrize("pointer", [None, "", "openai/clip-vit-base-patch16"])
def test_an_adapter_whose_base_is_no_name_of_the_hub_is_refused(base, pointer, tmp_path):
    make_adapter(tmp_path / "thing", base)
    if pointer is not None:
        (tmp_path / "thing" / "base_folder.txt").write_text(pointer)
    with pytest.raises(ValueError, match="as its base, which nobody else has"):
        plan_upload(tmp_path / "thing", "me/thing")


def test_the_name_of_a_metric_is_no_pattern(tmp_path):
    folder = tmp_path / "meta*"
    make_kind("metric", folder)
    (folder / "meta_secret.py").write_text("x")
    assert set(plan_upload(folder, "me/x").sizes) == {"meta*.py", "README.md"}


def test_an_adapter_within_a_model_is_left_out_if_its_base_is_a_folder(tmp_path):
    make_kind("model", tmp_path / "thing")
    make_adapter(tmp_path / "thing" / "adapter", "./backbone")
    upload = plan_upload(tmp_path / "thing", "me/thing")
    assert not any(name.startswith("adapter/") for name in upload.sizes)
    assert "./backbone, which nobody else has" in upload.left_out["adapter/"]


def test_a_folder_of_pictures_is_not_a_data_set(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jpg").write_text("x")
    (tmp_path / "README.md").write_text("x")
    with pytest.raises(ValueError, match="has no Parquet files in data/: make them with eccl-export"):
        plan_upload(tmp_path, "me/x")


def test_the_kind_of_a_folder_follows_from_its_files(tmp_path, capsys):
    assert kind_of(BACKBONE) == "model"
    assert kind_of(ROOT / "eval" / "person_retrieval") == "space"
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "README.md").write_text("x")
    assert kind_of(tmp_path / "set") == "dataset"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"is incomplete, these files are missing: adapter_model.safetensors, config.json"
    ):
        kind_of(tmp_path / "adapter")
    for name, data in read_files(BACKBONE).items():
        if name != "pipeline_eccl.py":
            (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"is incomplete, these files are missing: pipeline_eccl.py"):
        kind_of(tmp_path)
    with pytest.raises(ValueError, match=r"docs cannot be published: it must be a model"):
        kind_of(ROOT / "docs")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        publish(tmp_path / "nowhere", "me/x")
    with pytest.raises(SystemExit) as raised:
        main([str(ROOT / "docs"), "me/x"])
    error = capsys.readouterr().err
    assert raised.value.code == 2 and error.startswith("error: ") and "docs cannot be published" in error
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON: "):
        kind_of(tmp_path)


def test_offline_mode_forbids_uploads():
    assert constants.HF_HUB_OFFLINE
    with pytest.raises(ConnectionError, match=r"could not be published: .*offline mode"):
        publish(BACKBONE, "me/backbone")


@pytest.mark.slow
def test_everything_that_is_published_loads_by_name(tmp_path):
    """Runs the check of `make hub-check`."""
    assert [row for row in hub_check.check(tmp_path) if row[1] > row[2]] == []


# -- Cards


def make_result(**changes):
    metrics = {"rank1": 61.25, "rank5": 80.0, "rank10": 90.0, "mAP": 50.5, "mINP": 30.0}
    values = {"model": "m", "dataset": "rstpreid", "data_dir": "/data", "split": "test", "direction": "text_to_image"}
    values |= {"reranked": False, "queries": 2000, "gallery": 1000, "metrics": metrics}
    return Result(**(values | changes))


def test_a_card_has_the_measured_figures_and_marks_the_published_ones():
    facts = Facts(
        "me/eccl", "openai/clip-vit-base-patch16", "A method.", "rstpreid train: 3 ids", {"seed": 7}, 90.0, "1 x CPU",
        [make_result()], "the best epoch on val",
    )  # fmt: skip
    text = make_model_card(facts, PUBLISHED)
    card = ModelCard(text)
    assert card.data.base_model == "openai/clip-vit-base-patch16" and card.data.license == "other"
    entry = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"][0]
    assert entry["dataset"] == {"name": "rstpreid", "type": "rstpreid", "split": "test"}
    assert {metric["type"]: metric["value"] for metric in entry["metrics"]} == make_result().metrics
    assert "| me/eccl, measured" in text and "| ECCL (published)" in text and "69.60" in text
    assert "- seed: 7" in text and "- Duration: 1.5 minutes" in text and "- Chosen: the best epoch on val" in text
    assert "must not be used to identify" in text and "https://github.com/hhh10/ECCL" in text
    # The model index has only the measured figures.
    assert "69.6" not in text.split("---")[1]


def test_a_card_omits_unknown_facts(tmp_path):
    text = make_model_card(Facts("mine", str(tmp_path), "Converted."))
    data = yaml.safe_load(text.split("---")[1])
    assert "model-index" not in data and "base_model" not in data and str(tmp_path) not in text
    assert "## Training" not in text and "## Results" not in text and "(published)" not in text
    val = make_model_card(Facts("mine", None, "Trained.", "x", results=[make_result(split="val")]), PUBLISHED)
    assert "(published)" not in val and "random weights" in val
    other = make_model_card(
        Facts("mine", None, "Trained.", "x", results=[make_result(differs=["test has 3 ids"])]), PUBLISHED
    )
    assert "so these figures cannot be compared with the published ones: test has 3 ids." in other


def test_an_adapter_with_its_three_files_is_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    assert kind_of(tmp_path) == "model"
