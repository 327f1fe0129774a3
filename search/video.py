"""Pictures of people from a video or a live stream: a detector finds them, and overlapping boxes become tracklets.

OpenCV reads the video: `pip install opencv-python-headless`.
"""

import codecs
import contextlib
import hashlib
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..utils.text import printable
from .columns import Picture

_logger = logging.getLogger(__name__)
# A stream has one of these; FFmpeg could also read a file of another name, a pipe or a playlist by its other protocols.
_SCHEMES = ("http", "https", "rtsp", "rtsps", "rtmp", "rtmps")
# People who walk by move less than half their width in a fifth of a second.
_DETECTIONS_PER_SECOND = 5
# How much of a box of OpenCV's people detector is cut off: at the left and at the right, above, below. The medians of
# the margins around the moving people of vtest.avi, a street video of OpenCV's examples, are 0.27, 0.14 and 0.16.
_HOG_MARGINS = (0.2, 0.1, 0.12)
# A wide box that surrounds a person who has a better box is a second find of the same person.
_MOST_COMMON = 0.65

Box = tuple[int, int, int, int]


class Detection(NamedTuple):
    """A person in a frame: the box (x, y, width, height) in pixels, and the score of the detector."""

    box: Box
    score: float


# Takes a frame, `(height, width, 3)`, 8-bit BGR as OpenCV reads it, and finds the people in it.
Detector = Callable[[np.ndarray], list[Detection]]


class Tracker:
    """Follows people from frame to frame by the overlap of their boxes.

    In each frame, the pairs of a track and a box are matched greedily, the largest overlap first. A box without a track
    starts one; a track without a box in more than `max_missed` successive frames ends.

    Args:
        min_overlap: intersection over union from which a box can continue a track, above 0 and up to 1.
        max_missed: number of successive frames in which a track may have no box.

    Attributes:
        boxes: the last box of every track that has not ended, by its number; numbers count from 1.
    """

    def __init__(self, min_overlap: float = 0.2, max_missed: int = 3):
        self.boxes: dict[int, Box] = {}
        self._min_overlap, self._max_missed = min_overlap, max_missed
        self._missed: dict[int, int] = {}
        self._last = 0

    def update(self, boxes: Sequence[Box]) -> list[int]:
        """Takes the boxes of the next frame, and returns the number of the track of each."""
        pairs = sorted(
            (-overlap, number, index)
            for number, known in self.boxes.items()
            for index, box in enumerate(boxes)
            if (overlap := _measure_overlap(known, box)) >= self._min_overlap
        )
        matched: dict[int, int] = {}
        for _, number, index in pairs:
            if index not in matched and number not in matched.values():
                matched[index] = number
        for index in range(len(boxes)):
            if index not in matched:
                self._last += 1
                matched[index] = self._last
        found = {number: boxes[index] for index, number in matched.items()}
        self._missed = {number: self._missed.get(number, 0) + 1 for number in self.boxes} | dict.fromkeys(found, 0)
        self._missed = {number: missed for number, missed in self._missed.items() if missed <= self._max_missed}
        self.boxes = {number: (self.boxes | found)[number] for number in self._missed}
        return [matched[index] for index in range(len(boxes))]


def _measure_overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    common = _measure_intersection(first, second)
    return common / (first[2] * first[3] + second[2] * second[3] - common)


