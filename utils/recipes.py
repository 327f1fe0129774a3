"""Reading a recipe: a YAML file that maps the names of options to values."""

from pathlib import Path
from typing import Any

import yaml


class _RecipeLoader(yaml.SafeLoader):
    """Reads plain YAML. Aliases are refused: a few lines of them can stand for any number of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name), which a recipe must not have")
        return super().compose_node(parent, index)


def read_recipe(recipe: Path) -> dict[Any, Any]:
    """Reads the values of a recipe.

    Args:
        recipe: the file, see [`~eccl.utils.shipped.find_recipe`].

    Raises:
        ValueError: it is not YAML, or no mapping.
    """
    try:
        # It is a subclass of the safe loader.
        values = yaml.load(recipe.read_text(encoding="utf-8"), _RecipeLoader)
    # On malformed tags and on brackets within brackets, the library raises errors of many types.
    except Exception as error:
        raise ValueError(f"{recipe} is not YAML: {' '.join(str(error).split()) or type(error).__name__}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{recipe} holds a {type(values).__name__}, it must map option names to values")
    return values


__all__ = ["read_recipe"]
