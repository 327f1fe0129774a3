"""Uploads a folder to the Hub: a model, an adapter, a data set, the metric, or a Space. It is private unless --public.

python -m eccl.hub.publish runs/rstpreid me/eccl-rstpreid
"""

import contextlib
import fnmatch
import glob
import os
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..utils.command_line import CommandParser, command, say, tell
from ..utils.files import read_json
from .bases import is_path, resolve_base
from .run_folder import is_finished

_PACKAGE = Path(__file__).resolve().parents[1]
# The files that are uploaded, for each kind of folder; everything else is left out.
_CARD = ("README.md", "LICENSE")
# The subfolder that eccl-export-onnx writes.
_ONNX_FILES = (
    *("onnx.json", "*.onnx", "config.json", "configuration_eccl.py", "processing_eccl.py"),
    *("processor_config.json", "tokenizer.json", "tokenizer_config.json"),
)
_ADAPTER_FILES = (*_CARD, "adapter_config.json", "adapter_model.safetensors", "config.json")
_MODEL_FILES = (
    *(*_CARD, "config.json", "model.safetensors", "model.safetensors.index.json"),
    *("configuration_eccl.py", "modeling_eccl.py", "processing_eccl.py", "pipeline_eccl.py"),
    *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
_FILES = {
    "model": (
        *_MODEL_FILES,
        *(f"adapter/{name}" for name in _ADAPTER_FILES),
        *(f"onnx/{name}" for name in _ONNX_FILES),
    ),
    "adapter": _ADAPTER_FILES,
    "data set": (*_CARD, "contact_sheet.jpg", "data/*-?????-of-?????.parquet"),
    # `NAME.py` is added, where NAME is that of the folder.
    "metric": (*_CARD, "requirements.txt"),
    "Space": (*_CARD, "app.py", "requirements.txt", "packages.txt", "Dockerfile", "index.html", "style.css"),
}
_REPOSITORY_TYPES = {"data set": "dataset", "metric": "space", "Space": "space"}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Returns whether a path matches one of the patterns; `*` matches anything but a slash."""
    return any(name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def kind_of(folder: Path) -> str:
    """Returns the type of Hub repository that a folder becomes: model, dataset, or space (a metric or a Space).

    Raises:
        ValueError: the folder is nothing that can be published, or files are missing; the message names them.
    """
    return _REPOSITORY_TYPES.get(_recognise(folder), "model")


def _recognise(folder: Path) -> str:
    """Returns what a folder is, by the files in it: one of the kinds in `_FILES`."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = {path.name for path in folder.iterdir()}
    name = folder.resolve().name
    needed: set[str] = set()
    if "adapter_config.json" in files:
        kind, needed = "adapter", {"adapter_model.safetensors", "config.json"}
    elif "config.json" in files:
        kind, needed = "model", _files_of_model(folder)
    elif f"{name}.py" in files:
        kind, needed = "metric", {"README.md"}
    elif _space_sdk(folder):
        kind = "Space"
    elif "data" in files and "README.md" in files:
        kind = "data set"
    else:
        raise ValueError(
            f"{folder} cannot be published: it must be a model (with config.json), an adapter (adapter_config.json), "
            f"a data set (data/ and README.md), a metric ({name}.py), or a Space (README.md with sdk in its metadata)"
        )
    missing = sorted(needed - files)
    if missing:
        raise ValueError(f"{folder} is incomplete, these files are missing: {', '.join(missing)}")
    if kind == "adapter" and (base := _local_base(folder)):
        raise ValueError(
            f"{folder} names the folder {base} as its base, which nobody else has: publish the base first, then write "
            'its name on the Hub into adapter_config.json as "base_model_name_or_path"'
        )
    return kind


def _local_base(adapter: Path) -> str | None:
    """Returns the base of an adapter if it is a folder of a machine; `None` if it is a Hub id, or is not named."""
    named = read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not isinstance(named, (str, type(None))):
        raise ValueError(f"{adapter / 'adapter_config.json'}: base_model_name_or_path is {named!r}, it must be a text")
    if named is None or not (is_path(named) or _is_no_name(named)):
        return None
    return resolve_base(adapter, named) or named


def _is_no_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _files_of_model(folder: Path) -> set[str]:
    """Returns the names of the files that a model needs: its weights, and the code that `config.json` refers to."""
    # Imported here, because the module needs transformers.
    from ..configuration_eccl import list_shards

    config = read_json(folder / "config.json")
    try:
        code = {f"{reference.split('.')[0]}.py" for reference in config.get("auto_map", {}).values()}
        code |= {f"{task['impl'].split('.')[0]}.py" for task in config.get("custom_pipelines", {}).values()}
    except (AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'}: auto_map or custom_pipelines is damaged: {error!r}") from error
    index = folder / "model.safetensors.index.json"
    return code | (set(list_shards(index)) if index.is_file() else {"model.safetensors"})


def _space_sdk(folder: Path) -> str | None:
    """Returns the `sdk` in the metadata of a Space's README.md; `None` if there is none."""
    from huggingface_hub import metadata_load

    file = folder / "README.md"
    if not file.is_file():
        return None
    try:
        return (metadata_load(file) or {}).get("sdk")
    except Exception as error:  # The errors of the YAML library have a class of their own.
        raise ValueError(f"the metadata of {file} cannot be read: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Upload:
    """What a publication sends.

    Attributes:
        folder: the folder.
        kind: model, adapter, data set, metric or Space.
        name: the name of the repository, as the user gave it.
        public: whether everybody can read the repository.
        sizes: the number of bytes of each file that is sent, by its path in the folder.
        left_out: the paths of the files, and of whole folders, that are not sent, each with the reason.
    """

    folder: Path
    kind: str
    name: str
    public: bool
    sizes: dict[str, int]
    left_out: dict[str, str]

    def describe(self) -> list[str]:
        """Returns lines for a user: the visibility, the files with their sizes, and what is left out."""
        visibility = "public: everybody can read it" if self.public else "private"
        total = sum(self.sizes.values())
        lines = [f"{self.name} ({self.kind}, {visibility}): {len(self.sizes)} files, {total:,} bytes"]
        lines += [f"  {size:>15,}  {path}" for path, size in self.sizes.items()]
        return lines + [f"  not published: {path} ({reason})" for path, reason in self.left_out.items()]


def plan_upload(folder: str | Path, name: str, public: bool = False) -> Upload:
    """Lists what [`publish`] would send; it asks nobody and changes nothing.

    Args:
        folder, name, public: see [`publish`].

    Raises:
        ValueError: the folder or the name cannot be published; or a link in the folder leads out of it.
    """
    from huggingface_hub.utils import validate_repo_id

    folder = Path(folder)
    validate_repo_id(name)
    kind = _recognise(folder)
    if is_finished(folder) is False:
        raise ValueError(f"{folder} has an unfinished run: continue it with --resume_from_checkpoint True first")
    if (folder / "trainer_state.json").is_file():
        raise ValueError(f"{folder} is a checkpoint of a training: publish the folder of the run, or its adapter/")
    allowed = _FILES[kind]
    if kind == "metric":
        allowed += (glob.escape(f"{folder.resolve().name}.py"),)
    elif kind == "model":
        # The index names the files of the weights, if there are several.
        allowed += tuple(map(glob.escape, _files_of_model(folder)))
    adapter_base = None
    if kind == "model" and (folder / "adapter" / "adapter_config.json").is_file():
        adapter_base = _local_base(folder / "adapter")
    sizes, left_out = {}, {}
    for path in _list_files(folder, allowed):
        short = path.relative_to(folder).as_posix()
        if adapter_base and short.startswith("adapter/"):
            left_out["adapter/"] = f"its base is the folder {adapter_base}, which nobody else has"
        elif matches(short, allowed) and path.is_file():
            _require_own_content(path, folder, allowed)
            sizes[short] = path.stat().st_size
        else:
            left_out[short + ("/" if path.is_dir() else "")] = f"it does not belong to a published {kind}"
    if kind == "data set" and not any(short.startswith("data/") for short in sizes):
        raise ValueError(f"{folder} has no Parquet files in data/: make them with eccl-export, and publish its folder")
    return Upload(folder, kind, name, public, sizes, left_out)


def _list_files(folder: Path, allowed: Iterable[str]) -> list[Path]:
    """Lists the files of a folder, and of those subfolders that can have allowed files; others count as one entry.

    Raises:
        ValueError: a link leads out of the folder. Links to the code of this package may, as in the shipped backbone.
    """
    subfolders = {pattern.split("/")[0] for pattern in allowed if "/" in pattern}
    found = []
    for path in sorted(folder.iterdir()):
        found += sorted(path.iterdir()) if path.name in subfolders and path.is_dir() else [path]
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        # Unlike `Path.resolve`, it takes a link to itself.
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(root) and target != _PACKAGE / path.name:
            raise ValueError(
                f"{path} is a link that leads out of the folder, to {target}: remove it, or replace it by a copy"
            )
    return found


def _require_own_content(path: Path, folder: Path, allowed: Iterable[str]) -> None:
    """Refuses a link to a file that would be left out itself; a link to the code of this package may be sent."""
    target = Path(os.path.realpath(path))
    if path.is_symlink() and target != _PACKAGE / path.name:
        short = target.relative_to(folder.resolve()).as_posix()
        if not matches(short, allowed):
            raise ValueError(f"{path} is a link to {short}, which does not belong to what is published: remove it")


def require_publishable(name: str, kind: str, public: bool) -> str:
    """Checks, before the work, that a repository can be written and has the visibility that is asked for.

    Args:
        name: see [`publish`].
        kind: model, adapter, data set, metric or Space.
        public: whether the repository is meant to be public.

    Returns:
        The full name of the repository, which may not exist yet.

    Raises:
        ValueError: the name is not one of the Hub's; or the repository exists and is public, and `public` is not set,
            or the other way round.
        ConnectionError: the Hub cannot be reached, or the user is not logged in.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(name)
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(
            f"{name} could not be published: offline mode is set (HF_HUB_OFFLINE), which forbids to reach the Hub"
        )
    api = HfApi()
    with _naming_refusals(name):
        if "/" not in name:
            name = f"{api.whoami()['name']}/{name}"
        try:
            is_private = bool(api.repo_info(name, repo_type=_REPOSITORY_TYPES.get(kind, "model")).private)
        except RepositoryNotFoundError:
            # The Hub gives the same answer for a private repository of somebody else, and without a login.
            api.whoami()
            return name
    if is_private == public:
        raise ValueError(
            f"{name} is a public repository: use --public if everybody may see these files, or another name"
            if not public
            else f"{name} is a private repository and stays private: leave --public out, or change its visibility first"
        )
    return name


@contextlib.contextmanager
def _naming_refusals(name: str) -> Iterator[None]:
    """Turns what the Hub and the network refuse into a `ConnectionError` of one line that names the repository."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # The base class of all errors of the HTTP library. huggingface_hub does not export it, and has changed the library.
    transport_error: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError, transport_error, ConnectionError) as error:
        # Some errors of the HTTP library have no message.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = getattr(error, "server_message", None) or lines[-1]
        raise ConnectionError(f"{name} could not be published: {reason}") from error


def publish(folder: str | Path, name: str, public: bool = False, message: str | None = None) -> str:
    """Creates the repository if it does not exist, and uploads the files of the folder's kind in one commit.

    The folder is not changed. A failed upload can be repeated; it sends only the files that have not arrived.

    Args:
        folder: a model, an adapter, a data set, a metric or a Space; see [`kind_of`].
        name: `USER/NAME`, or `NAME` for a repository of the user who is logged in.
        public: lets everybody read the repository. Without it, a new repository is private, and one that is public
            already is refused.
        message: the commit message.

    Returns:
        The full name of the repository.

    Raises:
        ValueError: see [`plan_upload`] and [`require_publishable`].
        ConnectionError: the server refused or cannot be reached; the message gives the reason in one line, and the
            command that repeats the upload.
    """
    upload = plan_upload(folder, name, public)
    for line in upload.describe():
        say(line)
    try:
        return _send(upload, require_publishable(name, upload.kind, public), message)
    except ConnectionError:
        words = ["eccl-publish", str(folder), name, *(["--public"] if public else [])]
        say(f"to repeat the upload: {shlex.join(words)}")
        raise


def _send(upload: Upload, name: str, message: str | None) -> str:
    # Imported here, so that --help and a wrong folder answer at once.
    from huggingface_hub import CommitOperationAdd, HfApi

    api, repository_type = HfApi(), _REPOSITORY_TYPES.get(upload.kind, "model")
    sdk = {"metric": "static", "Space": _space_sdk(upload.folder)}.get(upload.kind)
    with _naming_refusals(name):
        name = api.create_repo(
            name, repo_type=repository_type, private=not upload.public, exist_ok=True, space_sdk=sdk
        ).repo_id
        # An organisation can decide the visibility of its new repositories.
        if not upload.public and not api.repo_info(name, repo_type=repository_type).private:
            raise ValueError(f"{name} was made, but the Hub made it public: nothing was uploaded")
        api.create_commit(
            repo_id=name,
            repo_type=repository_type,
            operations=[CommitOperationAdd(path, upload.folder / path) for path in upload.sizes],
            commit_message=message or f"Upload of a {upload.kind}",
        )
    return name


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.hub.publish", __doc__)
    parser.add_argument("folder", help="folder to upload: a model, an adapter, an exported data set, metric or Space")
    parser.add_argument("name", help="repository on the Hub: USER/NAME, or NAME alone for the user who is logged in")
    visibility = parser.add_mutually_exclusive_group()
    visibility.add_argument("--public", action="store_true", help="let everybody read the repository")
    visibility.add_argument("--private", action="store_true", help="keep the repository private, which is the default")
    parser.add_argument(
        "--dry_run", action="store_true", help="only list the files that would be uploaded; the Hub is not asked"
    )
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    if options.dry_run:
        for line in plan_upload(options.folder, options.name, options.public).describe():
            tell(line)
        return
    tell(f"published: {publish(options.folder, options.name, options.public)}")


__all__ = ["Upload", "kind_of", "matches", "plan_upload", "publish", "require_publishable"]


if __name__ == "__main__":
    main()
