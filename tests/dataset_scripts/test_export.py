import hashlib
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
from huggingface_hub import DatasetCard

from eccl.dataset_scripts import export
from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark

# Reads an export in a process that cannot import this project, and prints the rows.
READER = """
import hashlib, json, sys
sys.modules["eccl"] = None
import datasets
splits = datasets.load_dataset(sys.argv[1])
print(json.dumps({
    split: [[row["person_id"], row["image_id"], row["captions"], row["file_path"],
             hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest()] for row in rows]
    for split, rows in splits.items()
}))
"""


def run(name, data_dir, output_dir, *more):
    export.main([name, "--data_dir", str(data_dir), "--output_dir", str(output_dir), *more])


def read_error(capsys, *arguments):
    """Runs the command, which must fail with one line on stderr, and returns this line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err[captured.err.index("error: ") :]


def test_an_export_gives_the_same_rows_without_this_project(make_raw, tmp_path):
    root, _ = make_raw()
    run("cuhk_pedes", root, tmp_path / "out")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", READER, "out"], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    splits = datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    assert list(found) == ["train", "val", "test"]
    for split, rows in splits.items():
        assert found[split] == [
            [
                *(row[name] for name in ("person_id", "image_id", "captions", "file_path")),
                hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest(),
            ]
            for row in rows
        ]


def test_the_parquet_files_have_the_bytes_of_all_images_in_order(make_raw, tmp_path):
    root, _ = make_raw()
    splits = datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    info = export.write_parquet(splits, tmp_path / "out", shard_bytes=2000)
    files = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    shards = [name for name in files if name.startswith("train")]
    assert len(shards) > 1 and shards[0] == f"train-00000-of-{len(shards):05d}.parquet"
    paths = [str(tmp_path / "out" / "data" / name) for name in shards]
    rows = datasets.load_dataset("parquet", data_files=paths, split="train")
    assert rows["file_path"] == splits["train"]["file_path"] and info.splits["train"].num_examples == len(rows)
    for row in rows.cast_column("image", datasets.Image(decode=False)):
        assert row["image"]["bytes"] == (root / "imgs" / row["file_path"]).read_bytes()


def test_the_card_has_the_terms_of_the_owners(make_raw, tmp_path):
    root, _ = make_raw("RSTPReid", "data_captions.json", "img_path")
    run("rstpreid", root, tmp_path / "out")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other" and card.data.license_link == "https://github.com/NjtechCVLab/RSTPReid-Dataset"
    assert card.data.configs[0]["data_files"][1] == {"split": "val", "path": "data/val-*"}
    sizes = {split["name"]: split["num_examples"] for split in card.data.dataset_info["splits"]}
    assert sizes == {"train": 4, "val": 1, "test": 1}
    assert "| train | 3 | 4 | 8 | 3,701 ids, 18,505 images, 37,010 captions |" in card.text
    assert "MIT licence" in card.text and "zhu2021dssl" in card.text and "surveillance" in card.text


def test_the_card_of_a_synthetic_export_says_how_it_was_made(tmp_path):
    benchmark = SyntheticBenchmark("icfg_pedes", train_ids=2, val_ids=0, test_ids=2, captions_per_image=1)
    write_benchmark(benchmark, tmp_path / "set", num_workers=1)
    run("synthetic_pedes", tmp_path / "set", tmp_path / "out")
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "apache-2.0"
    assert "layout icfg_pedes, seed 0" in card.text and "Oracle Rank-1" in card.text
    assert "| hat | none, cap, beanie, sun hat |" in card.text
    assert (tmp_path / "out" / "contact_sheet.jpg").is_file()
    rows = datasets.load_dataset(str(tmp_path / "out"), split="test", cache_dir=str(tmp_path / "cache"))
    original = datasets.load_dataset("synthetic_pedes", data_dir=str(tmp_path / "set"), split="test")
    for row, other in zip(rows, original, strict=True):
        assert np.array_equal(row["image"], other["image"]) and row["captions"] == other["captions"]


def test_nothing_is_overwritten_or_written_incompletely(make_raw, tmp_path, monkeypatch, capsys):
    root, _ = make_raw()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "out exists and is not an empty folder" in read_error(capsys, "cuhk_pedes", root, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def full(*arguments):
        raise OSError("No space left on device")

    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine.txt").write_text("mine")
    before = set(tmp_path.iterdir())
    monkeypatch.setattr(export, "make_card", full)
    assert "No space left" in read_error(capsys, "cuhk_pedes", root, tmp_path / "new")
    assert set(tmp_path.iterdir()) == before
    assert (tmp_path / "new.partial" / "mine.txt").is_file()


def test_a_push_is_private_by_default(make_raw, tmp_path, monkeypatch, capsys):
    root, _ = make_raw()
    calls = []
    monkeypatch.setattr(export, "require_publishable", lambda *words: calls.append(words))
    monkeypatch.setattr(export, "publish", lambda *words: calls.append(words) or "me/cuhk")
    run("cuhk_pedes", root, tmp_path / "a", "--push_to_hub", "me/cuhk")
    (checked, (folder, *pushed)) = calls
    assert checked == ("me/cuhk", "data set", False) and folder == tmp_path / "a" and pushed[:2] == ["me/cuhk", False]
    assert "private: the owners give the benchmarks for research, on request" in capsys.readouterr().out
    calls.clear()
    run("cuhk_pedes", root, tmp_path / "b", "--push_to_hub", "me/cuhk", "--public")
    assert calls[0] == ("me/cuhk", "data set", True) and calls[1][2] is True

    def refuse(*_):
        raise ValueError("me/cuhk is a public repository")

    monkeypatch.setattr(export, "require_publishable", refuse)
    pushed = ("cuhk_pedes", root, tmp_path / "c", "--push_to_hub", "me/cuhk")
    # The repository is checked before the export.
    assert "me/cuhk is a public repository" in read_error(capsys, *pushed) and not (tmp_path / "c").exists()
    assert "--public only applies to --push_to_hub" in read_error(
        capsys, "cuhk_pedes", root, tmp_path / "d", "--public"
    )
