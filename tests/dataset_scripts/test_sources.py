"""Data sets of users: the columns, the rows, the splits, and what is refused."""

import csv
import io
import json
import warnings
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ten_sources import make_sources, read_rows

from eccl.dataset_scripts.annotations import SplitSize
from eccl.dataset_scripts.base import FEATURES
from eccl.dataset_scripts.columns import parse_columns
from eccl.dataset_scripts.persons import cut_by_person, number_persons
from eccl.dataset_scripts.records import Checks
from eccl.dataset_scripts.rstpreid import RstpReid
from eccl.dataset_scripts.sources import DataSource, choose_splits, find_benchmark


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 16), (number * 20 % 256, 255 - number * 20 % 256, number)).save(file, "PNG")
    return file.getvalue()


def write_images(folder: Path, count: int, below: str = "") -> list[str]:
    (folder / below).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        (folder / below / f"{number}.png").write_bytes(picture(number))
    return [f"{number}.png" for number in range(count)]


def write_table(file: Path, images=None, **columns) -> Path:
    """Writes Parquet; `images` are contents of files."""
    file.parent.mkdir(parents=True, exist_ok=True)
    given = {} if images is None else {"image": [each and {"bytes": each, "path": None} for each in images]}
    pq.write_table(pa.table(given | columns), file)
    return file.parent


def load(source: DataSource) -> datasets.DatasetDict:
    return source.load().splits


def error_of(source: DataSource) -> str:
    with pytest.raises((ValueError, OSError)) as raised:
        source.load()
    return str(raised.value)


def test_all_local_forms_of_a_data_set_give_the_same_rows(tmp_path):
    expected = None
    for form, words in make_sources(tmp_path).items():
        options = dict(zip(words[::2], words[1::2], strict=True))
        if form == "the Hub":
            continue
        columns = [options["--columns"]] if "--columns" in options else {}
        splits = load(DataSource(options["--dataset_name"], options.get("--data_dir"), columns=columns))
        assert all(dataset.features == FEATURES for dataset in splits.values()), form
        rows = read_rows(splits)
        expected = expected or rows
        assert rows == expected, form
    assert {split: len(rows) for split, rows in expected.items()} == {"train": 8, "test": 4}


# -- Rows


