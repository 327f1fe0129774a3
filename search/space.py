"""Writes the folder of a Space that shows the search page over a gallery. `eccl-publish` uploads it.

python -m eccl.search.space --gallery https://milvus.example.org:19530 --model me/eccl-model --output_dir space

The folder has no picture, no vector and no password. The Space needs the secret ECCL_USERS.
"""

import json
from importlib.metadata import version
from pathlib import Path

from ..utils.command_line import CommandParser, add_shared_option, command, tell
from ..utils.files import complete_folder, require_new_folder
from ..utils.text import printable
from .store import is_address

_APP = '''"""Shows the search page; the settings are in this file, the secrets in those of the Space.

ECCL_USERS: the lines of the file that `python -m eccl.search.app --add_user NAME --auth_file FILE` writes.
ECCL_TOKEN: the token of the Milvus server, if it has one.
"""

import os
import socket

from eccl import load_model
from eccl.search.app import Settings, make_app, read_users, run_server
from eccl.search.gallery import Gallery

GALLERY = {gallery}
NAME = {name}
CROPS = {crops}
MODEL = {model}

if __name__ == "__main__":
    settings = Settings(
        users=read_users(os.environ.get("ECCL_USERS", "")),
        hosts=("*.hf.space",),
        frame_ancestors="https://huggingface.co",
    )
    token = os.environ.get("ECCL_TOKEN")
    with (
        socket.create_server(("0.0.0.0", 7860)) as listener,
        Gallery.open(*load_model(MODEL), GALLERY, NAME, token=token, create=False, crops=CROPS) as gallery,
    ):
        run_server(make_app(gallery, settings), listener)
'''
_README = """---
title: {title}
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
pinned: false
---

# {title}

Finds pictures of persons in a gallery by a sentence. A high score means that a picture looks like the sentence, and
nothing more: it does not tell who somebody is.

The Space needs the secret `ECCL_USERS`, with the users and the hashes of their passwords, and `ECCL_TOKEN` if the
Milvus server has a token. Without users it does not start.
"""


def write_space(folder: Path, gallery: str, model: str, name: str, crops: str | None, package: str, title: str) -> None:
    """Writes `app.py`, `requirements.txt` and `README.md`.

    Args:
        folder: a folder that does not exist yet, or an empty one.
        gallery: address of a Milvus server, or a path on the storage of the Space.
        model: Hub id of the model that made the gallery.
        name: name of the gallery in its store.
        crops: folder on the storage of the Space with the pictures; needed for a server.
        package: how pip names this package.
        title: title of the Space, one line.

    Raises:
        ValueError: a text has several lines.
        FileExistsError: the folder is not empty.
    """
    if is_address(gallery) and "@" in gallery:
        raise ValueError("--gallery must not contain a password: put the token into the secret ECCL_TOKEN")
    if is_address(gallery) and crops is None:
        raise ValueError("--crops is missing: a gallery on a server needs the folder of the pictures")
    for what, text in (("the package", package), ("the title", title)):
        if not text.strip() or printable(text) != text:
            raise ValueError(f"{what} is {text!r}, it must be one line of text")
    require_new_folder(folder)
    values = {"gallery": gallery, "name": name, "crops": crops, "model": model}
    app = _APP.format(**{key: repr(value) for key, value in values.items()})
    # JSON quotes a title so that YAML reads it as it is.
    readme = _README.replace("title: {title}", f"title: {json.dumps(title, ensure_ascii=False)}")
    with complete_folder(folder) as unfinished:
        (unfinished / "app.py").write_text(app, encoding="utf-8")
        (unfinished / "requirements.txt").write_text(f"{package}\n", encoding="utf-8")
        (unfinished / "README.md").write_text(
            readme.replace("{gradio}", version("gradio")).replace("{title}", title), encoding="utf-8"
        )


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.search.space", __doc__)
    parser.add_argument("--gallery", required=True, help="address of a Milvus server, or a path like /data/gallery.db")
    add_shared_option(parser, "model", help="Hub id of the model that made the gallery")
    add_shared_option(parser, "output_dir")
    parser.add_argument("--name", default="gallery", help="name of the gallery in its store")
    parser.add_argument("--crops", help="folder with the pictures on the Space's storage, for a gallery on a server")
    parser.add_argument(
        "--package",
        default=f"eccl[search]=={version('eccl')}",
        help="line of requirements.txt that installs this package",
    )
    parser.add_argument("--title", default="Person search", help="title of the Space")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    folder = Path(options.output_dir)
    write_space(folder, options.gallery, options.model, options.name, options.crops, options.package, options.title)
    tell(f"written: {folder}; upload it with: eccl-publish {folder} NAME/SPACE")


__all__ = ["write_space"]

if __name__ == "__main__":
    main()
