"""What `describe` finds doubtful, compared with sets in which the doubtful things were planted."""

import json

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import CLIPTokenizer

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.dataset_scripts import describe, quality
from eccl.dataset_scripts.quality import ImageFacts, find_doubtful_captions, read_image_facts
from helpers import clip_tokenizer

SKIP = ("--on_bad_caption", "skip")


def draw(seed: int, size=(64, 128)) -> Image.Image:
    """A picture of random rectangles: two seeds look different."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(rng.integers(0, 256, 3).tolist()))
    for _ in range(12):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        box = (int(x), int(y), int(x + rng.integers(5, 40)), int(y + rng.integers(5, 60)))
        ImageDraw.Draw(image).rectangle(box, tuple(rng.integers(0, 256, 3).tolist()))
    return image


@pytest.fixture
def doubtful(tmp_path):
    """A list with planted faults: its folder."""
    folder = tmp_path / "doubtful"
    (folder / "imgs").mkdir(parents=True)
    rows = []

    def add(name, image, person, *captions, split="train", **save):
        image.save(folder / "imgs" / name, **save)
        rows.append({"image": name, "person_id": person, "captions": list(captions), "split": split})

    add("a.png", draw(0), 1, "A man in a red coat.", "a  man in a RED coat.")
    add("b.png", draw(1), 2, "a man in a red coat.", "Hat")
    # The same picture once more: the same bytes, and as a JPEG.
    add("c.png", draw(0), 1, "<b>A man</b> in blue", "A woman with a bag &amp; a hat")
    add("d.jpg", draw(0), 3, "word " * 100, "see https://example.org/x", quality=70)
    add("e.png", draw(4, (31, 90)), 3, "for (i = 0; i < 3; i++) { print(i); }", "  ...  ")
    add("f.png", draw(5), 4, "A child with a yellow kite.", split="test")
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder


def run(capsys, *words) -> str:
    capsys.readouterr()
    describe.main([*map(str, words)])
    return capsys.readouterr().out


def test_planted_faults_are_counted_with_examples(doubtful, capsys, tmp_path):
    with pytest.warns(UserWarning, match="captions are left out"):
        printed = run(capsys, "person_pairs", "--data_dir", doubtful, *SKIP, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    found = {finding["name"]: finding for finding in report["findings"]}
    assert {name: finding["count"] for name, finding in found.items()} == {
        "captions_left_out": 1,
        "same_caption_for_several_persons": 3,
        "one_word_captions": 1,
        "captions_longer_than_the_model_reads": 1,
        "code_or_markup": 4,
        "unknown_letters": 0,
        "same_bytes": 1,
        "small_images": 1,
        "near_duplicates": 3 - 1,
        "near_duplicates_of_different_persons": 2,
        "persons_with_one_image": 2,
        "persons_in_several_splits": 0,
    }
    assert found["captions_left_out"]["examples"] == ["record 4: captions[1] is '  ...  ', it must be a sentence"]
    assert found["same_caption_for_several_persons"]["examples"] == ["'a man in a red coat.': 2 persons"]
    assert found["same_bytes"]["examples"] == ["train a.png and train c.png (person 1)"]
    assert found["small_images"]["examples"] == ["train e.png: 31 x 90"]
    assert found["near_duplicates_of_different_persons"]["examples"] == [
        "train a.png and train d.jpg (persons 1 and 3)"
    ]
    assert found["persons_with_one_image"]["examples"] == ["train person 2", "test person 4"]
    assert report["splits"]["train"] == {"ids": 3, "images": 5, "captions": 9}
    assert "1 images that are copies of another one (the same bytes)\n  train a.png and train c.png" in printed
    assert "persons in several splits" in printed.partition("not found:")[2]


def test_the_report_can_be_put_into_a_page(doubtful, capsys, tmp_path):
    with pytest.warns(UserWarning):
        run(capsys, doubtful, *SKIP, "--json", tmp_path / "r.json", "--output", tmp_path / "sheet.png")
    text = (tmp_path / "r.json").read_text()
    assert not set("<>&") & set(text)
    examples = next(each["examples"] for each in json.loads(text)["findings"] if each["name"] == "code_or_markup")
    assert examples[0] == "'<b>A man</b> in blue'"
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"


def test_letters_that_the_tokenizer_lacks_are_named(doubtful):
    tokenizer = CLIPTokenizer(
        vocab={"a</w>": 0, "b</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}, merges=[], unk_token="<|endoftext|>"
    )
    rows = datasets.Dataset.from_dict({"person_id": [1, 2], "captions": [["a b", "a é b"], ["b"]]})
    finding = find_doubtful_captions({"train": rows}, tokenizer, 73)[-1]
    assert (finding.count, finding.examples) == (1, ["'a é b'"]) and "(é)" in finding.title
    assert find_doubtful_captions({"train": rows}, clip_tokenizer(), 73)[-1].count == 0


def test_persons_in_several_splits_of_a_table_are_counted(tmp_path, capsys):
    for split, persons in (("train", [1, 2]), ("test", [2, 3])):
        rows = {"image": [draw(n) for n in persons], "pid": persons, "caption": ["red", "blue"]}
        features = datasets.Features(
            {"image": datasets.Image(), "pid": datasets.Value("int64"), "caption": datasets.Value("string")}
        )
        (tmp_path / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    printed = run(capsys, tmp_path / "set")
    assert "1 persons in several splits, on whom a model must not be scored\n  person 2 in train and test" in printed
    # The same picture is in both splits.
    assert "images that are copies of another one (the same bytes)\n  train" in printed


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.lists(st.integers(0, 63), max_size=6), st.data())
def test_near_hashes_are_those_that_a_comparison_of_all_pairs_finds(codes, bits, data):
    codes = list(codes)
    for _ in range(len(codes)):
        code = data.draw(st.sampled_from(codes))
        for bit in bits:
            code ^= 1 << bit
        codes.append(code)
    images = [ImageFacts(1, 1, "RGB", bytes([index]), code) for index, code in enumerate(codes)]
    found = quality._find_near(images)
    first = {code: codes.index(code) for code in codes}
    near = {
        (i, j)
        for i in range(len(codes))
        for j in range(i + 1, len(codes))
        if (codes[i] ^ codes[j]).bit_count() <= 4
        and ((codes[i] == codes[j] and first[codes[i]] == i) or codes[i] != codes[j])
    }
    expected = {(i, j) for i, j in near if codes[i] == codes[j] or (first[codes[i]] == i and first[codes[j]] == j)}
    assert set(found) == expected


def test_without_the_package_of_hashes_the_report_says_so(doubtful, capsys, monkeypatch):
    monkeypatch.setattr(quality.importlib.util, "find_spec", lambda _: None)
    with pytest.warns(UserWarning):
        printed = run(capsys, doubtful, *SKIP)
    assert "images that look alike were not searched: that needs the package imagehash" in printed
    assert "images that look like" not in printed


def test_the_facts_of_an_image_are_those_of_its_file(doubtful):
    rows = datasets.load_dataset("person_pairs", data_dir=str(doubtful), split="test", on_bad_caption="skip")
    (fact,) = read_image_facts(rows)
    assert (fact.width, fact.height, fact.mode) == (64, 128, "RGB") and fact.hash is not None


def test_a_file_that_cannot_be_written_is_refused_before_the_data_are_read(doubtful, tmp_path, capsys):
    for words, message in (
        (["--json", tmp_path / "r.txt"], "r.txt, it must end in .json"),
        (["--json", tmp_path / "none" / "r.json"], "is not a folder"),
        (["--json", doubtful / "r.json"], "inside the data set"),
        (["--output", doubtful / "imgs" / "sheet.png"], "inside the data set"),
    ):
        with pytest.raises(SystemExit):
            describe.main([str(doubtful), *map(str, words)])
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == ""