def _measure_intersection(first: Box, second: Box) -> int:
    width = min(first[0] + first[2], second[0] + second[2]) - max(first[0], second[0])
    height = min(first[1] + first[3], second[1] + second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def _share_of_smaller(first: Box, second: Box) -> float:
    """How much of the smaller of two boxes both have in common, 0 to 1."""
    return _measure_intersection(first, second) / min(first[2] * first[3], second[2] * second[3])


def _rank(detection: Detection) -> tuple[float, Box]:
    """Puts the best detection first; equal ones are in the order of their boxes."""
    return -detection.score, detection.box


def load_detector(name: str = "hog", min_score: float = 0.5) -> Detector:
    """Loads a detector of people.

    Args:
        name: `hog`, OpenCV's own detector of standing and walking people who are at least about 100 pixels tall; or the
            folder or Hub id of an object-detection model of transformers whose labels contain "person".
        min_score: lowest score of a detection. The scores of `hog` are distances from the border of its classes, about
            0 to 3; those of a model are probabilities.

    Raises:
        ImportError: OpenCV is not installed, or has no such detector.
        OSError, ValueError: the model cannot be loaded, or knows no label "person".
    """
    if not math.isfinite(min_score) or min_score < 0:
        raise ValueError(f"min_score is {min_score}, it must be a number from 0 on")
    return _load_hog(min_score) if name == "hog" else _load_model(name, min_score)


def _load_hog(min_score: float) -> Detector:
    cv2 = _import_opencv()
    if not hasattr(cv2, "HOGDescriptor"):
        raise ImportError(f"OpenCV {cv2.__version__} has no HOG detector: pip install 'opencv-python-headless<5'")
    hog = cv2.HOGDescriptor()
    hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())

    def detect(frame: np.ndarray) -> list[Detection]:
        boxes, scores = hog.detectMultiScale(frame, winStride=(4, 4), padding=(8, 8), scale=1.05)
        side, above, below = _HOG_MARGINS
        found = [
            Detection(
                (
                    round(x + side * width),
                    round(y + above * height),
                    round((1 - 2 * side) * width),
                    round((1 - above - below) * height),
                ),
                float(score),
            )
            for (x, y, width, height), score in zip(boxes, scores, strict=True)
            if score >= min_score
        ]
        kept: list[Detection] = []
        for each in sorted(found, key=_rank):
            if not any(_share_of_smaller(each.box, other.box) > _MOST_COMMON for other in kept):
                kept.append(each)
        return kept

    return detect


def _load_model(name: str, min_score: float) -> Detector:
    from transformers import pipeline

    # Without trust_remote_code, transformers would ask at the terminal whether it may run a repository's code.
    detector = pipeline("object-detection", model=name, trust_remote_code=False)
    labels = list((detector.model.config.id2label or {}).values())
    if "person" not in map(str.lower, labels):
        shown = ", ".join(labels[:10]) + (", ..." if len(labels) > 10 else "")
        raise ValueError(f"the detector {name} has no label person, only {shown}")

    def detect(frame: np.ndarray) -> list[Detection]:
        found: list[dict[str, Any]] = detector(Image.fromarray(_to_rgb(frame)), threshold=min_score)
        return [
            Detection((box["xmin"], box["ymin"], box["xmax"] - box["xmin"], box["ymax"] - box["ymin"]), result["score"])
            for result in found
            if result["label"].lower() == "person"
            for box in [result["box"]]
        ]

    return detect


def read_video(
    source: str | os.PathLike[str],
    camera: str | None = None,
    start: datetime | None = None,
    *,
    detector: str | Detector = "hog",
    every: int | None = None,
    min_score: float = 0.5,
    interval: float = 1.0,
    timeout: float = 10.0,
    progress: bool = True,
) -> Iterator[Picture]:
    """Opens a video and finds the people in it.

    Every tracklet gives its best crop, the one with the highest score, of each `interval`. A picture has the columns
    `frame` (number of the frame, counted from 0), `tracklet`, `time` if it is known, and `camera` if it is given. Its
    path is `VIDEO#frame=120&box=X,Y,WIDTH,HEIGHT`, where VIDEO is an absolute path or the URL. The same file gives the
    same pictures each time.

    Args:
        source: a file; or a URL (http, https, rtsp, rtsps, rtmp, rtmps). A user and a password in it are used, but do
            not appear in paths and messages. A URL without a known number of frames is a live stream: then frames are
            passed over while the detector is busy, and the times are those of this machine's clock.
        camera: name of the camera.
        start: the time of the first frame; without a zone, UTC. Without it, the pictures of a file have no time: the
            file's own times say when it was copied or closed, not when it was recorded.
        detector: see [`load_detector`]; or a function that takes a frame and returns a list of `Detection`.
        every: the detector looks at every Nth frame; by default at about five frames a second.
        min_score: lowest score of a detection, see [`load_detector`].
        interval: seconds; 0 keeps every crop.
        timeout: seconds after which a URL that does not answer, or that sends no more frames, is given up.
        progress: shows a bar of frames.

    Returns:
        The pictures; their `image` is a PIL image. A warning tells of a video with unreadable frames, and of the end of
        a stream.

    Raises:
        ImportError: OpenCV is not installed.
        FileNotFoundError: the file does not exist.
        ConnectionError: the URL does not answer, or sends no video.
        ValueError: the file is no video, an argument is out of range, or several processes read a live stream.
    """
    for name, value, smallest in (("every", every, 1), ("interval", interval, 0), ("timeout", timeout, 0.1)):
        if value is not None and not (math.isfinite(value) and value >= smallest):
            raise ValueError(f"{name} is {value}, it must be at least {smallest}")
    source = os.fspath(source)
    _require_source(source)
    if isinstance(detector, str):
        # First, because a stream that is open and not read falls behind.
        detector = load_detector(detector, min_score)
    video = _Video.open(source, timeout)
    if video.is_live and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{video.name} is a live stream: each process would see other frames, start one process only")
    if video.is_live and start is not None:
        raise ValueError(f"{video.name} is a live stream: its times are those of the clock, leave start out")
    if not video.is_live and start is None:
        _logger.warning(f"{video.name} has no start time: its pictures get no time")
    return _make_pictures(video, camera, start, detector, every, min_score, interval, progress)


