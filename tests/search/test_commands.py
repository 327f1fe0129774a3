"""The command `eccl-gallery`."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from eccl.hub import loading
from eccl.hub.loading import load_model
from eccl.search.commands import main, read_age
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"
SENTENCE = "a person in a green coat"


@pytest.fixture
def run(tmp_path, capsys):
    """Runs a command on the gallery of the test, and returns what it prints."""

    def run(*words, model=None):
        if words[0] in COMMANDS:
            words = [*words, "--gallery", tmp_path / "gallery.db"]
        main([*map(str, words), *(["--model", str(model)] if model else [])])
        return capsys.readouterr().out.splitlines()

    return run


COMMANDS = ("index", "search", "info", "remove", "expire", "verify", "export", "calibrate")


@pytest.fixture
def fails(run, capsys):
    """Runs a command that must fail in one line, and returns the line."""

    def fails(*words, **options):
        with pytest.raises(SystemExit) as raised:
            run(*words, **options)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert raised.value.code == 2 and len(errors) == 1
        return errors[0]

    return fails


def cosines(paths):
    """The oracle: the model alone."""
    model, processor = load_model(BACKBONE)
    scores = {}
    for path in paths:
        with torch.no_grad():
            output = model(**processor(images=Image.open(path), text=[SENTENCE], return_tensors="pt"))
        scores[str(path)] = torch.cosine_similarity(output.text_embeds, output.image_embeds).item()
    return scores


def test_a_gallery_from_its_making_to_its_end(make_raw, run, tmp_path, capsys):
    root, records = make_raw()
    photos = tmp_path / "photos"
    for number, record in enumerate(records):
        folder = photos / f"cam{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        file = root / "imgs" / record["file_path"]
        shutil.copy(file, folder / f"20260531_10{number:02}00_x{file.suffix}")
    pattern = ["--pattern", "cam{camera}/{time:%Y%m%d_%H%M%S}_*"]
    printed = run("index", photos, *pattern, model=BACKBONE)
    assert printed == [f"added 6, known 0, skipped 0: 6 pictures in {tmp_path / 'gallery.db'}"]
    # From now on the gallery names its model.
    assert "added 0, known 6" in run("index", photos, *pattern)[-1]
    paths = sorted(photos.rglob("*.*"))
    scores = cosines(paths)
    expected = sorted(scores, key=scores.get, reverse=True)
    lines = run("search", SENTENCE, "--top_k", 4)
    assert lines[0] == f'"{SENTENCE}" among 6 images:'
    assert [line.split()[2] for line in lines[1:]] == expected[:4]
    assert [float(line.split()[1]) for line in lines[1:]] == pytest.approx(
        [scores[path] for path in expected[:4]], abs=6e-4
    )
    assert all(line.split()[3] in ("0", "1") and line.split()[4] == "2026-05-31" for line in lines[1:])
    of_camera = [path for path in expected if "cam1" in path]
    assert [line.split()[2] for line in run("search", SENTENCE, "--camera", "1")[1:]] == of_camera
    late = run("search", SENTENCE, "--start", "2026-05-31T10:03:00", "--stop", "2026-05-31T10:05:00", "--order", "time")
    assert [line.split()[2] for line in late[1:]] == [
        str(path) for path in paths if "_1003" in path.name or "_1004" in path.name
    ][:: 1 if "cam0" in late[1] else -1]
    found = [json.loads(line) for line in run("search", "--query", SENTENCE, "--json", "--offset", "1", "--top_k", "2")]
    assert [match["path"] for match in found] == expected[1:3]
    again = run("search", SENTENCE, "--like", found[1]["id"], "--unlike", found[0]["id"], "--top_k", "1")
    assert again[1].split()[2] == expected[2]
    assert run("search", SENTENCE, "--min_score", "0.99")[1:] == [
        "nobody fits: no picture has a score of 0.990 or more"
    ]
    run("search", SENTENCE, "--output", tmp_path / "found.png", "--top_k", 3)
    assert Image.open(tmp_path / "found.png").width > 100
    run("search", SENTENCE, "--output", tmp_path / "found.csv", "--top_k", 3)
    assert [row["path"] for row in csv.DictReader((tmp_path / "found.csv").read_text().splitlines())] == expected[:3]
    info = dict(line.split(maxsplit=1) for line in run("info") if not line.startswith(("first", "last", "bytes")))
    assert info["pictures"] == "6" and info["cameras"] == "0: 3, 1: 3" and info["oldest"] == "2026-05-31 10:00:00+00:00"
    assert run("verify")[-1].startswith("6 pictures, 0 x the file is gone")
    assert run("remove", "--path", paths[0]) == ["removed 1 pictures, 5 are left"]
    assert run("remove", "--camera", "1") == ["removed 3 pictures, 2 are left"]
    assert run("export", tmp_path / "all.csv") == [f"written: {tmp_path / 'all.csv'}"]
    paths[1].unlink()
    with pytest.raises(SystemExit) as raised:
        run("verify")
    assert raised.value.code == 1 and "1 x the file is gone" in capsys.readouterr().out
    assert run("search", SENTENCE, "--camera", "7")[1:] == ["no picture passes the filter"]
    assert run("search", SENTENCE, "--offset", "9")[1:] == ["there are no more matches"]
    assert run("expire", "--older_than", "2026-05-31T10:03:00") == ["removed 1 pictures, 1 are left"]
    assert run("remove", "--path", "nowhere") == ["removed 0 pictures, 1 are left"]
    assert run("expire", "--older_than", "1d") == ["removed 1 pictures, 0 are left"]


def test_a_data_set_is_indexed_and_the_gallery_calibrated(benchmark, run, fails, tmp_path):
    data = ["--dataset_name", "cuhk_pedes", "--data_dir", benchmark]
    printed = run("index", *data, "--split", "test", "--keep_columns", "person_id", model=BACKBONE)
    assert printed[-1].startswith("added 4, known 0")
    assert [line.split()[1] for line in run("search", SENTENCE, "--where", "person_id=0", "--json")] == []
    (line,) = run("calibrate", *data, "--split", "train", "--precision", "0.6")
    assert "of the 16 queries have one" in line
    threshold, precision = float(line.split()[1].rstrip(":")), float(line.split()[2])
    assert precision >= 60
    shown = next(line for line in run("info") if line.startswith("threshold"))
    assert float(shown.split()[1]) == pytest.approx(threshold, abs=1e-4)
    assert "has no none split, only train, val, test; --split names another one" in fails(
        "calibrate", *data, "--split", "none"
    )


def test_a_list_with_columns_and_unreadable_pictures(make_raw, run, fails, tmp_path):
    root, records = make_raw()
    (root / "broken.jpg").write_bytes(b"no picture")
    lines = ["file_path,zone,floor"]
    lines += [f"imgs/{record['file_path']},{'ab'[number % 2]},{number}" for number, record in enumerate(records)]
    (root / "list.csv").write_text("\n".join([*lines, "broken.jpg,a,7"]))
    assert "broken.jpg cannot be read as an image" in fails("index", root / "list.csv", model=BACKBONE)
    printed = run("index", root / "list.csv", "--on_bad_image", "skip", model=BACKBONE)
    assert printed[-1].startswith("added 6, known 0, skipped 1: 6 pictures")
    found = [json.loads(line) for line in run("search", SENTENCE, "--json", "--where", "zone=a", "floor=0", "floor=4")]
    assert {match["columns"]["floor"] for match in found} == {0, 4}
    for words, message in (
        (("--where", "zone"), "--where has 'zone', it must be COLUMN=VALUE"),
        (("--where", "floor=one"), "floor is 'one', the column has the type int"),
        (("--where", "shoe=1"), "no column 'shoe', its columns are camera, floor, height, tracklet, width, zone"),
        (("--top_k", "0"), "--top_k is 0, it must be at least 1"),
        (("--top_k", "16385"), "--top_k is 16385, it must be at least 1 and at most 16,384"),
        (("--output", "found.txt"), "found.txt does not end like a picture file"),
        (("--batch_size", "3"), "--batch_size only applies to --images"),
        (("--query", "twice"), "the query is given twice"),
        (("--image", root / "broken.jpg"), "broken.jpg cannot be read as an image"),
        (("--model", BACKBONE, "--start", "noon"), "'noon' is no time"),
        (("--token_env", "NO_SUCH"), "--token_env is NO_SUCH, but there is no such environment variable"),
        (("--like", "x"), "the gallery has no picture x"),
    ):
        assert message in fails("search", SENTENCE, *words)
    assert "the query has 1,200 characters" in fails("search", "red " * 300)
    assert "the query is missing" in fails("search")
    assert "'soon' is no age" in fails("expire", "--older_than", "soon")
    assert "every picture would be too old" in fails("expire", "--older_than", "2999-01-01")
    assert "before the year 1" in fails("expire", "--older_than", "9999999d")
    assert "only applies to a file" in fails("export", tmp_path / "new", "--overwrite")
    assert "give either ids, or where, or path" in fails("remove")
    (tmp_path / "all.csv").write_text("mine")
    assert "all.csv exists: give --overwrite" in fails("export", tmp_path / "all.csv")
    assert (tmp_path / "all.csv").read_text() == "mine"


def test_mistakes_come_before_the_work(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model is loaded"))
    (tmp_path / "old.db").write_bytes(b"SQLite format 3")
    photo = tmp_path / "a.png"
    Image.fromarray(np.zeros((8, 4, 3), dtype=np.uint8)).save(photo)
    for words, message in (
        (("index",), "give either sources, or --dataset_name, or --video"),
        (("index", photo, "--video", "x.avi"), "give either sources, or --dataset_name, or --video"),
        (("index", photo), "--model is missing:"),
        (("index", tmp_path / "none"), "none"),
        (("index", photo, "--every", "3"), "--every only applies to --video"),
        (("index", photo, "--split", "test"), "--split only applies to --dataset_name"),
        (("index", "--video", "x.avi", "--pattern", "{camera}/*"), "--pattern only applies to sources"),
        (("index", "--video", tmp_path / "none.avi"), "none.avi"),
        (("search", "a man"), "there is no gallery"),
        (("search", "a man", "--gallery", tmp_path / "old.db"), "old.db is a file: a store of milvus-lite before"),
        (
            ("search", "a man", "--gallery", "http://127.0.0.1:1"),
            "the Milvus server http://127.0.0.1:1 does not answer",
        ),
        (("info",), "there is no gallery"),
        (("verify",), "there is no gallery"),
        (("search", "a man", "--output", tmp_path / "none.gif.xyz"), "does not end like a picture file"),
    ):
        if "--gallery" in words:
            with pytest.raises((ValueError, OSError), match=message):
                main([*map(str, words), "--debug"])
        else:
            assert message in fails(*words)


# -- A folder that is searched once, without a gallery


def search(*words):
    main(["--model", str(BACKBONE), *map(str, words)])


def test_a_folder_is_ranked_by_cosine(make_raw, capsys):
    root, records = make_raw()
    search("--images", root / "imgs", "--query", SENTENCE, "--top_k", "4")
    lines = capsys.readouterr().out.splitlines()
    scores = cosines(root / "imgs" / record["file_path"] for record in records)
    expected = sorted(scores, key=scores.get, reverse=True)[:4]
    assert [line.split()[2] for line in lines[1:]] == expected
    assert [float(line.split()[1]) for line in lines[1:]] == pytest.approx(
        [scores[path] for path in expected], abs=6e-4
    )


def test_the_images_of_a_folder_are_printed_and_drawn(make_raw, tmp_path, capsys):
    root, _ = make_raw()
    search("--images", root, "--query", "a red coat", "--top_k", "2", "--output", tmp_path / "found.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == '"a red coat" among 6 images:' and len(lines) == 4
    assert Image.open(tmp_path / "found.png").width > 100


def test_a_mistake_is_one_line_with_status_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "broken.jpg").write_bytes(b"no image")
    good = tmp_path / "good"
    good.mkdir()
    Image.new("RGB", (5, 5)).save(good / "a.png")
    for words, message in (
        (("--images", tmp_path / "none", "--query", "a man"), "none is not a folder"),
        (("--images", tmp_path / "empty", "--query", "a man"), "empty contains no images"),
        (("--images", tmp_path / "broken", "--query", "a man"), "broken.jpg cannot be read as an image"),
        (("--images", good, "--query", "  "), "--query is empty"),
        (("--images", good, "--query", "a man", "--top_k", "0"), "top_k is 0"),
        (("--images", good, "--query", "a man", "--output", "found.txt"), "found.txt does not end like a picture file"),
        (("--images", good, "--query", "a man", "--output", good), "good does not end like a picture file"),
        (("--images", good, "--query", "a man", "--camera", "1"), "--camera only applies to a gallery"),
        (("--images", good), "the query is missing"),
    ):
        with pytest.raises(SystemExit) as raised:
            search(*words)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert raised.value.code == 2 and len(errors) == 1 and message in errors[0]
        with pytest.raises(ValueError, match=message):
            search(*words, "--debug")


def test_a_mistake_is_found_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model is loaded"))
    for words, message in (
        (("--top_k", "0"), "--top_k is 0, it must be at least 1"),
        (("--batch_size", "0"), "--batch_size: 0 is too small, it must be at least 1"),
        (("--output", tmp_path / "found.x"), "found.x does not end like a picture file"),
        ((), f"{tmp_path} contains no images"),
    ):
        with pytest.raises(SystemExit) as raised:
            search("--images", tmp_path, "--query", "a man", *words)
        assert raised.value.code == 2 and message in capsys.readouterr().err


def test_ages():
    assert read_age("30d").days == 30 and read_age("90min").total_seconds() == 5400
    assert read_age("2w").days == 14 and read_age("1.5h").total_seconds() == 5400
    assert read_age("2026-01-02").year == 2026
    for text in ("", "30", "d", "-3d", "3 d"):
        with pytest.raises(ValueError, match="is no age"):
            read_age(text)
