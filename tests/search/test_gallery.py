import pytest
import torch
from PIL import Image

from eccl.hub import loading
from eccl.hub.loading import load_model
from eccl.search.gallery import main
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"


def search(*words):
    main(["--model", str(BACKBONE), *map(str, words)])


def test_the_command_ranks_by_cosine(make_raw, capsys):
    root, records = make_raw()
    search("--images", root / "imgs", "--query", "a person in a green coat", "--top_k", "4")
    lines = capsys.readouterr().out.splitlines()
    encoder, processor = load_model(BACKBONE)
    scores = {}
    for record in records:
        path = root / "imgs" / record["file_path"]
        inputs = processor(images=Image.open(path), text=["a person in a green coat"], return_tensors="pt")
        with torch.no_grad():
            output = encoder(**inputs)
        scores[str(path)] = torch.cosine_similarity(output.text_embeds, output.image_embeds).item()
    expected = sorted(scores, key=scores.get, reverse=True)[:4]
    assert [line.split()[2] for line in lines[1:]] == expected
    assert [float(line.split()[1]) for line in lines[1:]] == pytest.approx(
        [scores[path] for path in expected], abs=6e-4
    )


def test_the_command_prints_and_draws_the_images_found(make_raw, tmp_path, capsys):
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
        (("--images", good), "the following arguments are required: --query"),
    ):
        with pytest.raises(SystemExit) as raised:
            search(*words)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert raised.value.code == 2 and len(errors) == 1 and message in errors[0]
        if "--query" in words:
            with pytest.raises(ValueError, match=message):
                search(*words, "--debug")


def test_a_mistake_is_found_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model is loaded"))
    for words, message in (
        (("--top_k", "0"), "--top_k is 0, it must be at least 1"),
        (("--batch_size", "0"), "--batch_size: 0 is too small, it must be at least 1"),
        (("--output", tmp_path / "found"), "found does not end like a picture file"),
        ((), f"{tmp_path} contains no images"),
    ):
        with pytest.raises(SystemExit) as raised:
            search("--images", tmp_path, "--query", "a man", *words)
        assert raised.value.code == 2 and message in capsys.readouterr().err