class _Frame(NamedTuple):
    number: int
    seconds: float  # since the first frame
    image: np.ndarray


@dataclass
class _Crop:
    """The best crop of a tracklet since `opened`, in seconds from the start of the video."""

    opened: float
    score: float
    seconds: float
    number: int
    box: Box
    pixels: np.ndarray


def _make_pictures(
    video: "_Video",
    camera: str | None,
    start: datetime | None,
    detect: Detector,
    every: int | None,
    min_score: float,
    interval: float,
    progress: bool,
) -> Iterator[Picture]:
    if video.is_live:
        start = datetime.now(UTC)
    elif start is not None and start.tzinfo is None:
        start = start.replace(tzinfo=UTC)
    # The tracklets of a stream that is opened twice have different names.
    title = f"{video.name}@{start:%Y%m%dT%H%M%S}" if video.is_live else video.path
    # A path can be longer than the name of a tracklet may be.
    group = f"{os.path.basename(title)[:40]}-{hashlib.sha256(os.fsencode(title)).hexdigest()[:12]}"

    def make(track: int, crop: _Crop) -> Picture:
        columns: dict[str, Any] = {"tracklet": f"{group}-{track}", "frame": crop.number}
        if start is not None:
            columns["time"] = start + timedelta(seconds=crop.seconds)
        if camera is not None:
            columns["camera"] = camera
        box = ",".join(map(str, crop.box))
        return Picture(Image.fromarray(_to_rgb(crop.pixels)), columns, f"{title}#frame={crop.number}&box={box}")

    tracker = Tracker()
    best: dict[int, _Crop] = {}
    with tqdm(total=video.size, desc=f"reading {printable(video.name)}", unit="frame", disable=not progress) as bar:
        for frame in video.read(every or max(1, round(video.rate / _DETECTIONS_PER_SECOND))):
            bar.update(frame.number + 1 - bar.n)
            # A detector with several threads may find the boxes in any order.
            detections = sorted(
                (
                    Detection(box, found.score)
                    for found in detect(frame.image)
                    if found.score >= min_score and (box := _clip(found.box, frame.image.shape))
                ),
                key=_rank,
            )
            tracks = tracker.update([found.box for found in detections])
            for track in [track for track in best if track not in tracker.boxes]:
                yield make(track, best.pop(track))
            for track, (box, score) in zip(tracks, detections, strict=True):
                crop = best.get(track)
                # The times of frames are multiples of a fraction: a frame that is due may come a little early.
                if crop and frame.seconds - crop.opened >= interval - 1e-6:
                    yield make(track, best.pop(track))
                    crop = None
                if crop is None or score > crop.score:
                    x, y, width, height = box
                    pixels = frame.image[y : y + height, x : x + width].copy()
                    opened = crop.opened if crop else frame.seconds
                    best[track] = _Crop(opened, score, frame.seconds, frame.number, box, pixels)
        bar.update(video.frames_read - bar.n)
    for track, crop in best.items():
        yield make(track, crop)


def _clip(box: Box, shape: tuple[int, ...]) -> Box | None:
    """Returns the part of a box within the frame; `None`: there is none."""
    x, y = max(box[0], 0), max(box[1], 0)
    width, height = min(box[0] + box[2], shape[1]) - x, min(box[1] + box[3], shape[0]) - y
    return (x, y, width, height) if width > 0 and height > 0 else None


def _to_rgb(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[:, :, ::-1])


