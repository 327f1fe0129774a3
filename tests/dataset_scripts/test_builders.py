import io
import json
import os
import shutil
import tempfile
import warnings
from pathlib import Path

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl import processing_eccl
from eccl.dataset_scripts import annotations
from eccl.dataset_scripts.base import published_differences
from eccl.processing_eccl import read_image


def write_records(root, records, annotation="reid_raw.json"):
    (root / annotation).write_text(json.dumps(records))


@pytest.mark.parametrize(
    ("name", "folder", "annotation", "path_key"),
    [
        ("cuhk_pedes", "CUHK-PEDES", "reid_raw.json", "file_path"),
        ("icfg_pedes", "ICFG-PEDES", "ICFG-PEDES.json", "file_path"),
        ("icfg_pedes", "ICFG-PEDES", "ICFG_PEDES.json", "file_path"),
        ("rstpreid", "RSTPReid", "data_captions.json", "img_path"),
        ("synthetic_pedes", "synthetic_pedes", "data_captions.json", "img_path"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_each_layout_loads_by_name(make_raw, name, folder, annotation, path_key, streaming):
    root, records = make_raw(folder, annotation, path_key)
    for data_dir in (root, root.parent):
        splits = datasets.load_dataset(name, data_dir=str(data_dir), streaming=streaming)
        assert list(splits) == ["train", "val", "test"]
        for split, rows in splits.items():
            expected = [record for record in records if record["split"] == split]
            rows = list(rows)
            assert [row["person_id"] for row in rows] == [record["id"] for record in expected]
            assert [row["captions"] for row in rows] == [record["captions"] for record in expected]
            assert [row["file_path"] for row in rows] == [record[path_key] for record in expected]
            assert [row["image_id"] for row in rows] == list(range(len(expected)))
            for row in rows:
                assert row["image"].size == Image.open(root / "imgs" / row["file_path"]).size


def test_a_row_has_the_path_of_its_image_and_not_its_bytes(make_raw):
    root, _ = make_raw()
    rows = datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train")
    stored = rows.cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert stored == {"bytes": None, "path": str(root / "imgs" / "cam_a/0.jpg")}


def test_a_changed_annotation_or_image_is_read_again(make_raw):
    root, records = make_raw()
    load = lambda: datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train")  # noqa: E731
    assert load()[0]["captions"][0] == "A person in a coat number 0."
    records[0]["captions"] = ["Another caption."]
    write_records(root, records)
    assert load()[0]["captions"] == ["Another caption."]
    (root / "imgs" / "cam_a" / "0.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"record 0: 'cam_a/0.jpg' cannot be decoded"):
        load()


def truncate(root):
    file = root / "imgs" / "cam_a" / "2.jpg"
    file.write_bytes(file.read_bytes()[:400])


def link_out(root):
    file = root / "imgs" / "cam_a" / "2.jpg"
    outside = root.parent / "secret.jpg"
    file.rename(outside)
    os.symlink(outside, file)


RECORD_FAULTS = [
    (lambda r: r.pop("id"), "record 2: id is missing"),
    (lambda r: r.pop("captions"), "record 2: captions is missing"),
    (lambda r: r.pop("file_path"), "record 2: file_path is missing"),
    (lambda r: r.update(id="7"), "record 2: id is '7', it must be a whole number"),
    (lambda r: r.update(id=True), "record 2: id is True"),
    (lambda r: r.update(id=2**31), "record 2: id is 2147483648, it must fit into 32 bits"),
    (lambda r: r.update(split="training"), "record 2: split is 'training', it must be one of train, val, test"),
    (lambda r: r.update(captions="a man"), "record 2: captions is 'a man', it must be a list"),
    (lambda r: r.update(captions=["a man", "  "]), r"record 2: captions\[1\] is '  '"),
    (lambda r: r.update(captions=[]), r"record 2: captions is \[\]"),
    (lambda r: r.update(file_path="/etc/passwd"), "record 2: file_path is '/etc/passwd', it must stay below imgs/"),
    (lambda r: r.update(file_path="cam_a/../../x.jpg"), "must stay below imgs/"),
    (lambda r: r.update(file_path="cam_a/./0.jpg"), "is already the image of record 0"),
    (lambda r: r.update(id=20), "record 4: id 20 is in split val, but in split train in record 2"),
    (lambda r: r.update(file_path="cam_z/0.jpg"), "'cam_z/0.jpg' does not exist, nor does its folder .*cam_z"),
    (lambda r: r.update(file_path="cam_a/99.jpg"), "'cam_a/99.jpg' does not exist"),
]


@pytest.mark.parametrize(("spoil", "message"), RECORD_FAULTS, ids=[message[:50] for _, message in RECORD_FAULTS])
def test_the_message_about_a_faulty_record_has_file_field_and_value(make_raw, spoil, message):
    root, records = make_raw()
    spoil(records[2])
    write_records(root, records)
    with pytest.raises(ValueError, match=message) as error:
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    assert str(root / "reid_raw.json") in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "'cam_a/2.jpg' cannot be decoded"),
        (lambda root: (root / "imgs" / "cam_a" / "2.jpg").write_bytes(b""), r"'cam_a/2.jpg' is empty \(0 bytes\)"),
        (link_out, "'cam_a/2.jpg' is a link to a file outside imgs/"),
    ],
)
def test_a_faulty_image_is_reported_or_skipped(make_raw, spoil, message):
    root, _ = make_raw()
    spoil(root)
    with pytest.raises(ValueError, match=f"record 2: {message}"):
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    with pytest.warns(UserWarning, match=rf"1 unreadable images are left out: \n- record 2: {message}"):
        rows = datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train", on_bad_image="skip")
    assert rows["file_path"] == ["cam_a/0.jpg", "cam_a/1.png", "cam_a/3.png"]


def test_one_message_has_all_problems(make_raw):
    root, records = make_raw()
    records[0]["split"] = "x"
    del records[1]["id"]
    records[5]["captions"] = [3]
    write_records(root, records)
    with pytest.raises(ValueError, match="3 problems") as error:
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    assert all(f"record {number}: " in str(error.value) for number in (0, 1, 5))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "contains a dict, it must contain a list"), ("[{", "is not JSON"), ("[]", "contains no records")],
)
def test_a_file_that_is_not_an_annotation_is_refused(make_raw, content, message):
    root, _ = make_raw()
    (root / "reid_raw.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))


def test_the_message_about_a_missing_annotation_says_what_was_found(make_raw, tmp_path):
    root, _ = make_raw()
    (root / "reid_raw.json").rename(root / "caption_all.json")
    with pytest.raises(FileNotFoundError, match=r"no reid_raw.json in .* caption_all.json was found, but .* no splits"):
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        datasets.load_dataset("cuhk_pedes", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data_dir is missing"):
        datasets.load_dataset("cuhk_pedes")


def test_other_formats_of_datasets_still_load(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert datasets.load_dataset("json", data_files=str(tmp_path / "rows.json"), split="train")["a"] == [1, 2]


def load_train(root, **arguments):
    return datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train", **arguments)


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_means_val(make_raw, streaming):
    root, records = make_raw()
    records[4]["split"] = "validation"
    write_records(root, records)
    load = lambda split: datasets.load_dataset(  # noqa: E731
        "cuhk_pedes", data_dir=str(root), split=split, streaming=streaming
    )
    for split in ("val", "validation", datasets.Split.VALIDATION):
        assert [row["person_id"] for row in load(split)] == [20]
    assert [row["person_id"] for row in load("validation+test")] == [20, 30]
    if not streaming:
        first, second = load(["train", "validation[:1]"])
        assert (len(first), len(second)) == (4, 1)


def test_several_processes_give_the_same_rows(make_raw):
    root, _ = make_raw()
    alone = list(load_train(root))
    together = load_train(root, num_proc=2, download_mode="force_redownload")
    assert [row["file_path"] for row in together] == [row["file_path"] for row in alone]
    assert together["image_id"] == [0, 1, 2, 3]


def test_a_missing_folder_is_reported_once(make_raw):
    root, records = make_raw()
    for number in (0, 2, 3):
        records[number]["file_path"] = f"CUHK01/{number}.jpg"
    records[4]["file_path"] = "Market/deep/4.jpg"
    write_records(root, records)
    with pytest.raises(ValueError, match="2 problems") as error:
        load_train(root)
    assert f"the folder {root}/imgs/CUHK01 does not exist: 3 records have images there, the first is record 0" in str(
        error.value
    )
    assert f"record 4: 'Market/deep/4.jpg' does not exist, nor does its folder {root}/imgs/Market" in str(error.value)
    records[4]["file_path"] = "cam_a/4.jpg"
    write_records(root, records)
    with pytest.warns(UserWarning, match=r"3 unreadable images are left out(.|\n)*CUHK01 does not exist: 3 records"):
        rows = load_train(root, on_bad_image="skip")
    assert rows["file_path"] == ["cam_a/1.png"]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_images_of_an_unchanged_data_set_are_decoded_once(make_raw, monkeypatch, streaming, tmp_path):
    root, _ = make_raw()
    opened = []
    monkeypatch.setattr(processing_eccl, "read_image", lambda path: opened.append(path) or read_image(path))
    load = lambda: load_train(root, streaming=streaming, cache_dir=str(tmp_path / "cache"))  # noqa: E731
    load()
    assert len(opened) == 6
    load()
    assert len(opened) == 6
    os.utime(root / "imgs" / "cam_a" / "3.png", (1, 1))
    load()
    assert len(opened) == 12


def test_a_size_that_was_not_published_gives_a_warning_with_both_sizes(make_raw):
    root, _ = make_raw()
    with pytest.warns(UserWarning, match="is not the published CUHK-PEDES") as warned:
        load_train(root)
    text = str(warned[0].message)
    assert "train has 3 ids, 4 images, 8 captions; published: 11,003 ids, 34,054 images, 68,126 captions" in text
    published = {"train": annotations.SplitSize(1, 1, 1), "val": annotations.SplitSize(1, 2, 3)}
    assert annotations.size_differences(published, published) == []
    assert annotations.size_differences(published, {}) == []
    only_train = {"train": published["train"]}
    assert annotations.size_differences(only_train, published) == [
        "val has nothing; published: 1 ids, 2 images, 3 captions"
    ]


def test_a_data_set_that_says_it_is_synthetic_gives_no_warning_about_its_size(make_raw):
    root, _ = make_raw()
    (root / "synthetic.json").write_text("{}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_train(root)) == 4


def test_a_split_is_compared_with_its_published_size(make_raw):
    root, _ = make_raw()
    splits = datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    published = {"train": annotations.SplitSize(3, 4, 8), "test": annotations.SplitSize(1, 2, 3)}
    layout = annotations.Layout("X", ("x.json",), ("file_path",), published)
    assert published_differences(layout, "train", splits["train"]) == []
    assert published_differences(layout, "test", splits["test"]) == [
        "test has 1 ids, 1 images, 2 captions; published: 1 ids, 2 images, 3 captions"
    ]
    # ICFG-PEDES has published sizes, but no val split.
    assert published_differences(layout, "val", splits["val"]) == []
    nothing_published = annotations.Layout("X", ("x.json",), ("file_path",))
    assert published_differences(nothing_published, "test", splits["test"]) == []


UNUSUAL_FAULTS = [
    ('[{"split": "train"}' + "[" * 100_000, "is not JSON"),
    ("[" * 100_000 + "]" * 100_000, "is not JSON"),
    ('[{"id": ' + "9" * 5000 + "}]", "is not JSON"),
    ('["a"]', "record 0: is a str, it must be an object"),
    (r'[{"split": "train", "id": 1, "captions": ["half \ud800"], "file_path": "a"}]', r"captions\[0\] .* UTF-8"),
    (r'[{"split": "train", "id": 1, "captions": ["a"], "file_path": "a\u0000b"}]', "it must be a valid file path"),
    (r'[{"split": "train", "id": 1, "captions": ["a"], "file_path": "\ud800"}]', "it must be a valid file path"),
    ('[{"split": "train", "id": 1, "captions": ["a"], "file_path": "' + "x" * 5000 + '"}]', "record 0: .*too long"),
    ('[{"split": "train", "id": 1, "captions": ["a"], "file_path": "cam_a"}]', "record 0: 'cam_a' is a folder"),
    ('[{"id": 1, "id": 2, "split": "train", "captions": ["a"], "file_path": "a"}]', "record 0: contains a key twice"),
    (
        r'[{"split": "train", "id": 1, "captions": ["\u0001&nbsp;."], "file_path": "a"}]',
        r"captions\[0\] is .*a sentence",
    ),
    (
        '[{"split": "' + "x" * 9999 + '", "id": 1, "captions": ["a"], "file_path": "a"}]',
        r"split is 'x+\.\.\. \(10,001 characters\), it",
    ),
    ('[{"split": ["train"], "id": 1, "captions": ["a"], "file_path": "a"}]', r"split is \['train'\]"),
    ('[{"split": "train", "id": 1.0, "captions": {"a": 1}, "file_path": 3}]', "3 problems"),
]


@pytest.mark.parametrize(("content", "message"), UNUSUAL_FAULTS, ids=[message for _, message in UNUSUAL_FAULTS])
def test_unusual_faults_are_reported(make_raw, content, message):
    root, _ = make_raw()
    (root / "reid_raw.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_train(root)


def test_circular_links_and_decompression_bombs_are_reported(make_raw, monkeypatch):
    root, _ = make_raw()
    (root / "imgs" / "cam_a" / "2.jpg").unlink()
    os.symlink(root / "imgs" / "cam_a" / "2.jpg", root / "imgs" / "cam_a" / "2.jpg")
    with pytest.raises(ValueError, match="record 2: "):
        load_train(root)
    root, _ = make_raw("other")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"record 0: .*decompression bomb"):
        load_train(root)


def test_a_byte_order_mark_is_accepted(make_raw):
    root, records = make_raw()
    (root / "reid_raw.json").write_text(json.dumps(records), encoding="utf-8-sig")
    assert len(load_train(root)) == 4


# -- Random annotations, valid or not, compared with a reader that knows only the rules.

FILES = ("a.png", "b.jpg", "sub/c.png", "d.png")


@st.composite
def some_records(draw):
    value = {
        "split": st.sampled_from(["train", "train", "val", "validation", "test", "Train", None, 3]),
        "id": st.one_of(st.integers(-3, 3), st.sampled_from([True, "1", 1.5, 2**40, None])),
        "captions": st.one_of(
            st.lists(st.sampled_from(["a man", "x", "Ünïcode", " ", ".", 7]), max_size=3), st.just("a man"), st.none()
        ),
        "file_path": st.sampled_from([*FILES, "./a.png", "../a.png", "/a.png", "sub/../b.jpg", "", 5, None]),
    }
    good = {
        "split": st.just("train"),
        "id": st.integers(0, 5),
        "captions": st.just(["a man"]),
        "file_path": st.sampled_from(["a.png", "b.jpg", "sub/c.png"]),
    }
    records = []
    for _ in range(draw(st.integers(1, 5))):
        spoiled = draw(st.sampled_from(["", "", "split", "id", "captions", "file_path", "all"]))
        record = {name: draw(value[name] if spoiled in (name, "all") else good[name]) for name in good}
        records.append({name: entry for name, entry in record.items() if entry is not None})
    return records


def plain_reader(records, folder):
    """Returns the rows, and the numbers of the faulty records, by the rules of the format.

    `folder` has the kind of each file; it can be read if its kind is "good".
    """
    rows, faulty, sound = [], set(), []
    for number, record in enumerate(records):
        split, person = record.get("split"), record.get("id")
        captions, path = record.get("captions"), record.get("file_path")
        split = "val" if split == "validation" else split
        fine = split in ("train", "val", "test") and type(person) is int and abs(person) < 2**31
        fine = fine and isinstance(captions, list) and len(captions) > 0
        fine = fine and all(isinstance(caption, str) and caption.strip(" .") for caption in captions)
        fine = fine and isinstance(path, str) and path != "" and not path.startswith("/") and ".." not in path
        if not fine:
            faulty.add(number)
            continue
        plain = path.removeprefix("./")
        if folder[plain] != "good" or any(plain == other for _, other, _, _ in sound):
            faulty.add(number)
        if split != next((theirs for _, _, other, theirs in sound if person == other), split):
            faulty.add(number)
        sound.append((number, plain, person, split))
        rows.append({"split": split, "person_id": person, "captions": captions, "file_path": path})
    return rows, faulty


GOOD_IMAGE = io.BytesIO()
Image.new("RGB", (8, 9), (200, 30, 60)).save(GOOD_IMAGE, "PNG")
CONTENTS = {
    "good": GOOD_IMAGE.getvalue(),
    "truncated": GOOD_IMAGE.getvalue()[:-25],
    "no image": b"\xff\xd8\xff\xe0 text",
    "empty": b"",
}


def write_folder(root, folder):
    (root / "outside.png").write_bytes(CONTENTS["good"])
    for name, kind in folder.items():
        file = root / "imgs" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "link out":
            os.symlink(root / "outside.png", file)
        elif kind == "folder":
            file.mkdir()
        elif kind != "missing":
            file.write_bytes(CONTENTS[kind])


@settings(deadline=None, max_examples=150)
@given(
    records=some_records(),
    kinds=st.lists(
        st.sampled_from(["good", "good", "good", *CONTENTS, "link out", "folder", "missing"]), min_size=4, max_size=4
    ),
)
def test_a_random_annotation_is_read_or_every_faulty_record_is_reported(records, kinds):
    layout = annotations.Layout("X", ("x.json",), ("file_path",))
    folder = dict(zip(FILES, kinds, strict=True))
    rows, faulty = plain_reader(records, folder)
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        write_folder(root, folder)
        (root / "x.json").write_text(json.dumps(records))
        if not faulty:
            read = annotations.read_records(root / "x.json", layout)
            assert [{name: row[name] for name in rows[0]} for row in read] == rows
            return
        with pytest.raises(ValueError, match="problems") as error:
            annotations.read_records(root / "x.json", layout)
    lines = str(error.value).splitlines()[1:]
    reported = {int(line.removeprefix("- record ").split(":")[0]) for line in lines}
    # All links out of the data set share one line.
    is_link = lambda number: folder.get(str(records[number].get("file_path")).removeprefix("./")) == "link out"  # noqa: E731
    unnamed = {number for number in faulty - reported if is_link(number)}
    assert reported | unnamed == faulty
    assert sum("is a link to a file outside imgs/" in line for line in lines) == bool(
        unnamed or any("is a link" in line for line in lines)
    )


def test_rows_can_be_read_from_any_working_directory(make_raw, monkeypatch, tmp_path):
    root, _ = make_raw()
    monkeypatch.chdir(root.parent)
    rows = datasets.load_dataset("cuhk_pedes", data_dir=root.name, split="train")
    monkeypatch.chdir("/")
    assert rows[0]["image"].size == (37, 91)
    # Another copy of the data set with the same relative path has other rows.
    shutil.copytree(root, tmp_path / "elsewhere" / root.name)
    monkeypatch.chdir(tmp_path / "elsewhere")
    other = datasets.load_dataset("cuhk_pedes", data_dir=root.name, split="train")
    path = other.cast_column("image", datasets.Image(decode=False))[0]["image"]["path"]
    assert path.startswith(str(tmp_path / "elsewhere"))


def test_two_records_that_link_to_one_file_are_reported(make_raw):
    root, records = make_raw()
    images = root / "imgs" / "cam_a"
    (images / "5.png").unlink()
    os.symlink(images / "0.jpg", images / "5.png")
    with pytest.raises(
        ValueError, match=r"record 5: 'cam_a/5.png' links to the same file as 'cam_a/0.jpg' of record 0"
    ):
        load_train(root)
    (images / "5.png").unlink()
    os.symlink(images, root / "imgs" / "again")
    records[5]["file_path"] = "again/0.jpg"
    write_records(root, records)
    with pytest.raises(
        ValueError, match=r"record 5: 'again/0.jpg' links to the same file as 'cam_a/0.jpg' of record 0"
    ):
        load_train(root, on_bad_image="skip")


def test_every_load_warns_about_skipped_images_and_no_split_becomes_empty(make_raw):
    root, _ = make_raw()
    truncate(root)
    for streaming in (False, False, True, True):
        with pytest.warns(UserWarning, match=r"1 unreadable images are left out: \n- record 2"):
            rows = load_train(root, on_bad_image="skip", streaming=streaming)
        assert len(list(rows)) == 3
    (root / "imgs" / "cam_a" / "4.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="no image of split val can be read"):
        load_train(root, on_bad_image="skip")


def test_a_file_that_changes_within_the_same_size_and_time_is_read_again(make_raw):
    root, _ = make_raw()
    file = root / "imgs" / "cam_a" / "2.jpg"
    content, status = file.read_bytes(), file.stat()
    file.write_bytes(b"\xff" * len(content))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ValueError, match="record 2"):
        load_train(root)
    # Size and time of modification are the same: only st_ctime differs.
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(load_train(root)) == 4


def test_two_different_annotation_files_are_refused(make_raw):
    root, records = make_raw("ICFG-PEDES", "ICFG-PEDES.json")
    write_records(root, records, "ICFG_PEDES.json")
    assert len(datasets.load_dataset("icfg_pedes", data_dir=str(root), split="train")) == 4
    write_records(root, records[:3], "ICFG_PEDES.json")
    with pytest.raises(ValueError, match=r"ICFG-PEDES.json and .*ICFG_PEDES.json are different files"):
        datasets.load_dataset("icfg_pedes", data_dir=str(root))
