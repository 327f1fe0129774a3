"""Opens a web page that searches a gallery: a sentence in, ranked crops and the reasons for them out.

python -m eccl.search.app --gallery gallery.db --model DIR

The page sends no request to another host, and copies nothing to temporary folders.
"""

import asyncio
import getpass
import logging
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.command_line import CommandParser, at_least, command, tell
from .app_settings import LOCAL_HOSTS, Settings, hash_password, read_users
from .commands import add_gallery_options, open_gallery

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from starlette.responses import Response

    from .gallery import Gallery


def make_app(gallery: "Gallery", settings: Settings) -> "FastAPI":
    """Makes the page and its API over an open gallery, as an ASGI application.

    Args:
        gallery: it is shared by all requests, and stays open.
        settings: who may ask, and the limits.
    """
    # Gradio reads this when it is imported.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    from fastapi import FastAPI
    from starlette.responses import JSONResponse

    from .app_guard import Door
    from .app_page import build_page
    from .app_service import MISTAKES, SearchService, add_routes, in_words
    from .app_views import STYLE

    def answer_mistake(_: "Request", error: Exception) -> "Response":
        status, words = in_words(error)
        return JSONResponse({"error": words}, status)

    # The pages that describe the API would load scripts from another host.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Door, settings=settings)
    for mistake in MISTAKES:
        app.add_exception_handler(mistake, answer_mistake)
    service = SearchService(gallery, settings)
    add_routes(app, service)
    page = build_page(service)
    # The service limits how many searches run and wait, and says so in words. This queue only passes them on.
    page.queue(default_concurrency_limit=None, max_size=1_000)
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        pwa=False,
        show_error=False,
        # The fonts of the system: the default theme has others.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
    )


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.search.app", __doc__)
    add_gallery_options(parser)
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; an address that other machines reach needs --auth_file",
    )
    parser.add_argument("--port", type=at_least(0), default=7860, help="port to listen on; 0: any free port")
    parser.add_argument("--auth_file", help="file with the users and the hashes of their passwords")
    parser.add_argument("--add_user", metavar="NAME", help="add a user to --auth_file, and ask for the password")
    parser.add_argument(
        "--allowed_hosts",
        nargs="+",
        metavar="NAME",
        help="names under which the page is reached (default: those of this machine; with --auth_file any)",
    )
    parser.add_argument(
        "--requests_per_minute", type=at_least(1), default=120, help="searches of one user, or of one address"
    )
    parser.add_argument("--workers", type=at_least(1), default=2, help="number of searches at a time")
    parser.add_argument("--audit_log", help="file that gets a line for each search: who, when, what; never a picture")
    return parser


def add_user(file: Path, name: str) -> None:
    """Asks for a password, and adds the user to a file that only its owner can read.

    Raises:
        ValueError: the name or the password cannot be used, or the file has the name already.
    """
    if not name or not name.isprintable() or ":" in name or name != name.strip():
        raise ValueError(f"the name {name!r} must have letters, and no colon or blank at its ends")
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    if text.strip() and name in read_users(text):
        raise ValueError(f"{file} has the user {name!r} already: delete that line first")
    password = getpass.getpass(f"password of {name}: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    if len(password) < 8:
        raise ValueError("the password must have at least 8 characters")
    with open(file, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as users:
        users.write(f"{'' if text.endswith(chr(10)) or not text else chr(10)}{name}:{hash_password(password)}\n")


@command
def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    file = Path(options.auth_file) if options.auth_file else None
    if options.add_user is not None:
        if file is None:
            parser.error("--add_user needs --auth_file")
        add_user(file, options.add_user)
        tell(f"added {options.add_user} to {file}")
        return
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"--auth_file is {file}, but there is no such file: add a user with --add_user")
    is_local = options.host in ("localhost", "127.0.0.1", "::1")
    if not is_local and file is None:
        raise ValueError(
            f"--host is {options.host}, which other machines reach: give --auth_file, so that users log in"
        )
    settings = Settings(
        users=read_users(file.read_text(encoding="utf-8")) if file else {},
        hosts=tuple(options.allowed_hosts or (("*",) if file else LOCAL_HOSTS)),
        requests_per_minute=options.requests_per_minute,
        workers=options.workers,
        audit_log=Path(options.audit_log) if options.audit_log else None,
    )
    if find_spec("gradio") is None:
        raise ImportError("the page needs Gradio, which is not installed: pip install 'eccl[app]'")
    if options.port > 65_535:
        parser.error(f"--port is {options.port}, the largest port is 65535")
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    # The port comes first: loading a model takes seconds.
    with (
        socket.create_server((options.host, options.port), family=family) as listener,
        open_gallery(options) as gallery,
    ):
        run_server(make_app(gallery, settings), listener)


def run_server(app: "FastAPI", listener: socket.socket) -> None:
    """Serves an application until the process is stopped. No line is written for a request: a URL can hold a query."""
    import uvicorn

    address, port = listener.getsockname()[:2]
    tell(f"the page: http://{f'[{address}]' if ':' in address else address}:{port}/ (Ctrl-C stops it)")
    # An open page keeps a connection, which would hold up the end.
    logging.getLogger("uvicorn.error").addFilter(_is_no_interruption)
    config = uvicorn.Config(
        app,
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=2,
        timeout_keep_alive=60,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _is_no_interruption(record: logging.LogRecord) -> bool:
    """Keeps the log of an answer that the end of the program has cut off from the terminal."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


__all__ = ["Settings", "add_user", "make_app", "read_users", "run_server"]

if __name__ == "__main__":
    main()