class _Video:
    """An open video.

    Attributes:
        name: the source, without a user and a password.
        path: the absolute path of a file, or `name` of a URL.
        is_live: whether it is a stream without an end.
        size: number of frames, if it is known.
        rate: frames a second.
        frames_read: number of frames that have been read.
    """

    def __init__(self, cv2: ModuleType, capture: Any, name: str, is_url: bool):
        self._cv2, self._capture = cv2, capture
        self.name = name
        self.path = name if is_url else os.path.abspath(os.path.expanduser(name))
        size = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.size = int(size) if size > 0 else None
        self.is_live = is_url and self.size is None
        rate = capture.get(cv2.CAP_PROP_FPS)
        # Some containers have no rate, or the unit of their clock instead of one.
        self.rate = rate if 0 < rate <= 1000 else 25.0
        self.frames_read = 0

    @classmethod
    def open(cls, source: str, timeout: float) -> "_Video":
        cv2 = _import_opencv()
        is_url, name = _is_url(source), _hide_password(source)
        if not is_url:
            source = os.path.abspath(os.path.expanduser(source))
        milliseconds = round(timeout * 1000)
        settings = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, milliseconds, cv2.CAP_PROP_READ_TIMEOUT_MSEC, milliseconds]
        # Other backends know neither these limits nor exact times.
        capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, settings)
        if not capture.isOpened():
            if is_url:
                raise ConnectionError(f"{name} does not answer within {timeout:g} s, or sends no video")
            raise ValueError(f"{name} is no video that OpenCV can read")
        return cls(cv2, capture, name, is_url)

    def read(self, every: int) -> Iterator[_Frame]:
        """Reads each `every`-th frame; a warning tells of frames that cannot be read."""
        yield from self._read_live(every) if self.is_live else self._read_all(every)
        if self.is_live:
            _logger.warning(f"{self.name} has ended after {self.frames_read:,} frames")
        elif not self.frames_read:
            raise ValueError(f"{self.name} is no video that OpenCV can read: it has no frame")
        # Some containers give a duration only: then the number of frames is an estimate.
        elif self.size and self.size - self.frames_read > max(1, self.size / 100):
            _logger.warning(
                f"{self.name} is damaged or incomplete: only {self.frames_read:,} of {self.size:,} frames can be read"
            )

    def _read_all(self, every: int) -> Iterator[_Frame]:
        start = 0.0
        while self._capture.grab():
            # Frames of a phone come at uneven times; a file without times gives 0.
            seconds = self._capture.get(self._cv2.CAP_PROP_POS_MSEC) / 1000
            start = start if self.frames_read else seconds
            number, self.frames_read = self.frames_read, self.frames_read + 1
            if number % every:
                continue
            readable, image = self._capture.retrieve()
            if not readable:
                return
            yield _Frame(number, seconds - start if seconds > start else number / self.rate, image)

    def _read_live(self, every: int) -> Iterator[_Frame]:
        """Reads in a thread, so that the frame after the detector's pause is the newest one."""
        newest: queue.Queue[_Frame | None] = queue.Queue(1)
        stopped = threading.Event()
        opened = time.monotonic()

        def put(item: _Frame | None) -> None:
            with contextlib.suppress(queue.Empty):
                newest.get_nowait()
            newest.put(item)  # There is room: nobody else puts.

        def read() -> None:
            try:
                while not stopped.is_set() and self._capture.grab():
                    seconds = time.monotonic() - opened
                    number, self.frames_read = self.frames_read, self.frames_read + 1
                    if number % every == 0:
                        readable, image = self._capture.retrieve()
                        if not readable:
                            return
                        put(_Frame(number, seconds, image))
            finally:
                put(None)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            while (frame := newest.get()) is not None:
                yield frame
        finally:
            stopped.set()
            thread.join()


def _require_source(source: str) -> None:
    """Checks a source before it is opened."""
    name, file = _hide_password(source), os.path.expanduser(source)
    if _is_url(source):
        if urlsplit(source).scheme.lower() not in _SCHEMES:
            raise ValueError(f"{name} cannot be read: a URL must start with {', '.join(_SCHEMES)}")
    elif not os.path.exists(file):
        raise FileNotFoundError(f"{name} does not exist")
    elif not os.path.isfile(file) or _is_text(file):
        raise ValueError(f"{name} is no video")


def _is_url(source: str) -> bool:
    return "://" in source


def _hide_password(source: str) -> str:
    """Returns a URL without its user and password; a file as it is."""
    if not _is_url(source):
        return source
    parts = urlsplit(source)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _is_text(file: str) -> bool:
    """Whether a file starts like a text: FFmpeg would play it as the picture of a terminal, or open a playlist."""
    with open(file, "rb") as stream:
        start = stream.read(4096)
    try:
        # The bytes of the last character may be cut off: an incremental decoder waits for them.
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return b"\0" not in start


def _import_opencv() -> ModuleType:
    # FFmpeg reads this variable once, and would print every broken frame.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("a video needs OpenCV: pip install opencv-python-headless") from error
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


__all__ = ["Box", "Detection", "Detector", "Tracker", "load_detector", "read_video"]
