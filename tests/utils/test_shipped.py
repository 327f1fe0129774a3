import pytest

from eccl.utils import shipped
from helpers import ROOT

FILES = [path for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate"]
NAMES = sorted(path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in FILES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_found_by_its_name_with_or_without_suffix(name):
    assert shipped.find_recipe(name) == shipped.find_recipe(f"{name}.yaml") == ROOT / "recipes" / f"{name}.yaml"


def test_a_recipe_is_found_by_its_path(tmp_path, monkeypatch):
    mine = tmp_path / "folder" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("seed: 1\n")
    assert shipped.find_recipe(str(mine)) == mine
    monkeypatch.chdir(tmp_path)
    assert shipped.find_recipe("folder/mine.yaml").read_text() == "seed: 1\n"


def test_a_file_of_the_user_comes_before_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("seed: 1\n")
    assert shipped.find_recipe("demo.yaml").read_text() == "seed: 1\n"
    assert shipped.find_recipe("demo") == ROOT / "recipes" / "demo.yaml"


@pytest.mark.parametrize("name", ["eccl_rstp", "folder/mine.yaml", ""])
def test_a_wrong_name_lists_the_recipes_that_exist(name):
    with pytest.raises(FileNotFoundError) as raised:
        shipped.find_recipe(name)
    message = str(raised.value)
    assert repr(name) in message and ", ".join(NAMES) in message and "\n" not in message
    assert {"demo", "eccl_rstpreid", "eccl_cuhk_pedes", "eccl_icfg_pedes"} <= set(NAMES)
    assert "baselines/irra" in NAMES and shipped.list_recipes() == NAMES


def test_the_tokenizer_ships():
    assert shipped.clip_tokenizer()("a man")["input_ids"] == [49406, 320, 786, 49407]


def test_a_missing_backbone_is_explained(tmp_path, monkeypatch):
    assert (shipped.shipped_backbone() / "config.json").is_file()
    monkeypatch.setattr(shipped, "BACKBONE", tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="is in the repository, not in the wheel"):
        shipped.shipped_backbone()
