"""The two engines of a gallery: the embedded one, and a Milvus server in an environment of its own (slow)."""

import contextlib
import uuid

import pytest
from engines import ENGINES

from eccl.search.store import VectorStore


@pytest.fixture(params=ENGINES)
def uri(request, tmp_path):
    """The address of an empty gallery: a path, or a server."""
    return str(tmp_path / "gallery.db") if request.param == "embedded" else request.getfixturevalue("server_address")


@pytest.fixture
def collection(uri):
    """A name that no other test uses; on a server, the collection is dropped at the end."""
    name = f"test_{uuid.uuid4().hex}"
    yield name
    if "://" in uri:
        with (
            contextlib.suppress(FileNotFoundError),
            contextlib.closing(VectorStore.open(uri, name, create=False)) as store,
        ):
            store.drop()


@pytest.fixture
def reopen(uri, collection):
    """Opens the store of the test; the one that was open before is closed."""
    opened = []

    def open(dimension=32, create=True):
        for store in opened:
            store.close()
        opened.clear()
        opened.append(VectorStore.open(uri, collection, dimension=dimension, create=create, properties={"format": "1"}))
        return opened[0]

    yield open
    for store in opened:
        store.close()


@pytest.fixture
def store(reopen):
    return reopen()
