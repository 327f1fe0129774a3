import json
import os
import warnings

import datasets
import pytest
from PIL import Image

import eccl.dataset_scripts  # noqa: F401  (registers the builders)


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
def test_each_layout_loads_by_name_as_a_plain_reader_would_read_it(
    make_raw, name, folder, annotation, path_key, streaming
):
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


def test_the_row_keeps_the_path_not_the_bytes(make_raw):
    root, _ = make_raw()
    rows = datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train")
    stored = rows.cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert stored == {"bytes": None, "path": str(root / "imgs" / "cam_a/0.jpg")}


def test_a_changed_annotation_or_image_is_noticed(make_raw):
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
    (lambda r: r.update(file_path="cam_a/./0.jpg"), "is the image of record 0 already"),
    (lambda r: r.update(id=20), "record 4: id 20 is in split val, but in train in record 2"),
    (lambda r: r.update(file_path="cam_z/0.jpg"), "'cam_z/0.jpg' does not exist, nor does its folder .*cam_z"),
    (lambda r: r.update(file_path="cam_a/99.jpg"), "'cam_a/99.jpg' does not exist"),
]


@pytest.mark.parametrize(("spoil", "message"), RECORD_FAULTS, ids=[message[:50] for _, message in RECORD_FAULTS])
def test_a_faulty_record_is_named_with_file_field_and_value(make_raw, spoil, message):
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
        (link_out, "'cam_a/2.jpg' is a link that leads out of"),
    ],
)
def test_a_faulty_image_is_named_and_can_be_skipped(make_raw, spoil, message):
    root, _ = make_raw()
    spoil(root)
    with pytest.raises(ValueError, match=f"record 2: {message}"):
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    with pytest.warns(UserWarning, match=rf"1 unreadable images are left out: \n- record 2: {message}"):
        rows = datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train", on_bad_image="skip")
    assert rows["file_path"] == ["cam_a/0.jpg", "cam_a/1.png", "cam_a/3.png"]


def test_all_problems_come_together(make_raw):
    root, records = make_raw()
    records[0]["split"] = "x"
    del records[1]["id"]
    records[5]["captions"] = [3]
    write_records(root, records)
    with pytest.raises(ValueError, match="3 problems") as error:
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    assert all(f"record {number}: " in str(error.value) for number in (0, 1, 5))


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "holds a dict, it must hold a list"), ("[{", "is not JSON"), ("[]", "no records")]
)
def test_an_annotation_that_is_none_is_refused(make_raw, content, message):
    root, _ = make_raw()
    (root / "reid_raw.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))


def test_a_missing_annotation_is_explained(make_raw, tmp_path):
    root, _ = make_raw()
    (root / "reid_raw.json").rename(root / "caption_all.json")
    with pytest.raises(FileNotFoundError, match=r"no reid_raw.json in .* caption_all.json is there, but .* no splits"):
        datasets.load_dataset("cuhk_pedes", data_dir=str(root))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        datasets.load_dataset("cuhk_pedes", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="data_dir is missing"):
        datasets.load_dataset("cuhk_pedes")


def test_the_librarys_own_formats_still_load(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert datasets.load_dataset("json", data_files=str(tmp_path / "rows.json"), split="train")["a"] == [1, 2]
