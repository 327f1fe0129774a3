"""The doorkeeper of the web page: who may ask, how often, how much, and what leaves with each answer."""

import base64
import contextlib
import fnmatch
import hmac
import json
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response

from .app_settings import Settings, is_password

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Of Gradio's routes, only these are reached: its routes for files, uploads and proxies are not.
_PAGE_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(assets|static|svelte)/[\w./@+-]+"
    r"|/gradio_api/(info|app_id|startup-events|reset|cancel|queue/(join|data)|heartbeat/\w[\w-]*|call/(v2/)?search(/\w+)?)/?"
)
_OWN_ROUTES = re.compile(r"/healthz|/api/(search|picture)|/(crop|heat)/[0-9a-f]{64}|/export\.csv")
_LARGEST_REQUEST = 256 * 2**10


class RefusedError(Exception):
    """A request that is not answered; `status` is that of HTTP, the message says why in words."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


# --- limits ---


class RateLimiter:
    """A bucket of tokens for each client: it holds a quarter of a minute's requests, and fills all the time."""

    def __init__(self, per_minute: float):
        self.per_second, self.size = per_minute / 60, max(1.0, per_minute / 4)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, client: str, cost: float = 1.0) -> bool:
        """Takes tokens out of the client's bucket; returns whether it held enough."""
        now = time.monotonic()
        with self._lock:
            tokens, since = self._buckets.pop(client, (self.size, now))
            tokens = min(self.size, tokens + (now - since) * self.per_second)
            enough = tokens >= cost
            self._buckets[client] = (tokens - cost if enough else tokens, now)
            # The buckets that were not used for longest are full again.
            if len(self._buckets) > 10_000:
                self._buckets.popitem(last=False)
        return enough


class Desk:
    """Lets a few searches run at a time and some wait; more are refused."""

    def __init__(self, workers: int, waiting: int):
        self._turns, self._waiting, self._longest = anyio.Semaphore(workers), 0, waiting

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits for a turn.

        Raises:
            RefusedError: too many wait already.
        """
        if self._waiting >= self._longest:
            raise RefusedError(503, "too many searches are waiting: try again in a few seconds")
        self._waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._turns.release()


class AuditLog:
    """A file of JSON lines: who asked for what, and the number of results; never a picture, its id or its path."""

    def __init__(self, path: Path | None):
        self._path, self._lock = path, threading.Lock()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            # A folder, or a file that cannot be written, is found at the start.
            path.open("a").close()

    def write(self, client: str, action: str, **more: Any) -> None:
        if self._path is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "client": client, "action": action, **more}
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# --- the door ---


class Door:
    """Middleware that checks each request before anything else sees it, and adds headers to each answer.

    It refuses other hosts' names (DNS rebinding), requests that another site's page makes, unknown users, routes that
    the page does not need, and large bodies. `scope["state"]["client"]` becomes the user, or the address.
    """

    def __init__(self, app: "ASGIApp", settings: Settings):
        self.app, self.settings = app, settings
        # Ten passwords may be tried at once, and 40 in a minute. The right ones are remembered under a keyed hash.
        self._tries = RateLimiter(40)
        self._key = secrets.token_bytes(32)
        self._known: dict[bytes, str] = {}
        self._headers = {
            "Content-Security-Policy": (
                # Gradio's page has scripts inside, and makes functions of texts.
                "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
                "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
                "connect-src 'self'; object-src 'none'; "
                f"base-uri 'self'; form-action 'self'; frame-ancestors {settings.frame_ancestors}"
            ),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
        }

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # The page uses no web sockets.
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
                if not scope["path"].startswith(("/assets/", "/static/")):
                    headers["Cache-Control"] = "private, no-store"
            await send(message)

        try:
            if scope["path"] != "/healthz":
                await self._check(scope, Headers(scope=scope))
        except RefusedError as error:
            await _refuse(error)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)

    async def _check(self, scope: "Scope", headers: Headers) -> None:
        host, address = headers.get("host", ""), (scope.get("client") or ("unknown", 0))[0]
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        if not any(fnmatch.fnmatchcase(name.lower(), allowed.replace("[", "[[]")) for allowed in self.settings.hosts):
            raise RefusedError(421, f"this page is not reached under the name {name!r}: see --allowed_hosts")
        origin = headers.get("origin")
        is_visit = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
        if (origin is not None and origin.partition("://")[2] != host) or (
            headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none") and not is_visit
        ):
            raise RefusedError(403, "a page of another site may not send requests to this one")
        scope.setdefault("state", {})["client"] = await self._find_user(headers, address)
        if ".." in scope["path"] or not (_PAGE_ROUTES.fullmatch(scope["path"]) or _OWN_ROUTES.fullmatch(scope["path"])):
            raise RefusedError(404, "there is nothing here")
        if scope["method"] not in ("GET", "HEAD"):
            self._check_length(headers, scope["path"])

    def _check_length(self, headers: Headers, path: str) -> None:
        limit = self.settings.largest_upload if path == "/api/picture" else _LARGEST_REQUEST
        length = headers.get("content-length", "")
        if not length.isdecimal():
            raise RefusedError(411, "the request does not say how long it is")
        if int(length) > limit:
            raise RefusedError(413, f"the request has {int(length):,} bytes, at most {limit:,} are read")

    async def _find_user(self, headers: Headers, address: str) -> str:
        """Returns the name of the user; without users, the address."""
        if not self.settings.users:
            return address
        given = headers.get("authorization", "")
        mark = hmac.digest(self._key, given.encode(), "sha256")
        if mark in self._known:
            return self._known[mark]
        scheme, _, encoded = given.partition(" ")
        if scheme.lower() == "basic":
            if not self._tries.take(address):
                raise RefusedError(429, "too many passwords were tried: wait a minute")
            try:
                name, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
            except ValueError:
                name, password = "", ""
            # An unknown name takes as long as a wrong password.
            record = self.settings.users.get(name, "scrypt:" + "00" * 16 + ":" + "00" * 64)
            if await anyio.to_thread.run_sync(is_password, password, record):
                self._known[mark] = name
                return name
        raise RefusedError(401, "a name and a password are needed")


def _refuse(error: RefusedError) -> Response:
    headers = {"WWW-Authenticate": 'Basic realm="person search", charset="UTF-8"'} if error.status == 401 else {}
    return JSONResponse({"error": str(error)}, error.status, headers)


__all__ = ["AuditLog", "Desk", "Door", "RateLimiter", "RefusedError"]
