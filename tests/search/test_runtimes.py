"""A gallery over the three runtimes: torch, onnxruntime in float32, and onnxruntime in int8."""

import numpy as np
import pytest
from PIL import Image

from eccl.hub.loading import load_model
from eccl.hub.onnx_encoder import load_onnx
from eccl.search.commands import main
from eccl.search.gallery import Gallery

SENTENCES = ["a woman in a red coat", "a man with a blue bag"]
RUNTIMES = ("torch", "onnx", "onnx-int8")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 255, (6, 3, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((24, 48)).save(folder / f"{number:02}.png")
    return folder


def load(runtime, folder):
    if runtime == "torch":
        return load_model(folder)
    return load_onnx(folder, "int8" if runtime == "onnx-int8" else "float32")


def ranking(gallery, sentence):
    return [match.path for match in gallery.search(sentence, len(gallery))]


@pytest.mark.parametrize("first, second", [("torch", "onnx"), ("onnx", "torch")])
def test_torch_and_onnx_share_a_gallery(first, second, exported, photos, tmp_path):
    files = sorted(photos.iterdir())
    with Gallery.open(*load(first, exported), tmp_path / "gallery.db") as gallery:
        gallery.add(files[:6], progress=False)
        identity = gallery.store.properties["weights"]
    with Gallery.open(*load(second, exported), tmp_path / "gallery.db") as gallery:
        assert gallery.store.properties["weights"] == identity
        report = gallery.add(files, progress=False)
        assert (report.added, report.known) == (6, 6)
        assert gallery.verify().is_sound
        found = {sentence: gallery.search(sentence, 12) for sentence in SENTENCES}
    with Gallery.open(*load(first, exported), tmp_path / "gallery.db") as gallery:
        for sentence, matches in found.items():
            expected = gallery.search(sentence, 12)
            assert [match.path for match in matches] == [match.path for match in expected]
            assert [match.score for match in matches] == pytest.approx([match.score for match in expected], abs=1e-5)


def test_int8_searches_a_float32_gallery_but_does_not_add_to_it(exported, photos, tmp_path):
    with Gallery.open(*load("torch", exported), tmp_path / "gallery.db") as gallery:
        gallery.add(photos, progress=False)
        expected = {match.path: match.score for match in gallery.search(SENTENCES[0], 12)}
    with Gallery.open(*load("onnx-int8", exported), tmp_path / "gallery.db") as gallery:
        scores = {match.path: match.score for match in gallery.search(SENTENCES[0], 12)}
        assert scores == pytest.approx(expected, abs=0.1) and scores != expected
        for change in (lambda: gallery.add(photos), gallery.verify, lambda: gallery.calibrate([])):
            with pytest.raises(ValueError, match="were encoded in float32, the encoder computes in int8"):
                change()


def test_a_gallery_of_int8_is_made_and_verified_with_int8(exported, photos, tmp_path):
    with Gallery.open(*load("onnx-int8", exported), tmp_path / "gallery.db") as gallery:
        assert gallery.add(photos, progress=False, batch_size=5).added == 12
    with Gallery.open(*load("onnx-int8", exported), tmp_path / "gallery.db") as gallery:
        assert gallery.add(photos, progress=False).known == 12 and gallery.verify().is_sound
        own = ranking(gallery, SENTENCES[0])
    with Gallery.open(*load("torch", exported), tmp_path / "gallery.db") as gallery:
        assert sorted(ranking(gallery, SENTENCES[0])) == sorted(own)
        with pytest.raises(ValueError, match="were encoded in int8, the encoder computes in float32"):
            gallery.add(photos, progress=False)


def run(capsys, *words):
    capsys.readouterr()
    main([*map(str, words)])
    return capsys.readouterr().out


def test_the_command_takes_a_runtime(exported, photos, tmp_path, capsys):
    gallery = ("--gallery", tmp_path / "gallery.db")
    added = run(capsys, "index", photos, *gallery, "--model", exported, "--runtime", "onnx")
    assert added.startswith("added 12, known 0")
    # The next command finds the model, and its export, by the name that the gallery has stored.
    found = {runtime: run(capsys, "search", SENTENCES[0], *gallery, "--runtime", runtime) for runtime in RUNTIMES}
    assert found["torch"] == found["onnx"] and found["onnx-int8"].count(str(photos)) == 10
    assert "12 pictures, 0 x" in run(capsys, "verify", *gallery, "--runtime", "onnx")


def test_a_runtime_that_is_not_there_is_refused_in_one_line(backbone, exported, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (("index", photos, "--model", backbone, "--runtime", "onnx"), "has no ONNX files: make them with"),
        (("search", "a man", "--images", photos, "--model", exported, "--runtime", "onnx"), "--runtime only applies"),
        (("search", "a man", "--runtime", "tensorrt"), "invalid choice"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as raised:
            main([*map(str, words)])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert raised.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "gallery.db").exists()
