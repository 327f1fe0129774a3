"""The benchmark of explanations: its regions and phrases are the true ones, and its figures tell good maps from bad."""

import random
import re

import numpy as np
import pytest

from eccl.dataset_scripts.synthetic.people import sample_person
from eccl.eval.benchmarks import explanation
from eccl.hub.loading import load_model
from eccl.search.explanation import explain
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"
GRID = (12, 4)


@pytest.fixture(scope="module")
def loaded():
    model, processor = load_model(BACKBONE)
    return model.cpu(), processor


@pytest.fixture(scope="module")
def samples():
    return [explanation.draw_sample(number, 0, GRID) for number in range(12)]


def person_of(number):
    return sample_person(random.Random(f"explanation/0/{number}"))


def test_a_region_is_where_the_part_is(samples):
    parts = [part for sample in samples for part in sample.parts]
    rows = {name: [] for name in explanation.PARTS}
    for part in parts:
        assert part.region.shape == GRID and 0 < part.region.mean() < 0.6
        rows[part.name].append(np.nonzero(part.region)[0].mean())
    assert min(len(rows[name]) for name in ("upper", "lower", "shoes")) >= 3
    means = [np.mean(rows[name]) for name in ("upper", "lower", "shoes")]
    assert means == sorted(means) and means[0] < 6 < means[1] < means[2] and means[2] > 9
    assert rows["hair"] and max(rows["hair"] + rows["hat"]) < min(rows["upper"] + rows["lower"])


def test_a_region_has_the_colour_of_the_part():
    """Red and blue survive the camera, so a red garment is where the picture is red."""
    shares = []
    for number in range(60):
        person = person_of(number)
        if person["upper_colour"] not in ("red", "blue") or person["upper_pattern"] != "plain":
            continue
        sample = explanation.draw_sample(number, 0, GRID)
        pixels = np.asarray(sample.image, dtype=int)
        first, second = (0, 2) if person["upper_colour"] == "red" else (2, 0)
        coloured = (pixels[..., first] - pixels[..., second] > 25).reshape(12, 32, 4, 32).mean(axis=(1, 3))
        for part in sample.parts:
            if part.name == "upper":
                shares.append((coloured[part.region].mean(), coloured[~part.region].mean()))
    inside, outside = np.mean(shares, axis=0)
    assert len(shares) >= 3 and inside > 2 * outside and inside > 0.3


def test_a_phrase_names_the_part_in_the_caption(samples):
    for number, sample in enumerate(samples):
        person = person_of(number)
        for part in sample.parts:
            assert sample.text[part.start : part.stop] == part.phrase
            *before, noun = part.phrase.replace(person[part.name], person[part.name].replace(" ", "_")).split()
            assert noun.replace("_", " ") == person[part.name] or part.name == noun == "hair"
            known = {person[f"{part.name}_colour"], person.get(f"{part.name}_pattern")}
            assert {*before} <= known | ({person["hair"]} if noun == "hair" else set())
    assert any(" " in part.phrase for sample in samples for part in sample.parts)


@pytest.mark.parametrize(
    ("name", "text", "phrase"),
    [
        ("upper", "a man in a red striped shirt.", "red striped shirt"),
        ("upper", "a man in a crimson shirt, with a bag", "shirt"),
        ("upper", "a man in a t-shirt", None),
        ("upper", "a man in red shirts", None),
        ("hair", "a man with short black hair", "short black hair"),
        ("hair", "a man with short cut black hair and short pants", "black hair"),
        ("bag", "a man with a blue shoulder bag", "blue shoulder bag"),
    ],
)
def test_a_part_that_has_another_name_is_left_out(name, text, phrase):
    person = {
        **{"upper": "shirt", "upper_colour": "red", "upper_pattern": "striped", "hair": "short"},
        **{"hair_colour": "black", "bag": "shoulder bag", "bag_colour": "blue"},
    }
    span = explanation.find_phrase(person, name, text)
    assert phrase == (None if span is None else text[slice(*span)])


