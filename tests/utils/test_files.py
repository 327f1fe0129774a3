import os

import pytest
from PIL import Image

from eccl.utils.files import (
    complete_file,
    complete_folder,
    require_new_folder,
    require_picture_path,
    require_writable_folder,
)


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_folder_appears_under_its_name_when_the_block_ends(tmp_path):
    with complete_folder(tmp_path / "new" / "model") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "new" / "model").exists()
        # The temporary folder is on the same disk, so that it can be renamed.
        assert folder.is_relative_to(tmp_path / "new")
    assert names_below(tmp_path) == ["new", "new/model", "new/model/config.json"]


def test_a_complete_folder_may_replace_an_empty_folder(tmp_path):
    (tmp_path / "model").mkdir()
    with complete_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
    assert names_below(tmp_path) == ["model", "model/config.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_folder_appears_after_an_error(tmp_path, error):
    with pytest.raises(error), complete_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text("{}")
        raise error
    assert names_below(tmp_path) == []


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(OSError), complete_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert names_below(tmp_path) == ["model", "model/weights"]
    assert (tmp_path / "model" / "weights").read_text() == "old"


def test_a_file_appears_under_its_name_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "picture.png"
    with complete_file(path) as temporary:
        # Pillow chooses the format by the suffix of the temporary name.
        Image.new("RGB", (3, 5)).save(temporary)
        assert not path.exists() and temporary.parent == path.parent
    assert names_below(tmp_path) == ["new", "new/picture.png"]
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_a_file_is_as_it_was(tmp_path, error):
    for old in (None, "old"):
        path = tmp_path / "results.json"
        if old:
            path.write_text(old)
        with pytest.raises(error), complete_file(path) as temporary:
            temporary.write_text("half of the new te")
            raise error
        assert names_below(tmp_path) == (["results.json"] if old else [])
        assert not old or path.read_text() == old


def test_a_complete_file_has_the_permissions_of_a_new_file(tmp_path):
    (tmp_path / "neighbour").touch()
    with complete_file(tmp_path / "features.safetensors") as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)
    assert (tmp_path / "features.safetensors").stat().st_mode == (tmp_path / "neighbour").stat().st_mode


def test_a_complete_file_replaces_the_old_one(tmp_path):
    (tmp_path / "results.json").write_text("old")
    with complete_file(tmp_path / "results.json") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "results.json").read_text() == "old"
    assert (tmp_path / "results.json").read_text() == "new"


def test_only_a_missing_or_an_empty_folder_is_new(tmp_path):
    require_new_folder(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    require_new_folder(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(FileExistsError, match=f"{path.name} exists and is not an empty folder"):
            require_new_folder(path)
    assert names_below(tmp_path) == ["empty", "file"]


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "new" / "newer", tmp_path.relative_to(tmp_path), tmp_path / "new"):
        require_writable_folder(path)
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file"):
            require_writable_folder(path)
    # The superuser may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match="is not writable"):
        require_writable_folder(tmp_path / "new")
    assert names_below(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.jpeg", "new/a.webp"])
def test_a_picture_can_be_written_with_a_suffix_of_pillow(tmp_path, name):
    require_picture_path(tmp_path / name)
    assert names_below(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("a.txt", ValueError, "a.txt does not end like a picture file"),
        ("a", ValueError, "a does not end like a picture file"),
        # Pillow reads this format and does not write it.
        ("a.psd", ValueError, "a.psd does not end like a picture file"),
        ("folder.png", IsADirectoryError, "folder.png is a folder"),
        ("file/a.png", NotADirectoryError, "file is a file"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(tmp_path, name, error, message):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message):
        require_picture_path(tmp_path / name)
