"""Files that ship with the package: CLIP's tokenizer, the recipes; and the small backbone, in a checkout only."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_ROOT = Path(__file__).parents[1]
RECIPES = _ROOT / "recipes"
BACKBONE = _ROOT / "assets" / "synthetic-backbone"


def clip_tokenizer() -> "CLIPTokenizer":
    """Loads CLIP's own tokenizer, which ships with this package."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(_ROOT / "assets" / "clip-tokenizer")


def shipped_backbone() -> Path:
    """The folder of the small synthetic backbone.

    Raises:
        FileNotFoundError: it is not there: a wheel leaves it out.
    """
    if not BACKBONE.is_dir():
        raise FileNotFoundError(f"{BACKBONE} is missing: the synthetic backbone is in the repository, not in the wheel")
    return BACKBONE


def find_recipe(name: str) -> Path:
    """The file of a recipe, by path (`my/recipe.yaml`) or by the name of one that ships (`eccl_rstpreid`).

    Raises:
        FileNotFoundError: there is no such recipe; the message lists those that ship.
    """
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"there is no recipe {name!r}: give the path of a YAML file, or one of {known}")


__all__ = ["BACKBONE", "RECIPES", "clip_tokenizer", "find_recipe", "shipped_backbone"]