def test_the_figures_tell_a_true_map_from_a_false_one(loaded, samples):
    def show_regions(model, processor, sample):
        return [part.region.astype(np.float32) for part in sample.parts]

    def hide_regions(model, processor, sample):
        return [0.5 - part.region.astype(np.float32) for part in sample.parts]

    chosen = samples[:4]
    true, seconds = explanation.measure(*loaded, chosen, show_regions)
    false, _ = explanation.measure(*loaded, chosen, hide_regions)
    assert len(seconds) == 4 and [result.name for result in true] == [p.name for s in chosen for p in s.parts]
    assert all(result.hit and result.inside == 1 for result in true)
    assert all(not result.hit and result.inside == 0 for result in false)
    assert np.mean([result.drop for result in true]) > np.mean([result.drop for result in false]) + 0.02


def test_half_of_the_mass(loaded, samples):
    sample = next(sample for sample in samples if sample.parts)

    def share(model, processor, _):
        return [part.region / part.region.sum() + ~part.region / (~part.region).sum() for part in sample.parts]

    results, _ = explanation.measure(*loaded, [sample], share)
    assert [result.inside for result in results] == pytest.approx([0.5] * len(results))


def test_the_cosines_are_those_of_patches_and_tokens_before_pooling(loaded, samples):
    import torch

    model, processor = loaded
    sample = next(sample for sample in samples if any(" " in part.phrase for part in sample.parts))
    maps = explanation.compare_patches(model, processor, sample)
    with torch.no_grad():
        patches = model.get_patch_features(processor(images=sample.image, return_tensors="pt")["pixel_values"])[0]
        tokens = model.get_token_features(processor(text=[sample.text], return_tensors="pt")["input_ids"])[0]
    for part, scores in zip(sample.parts, maps, strict=True):
        first = processor.count_tokens(sample.text[: part.start]) - 1
        chosen = tokens[first : first + processor.count_tokens(part.phrase) - 2]
        phrase = sum(token / token.norm() for token in chosen)
        expected = torch.cosine_similarity(phrase, patches, dim=-1)
        assert scores.shape == GRID and np.allclose(scores, expected, atol=1e-5)


def test_the_words_of_a_phrase_are_explained(loaded, samples):
    for sample in samples[:3]:
        whole = explain(*loaded, sample.image, sample.text)
        for part, scores in zip(sample.parts, explanation.explain_words(*loaded, sample), strict=True):
            bare = [word.strip(".,") for word in whole.words]
            words = part.phrase.split()
            (first,) = [place for place in range(len(bare)) if bare[place : place + len(words)] == words]
            expected = sum(whole.scores[first : first + len(words)])
            assert scores.shape == GRID and np.allclose(scores, expected, atol=1e-6)


def test_the_benchmark_prints_a_table(capsys):
    explanation.main(["--model", str(BACKBONE), "--images", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["method", "---", "random", "cosine", "explain"]
    pairs, pointing, inside, deletion = ([float(line.split("|")[cell]) for line in lines[2:]] for cell in (2, 3, 4, 5))
    assert pairs[0] == pairs[1] == pairs[2] == sum(map(int, re.findall(r"\((\d+)\)", lines[0]))) > 3
    assert pointing[2] > pointing[0] and inside[2] > inside[1] and deletion[2] > deletion[0]
    assert len({line.count("|") for line in lines}) == 1


def test_mistakes_are_reported_before_the_model_is_loaded(capsys, monkeypatch):
    from eccl.hub import loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model is loaded"))
    with pytest.raises(SystemExit) as raised:
        explanation.main(["--model", str(BACKBONE), "--images", "0"])
    assert raised.value.code == 2 and "argument --images: 0 is too small" in capsys.readouterr().err


def test_captions_that_the_model_cannot_read_are_left_out(capsys, monkeypatch, loaded):
    from eccl.hub import loading

    monkeypatch.setattr(loading, "load_model", lambda *_: loaded)
    monkeypatch.setattr(loaded[1], "max_text_length", 4)
    with pytest.raises(SystemExit):
        explanation.main(["--model", "none", "--images", "2"])
    assert "no caption of these pictures names a part within 4 tokens: draw more" in capsys.readouterr().err


def test_the_same_seed_draws_the_same_picture():
    first, again, other = (explanation.draw_sample(3, seed, GRID) for seed in (0, 0, 1))
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes() and first.text == again.text
