"""What the tests of the search page share: a small gallery with hostile names, and a server in a thread."""

import contextlib
import io
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import uvicorn
from PIL import Image

from eccl.hub.loading import load_model
from eccl.search.gallery import Gallery, Picture
from helpers import wait_until

HOSTILE_CAMERA = "<script>document.title='broken'</script>"
HOSTILE_NOTE = "<img src=x onerror=\"document.title='broken'\">"
START = datetime(2026, 5, 1, 8, tzinfo=UTC)
PICTURES = 30


def draw_person(row: int) -> Image.Image:
    """Draws a picture of 24 x 48 pixels that no other number gives."""
    picture = Image.new("RGB", (24, 48), (8 * row % 256, 37 * row % 256, 91 * row % 256))
    picture.paste((255 - 8 * row, 20, 5 * row), (4, 12, 20, 30))
    return picture


def encode_jpeg(picture: Image.Image, orientation: int | None = None) -> bytes:
    """Encodes a picture; with an orientation, it also gets a place on earth, a name and a thumbnail's marker."""
    file, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
        exif[0x010E] = "taken by SECRETNAME"
        exif[0x8825] = {1: "N", 2: (48.0, 8.0, 15.0)}
    picture.save(file, "JPEG", quality=95, exif=exif.tobytes())
    return file.getvalue()


def make_gallery(folder: Path, backbone: Path, uri: str = "gallery.db") -> Gallery:
    """Makes a gallery of thirty pictures: two cameras, ten minutes between pictures, three pictures a tracklet.

    It has the columns `floor` (0 to 2) and `note`. The first picture is stored lying on its side, with a place.
    """
    (folder / "imgs").mkdir(parents=True)
    pictures = []
    for row in range(PICTURES):
        file = folder / "imgs" / f"person {row:02}.jpg"
        file.write_bytes(encode_jpeg(draw_person(row), orientation=6 if row == 0 else None))
        columns = {
            "camera": ("north", HOSTILE_CAMERA)[row % 2],
            "time": START + timedelta(minutes=10 * row),
            "tracklet": f"t{row // 3}",
            "floor": row % 3,
            "note": HOSTILE_NOTE if row % 2 else "=1+1",
        }
        pictures.append(Picture(file, columns))
    gallery = Gallery.open(*load_model(str(backbone)), folder / uri)
    gallery.add(pictures, progress=False)
    return gallery


@contextlib.contextmanager
def served(app) -> Iterator[str]:
    """Serves an application on a free port, in a thread; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