def test_rows_of_an_image_are_joined_by_their_bytes_or_by_their_path(tmp_path):
    images = [picture(0), picture(1), picture(0), picture(2)]
    captions = ["a red coat", "a hat", "someone in red", "a bag"]
    folder = write_table(tmp_path / "a" / "train.parquet", images, person=[3, 4, 3, 3], text=captions)
    (rows,) = load(DataSource(str(folder))).values()
    assert rows["captions"] == [["a red coat", "someone in red"], ["a hat"], ["a bag"]]
    assert rows["person_id"] == [3, 4, 3] and rows["image_id"] == [0, 1, 2]
    assert [np.asarray(image)[0, 0, 2] for image in rows["image"]] == [0, 1, 2]
    # With paths, the paths decide: the same picture under two paths is two images.
    columns = {"person": [3, 4, 3, 3], "text": captions, "file_path": list("xyzx")}
    folder = write_table(tmp_path / "c" / "train.parquet", images, **columns)
    assert "train record 3 has the file_path of record 0, but another picture" in error_of(DataSource(str(folder)))
    folder = write_table(tmp_path / "b" / "train.parquet", [*images[:3], images[0]], **columns)
    (rows,) = load(DataSource(str(folder))).values()
    assert rows["file_path"] == ["x", "y", "z"]
    assert rows["captions"] == [["a red coat", "a bag"], ["a hat"], ["someone in red"]]


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.lists(st.sampled_from(["red", "blue", "a hat"]), min_size=1, max_size=3)),
        min_size=1,
        max_size=12,
    )
)
def test_joined_rows_are_those_of_a_dict_of_paths(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    expected: dict[str, list] = {}
    for image, captions in rows:
        expected.setdefault(f"{image}.png", []).extend(captions)
    write_table(
        folder / "train.parquet",
        [picture(image) for image, _ in rows],
        person_id=[image for image, _ in rows],
        captions=[captions for _, captions in rows],
        file_path=[f"{image}.png" for image, _ in rows],
    )
    (table,) = load(DataSource(str(folder))).values()
    entries = [
        {"image": f"{image}.png", "pid": image, "captions": captions, "split": "train"} for image, captions in rows
    ]
    lists = folder / "list"
    write_images(lists, 5)
    (lists / "pairs.json").write_text(json.dumps(entries))
    (listed,) = load(DataSource(str(lists), columns={"person_id": "pid"})).values()
    for found in (table, listed):
        assert dict(zip(found["file_path"], found["captions"], strict=True)) == expected
        assert found["file_path"] == list(expected)
        assert found["person_id"] == [int(path[0]) for path in expected]


@pytest.mark.parametrize(
    ("ids", "numbers"),
    [
        (["p2", "p10", "p2"], [1, 0, 1]),
        ([2**40, 5, 2**40], [1, 0, 1]),
        ([900, -7, 900], [900, -7, 900]),
        ([2**63, 0, 2**63], [1, 0, 1]),
    ],
)
def test_persons_of_any_kind_become_numbers_of_32_bits(tmp_path, ids, numbers):
    type_ = pa.uint64() if 2**63 in ids else None
    write_table(
        tmp_path / "train.parquet", [picture(n) for n in range(3)], pid=pa.array(ids, type_), caption=["red", "a", "b"]
    )
    (rows,) = load(DataSource(str(tmp_path))).values()
    assert rows["person_id"] == numbers
    write_images(tmp_path / "list", 3)
    entries = [{"image": f"{n}.png", "caption": "red", "pid": person} for n, person in enumerate(ids)]
    (tmp_path / "list" / "all.jsonl").write_text("\n".join(map(json.dumps, entries)))
    (rows,) = load(DataSource(str(tmp_path / "list"))).values()
    assert rows["person_id"] == numbers


def test_a_person_has_the_same_number_in_all_splits(tmp_path):
    for split, ids in (("train", ["b", "c"]), ("test", ["c", "a"])):
        write_table(tmp_path / f"{split}-0.parquet", [picture(0), picture(1)], id=ids, caption=["red", "blue"])
    splits = load(DataSource("parquet", data_dir=str(tmp_path)))
    assert splits["train"]["person_id"] == [1, 2]
    assert number_persons(["b", "c", "c", "a"]) == {"a": 0, "b": 1, "c": 2} and number_persons([3, -1]) == {}


def test_numbers_of_a_table_stay_apart(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "a.csv").write_text("image,caption,pid\n0.png,red,1\n1.png,blue,01\n")
    (rows,) = load(DataSource(str(tmp_path))).values()
    assert len(set(rows["person_id"])) == 2


def test_images_as_plain_bytes_and_metadata_of_an_imagefolder_load(tmp_path):
    write_table(tmp_path / "a" / "train.parquet", img=[picture(3)], pid=[1], texts=[["red"]])
    (rows,) = load(DataSource(str(tmp_path / "a"))).values()
    assert rows["image"][0].size == (8, 16) and rows["captions"] == [["red"]]
    for split in ("train", "query"):
        write_images(tmp_path / "b" / split, 2, "cam")
        with (tmp_path / "b" / split / "metadata.csv").open("w") as stream:
            csv.writer(stream).writerows(
                [("file_name", "text", "id"), *((f"cam/{n}.png", f"number {n}", f"{split}{n}") for n in (0, 1, 1))]
            )
    splits = load(DataSource("imagefolder", str(tmp_path / "b")))
    assert list(splits) == ["train", "query"]
    assert splits["query"]["file_path"] == ["query/cam/0.png", "query/cam/1.png"]
    assert splits["query"]["captions"] == [["number 0"], ["number 1", "number 1"]]


# -- Columns


def test_columns_are_mapped_by_the_user(tmp_path):
    images = [picture(0), picture(1)]
    write_table(tmp_path / "t.parquet", images, caption=["wrong"] * 2, wanted=["red", "blue"], who=[1, 2])
    source = DataSource(str(tmp_path), columns=["captions=wanted", "person_id=who"])
    (rows,) = load(source).values()
    assert rows["captions"] == [["red"], ["blue"]] and rows["person_id"] == [1, 2]
    message = error_of(DataSource(str(tmp_path)))
    assert "has no column for person_id (a whole number or a text for each person)" in message
    assert "it has image, caption, wanted, who" in message and "--columns person_id=COLUMN" in message
    assert "captions: 'nothing', which columns names, is not there" in error_of(
        DataSource(str(tmp_path), columns={"captions": "nothing"})
    )
    for words, reason in (
        (["pid"], "must be ROLE=COLUMN"),
        (["colour=a"], "colour=a must be ROLE=COLUMN, with a role of image, captions"),
        (["image=a", "image=b"], "image is given twice"),
    ):
        with pytest.raises(ValueError, match=reason):
            parse_columns(words)


def test_a_column_that_is_named_for_a_role_is_of_no_other(tmp_path):
    write_table(tmp_path / "t.parquet", [picture(0)], label=["a hat"], image_id=[7])
    (rows,) = load(DataSource(str(tmp_path), columns={"captions": "label"})).values()
    assert rows["captions"] == [["a hat"]] and rows["person_id"] == [7]


def test_a_list_has_its_paths_below_the_folder_or_below_imgs(tmp_path):
    write_images(tmp_path / "imgs", 2)
    for paths in (["imgs/0.png", "imgs/1.png"], ["0.png", "1.png"]):
        rows = [entry(image=path, image_id=number) for number, path in enumerate(paths)]
        rows[1]["split"] = "validation"
        (tmp_path / "all.json").write_text(json.dumps(rows))
        splits = load(DataSource(str(tmp_path)))
        assert [splits["train"]["file_path"][0], splits["val"]["file_path"][0]] == paths


def test_a_list_with_a_missing_folder_gives_no_hint_about_downloads(tmp_path):
    rows = [entry(image="gone/0.png"), entry(image="gone/1.png")]
    text = error_of(flat(tmp_path, json.dumps(rows)))
    assert "gone does not exist: 2 records have images there" in text and "newer downloads" not in text


def test_a_column_of_paths_can_be_the_image_and_its_name(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "a.csv").write_text("crop,who,sentence\n0.png,x,red\n1.png,y, two  words \n")
    columns = {"file_path": "crop", "image": "crop", "person_id": "who", "captions": "sentence"}
    (rows,) = load(DataSource(str(tmp_path), columns=columns)).values()
    assert rows["file_path"] == ["0.png", "1.png"] and rows["captions"] == [["red"], [" two  words "]]
    (tmp_path / "a.csv").write_text("image;pid;caption\n0.png;1;red\n")
    assert "a table must have commas, or tabs in a .tsv file" in error_of(DataSource(str(tmp_path)))


def test_a_column_of_images_may_have_a_name_that_is_usual_for_paths(tmp_path):
    for name, more in (("image_path", {}), ("path", {"file_name": ["x", "y"]})):
        images = [{"bytes": picture(number), "path": None} for number in range(2)]
        folder = write_table(tmp_path / name / "t.parquet", pid=[1, 2], caption=["a", "b"], **{name: images}, **more)
        (rows,) = load(DataSource(str(folder))).values()
        assert rows["image"][0].size == (8, 16) and rows["file_path"][0] == ("x" if more else "train/0000000")
    message = error_of(DataSource(str(folder), columns={"split": "caption"}))
    assert "columns: split is 'caption', but it applies to lists only" in message


# -- Splits


def test_a_single_split_is_cut_by_person(tmp_path):
    images = [picture(n) for n in range(12)]
    write_table(tmp_path / "t.parquet", images, pid=[n // 2 for n in range(12)], caption=["red coat"] * 12)
    source = DataSource(str(tmp_path))
    splits = choose_splits(source, eval_fraction=0.5, seed=1)
    persons, others = (set(part["person_id"]) for part in (splits.train, splits.evaluation))
    assert len(others) == 3 and persons | others == set(range(6)) and not persons & others
    assert splits.eval_split == "val" and "50% of the persons of train, chosen with seed 1" in splits.cut
    again = choose_splits(source, eval_fraction=0.5, seed=1)
    assert again.evaluation["file_path"] == splits.evaluation["file_path"]
    assert any(
        set(choose_splits(source, eval_fraction=0.5, seed=n).evaluation["person_id"]) != others for n in range(5)
    )
    # At least one person stays.
    assert len(set(choose_splits(source, eval_fraction=0.99).train["person_id"])) == 1
    # By default a tenth is cut off, at least one person.
    assert len(set(choose_splits(source).evaluation["person_id"])) == 1
    assert choose_splits(source, evaluated=False).evaluation is None
    with pytest.raises(ValueError, match="has no test split, only train"):
        choose_splits(source, eval_split="test")
    with pytest.raises(ValueError, match=r"eval_fraction is 1\.5, it must be between 0 and 1"):
        choose_splits(source, eval_fraction=1.5)
    with pytest.raises(ValueError, match=r"eval_fraction is 0\.5, but nothing is evaluated"):
        choose_splits(source, eval_fraction=0.5, evaluated=False)
    with pytest.raises(ValueError, match="has 1 person, at least 2 are needed"):
        cut_by_person(splits.train.filter(lambda row: row["person_id"] == min(persons)), 0.5, 0)


def test_splits_have_any_name(tmp_path):
    for split, first in (("gallery", 0), ("learn", 10)):
        folder = tmp_path / split
        write_images(folder, 2)
        lines = [{"file_name": f"{n}.png", "text": "a hat", "id": first + n} for n in range(2)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = DataSource("imagefolder", str(tmp_path))
    splits = choose_splits(source, "learn", "gallery")
    assert splits.train["person_id"] == [10, 11] and splits.evaluation["person_id"] == [0, 1]
    with pytest.raises(ValueError, match="has no train split, only gallery, learn; train_split names another one"):
        choose_splits(source)
    with pytest.raises(ValueError, match="eval_split names another one"):
        choose_splits(source, "learn", "gallary")


def test_persons_of_training_in_the_evaluation_are_refused(tmp_path):
    for split, ids in (("train", [1, 2, 3]), ("val", [4, 3, 2])):
        write_table(tmp_path / f"{split}.parquet", [picture(n) for n in range(3)], pid=ids, caption=["red"] * 3)
    source = DataSource(str(tmp_path))
    with pytest.raises(ValueError, match="2 persons are in the splits train and val, the first is person_id 2, in val"):
        choose_splits(source)
    with pytest.raises(ValueError, match="train_split and eval_split are both train"):
        choose_splits(source, eval_split="train")
    with pytest.raises(ValueError, match=r"eval_fraction is 0\.5, but .* has a split val: leave eval_fraction out"):
        choose_splits(source, eval_fraction=0.5)
    assert choose_splits(source, eval_fraction=0.5, eval_split="held_out").eval_split == "held_out"


# -- What is refused


def flat(folder: Path, content: str | bytes, name: str = "pairs.json") -> DataSource:
    write_images(folder, 3)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return DataSource(str(folder / name))


def entry(**changes) -> dict:
    return {"image": "0.png", "caption": "a red coat", "image_id": 7} | changes


BAD_LISTS = {
    "a list and a text": (
        [entry(), entry(image="1.png", caption=["a hat"])],
        "record 1: caption is ['a hat'], a list, but record 0 has a text there",
    ),
    "a number and a text": (
        [entry(), entry(image="1.png", image_id="7")],
        "image_id is '7', a text, but record 0 has a",
    ),
    "an empty person": ([entry(image_id=" ")], "record 0: image_id is ' ', it must be a whole number or a text"),
    "a person that is NaN": ([entry(image_id=float("nan"))], "record 0: image_id is nan, it must be"),
    "a person that is true": ([entry(image_id=True)], "record 0: image_id is True"),
    "a path out of the folder": ([entry(image="../x.png")], "record 0: image is '../x.png', it must stay below"),
    "a path of Windows out of the folder": ([entry(image="..\\x.png")], "must stay below the folder of the images"),
    "an absolute path": ([entry(image="/etc/passwd")], "record 0: image is '/etc/passwd', it must stay below"),
    "a path with a drive": ([entry(image="C:\\x.png")], "must stay below"),
    "plain text in place of a path": ([entry(image="a man in red")], "record 0: 'a man in red' does not exist"),
    "a caption of 100 MB": ([entry(caption="x" * 10**8)], "caption has 100,000,000 characters, the limit is 20,000"),
    "a missing key": ([entry(), {"image": "1.png", "image_id": 1}], "record 1: caption is missing"),
    "an image of two persons": ([entry(), entry(image_id=8)], "record 1: '0.png' is of person 8, but of person 7 in"),
    "a person in two splits": (
        [entry(split="train"), entry(image="1.png", split="test")],
        "record 1: id 7 is in split test, but in split train in record 0",
    ),
    "a split without a name": ([entry(split="a/b")], "record 0: split is 'a/b', it must be the name of a split"),
    "a text in place of an object": (["red"], "has no column for image"),
    "nothing": ([], "contains no records, it must contain at least one"),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_faulty_list_is_refused_by_file_record_field_and_value(tmp_path, case):
    entries, message = BAD_LISTS[case]
    text = error_of(flat(tmp_path, json.dumps(entries)))
    assert message in text and str(tmp_path / "pairs.json") in text
    assert len(text) < 2000


def test_everything_wrong_in_a_list_is_listed_together(tmp_path):
    entries = [entry(caption=" "), entry(image="none.png"), entry(image="1.png", image_id=None), entry(image="2.png")]
    text = error_of(flat(tmp_path, json.dumps(entries)))
    assert "3 problems" in text and all(f"- record {number}: " in text for number in (0, 1, 2))


BAD_FILES = {
    "a.csv": [
        (b'image,caption,pid\n0.png,"a red\n1.png,blue,2\n', "the record that starts in line 2 has a broken quote"),
        (b"image,caption,pid\n0.png,red,1\n1.png,caf\xe9,2\n", "line 3 is not UTF-8"),
        (b"image,caption,pid\n0.png,a red, coat,1\n", "line 2 has 4 fields, the header has 3"),
        (b"image,caption,caption\n0.png,a,1\n", "a column occurs twice in the header"),
        (b"image,caption,pid\n0.png,red,\n", "record 0: pid is '', it must be a whole number or a text"),
        (b"image,caption,pid\n", "contains no records"),
    ],
    "a.jsonl": [
        (b'{"image": "0.png"}\n{"image": \n', "a.jsonl, line 2, is not JSON"),
        (b'{"image": "\xff"}\n', "line 1 is not UTF-8"),
        (b'{"image": "0.png", "image": "1.png", "pid": 1, "caption": "a"}\n', "record 0: contains a key twice"),
    ],
    "a.json": [(b'{"image": 1}', "contains a dict, it must contain a list of records"), (b"[{", "is not JSON")],
    "a.parquet": [(b"PAR1 nothing", "a.parquet is not Parquet")],
    "a.txt": [(b"image", "cannot be read as a list: its name must end in .json")],
}


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name, cases in BAD_FILES.items() for case in cases]
)
def test_a_broken_file_is_refused_with_its_name_and_line(tmp_path, name, content, message):
    text = error_of(flat(tmp_path, content, name))
    assert message in text and name in text


def test_faulty_tables_are_refused_with_everything_wrong(tmp_path):
    images = [picture(0), b"no picture", None, picture(3)]
    captions = [["red", " "], ["blue"], ["hat"], []]
    write_table(tmp_path / "train.parquet", images, person_id=["a", "b", "", None], captions=captions)
    text = error_of(DataSource(str(tmp_path)))
    for line in (
        "6 problems",
        "train record 2: person_id is '', it must be a whole number or a text",
        "train record 3: person_id is None",
        "train record 3: captions is empty, it must have at least one caption",
        "train record 0: captions[1] is ' ', it must be a sentence",
        "train record 1: image cannot be decoded",
        "train record 2: image is missing",
    ):
        assert line in text
    # The second time the result of the checks is read from the cache.
    assert error_of(DataSource(str(tmp_path))) == text


def test_columns_of_a_wrong_type_are_refused_together(tmp_path):
    write_table(tmp_path / "train.parquet", image=[3], person_id=[[1]], captions=[2.5])
    text = error_of(DataSource("parquet", str(tmp_path)))
    assert "column image (image) has type int64, it must be a picture" in text
    assert "column person_id (person_id) has type list<" in text
    assert "column captions (captions) has type double, it must be a text or a list of texts" in text


def test_a_row_without_a_path_is_refused(tmp_path):
    write_table(tmp_path / "t.parquet", [picture(0), picture(1)], pid=[1, 2], caption=["a", "b"], path=["x", None])
    assert "train record 1: path is None, it must be a path" in error_of(DataSource(str(tmp_path)))
    write_table(tmp_path / "t.parquet", [picture(0), picture(1)], pid=[1, 2], caption=["a", "b"], path=["x", ""])
    assert "train record 1: path is '', it must be a path" in error_of(DataSource(str(tmp_path)))


def test_a_person_that_is_nan_in_a_table_is_refused(tmp_path):
    images = [picture(0), picture(1)]
    write_table(tmp_path / "train.parquet", images, pid=[3.0, float("nan")], caption=["a", "b"])
    assert "train record 1: pid is nan, it must be a whole number" in error_of(DataSource(str(tmp_path)))
    write_table(tmp_path / "b" / "train.parquet", images, pid=[3.0, 4.0], caption=["a", "b"])
    assert load(DataSource(str(tmp_path / "b")))["train"]["person_id"] == [3, 4]


def test_an_image_of_two_persons_in_a_table_is_refused(tmp_path):
    write_table(tmp_path / "train.parquet", [picture(0)] * 2, pid=[3, 4], caption=["a", "b"])
    assert "train record 1 has the image of record 0, but the person 4" in error_of(DataSource(str(tmp_path)))


def test_faulty_rows_of_a_table_are_left_out_on_request(tmp_path):
    images = [picture(0), b"no picture", picture(2), picture(3)]
    captions = [["red", " "], ["blue"], ["."], ["hat"]]
    write_table(tmp_path / "train.parquet", images, person_id=[1, 1, 2, 3], captions=captions)
    with pytest.warns(UserWarning) as warned:
        data = DataSource(str(tmp_path), checks=Checks("skip", "skip")).load()
    rows = data.splits["train"]
    assert rows["captions"] == [["red"], ["hat"]] and rows["person_id"] == [1, 3] and len(data.bad_captions) == 2
    text = "".join(str(each.message) for each in warned)
    assert "1 images are left out" in text and "2 captions are left out" in text and "train record 1" in text


def test_persons_are_numbered_after_rows_are_left_out(tmp_path):
    images = [b"no picture", picture(1), picture(2)]
    write_table(tmp_path / "a" / "train.parquet", images, pid=["a", "b", "c"], caption=["red"] * 3)
    write_images(tmp_path / "b", 3)
    (tmp_path / "b" / "0.png").write_bytes(b"no picture")
    entries = [entry(image=f"{n}.png", image_id="abc"[n]) for n in range(3)]
    (tmp_path / "b" / "all.json").write_text(json.dumps(entries))
    for name in ("a", "b"):
        with pytest.warns(UserWarning, match="left out"):
            (rows,) = load(DataSource(str(tmp_path / name), checks=Checks("skip"))).values()
        assert rows["person_id"] == [0, 1]


def test_a_changed_image_or_list_is_read_again(tmp_path):
    """Also an image file that Parquet names by its path, and the split that a list has been given."""
    source = flat(tmp_path / "list", json.dumps([entry(), entry(image="1.png", image_id=8)]))
    assert len(load(source)["train"]) == 2
    (tmp_path / "list" / "0.png").write_bytes(b"no picture")
    assert "record 0: '0.png' cannot be decoded" in error_of(source)
    (tmp_path / "list" / "0.png").write_bytes(picture(5))
    assert np.asarray(load(source)["train"]["image"][0])[0, 0, 2] == 5
    # A file that the list does not name changes nothing.
    fingerprint = source._make_builder().config.fingerprint()
    (tmp_path / "list" / "notes.txt").write_text("mine")
    assert source._make_builder().config.fingerprint() == fingerprint
    for split in ("query", "train"):
        files = {split: "pairs.json"}
        assert list(datasets.load_dataset("person_pairs", data_dir=str(tmp_path / "list"), data_files=files)) == [split]
    write_images(tmp_path / "folder" / "train", 2)
    table = {"file_name": ["0.png", "1.png"], "pid": [1, 2], "caption": ["a", "b"]}
    pq.write_table(pa.table(table), tmp_path / "folder" / "train" / "metadata.parquet")
    source = DataSource("imagefolder", str(tmp_path / "folder"))
    (tmp_path / "folder" / "train" / "1.png").write_bytes(b"no picture")
    assert "train record 1: image cannot be decoded" in error_of(source)
    (tmp_path / "folder" / "train" / "1.png").write_bytes(picture(9))
    assert len(load(source)["train"]) == 2


def test_other_files_beside_parquet_do_not_make_a_list(tmp_path):
    write_table(tmp_path / "train.parquet", [picture(0)], pid=[1], caption=["a"])
    (tmp_path / "report.json").write_text("{}")
    assert len(load(DataSource(str(tmp_path)))["train"]) == 1


@pytest.mark.parametrize("form", ["json", "table"])
def test_bad_captions_of_a_list_are_left_out_on_request(tmp_path, form):
    entries = [entry(), entry(caption="..."), entry(image="1.png", caption="x" * 20_001), entry(image="2.png")]
    source = flat(tmp_path, json.dumps(entries))
    if form == "table":
        lines = ["\t".join(("image", "caption", "pid")), *("\t".join(map(str, each.values())) for each in entries)]
        source = flat(tmp_path, "\n".join(lines), "pairs.tsv")
    source = DataSource(source.name, checks=Checks(on_bad_caption="skip"))
    for _ in range(2):
        with pytest.warns(UserWarning, match="captions are left out"):
            data = source.load()
        assert data.splits["train"]["file_path"] == ["0.png", "2.png"]
        assert data.splits["train"]["captions"] == [["a red coat"], ["a red coat"]]
        assert any("no caption is left" in line for line in data.bad_captions)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_cannot_name_files_outside_its_folder(tmp_path, streaming):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "a.png").write_bytes(picture(0))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "b.png").write_bytes(picture(1))
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "private" / "a.png")

    def read(path: str) -> int:
        table = {"image": [{"bytes": None, "path": path}], "pid": [1], "caption": ["a"]}
        pq.write_table(pa.table(table), tmp_path / "set" / "train.parquet")
        source = DataSource(str(tmp_path / "set"))
        return len(list(source.stream("train") if streaming else source.load().splits["train"]))

    for path in (str(tmp_path / "private" / "a.png"), str(tmp_path / "set" / "link.png"), "../private/a.png"):
        with pytest.raises(ValueError, match="which is outside the data set"):
            read(path)
    assert read(str(tmp_path / "set" / "b.png")) == 1


