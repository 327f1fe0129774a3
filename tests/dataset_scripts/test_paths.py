"""Paths as people write them, and links as the Hub's cache and people make them."""

import json
import shutil
import unicodedata

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from ten_sources import make_snapshot

import eccl.dataset_scripts  # noqa: F401  (registers the builders)
from eccl.dataset_scripts.paths import find_variants, leaves_folder, walk_files


def load(root, **arguments):
    return datasets.load_dataset("cuhk_pedes", data_dir=str(root), split="train", **arguments)


def rewrite(root, records, change, numbers=(0, 2)):
    for number in numbers:
        records[number]["file_path"] = change(records[number]["file_path"])
    (root / "reid_raw.json").write_text(json.dumps(records))


WAYS = {
    "backslashes": lambda path: path.replace("/", "\\"),
    "the prefix imgs/": lambda path: f"imgs/{path}",
    "blanks around the path": lambda path: f" {path}\n",
    "another case of letters": lambda path: path.upper(),
    "backslashes and the prefix imgs/": lambda path: f".\\imgs\\{path}".replace("/", "\\"),
    "blanks around the path and the prefix imgs/ and another case of letters": lambda path: f" IMGS/{path.upper()}",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_path_written_otherwise_is_named_and_read_on_request(make_raw, way):
    root, records = make_raw()
    rewrite(root, records, WAYS[way])
    given = records[0]["file_path"]
    with pytest.raises(ValueError, match="1 problems") as raised:
        load(root)
    text = str(raised.value)
    assert f"2 records with {way} in the path of the image, the first is record 0: {given!r}" in text
    assert "the file 'cam_a/0.jpg' exists, fix_paths=True (--fix_paths) reads it" in text
    for _ in range(2):
        with pytest.warns(UserWarning, match=f"1 kinds of paths are read in another way: \n- 2 records with {way}"):
            rows = load(root, fix_paths=True)
        assert rows["file_path"] == ["cam_a/0.jpg", "cam_a/1.png", "cam_a/2.jpg", "cam_a/3.png"]
        assert rows[0]["image"].size == (37, 91)


def test_the_unicode_form_of_a_path_may_differ(make_raw):
    root, records = make_raw()
    (root / "imgs" / "caméra").mkdir()
    shutil.move(root / "imgs" / "cam_a" / "0.jpg", root / "imgs" / "caméra" / "0.jpg")
    rewrite(root, records, lambda _: unicodedata.normalize("NFD", "caméra/0.jpg"), [0])
    with pytest.raises(ValueError, match="1 record with another Unicode form in the path"):
        load(root)
    with pytest.warns(UserWarning, match="another Unicode form"):
        assert load(root, fix_paths=True)["file_path"][0] == "caméra/0.jpg"


def test_each_way_has_a_line_and_a_missing_file_stays_missing(make_raw):
    root, records = make_raw()
    rewrite(root, records, str.upper, [0])
    rewrite(root, records, lambda path: f"imgs/{path}", [1, 2])
    rewrite(root, records, lambda _: "cam_a/none.jpg", [3])
    with pytest.raises(ValueError, match="3 problems") as raised:
        load(root)
    assert "1 record with another case of letters" in str(raised.value)
    assert "2 records with the prefix imgs/" in str(raised.value)
    assert "record 3: 'cam_a/none.jpg' does not exist" in str(raised.value)
    with pytest.raises(ValueError, match=r"1 problems: \n- record 3: 'cam_a/none.jpg' does not exist"):
        load(root, fix_paths=True)


def test_a_path_that_could_mean_two_files_is_not_fixed(make_raw):
    root, records = make_raw()
    shutil.copy(root / "imgs" / "cam_a" / "0.jpg", root / "imgs" / "cam_a" / "A.jpg")
    shutil.copy(root / "imgs" / "cam_a" / "0.jpg", root / "imgs" / "cam_a" / "a.JPG")
    rewrite(root, records, lambda _: "cam_a/a.jpg", [0])
    with pytest.raises(ValueError, match=r"record 0: 'cam_a/a.jpg' does not exist"):
        load(root, fix_paths=True)


def test_paths_that_become_the_same_are_one_image_twice(make_raw):
    root, records = make_raw()
    rewrite(root, records, lambda _: "cam_a\\0.jpg", [1])
    with pytest.raises(ValueError, match=r"record 1: 'cam_a/0.jpg' is already the image of record 0"):
        load(root, fix_paths=True)


@pytest.mark.parametrize("path", ["../secret.jpg", "..\\secret.jpg", "/etc/passwd", "C:\\a.jpg", "a/../../b"])
def test_no_way_of_writing_leaves_the_folder(make_raw, path):
    root, records = make_raw()
    Image.new("RGB", (8, 9)).save(root.parent / "secret.jpg")
    rewrite(root, records, lambda _: path, [0])
    with pytest.raises(ValueError, match="it must stay below imgs/"):
        load(root, fix_paths=True, follow_links=True)
    assert leaves_folder(path)


@settings(deadline=None, max_examples=100)
@given(name=st.text(st.characters(codec="utf-8", exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1))
def test_a_variant_is_a_file_that_exists(tmp_path_factory, name):
    root = tmp_path_factory.mktemp("imgs")
    stored = unicodedata.normalize("NFC", f"a{name.strip()}b")[:60]
    (root / stored).write_bytes(b"x")
    files = list(walk_files(root))
    assert files == [stored]
    # Upper case is left out: for some letters, lower case does not lead back.
    for written in (f" {stored}", f"imgs/{stored}", f" imgs\\{stored} ", unicodedata.normalize("NFD", stored)):
        found = find_variants([written], root)
        assert found[written].path == stored and found[written].difference
    assert find_variants(["x" + stored], root) == {}


def test_the_hint_about_downloads_is_for_whole_top_folders_of_a_benchmark(make_raw):
    root, records = make_raw()
    rewrite(root, records, lambda path: f"CUHK01/{path}", (0, 1))
    rewrite(root, records, lambda path: path.replace("cam_a", "cam_a/deep"), (2, 3))
    with pytest.raises(ValueError, match="2 problems") as raised:
        load(root)
    lines = [line for line in str(raised.value).splitlines() if "does not exist" in line]
    assert "CUHK01 does not exist: 2 records" in lines[0] and lines[0].endswith(
        "ask the owners of the data set for them"
    )
    assert "cam_a/deep does not exist: 2 records" in lines[1] and "newer downloads" not in lines[1]


# -- Links


def test_a_snapshot_of_the_hub_loads_and_equal_files_in_it_are_two_images(make_raw, tmp_path):
    root, _ = make_raw()
    shutil.copy(root / "imgs" / "cam_a" / "0.jpg", root / "imgs" / "cam_a" / "2.jpg")
    snapshot = make_snapshot(root, tmp_path / "hub" / "datasets--me--x")
    assert (snapshot / "imgs" / "cam_a" / "0.jpg").is_symlink()
    rows, expected = load(snapshot), load(root)
    assert [row["image"].tobytes() for row in rows] == [row["image"].tobytes() for row in expected]
    # Elsewhere the same links leave the data set.
    moved = tmp_path / "elsewhere" / "deep" / "set"
    shutil.copytree(snapshot, moved, symlinks=True)
    shutil.copytree(tmp_path / "hub" / "datasets--me--x" / "blobs", tmp_path / "elsewhere" / "blobs")
    with pytest.raises(ValueError, match=r"record 0: 'cam_a/0\.jpg' is a link to a file outside imgs/, and so are the"):
        load(moved)


def test_links_out_of_the_data_set_share_one_line_and_load_on_request(make_raw, tmp_path):
    root, _ = make_raw()
    shutil.move(root / "imgs" / "cam_a", tmp_path / "elsewhere")
    (root / "imgs" / "cam_a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="1 problems") as raised:
        load(root)
    text = str(raised.value)
    assert "record 0: 'cam_a/0.jpg' is a link to a file outside imgs/, and so are the images of 5 other records" in text
    assert "follow_links=True (--follow_links) allows such links" in text
    rows = load(root, follow_links=True)
    assert rows["file_path"] == ["cam_a/0.jpg", "cam_a/1.png", "cam_a/2.jpg", "cam_a/3.png"]
    # The target is part of what the cached data set depends on.
    (tmp_path / "elsewhere" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"record 0: 'cam_a/0.jpg' cannot be decoded"):
        load(root, follow_links=True)


def test_the_target_of_a_linked_file_is_part_of_the_data_set(make_raw, tmp_path):
    root, _ = make_raw()
    shutil.move(root / "imgs" / "cam_a" / "0.jpg", tmp_path / "outside.jpg")
    (root / "imgs" / "cam_a" / "0.jpg").symlink_to(tmp_path / "outside.jpg")
    assert load(root, follow_links=True)[0]["image"].size == (37, 91)
    (tmp_path / "outside.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"record 0: 'cam_a/0\.jpg' cannot be decoded"):
        load(root, follow_links=True)


def test_linked_folders_in_a_circle_are_entered_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"x")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert sorted(walk_files(tmp_path)) == ["a/x.png"]
    assert sorted(walk_files(tmp_path, follow_links=True)) == ["a/x.png", "b/x.png"]
    # Two folders outside that link to each other.
    for name, other in (("left", "right"), ("right", "left")):
        (tmp_path / "outside" / name).mkdir(parents=True)
        (tmp_path / "outside" / name / "link").symlink_to(tmp_path / "outside" / other)
        (tmp_path / "outside" / name / "x.png").write_bytes(b"x")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "c").symlink_to(tmp_path / "outside" / "left")
    assert sorted(walk_files(tmp_path / "set", follow_links=True)) == ["c/link/x.png", "c/x.png"]
