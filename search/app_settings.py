"""The settings of the web page, and the users who may ask."""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
# The cost of scrypt: 16 MiB and about 50 ms for each password that is tried.
_SCRYPT = {"n": 2**14, "r": 8, "p": 1}


@dataclass(frozen=True)
class Settings:
    """The settings of the web page.

    Args:
        users: names, and the records of their passwords as [`hash_password`] makes them; empty: everybody may ask.
        hosts: the names under which the page is reached; `*` stands for any letters.
        frame_ancestors: the pages that may show this one in a frame, as in a Content-Security-Policy.
        requests_per_minute: of one user, or of one address without users; a crop counts as 1/50.
        workers: number of searches at a time.
        waiting: number of searches that may wait for their turn; more are refused.
        largest_upload: size of an uploaded picture, in bytes.
        most_pixels: pixels of an uploaded picture.
        audit_log: file that gets a line for each search, heat map and export.
    """

    users: Mapping[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = LOCAL_HOSTS
    frame_ancestors: str = "'none'"
    requests_per_minute: int = 120
    workers: int = 2
    waiting: int = 100
    largest_upload: int = 10 * 2**20
    most_pixels: int = 25_000_000
    audit_log: Path | None = None


def hash_password(password: str) -> str:
    """Makes the record of a password: `scrypt:SALT:HASH`, both in hexadecimal digits."""
    salt = secrets.token_bytes(16)
    return f"scrypt:{salt.hex()}:{hashlib.scrypt(password.encode(), salt=salt, **_SCRYPT).hex()}"


def is_password(password: str, record: str) -> bool:
    _, salt, digest = record.split(":")
    found = hashlib.scrypt(password.encode(), salt=bytes.fromhex(salt), **_SCRYPT)
    return hmac.compare_digest(found, bytes.fromhex(digest))


def read_users(text: str) -> dict[str, str]:
    """Reads the lines of a file of users: `name:scrypt:SALT:HASH`. Empty lines are passed over.

    Raises:
        ValueError: a line is of another form, a name comes twice, or there is no user. The message has no password.
    """
    users: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, _, record = line.strip().partition(":")
        if not name or not re.fullmatch(r"scrypt:[0-9a-f]{32}:[0-9a-f]{128}", record):
            raise ValueError(f"line {number} of the users is not NAME:scrypt:SALT:HASH: write it with --add_user")
        if name in users:
            raise ValueError(f"line {number} of the users names {name!r} again")
        users[name] = record
    if not users:
        raise ValueError("the file of users has no user: add one with --add_user")
    return users


__all__ = ["LOCAL_HOSTS", "Settings", "hash_password", "is_password", "read_users"]
