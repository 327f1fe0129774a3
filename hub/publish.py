"""Publishes a folder on the Hub: a model, an adapter, a data set or the metric, with all that lies in it.

python -m eccl.hub.publish runs/rstpreid me/eccl-rstpreid
"""

import argparse
import json
import sys
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

# The HTTP library's own, of connections that fail; the Hub's client does not say which library it uses.
_TransportError = HfHubHTTPError.__bases__[0]
# What a run leaves beside the result.
_NOT_PUBLISHED = ["checkpoint-*", "checkpoint-*/**", "runs/**", "**/__pycache__/**"]


def kind_of(folder: Path) -> str:
    """`model`, `dataset` or `space` (where metrics live), by what is in the folder.

    Raises:
        ValueError: it is none of them, or is incomplete; what is missing is named.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in files:
        needed, kind = {"adapter_model.safetensors", "config.json"}, "model"
    elif "config.json" in files:
        needed, kind = _files_of_model(folder), "model"
    elif "data" in files and "README.md" in files:
        needed, kind = set(), "dataset"
    elif f"{folder.resolve().name}.py" in files:
        needed, kind = {"README.md"}, "space"
    else:
        raise ValueError(
            f"{folder} holds no model (config.json), adapter (adapter_config.json), data set (data/ and README.md) nor "
            f"metric ({folder.resolve().name}.py)"
        )
    missing = sorted(needed - files)
    if missing:
        raise ValueError(f"{folder} is incomplete: {', '.join(missing)} is missing")
    return kind


def _files_of_model(folder: Path) -> set[str]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    code = {f"{reference.split('.')[0]}.py" for reference in config.get("auto_map", {}).values()}
    code |= {f"{task['impl'].split('.')[0]}.py" for task in config.get("custom_pipelines", {}).values()}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return code | set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return code | {"model.safetensors"}


def publish(folder: str | Path, name: str, private: bool = False, message: str | None = None) -> str:
    """Creates the repository if it is not there, and uploads the folder in one commit.

    The folder is only read: a push that breaks can be repeated, and sends again only what did not arrive.

    Args:
        folder: see [`kind_of`].
        name: `USER/NAME`, or `NAME` of one's own.
        private: of a new repository.
        message: of the commit.

    Returns:
        The full name.

    Raises:
        ValueError: the folder is not what can be published.
        RuntimeError: the server refused, or is not there; the reason in one line.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    api = HfApi()
    try:
        extra = {"space_sdk": "static"} if kind == "space" else {}
        name = api.create_repo(name, repo_type=kind, private=private, exist_ok=True, **extra).repo_id
        api.upload_folder(
            repo_id=name,
            repo_type=kind,
            folder_path=folder,
            commit_message=message or f"Upload of a {kind}",
            ignore_patterns=_NOT_PUBLISHED,
        )
    except (HfHubHTTPError, _TransportError, ConnectionError) as error:
        reason = getattr(error, "server_message", None) or str(error).strip().splitlines()[-1]
        raise RuntimeError(f"{name} could not be published: {reason}") from error
    return name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eccl.hub.publish", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="a model, an adapter, an exported data set, or the metric's folder")
    parser.add_argument("name", help="USER/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="if the repository is new, only its owner sees it")
    options = parser.parse_args(arguments)
    try:
        name = publish(options.folder, options.name, options.private)
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    print(f"published: {name}")


if __name__ == "__main__":
    main()
