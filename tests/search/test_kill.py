"""Indexing that is killed, or that several processes share: nothing is lost, and nothing is in twice."""

import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
from PIL import Image

from eccl.hub.loading import load_model
from eccl.search.gallery import Gallery
from eccl.search.store import VectorStore
from helpers import ROOT, launch

BACKBONE = ROOT / "assets" / "synthetic-backbone"
PICTURES = 160


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = noise.integers(0, 256, (48, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03}.png")
    return folder


@pytest.fixture(scope="module")
def ids(folder):
    return {hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def index(uri, collection, folder, crops, started):
    """Runs in a process of its own. Every other picture has no file, and is kept as a crop."""
    with Gallery.open(*load_model(BACKBONE), uri, collection, crops=crops) as gallery:
        started.set()
        files = sorted(folder.iterdir())
        pictures = [
            file if number % 2 else {"bytes": file.read_bytes(), "path": file.name} for number, file in enumerate(files)
        ]
        # A batch is written at once: small ones give many moments to be killed at.
        for start in range(0, len(pictures), 16):
            gallery.add(pictures[start : start + 16], batch_size=4, progress=False)


def start(context, *arguments):
    started = context.Event()
    process = context.Process(target=index, args=(*arguments, started))
    process.start()
    assert started.wait(120)
    return process


@pytest.mark.slow
def test_ten_kills_at_random_moments_lose_nothing_and_double_nothing(
    uri, collection, folder, ids, tmp_path, laboratory
):
    # New processes are copies of one that has imported the package. A program has one such process: the laboratory's.
    context = multiprocessing.get_context("forkserver")
    moments = random.Random(17)
    kept = set()
    killed = 0
    pause = 0.3
    for _ in range(10):
        process = start(context, uri, collection, folder, tmp_path / "crops")
        time.sleep(moments.uniform(0, pause))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        with contextlib.closing(VectorStore.open(uri, collection, create=False)) as store:
            found = {row["id"] for row in store.scan()}
            assert store.count() == len(found) and kept <= found <= ids
            # On a slow machine, the first write comes later.
            pause *= 1.0 if found > kept else 1.7
            kept = found
    assert killed >= 5 and kept
    process = start(context, uri, collection, folder, tmp_path / "crops")
    process.join()
    assert process.exitcode == 0
    with Gallery.open(*load_model(BACKBONE), uri, collection, crops=tmp_path / "crops") as gallery:
        rows = list(gallery.store.scan())
        assert len(rows) == len(gallery) == PICTURES and {row["id"] for row in rows} == ids
        report = gallery.verify(samples=PICTURES)
        assert report.is_sound and report.pictures == PICTURES


@pytest.mark.slow
def test_two_processes_index_as_one(uri, collection, folder, ids, tmp_path):
    words = ["index", folder, "--model", BACKBONE, "--gallery", uri, "--name", collection, "--batch_size", 8]
    launch(2, "tests/programs/index_run.py", *words, log=tmp_path / "log.txt")
    printed = (tmp_path / "log.txt").read_text()
    assert printed.count("added 160, known 0, skipped 0: 160 pictures") == 1
    with Gallery.open(*load_model(BACKBONE), uri, collection) as gallery:
        assert {row["id"] for row in gallery.store.scan()} == ids and gallery.verify(samples=PICTURES).is_sound
