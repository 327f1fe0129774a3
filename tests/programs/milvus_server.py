"""Starts a real Milvus server for the tests: Milvus 2.3.5 from the package index, in an environment of its own."""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from helpers import ROOT

# The last release that comes as a package. Its dependencies do not fit those of this project.
REQUIREMENT = "milvus==2.3.5"
ENVIRONMENT = ROOT / ".venv-milvus"
# If this variable has the address of a server, the tests use that one.
ADDRESS_VARIABLE = "ECCL_MILVUS_SERVER"
ADDRESS = "http://127.0.0.1:19530"
_ATTEMPTS, _PATIENCE = 6, 25
_PORTS = (19530, 2379, 2380)


def install_server() -> Path:
    """Makes the environment, if it is missing, and returns the server's program."""
    program = ENVIRONMENT / "bin" / "milvus-server"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", REQUIREMENT]
        subprocess.run(pip, check=True)
    return program


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Runs a server with its data in a folder, and yields its address; at the end the server is stopped.

    It listens on its usual ports, on all interfaces, because this release cannot be told otherwise: its etcd has no
    options for ports. So a machine runs one at a time.
    """
    if ADDRESS_VARIABLE in os.environ:
        yield os.environ[ADDRESS_VARIABLE]
        return
    program = install_server()
    for attempt in range(_ATTEMPTS):
        place = folder / str(attempt)
        place.mkdir(parents=True)
        server = _start(program, place)
        try:
            # Now and then its etcd elects a leader twice, and the server waits for ever.
            if _answers(server):
                yield ADDRESS
                return
        finally:
            _stop(server)
    raise RuntimeError(f"the Milvus server did not start: {(place / 'log.txt').read_text()[-2000:]}")


def _start(program: Path, folder: Path) -> subprocess.Popen:
    with open(folder / "log.txt", "w") as log:
        words = [str(program), "--data", str(folder / "data")]
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def _answers(server: subprocess.Popen) -> bool:
    from pymilvus import MilvusClient

    # It logs a traceback for each attempt.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    end = time.monotonic() + _PATIENCE
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(Exception):
            with contextlib.closing(MilvusClient(uri=ADDRESS, timeout=2)) as client:
                client.list_collections(timeout=2)
            return True
        time.sleep(0.5)
    return False


def _stop(server: subprocess.Popen) -> None:
    """Ends the program, which is a wrapper, and the server, which is its child; then the ports are free."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and any(_is_used(port) for port in _PORTS):
        time.sleep(0.2)


def _is_used(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
