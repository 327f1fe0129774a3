"""Uploads a folder to the Hub: a model, an adapter, a data set, or the metric.

python -m eccl.hub.publish runs/rstpreid me/eccl-rstpreid
"""

import json
from pathlib import Path
from typing import Any, Literal

from ..utils.command_line import CommandParser, command, say

# A training run writes these files next to its result.
_NOT_PUBLISHED = ["checkpoint-*", "checkpoint-*/**", "runs/**", "**/__pycache__/**"]


def kind_of(folder: Path) -> Literal["model", "dataset", "space"]:
    """Returns the kind of Hub repository that a folder becomes, by the files in it; a metric becomes a space.

    Raises:
        ValueError: the folder is none of them, or files are missing; the message names them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = {path.name for path in folder.iterdir()}
    kind: Literal["model", "dataset", "space"]
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
            f"{folder} cannot be published: it must be a model (with config.json), an adapter (adapter_config.json), "
            f"a data set (data/ and README.md), or a metric ({folder.resolve().name}.py)"
        )
    missing = sorted(needed - files)
    if missing:
        raise ValueError(f"{folder} is incomplete, these files are missing: {', '.join(missing)}")
    if "adapter_config.json" in files and (base := _local_base(folder)):
        raise ValueError(
            f"{folder} names the folder {base} as its base, which nobody else has: publish the base first, then write "
            'its name on the Hub into adapter_config.json as "base_model_name_or_path"'
        )
    return kind


def _local_base(adapter: Path) -> str | None:
    """Returns the base of an adapter if it is a folder of a machine; `None` if it is a Hub id, or is not named."""
    # Imported here, because the module needs torch.
    from .adapter import is_path

    base = _read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    return base if base and is_path(base) else None


def _files_of_model(folder: Path) -> set[str]:
    """Returns the names of the files that a model needs: its weights, and the code that `config.json` refers to."""
    config = _read_json(folder / "config.json")
    code = {f"{reference.split('.')[0]}.py" for reference in config.get("auto_map", {}).values()}
    code |= {f"{task['impl'].split('.')[0]}.py" for task in config.get("custom_pipelines", {}).values()}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return code | set(_read_json(index)["weight_map"].values())
    return code | {"model.safetensors"}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error


def publish(folder: str | Path, name: str, private: bool = False, message: str | None = None) -> str:
    """Creates the repository if it does not exist, and uploads the folder in one commit.

    The folder is not changed. A failed upload can be repeated; it sends only the files that have not arrived.

    Args:
        folder: a model, an adapter, a data set or a metric; see [`kind_of`].
        name: `USER/NAME`, or `NAME` for a repository of the user who is logged in.
        private: makes a new repository private; an existing one stays as it is.
        message: the commit message.

    Returns:
        The full name of the repository.

    Raises:
        ValueError: the folder or the name cannot be published.
        ConnectionError: the server refused or cannot be reached; the message gives the reason in one line.
    """
    folder = Path(folder)
    kind = kind_of(folder)
    left_out = list(_NOT_PUBLISHED)
    if (folder / "adapter" / "adapter_config.json").is_file() and (base := _local_base(folder / "adapter")):
        say(f"{folder}/adapter is not published: its base is the folder {base}, which nobody else has")
        left_out.append("adapter/**")
    # Imported here, so that --help and a wrong folder answer at once.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # The base class of all errors of the HTTP library. huggingface_hub does not export it, and has changed the library.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi()
    try:
        space_sdk = "static" if kind == "space" else None
        name = api.create_repo(name, repo_type=kind, private=private, exist_ok=True, space_sdk=space_sdk).repo_id
        api.upload_folder(
            repo_id=name,
            repo_type=kind,
            folder_path=folder,
            commit_message=message or f"Upload of a {kind}",
            ignore_patterns=left_out,
        )
    except (HfHubHTTPError, transport_error, ConnectionError) as error:
        # Some errors of the HTTP library have no message.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = getattr(error, "server_message", None) or lines[-1]
        raise ConnectionError(f"{name} could not be published: {reason}") from error
    return name


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.hub.publish", __doc__)
    parser.add_argument("folder", help="folder to upload: a model, an adapter, an exported data set, or the metric")
    parser.add_argument("name", help="repository on the Hub: USER/NAME, or NAME alone for the user who is logged in")
    parser.add_argument(
        "--private",
        action="store_true",
        help="make a new repository private; an existing repository keeps its visibility",
    )
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    kind_of(Path(options.folder))
    say(f"uploading {options.folder}")
    print(f"published: {publish(options.folder, options.name, options.private)}")


if __name__ == "__main__":
    main()
