import hashlib
import json
import random
import re
from collections import Counter

import datasets
import numpy as np
import PIL
import pytest

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.dataset_scripts.cuhk_pedes import CuhkPedes
from eccl.dataset_scripts.synthetic import ANNOTATION_FILES, LABELS_FILE, SyntheticBenchmark, write_benchmark
from eccl.dataset_scripts.synthetic import __main__ as generate_command
from eccl.dataset_scripts.synthetic import captions as grammar
from eccl.dataset_scripts.synthetic.__main__ import main
from eccl.dataset_scripts.synthetic.appearance import sample_appearance
from eccl.dataset_scripts.synthetic.attribute_loss import read_attribute_labels
from eccl.dataset_scripts.synthetic.captions import DOMAINS, make_caption
from eccl.dataset_scripts.synthetic.drawing import draw_person
from eccl.dataset_scripts.synthetic.people import (
    ATTRIBUTES,
    attribute_labels,
    oracle_rank1,
    sample_lookalikes,
    sample_person,
)

SMALL = {"train_ids": 3, "val_ids": 2, "test_ids": 2, "images_per_id": 2}


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]


@pytest.mark.parametrize("layout", ["cuhk_pedes", "icfg_pedes", "rstpreid"])
@pytest.mark.parametrize("domain", ["source", "target"])
def test_each_layout_is_written_as_its_builder_reads_it(tmp_path, layout, domain):
    sizes = SMALL | ({"val_ids": 0, "captions_per_image": 1} if layout == "icfg_pedes" else {})
    report = write_benchmark(SyntheticBenchmark(layout, domain=domain, **sizes), tmp_path / "set", num_workers=1)
    for name in (layout, "synthetic_pedes"):
        splits = datasets.load_dataset(name, data_dir=str(tmp_path / "set"))
        for split, rows in splits.items():
            captions = sum(map(len, rows["captions"]))
            expected = {"ids": len(set(rows["person_id"])), "images": len(rows), "captions": captions}
            assert report["counts"][split] == expected
            assert all(row["image"].size == (128, 384) and row["image"].format == "JPEG" for row in rows)
        people = [set(rows["person_id"]) for rows in splits.values()]
        assert len(set.union(*people)) == sum(map(len, people))


def test_the_seed_decides_every_byte(tmp_path):
    for name, seed, workers in (("a", 4, 1), ("b", 4, 2), ("c", 5, 1)):
        write_benchmark(SyntheticBenchmark("cuhk_pedes", seed=seed, **SMALL), tmp_path / name, num_workers=workers)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert not {sha for _, sha in digest(tmp_path / "a")} & {sha for _, sha in digest(tmp_path / "c")}


@pytest.mark.skipif(PIL.__version__ != "13.0.0", reason="other versions of Pillow draw and resize a little differently")
@pytest.mark.parametrize(
    ("domain", "nuisance", "expected"),
    [
        ("source", 1.0, "ed6588efcb6b2525120b58c4bdc4d1be2d40d6f3f909e8bcb58ced58329ad0c1"),
        ("source", 2.0, "3240a8f4e79f86b56643c80da134372e59a01c4c9c89175563dd90665bc87429"),
        ("target", 1.0, "f9d3d382bba8c26207c1d0f92d96feab3d42d718a04897bcc9725eea931edc90"),
        ("target", 2.0, "bd567b6d14c78f5a34a2df01ca158a1a3796d6ef8b895e6449325bd1d10862b5"),
    ],
)
def test_the_pixels_of_a_seed_stay_the_same(domain, nuisance, expected):
    """The digests are those of the first version of the drawings; 60 persons reach every line of the drawing code."""
    pixels = hashlib.sha256()
    for seed in range(60):
        rng = random.Random(seed)
        person = sample_person(rng)
        image = draw_person(person, sample_appearance(person, domain, rng), domain, rng, nuisance)
        pixels.update(image.tobytes())
    assert pixels.hexdigest() == expected


