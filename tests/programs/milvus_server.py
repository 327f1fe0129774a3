"""Starts a real Milvus server for the tests: Milvus 2.3.5 from the package index, in an environment of its own."""

import contextlib
import os
import signal
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
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(
            [str(program), "--data", str(folder / "data")], stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait(server, "http://127.0.0.1:19530", folder / "log.txt")
        yield "http://127.0.0.1:19530"
    finally:
        # The program is a wrapper; the server is its child.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)


def _wait(server: subprocess.Popen, address: str, log: Path) -> None:
    from pymilvus import MilvusClient

    end = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < end:
        with contextlib.suppress(Exception):
            with contextlib.closing(MilvusClient(uri=address, timeout=2)) as client:
                client.list_collections(timeout=2)
            return
        time.sleep(0.5)
    raise RuntimeError(f"the Milvus server did not start: {log.read_text()[-2000:]}")
