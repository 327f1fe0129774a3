"""The files that ship with the package: tokenizer, recipes, a help text; in a checkout, also a small backbone."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_ROOT = Path(__file__).parents[1]
RECIPES = _ROOT / "recipes"
BACKBONE = _ROOT / "assets" / "synthetic-backbone"
# What `train_eccl.py --help` prints: a test compares it with the options, and says how to write it anew.
TRAINING_HELP = _ROOT / "assets" / "training_help.txt"


def clip_tokenizer() -> "CLIPTokenizer":
    """Loads the tokenizer of CLIP, which ships with this package."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(_ROOT / "assets" / "clip-tokenizer")


def shipped_backbone() -> Path:
    """Returns the folder of the small backbone that was trained on synthetic data.

    Raises:
        FileNotFoundError: the folder is missing, because the package was installed from a wheel.
    """
    if not BACKBONE.is_dir():
        raise FileNotFoundError(f"{BACKBONE} is missing: the synthetic backbone is in the repository, not in the wheel")
    return BACKBONE


def find_recipe(name: str) -> Path:
    """Finds the file of a recipe.

    Args:
        name: a path (`my/recipe.yaml`), or the name of a recipe that ships with the package (`eccl_rstpreid`,
            `baselines/irra`).

    Raises:
        FileNotFoundError: there is no such recipe; the message lists the names that exist.
    """
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"there is no recipe {name!r}: give the path of a YAML file, or one of {', '.join(list_recipes())}"
    )


def list_recipes() -> list[str]:
    """Returns the names of the recipes that ship with the package, without the launch settings in `accelerate/`."""
    files = [path for folder in (".", "baselines") for path in (RECIPES / folder).glob("*.yaml")]
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in files)


__all__ = ["BACKBONE", "RECIPES", "TRAINING_HELP", "clip_tokenizer", "find_recipe", "list_recipes", "shipped_backbone"]