@pytest.mark.parametrize(
    ("domain", "expected"),
    [
        ("source", "5aa37dec0c344ab6e69fb93099212a911a35e8a6705d773fef014e19d2eba31e"),
        ("target", "19c56bdecf04d612ed03b990771accef9fecf23356d50e7bc375730558719723"),
    ],
)
def test_the_annotation_of_a_seed_stays_the_same(tmp_path, domain, expected):
    sizes = {"train_ids": 20, "val_ids": 2, "test_ids": 2, "images_per_id": 2}
    write_benchmark(SyntheticBenchmark("cuhk_pedes", seed=4, domain=domain, **sizes), tmp_path / "set", num_workers=1)
    assert hashlib.sha256((tmp_path / "set" / "reid_raw.json").read_bytes()).hexdigest() == expected


def test_the_same_benchmark_is_kept_and_another_folder_is_not_touched(tmp_path, capsys):
    sizes = ("--train_ids", "--val_ids", "--test_ids", "--images_per_id", "--num_workers")
    arguments = ["--layout", "rstpreid", *(word for size in sizes for word in (size, "1"))]
    main([*arguments, "--output_dir", str(tmp_path / "set")])
    assert "oracle Rank-1 100.0%" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    main([*arguments, "--output_dir", str(tmp_path / "set")])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--seed", "9", "--output_dir", str(tmp_path / "set")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "is not empty" in error and "other arguments (seed 0 instead of 9)" in error
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "market"}, "layout is 'market'"),
        ({"domain": "mars"}, "domain is 'mars'"),
        ({"train_ids": -1}, "train_ids is -1"),
        ({"images_per_id": 0}, "images_per_id is 0"),
        ({"layout": "icfg_pedes", "val_ids": 5}, "val_ids is 5"),
        ({"mentions": 0}, "mentions is 0"),
        ({"nuisance": -1}, "nuisance is -1"),
        ({"lookalikes": 0}, "lookalikes is 0, it must be from 1 to 100"),
        ({"lookalikes": 101}, "lookalikes is 101"),
        ({"caption_noise": -0.1}, "caption_noise is -0.1, it must be at least 0 and below 1"),
        ({"caption_noise": 1.0}, "caption_noise is 1.0"),
        ({"caption_noise": float("nan")}, "caption_noise is nan"),
        ({"caption_noise": 0.1, "train_ids": 1}, "caption_noise is 0.1, it must be 0: train_ids is 1"),
        ({"agreement": 1.5}, "agreement is 1.5, it must be from 0 to 1"),
        ({"agreement": float("nan")}, "agreement is nan"),
        ({"images": (299, 200, 600)}, "train has 300 ids, 299 images and 598 captions"),
        ({"captions": (2400, 100, 1200)}, "val has 50 ids, 200 images and 100 captions"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        SyntheticBenchmark(**({"layout": "cuhk_pedes"} | changes))


def test_the_oracle_equals_counting_compatible_images():
    rng = random.Random(0)
    people = [sample_person(rng) for _ in range(40)]
    images = [rng.randint(1, 4) for _ in people]
    queries = []
    for _ in range(100):
        queries.append((rng.randrange(40), rng.sample(list(ATTRIBUTES), rng.randint(0, 4))))
    expected = 0.0
    for index, names in queries:
        fits = [all(person[name] == people[index][name] for name in names) for person in people]
        expected += images[index] / sum(count for count, fit in zip(images, fits, strict=True) if fit)
    assert oracle_rank1(people, images, queries) == pytest.approx(expected)


@pytest.mark.parametrize("domain", ["source", "target"])
def test_the_benchmark_is_neither_trivial_nor_impossible(domain):
    rng = random.Random(7)
    people = [sample_person(rng) for _ in range(150)]
    queries = [(index, make_caption(person, domain, rng)[1]) for index, person in enumerate(people) for _ in range(8)]
    assert 95 < oracle_rank1(people, [4] * 150, queries) < 99
    assert 7 < np.mean([len(names) for _, names in queries]) < 9


def test_captions_mention_only_attributes_that_the_person_has():
    rng = random.Random(3)
    for _ in range(300):
        person = sample_person(rng)
        caption, names = make_caption(person, "source", rng)
        assert caption[0].isupper() and caption.endswith(".") and "{" not in caption and "  " not in caption
        assert len(caption.split()) >= 4
        assert not (person["bag"] == "none" and "bag" in names) and not (person["hat"] == "none" and "hat" in names)
        if "upper_colour" in names and person["upper_colour"] in ("green", "black", "blue"):
            assert person["upper_colour"] in caption.lower()
        if "gender" in names:
            words = caption.lower().replace(".", "").replace(",", "").split()
            other = (
                {"man", "guy", "male", "he", "his"} if person["gender"] == "woman" else {"woman", "lady", "she", "her"}
            )
            assert not other & set(words)


def test_a_person_looks_similar_in_all_pictures_and_all_pictures_differ():
    rng = random.Random(1)
    person = sample_person(rng) | {
        "upper": "coat",
        "upper_colour": "red",
        "upper_pattern": "plain",
        "lower": "trousers",
    }
    appearance = sample_appearance(person, "source", rng)
    pictures = [np.asarray(draw_person(person, appearance, "source", rng), dtype=float) for _ in range(12)]
    assert all(picture.shape == (384, 128, 3) for picture in pictures)
    # The chest is red in nearly all pictures, in any light, from any side and at any place.
    chests = np.array([picture[130:190, 50:78].mean((0, 1)) for picture in pictures])
    assert (chests[:, 0] > 1.4 * chests[:, 1]).mean() > 0.7
    assert len({picture.tobytes() for picture in pictures}) == 12


def test_the_labels_agree_with_the_captions(tmp_path):
    write_benchmark(SyntheticBenchmark("cuhk_pedes", **SMALL), tmp_path / "set", num_workers=1)
    known = json.loads((tmp_path / "set" / LABELS_FILE).read_text())
    records = json.loads((tmp_path / "set" / "reid_raw.json").read_text())
    assert all("mentioned" not in record for record in records)
    for record in records:
        labels = known["people"][str(record["id"])]
        person = {
            name: values[label] for (name, values), label in zip(known["attributes"].items(), labels, strict=True)
        }
        assert attribute_labels(person) == labels
        assert len(known["mentioned"][record["file_path"]]) == len(record["captions"])
        for caption, names in zip(record["captions"], known["mentioned"][record["file_path"]], strict=True):
            if "upper" in names and person["upper"] == "hoodie":
                assert "hood" in caption


def test_exact_totals_are_spread_evenly(tmp_path):
    benchmark = SyntheticBenchmark(
        "cuhk_pedes", train_ids=3, val_ids=1, test_ids=2, images=(7, 1, 3), captions=(15, 1, 4)
    )
    report = write_benchmark(benchmark, tmp_path / "set", num_workers=1)
    assert report["counts"]["train"] == {"ids": 3, "images": 7, "captions": 15}
    assert report["counts"]["test"] == {"ids": 2, "images": 3, "captions": 4}
    rows = datasets.load_dataset("cuhk_pedes", data_dir=str(tmp_path / "set"), split="train")
    assert rows["person_id"] == [0, 0, 0, 1, 1, 2, 2]
    assert list(map(len, rows["captions"])) == [3, 2, 2, 2, 2, 2, 2]
    # A second call finds the same benchmark, although JSON has no tuples.
    assert write_benchmark(benchmark, tmp_path / "set") == report


def test_sizes_follow_the_options_and_the_layout(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(generate_command, "write_benchmark", lambda benchmark, *_: drawn.append(benchmark) or NO_REPORT)
    main(["--size", "cuhk", "--output_dir", "somewhere"])
    assert drawn[0].counts == CuhkPedes.BUILDER_CONFIGS[0].layout.published_sizes
    main(["--size", "cuhk", "--output_dir", "somewhere", "--train_ids", "20"])
    assert drawn[1].counts == {"train": (20, 80, 160), "val": (1000, 4000, 8000), "test": (1000, 4000, 8000)}
    main(["--layout", "icfg_pedes", "--size", "medium", "--output_dir", "somewhere"])
    assert drawn[2].counts == {"train": (3000, 12000, 12000), "val": (0, 0, 0), "test": (500, 2000, 2000)}
    for options, message in (
        (("--layout", "icfg_pedes", "--size", "cuhk"), "error: val_ids is 1000, it must be 0"),
        (("--train_ids", "many"), "error: argument --train_ids: invalid int value: 'many'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*options, "--output_dir", "somewhere"])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


NO_REPORT = {"counts": {}, "oracle_rank1": {}}


def test_fewer_mentions_lower_the_oracle():
    oracles = []
    for mentions in (0.3, 0.6, 1.0):
        rng = random.Random(7)
        people = [sample_person(rng) for _ in range(150)]
        queries = [(i, make_caption(person, "source", rng, mentions)[1]) for i, person in enumerate(people * 4)]
        oracles.append(oracle_rank1(people, [4] * 150, [(i % 150, names) for i, names in queries]))
    assert oracles[0] < oracles[1] - 10 and oracles[1] < oracles[2] - 5


def test_less_nuisance_makes_photographs_more_similar():
    differences = []
    for nuisance in (0.0, 1.0, 2.0):
        rng = random.Random(1)
        person = sample_person(rng)
        appearance = sample_appearance(person, "target", rng)
        pictures = [np.asarray(draw_person(person, appearance, "target", rng, nuisance), float) for _ in range(16)]
        # Brightness and sharpness; backgrounds and poses change them little.
        means = [picture.mean() for picture in pictures]
        edges = [np.abs(np.diff(picture, axis=1)).mean() for picture in pictures]
        differences.append((np.std(means), np.std(edges)))
    assert differences[0][0] < differences[1][0] < differences[2][0]
    assert differences[0][1] < differences[1][1]


def test_a_file_instead_of_a_folder_and_a_wrong_number_of_workers_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="file exists and is not an empty folder"):
        write_benchmark(SyntheticBenchmark("cuhk_pedes", **SMALL), tmp_path / "file")
    with pytest.raises(ValueError, match="num_workers is 0, it must be at least 1"):
        write_benchmark(SyntheticBenchmark("cuhk_pedes", **SMALL), tmp_path / "set", num_workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def read_benchmark(folder):
    """Returns the content of synthetic.json, the attributes of each person, and the records of the annotation."""
    known = json.loads((folder / LABELS_FILE).read_text())
    people = {
        int(person_id): {
            name: values[label] for (name, values), label in zip(known["attributes"].items(), labels, strict=True)
        }
        for person_id, labels in known["people"].items()
    }
    return known, people, json.loads((folder / "reid_raw.json").read_text())


def read_caption(caption, domain):
    """Reads the attributes of the person from a caption: a reader that knows every word of the grammar."""

    def words_of(table):
        found = {}
        for value, groups in table.items():
            found |= {word.replace("{their} ", ""): value for word in groups[0] + groups[1 + DOMAINS.index(domain)]}
        return found

    def one_of(table):
        return "|".join(re.escape(word) for word in sorted(words_of(table), key=len, reverse=True))

    caption = re.sub(r"\b(their|her|his|the) hand\b", "hand", caption.lower())
    read = {}
    tables = {"hat": grammar._HAT, "upper": grammar._UPPER, "lower": grammar._LOWER, "shoes": grammar._SHOES}
    for name, table in (tables | {"bag": grammar._BAG}).items():
        pattern = rf"\b(?:({one_of(grammar._COLOUR)}) )?(?:({one_of(grammar._PATTERN)}) )?({one_of(table)})\b"
        for colour, cloth, noun in re.findall(pattern, caption):
            read[name] = words_of(table)[noun]
            if colour:
                read[f"{name}_colour"] = words_of(grammar._COLOUR)[colour]
            if cloth:
                read[f"{name}_pattern"] = words_of(grammar._PATTERN)[cloth]
    for phrase, value in words_of(grammar._HAIR).items():
        for colour, colour_value in (words_of(grammar._COLOUR) | {"": None}).items():
            words = " ".join(phrase.format(colour=colour).split())
            if re.search(rf"\b{words.replace('a orange', 'an orange')}\b", caption):
                read["hair"] = value
                if colour_value:
                    read["hair_colour"] = colour_value
    for name, table in {"gender": grammar._SUBJECT, "build": grammar._BUILD}.items():
        if found := re.search(rf"\b({one_of(table)})\b", caption):
            read[name] = words_of(table)[found[1]]
    return read


def is_lawful(person):
    return (
        all(person[name] in values for name, values in ATTRIBUTES.items())
        and not (person["gender"] == "man" and person["lower"] == "skirt")
        and not (person["lower"] == "jeans" and person["lower_pattern"] != "plain")
        and not (person["lower"] == "jeans" and person["lower_colour"] not in ("blue", "black", "grey"))
        and not (person["upper"] in ("jacket", "coat", "hoodie") and person["upper_pattern"] == "dotted")
        and all((person[part] == "none") == (person[f"{part}_colour"] == "none") for part in ("hat", "bag"))
    )


def differing(person, other):
    return {name for name in ATTRIBUTES if person[name] != other[name]}


def test_lookalikes_differ_from_the_first_person_in_two_attributes():
    rng = random.Random(2)
    changed = Counter()
    for _ in range(60):
        first = sample_person(rng)
        lookalikes = sample_lookalikes(first, 12, rng)
        assert all(is_lawful(person) for person in [first, *lookalikes])
        assert all(len(differing(first, person)) == 2 for person in lookalikes)
        assert len({tuple(person.values()) for person in lookalikes}) == 12
        changed.update(name for person in lookalikes for name in differing(first, person))
    assert set(changed) == set(ATTRIBUTES) - {"gender", "build"}
    assert len({tuple(person.values()) for person in sample_lookalikes(first, 100, rng)}) == 100
    few, more = (sample_lookalikes(first, count, random.Random(5)) for count in (3, 6))
    assert few == more[:3]
    for count in (-1, 101):
        with pytest.raises(ValueError, match=f"count is {count}, it must be from 0 to 100"):
            sample_lookalikes(first, count, rng)


def test_groups_of_lookalikes_stay_within_a_split(tmp_path):
    sizes = {"train_ids": 19, "val_ids": 4, "test_ids": 8, "images_per_id": 1, "seed": 3}
    for name, lookalikes, workers in (("none", 1, 1), ("one", 3, 1), ("two", 3, 2)):
        benchmark = SyntheticBenchmark("cuhk_pedes", lookalikes=lookalikes, **sizes)
        report = write_benchmark(benchmark, tmp_path / name, num_workers=workers)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert report["oracle_rank1"] == read_benchmark(tmp_path / "one")[0]["oracle_rank1"]
    without, people = (read_benchmark(tmp_path / name)[1] for name in ("none", "one"))
    groups = [
        range(start, min(start + 3, end)) for a, end in ((0, 19), (19, 23), (23, 31)) for start in range(a, end, 3)
    ]
    assert [len(group) for group in groups] == [3] * 6 + [1] + [3, 1] + [3, 3, 2]
    for group in groups:
        assert people[group[0]] == without[group[0]]
        assert all(is_lawful(people[i]) and len(differing(people[i], people[group[0]])) == 2 for i in group[1:])
        assert len({tuple(people[i].values()) for i in group}) == len(group)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_reader_of_the_tests_reads_what_captions_mention(domain):
    rng = random.Random(11)
    for _ in range(400):
        person = sample_person(rng)
        caption, names = make_caption(person, domain, rng)
        assert read_caption(caption, domain) == {name: person[name] for name in names}


@pytest.mark.parametrize("lookalikes", [1, 4])
def test_wrong_captions_are_false_and_only_in_the_training_split(tmp_path, lookalikes):
    sizes = {"train_ids": 20, "val_ids": 2, "test_ids": 2, "images_per_id": 1, "captions_per_image": 6}
    sizes["lookalikes"] = lookalikes
    for name, noise, workers in (("clean", 0.0, 1), ("noisy", 0.3, 1), ("again", 0.3, 2)):
        benchmark = SyntheticBenchmark("cuhk_pedes", caption_noise=noise, **sizes)
        report = write_benchmark(benchmark, tmp_path / name, num_workers=workers)
    assert digest(tmp_path / "noisy") == digest(tmp_path / "again")
    assert digest(tmp_path / "noisy" / "imgs") == digest(tmp_path / "clean" / "imgs")
    clean, _, right_records = read_benchmark(tmp_path / "clean")
    known, people, records = read_benchmark(tmp_path / "noisy")
    assert "wrong" not in clean and all(known["wrong"].values())
    assert sum(map(len, known["wrong"].values())) == 0.3 * 120
    assert all({*record} == {"split", "captions", "file_path", "id"} for record in records)
    hits, total = 0.0, 0
    for record, right in zip(records, right_records, strict=True):
        wrong = known["wrong"].get(record["file_path"], [])
        assert record["split"] == "train" or not wrong
        for number, caption in enumerate(record["captions"]):
            read = read_caption(caption, "source")
            mentioned = known["mentioned"][record["file_path"]][number]
            is_true = all(people[record["id"]][name] == value for name, value in read.items())
            if number in wrong:
                assert mentioned == [] and not is_true
                assert any(all(people[i][name] == value for name, value in read.items()) for i in range(20))
            else:
                assert sorted(read) == mentioned and is_true and caption == right["captions"][number]
            if record["split"] == "train":
                # A reader picks one person of the split at random among those who fit; all have one image.
                fits = [i for i in range(20) if all(people[i][name] == value for name, value in read.items())]
                hits, total = hits + (record["id"] in fits) / len(fits), total + 1
    assert report["oracle_rank1"]["train"] == pytest.approx(100 * hits / total)
    assert report["oracle_rank1"]["train"] < 71
    assert report["oracle_rank1"]["test"] == clean["oracle_rank1"]["test"]


def test_wrong_captions_have_no_attribute_labels(tmp_path):
    sizes = {"train_ids": 6, "val_ids": 1, "test_ids": 1, "images_per_id": 1}
    write_benchmark(SyntheticBenchmark("cuhk_pedes", caption_noise=0.5, **sizes), tmp_path / "set", num_workers=1)
    known, people, _ = read_benchmark(tmp_path / "set")
    rows = datasets.load_dataset("synthetic_pedes", data_dir=str(tmp_path / "set"), split="train")
    labels, _ = read_attribute_labels(rows)
    for person_id, path, of_image in zip(rows["person_id"], rows["file_path"], labels, strict=True):
        assert of_image[-1].tolist() == attribute_labels(people[person_id])
        empty = [number for number, row in enumerate(of_image[:-1]) if (row == -100).all()]
        assert empty == known["wrong"].get(path, [])


def test_a_wrong_caption_is_refused_where_every_caption_is_true(tmp_path):
    # Two persons with the same upper garment; these captions mention nothing else.
    people = [sample_person(random.Random(f"{seed}/source/{number}")) for seed in range(99) for number in range(2)]
    seed = next(seed for seed in range(99) if people[2 * seed]["upper"] == people[2 * seed + 1]["upper"])
    sizes = {"seed": seed, "train_ids": 2, "val_ids": 0, "test_ids": 0, "images_per_id": 1, "mentions": 1e-9}
    with pytest.raises(ValueError, match="100 captions of other persons are all true of person"):
        write_benchmark(SyntheticBenchmark("cuhk_pedes", caption_noise=0.5, **sizes), tmp_path / "set", num_workers=1)
    assert not (tmp_path / "set").exists()


def test_captions_of_an_image_repeat_less_with_less_agreement(tmp_path):
    sizes = {"train_ids": 25, "val_ids": 1, "test_ids": 1, "images_per_id": 1, "captions_per_image": 3}
    parts = [("hair",), ("upper_colour", "upper_pattern"), ("lower",), ("shoes",), ("hat",), ("bag",)]
    repeated, first_captions, oracles = [], [], []
    for agreement in (1.0, 0.5, 0.0):
        folder = tmp_path / str(agreement)
        benchmark = SyntheticBenchmark("cuhk_pedes", agreement=agreement, **sizes)
        oracles.append(write_benchmark(benchmark, folder, num_workers=1)["oracle_rank1"]["train"])
        known, people, records = read_benchmark(folder)
        repeated.append(0)
        first_captions.append([record["captions"][0] for record in records])
        for record in records:
            mentioned = known["mentioned"][record["file_path"]]
            for caption, names in zip(record["captions"], mentioned, strict=True):
                assert read_caption(caption, "source") == {name: people[record["id"]][name] for name in names}
                assert "upper" in names
            for part in parts:
                repeated[-1] += max(0, sum(not set(part).isdisjoint(names) for names in mentioned) - 1)
    assert repeated[0] > 1.5 * repeated[1] > 0 and repeated[2] == 0
    assert first_captions[0] == first_captions[1] == first_captions[2]
    assert digest(tmp_path / "1.0" / "imgs") == digest(tmp_path / "0.0" / "imgs")
    assert oracles[0] > oracles[2]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            "cuhk_pedes",
            [
                "94495a356913d3d322463ddc1f7c793dcff1936aafa552f2a04e9a411791a6d5",
                "a606b1cc77037e2bdbf3aeaea8a72b0e44d42ca7aaf007896b4eb4744cfc9159",
            ],
        ),
        (
            "icfg_pedes",
            [
                "24721bd7c8a56d8ae16589e1e50a9a9d4ea46f35a8d87ceb4565cafbdd9cefe6",
                "05fcbc459cef312d6378e4f02a9233a428970f446bfca53146da0869dc9402d6",
            ],
        ),
        (
            "rstpreid",
            [
                "8d9bdb5b7d2f5c9790eb7ea37ce79990d0722499af95159386142bc610c6ee9c",
                "e8753b32642fafc34fb4c931ad3a40c645b1de84783b36366c9c3cb816b8c866",
            ],
        ),
    ],
)
def test_the_later_settings_change_no_byte_by_default(tmp_path, layout, expected):
    """The digests of the annotation and of synthetic.json are those of the version before these settings."""
    benchmark = SyntheticBenchmark(layout, **(SMALL | ({"val_ids": 0} if layout == "icfg_pedes" else {})))
    write_benchmark(benchmark, tmp_path / "set", num_workers=1)
    files = [tmp_path / "set" / ANNOTATION_FILES[layout], tmp_path / "set" / LABELS_FILE]
    assert [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] == expected


def test_later_settings_are_part_of_the_benchmark(tmp_path):
    default = SyntheticBenchmark("cuhk_pedes", **SMALL)
    assert {*write_benchmark(default, tmp_path / "set", num_workers=1)["benchmark"]}.isdisjoint(
        {"lookalikes", "caption_noise", "agreement"}
    )
    with pytest.raises(FileExistsError, match=r"other arguments \(lookalikes 1 instead of 2\)"):
        write_benchmark(SyntheticBenchmark("cuhk_pedes", lookalikes=2, **SMALL), tmp_path / "set")
    changed = SyntheticBenchmark("cuhk_pedes", lookalikes=2, caption_noise=0.25, agreement=0.5, **SMALL)
    report = write_benchmark(changed, tmp_path / "changed", num_workers=1)
    assert [report["benchmark"][name] for name in ("lookalikes", "caption_noise", "agreement")] == [2, 0.25, 0.5]
    assert write_benchmark(changed, tmp_path / "changed") == report
    with pytest.raises(
        FileExistsError,
        match=r"\(lookalikes 2 instead of 1, caption_noise 0.25 instead of 0.0, agreement 0.5 instead of 1.0\)",
    ):
        write_benchmark(default, tmp_path / "changed")


@pytest.mark.parametrize("size", ["small", "medium", "cuhk"])
def test_the_command_passes_the_correspondence_settings(monkeypatch, size):
    drawn = []
    monkeypatch.setattr(generate_command, "write_benchmark", lambda benchmark, *_: drawn.append(benchmark) or NO_REPORT)
    settings = ["--lookalikes", "4", "--caption_noise", "0.2", "--agreement", "0"]
    main(["--size", size, "--output_dir", "somewhere", *settings])
    main(["--size", size, "--output_dir", "somewhere"])
    assert [(b.lookalikes, b.caption_noise, b.agreement) for b in drawn] == [(4, 0.2, 0.0), (1, 0.0, 1.0)]
    assert drawn[0].counts == drawn[1].counts