def test_arguments_that_do_not_apply_are_refused(tmp_path):
    write_table(tmp_path / "train.parquet", [picture(0)], pid=[1], caption=["a"])
    for source, message in (
        (lambda: DataSource("cuhk_peds", str(tmp_path)), "dataset_name is 'cuhk_peds', it must be one of cuhk_pedes"),
        (lambda: DataSource("cuhk_pedes", str(tmp_path), revision="main"), "revision is 'main', but it does not apply"),
        (lambda: DataSource("rstpreid", str(tmp_path), columns=["image=a"]), "columns is .* it does not apply"),
        (lambda: DataSource(str(tmp_path), revision="main"), "revision is 'main', but it does not apply to a folder"),
        (lambda: DataSource(str(tmp_path), checks=Checks(fix_paths=True)), "fix_paths and follow_links do not apply"),
        (lambda: DataSource(str(tmp_path / "none")), "none does not exist"),
        (lambda: DataSource("~nobody-of-this-name/x"), "~nobody-of-this-name/x does not exist"),
        (lambda: DataSource("/dev/null"), "/dev/null is neither a file nor a folder"),
        (lambda: DataSource("person_pairs"), "data_dir is missing"),
        (lambda: DataSource("parquet"), "data_dir is missing: parquet needs the folder of its files"),
        (lambda: DataSource("nobody/nothing"), "nobody/nothing.*cannot give it.*hf auth login"),
        (lambda: DataSource("cuhk_pedes", str(tmp_path), checks=Checks("maybe")), "on_bad_image is 'maybe'"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            source().load()
    with pytest.raises(ValueError, match="no use for data_files"):
        datasets.load_dataset("cuhk_pedes", data_dir=str(tmp_path), data_files="train.parquet")


def test_a_folder_with_unclear_lists_asks_for_their_splits(tmp_path):
    write_images(tmp_path, 4)
    for name in ("cuhk_train.json", "icfg_train.json"):
        number = 0 if name.startswith("cuhk") else 1
        (tmp_path / name).write_text(json.dumps([entry(image=f"{number}.png", image_id=number)]))
    message = "several lists whose names do not tell one split each (cuhk_train.json, icfg_train.json)"
    assert message in error_of(DataSource(str(tmp_path)))
    files = {"train": ["cuhk_train.json", "icfg_train.json"]}
    rows = datasets.load_dataset("person_pairs", data_dir=str(tmp_path), data_files=files, split="train")
    assert rows["person_id"] == [0, 1]
    for name, split in (("a_test.json", "test"), ("b-val.json", "val")):
        (tmp_path / name).write_text(json.dumps([entry(image=f"{2 + (split == 'val')}.png", image_id=name)]))
    (tmp_path / "icfg_train.json").unlink()
    assert "cuhk_train.json record 0: image_id is 0, a number, but a_test.json record 0 has a text" in error_of(
        DataSource(str(tmp_path))
    )
    for number, (name, split) in enumerate((("a_test.json", "test"), ("b-val.json", "val")), start=5):
        (tmp_path / name).write_text(json.dumps([entry(image=f"{2 + (split == 'val')}.png", image_id=number)]))
    assert {split: rows["person_id"] for split, rows in load(DataSource(str(tmp_path))).items()} == {
        "train": [0],
        "val": [6],
        "test": [5],
    }


# -- Published figures


def test_a_data_set_of_the_published_size_is_recognised(tmp_path, monkeypatch):
    write_table(tmp_path / "test.parquet", [picture(0), picture(1)], pid=[1, 2], captions=[["a", "b"], ["c"]])
    rows = load(DataSource(str(tmp_path)))["test"]
    assert find_benchmark("test", rows) is None
    layout = RstpReid.BUILDER_CONFIGS[0].layout
    monkeypatch.setitem(layout.published_sizes, "test", SplitSize(2, 2, 3))
    assert find_benchmark("test", rows) == "rstpreid" and find_benchmark("val", rows) is None


def test_a_title_has_no_path_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, title, location in (
        ("./mine", "mine", "./mine"),
        (str(tmp_path / "mine"), "mine", str(tmp_path / "mine")),
        ("me/mine", "me/mine", ""),
        ("cuhk_pedes", "cuhk_pedes", "/data"),
    ):
        source = DataSource(name, "/data" if name == "cuhk_pedes" else None)
        assert (source.title, source.location) == (title, location)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DataSource("me/mine").path is None
