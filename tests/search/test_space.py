"""The folder of a Space with the search page."""

import ast

import pytest
import yaml

from eccl.hub.publish import kind_of, plan_upload
from eccl.search.space import main, write_space


def test_a_space_has_the_settings_and_no_secret(tmp_path, capsys):
    folder = tmp_path / "space"
    gallery, title = "http://host:19530/'\"\\", 'People: "red" #1'
    words = ["--gallery", gallery, "--model", "me/model", "--output_dir", str(folder), "--title", title]
    words += ["--crops", "/data/crops"]
    main([*words, "--package", "eccl[search] @ https://example.org/eccl.whl"])
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "app.py", "requirements.txt"]
    tree = ast.parse((folder / "app.py").read_text())
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert values == {"GALLERY": gallery, "NAME": "gallery", "CROPS": "/data/crops", "MODEL": "me/model"}
    assert (folder / "requirements.txt").read_text() == "eccl[search] @ https://example.org/eccl.whl\n"
    header = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert header["title"] == title and header["sdk"] == "gradio" and header["app_file"] == "app.py"
    assert kind_of(folder) == "space" and not plan_upload(folder, "me/space").public
    assert "eccl-publish" in capsys.readouterr().out


def test_the_app_of_a_space_needs_its_users(tmp_path, monkeypatch):
    import runpy

    write_space(tmp_path / "space", "/data/gallery.db", "me/model", "gallery", None, "eccl", "People")
    monkeypatch.delenv("ECCL_USERS", raising=False)
    with pytest.raises(ValueError, match="has no user"):
        runpy.run_path(str(tmp_path / "space" / "app.py"), run_name="__main__")


def test_a_wrong_space_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    good = ("/data/gallery.db", "me/model", "gallery", None)
    with pytest.raises(FileExistsError):
        write_space(tmp_path / "full", *good, "eccl", "People")
    for package, title in (("eccl\n--index-url x", "People"), ("eccl", "People\nsdk: docker"), ("eccl", " ")):
        with pytest.raises(ValueError, match="one line"):
            write_space(tmp_path / "space", *good, package, title)
    for gallery, crops, message in (
        ("http://ann:secret@host:1", "/data/crops", "must not contain a password"),
        ("http://host:1", None, "--crops is missing"),
    ):
        with pytest.raises(ValueError, match=message):
            write_space(tmp_path / "space", gallery, "me/model", "gallery", crops, "eccl", "People")
    assert not (tmp_path / "space").exists()
