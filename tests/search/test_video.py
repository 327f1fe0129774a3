import contextlib
import http.server
import itertools
import re
import socket
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eccl.hub.loading import load_model
from eccl.search.gallery import Gallery, Where
from eccl.search.video import Detection, Tracker, load_detector, read_video
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"
STREET = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
needs_street = pytest.mark.skipif(
    not STREET.exists(), reason="the street video of the Debian package opencv-doc is absent"
)
START = datetime(2024, 5, 31, 14, tzinfo=UTC)


def write_video(file, frames, rate=10, code="FFV1"):
    """Writes frames, `(height, width, 3)` in BGR; FFV1 keeps every pixel."""
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(file), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*code), rate, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return file


def draw(*persons, width=160, height=120):
    """Draws persons, `(x, y, red)`: rectangles of 20 x 50 pixels on grey."""
    frame = np.full((height, width, 3), 80, np.uint8)
    for x, y, red in persons:
        frame[max(y, 0) : y + 50, max(x, 0) : x + 20] = (0, 0, red)
    return frame


def find_rectangles(frame):
    """A detector that finds the rectangles of `draw`; their score is their red, 0 to 1."""
    mask = ((frame[:, :, 2] > 100) & (frame[:, :, 0] == 0)).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    return [
        Detection((int(x), int(y), int(w), int(h)), int(frame[y + h // 2, x + w // 2, 2]) / 255)
        for x, y, w, h, _ in stats[1:]
    ]


def read(file, **options):
    return list(read_video(file, **({"detector": find_rectangles, "progress": False, "start": START} | options)))


# Tracks


def test_tracks_follow_people_who_cross_pause_and_leave():
    tracker = Tracker(min_overlap=0.2, max_missed=1)
    left, right = (0, 0, 10, 20), (40, 0, 10, 20)
    assert tracker.update([left, right]) == [1, 2]
    # The order of the boxes does not matter, and both may move.
    assert tracker.update([(37, 0, 10, 20), (3, 0, 10, 20)]) == [2, 1]
    # Both boxes overlap the first track: the nearer one continues it.
    assert tracker.update([(6, 0, 10, 20), (4, 0, 10, 20)]) == [3, 1]
    # Without a box in one frame the second track goes on; without a box in two frames it has ended.
    assert tracker.boxes[2] == (37, 0, 10, 20)
    assert tracker.update([(36, 0, 10, 20)]) == [2]
    assert tracker.update([]) == [] and set(tracker.boxes) == {2}
    assert tracker.update([]) == [] and tracker.boxes == {}
    assert tracker.update([(36, 0, 10, 20)]) == [4]


def paint(box):
    """The pixels of a box as a set."""
    x, y, width, height = box
    return {(column, row) for column in range(x, x + width) for row in range(y, y + height)}


boxes = st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(1, 6), st.integers(1, 6))


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(boxes, max_size=5), max_size=8), st.sampled_from([0.1, 0.3, 0.9]), st.integers(0, 2))
def test_tracks_are_those_of_a_search_that_takes_the_best_pair_again_and_again(frames, min_overlap, max_missed):
    tracker = Tracker(min_overlap, max_missed)
    known = {}  # number: (box, frame in which it was seen last)
    total = 0
    for time_, frame in enumerate(frames):
        known = {number: (box, seen) for number, (box, seen) in known.items() if time_ - seen <= max_missed + 1}
        expected = [None] * len(frame)
        while True:
            pairs = [
                (len(paint(box) & paint(old)) / len(paint(box) | paint(old)), -number, -index)
                for index, box in enumerate(frame)
                for number, (old, _) in known.items()
                if expected[index] is None and number not in expected
            ]
            if not pairs or max(pairs)[0] < min_overlap:
                break
            _, number, index = max(pairs)
            expected[-index] = -number
        for index in range(len(frame)):
            if expected[index] is None:
                total += 1
                expected[index] = total
        assert tracker.update(frame) == expected
        known |= {number: (box, time_) for number, box in zip(expected, frame, strict=True)}


# Pictures of small videos


def test_each_tracklet_gives_its_best_crop_of_each_interval(tmp_path):
    # 25 frames, 10 a second. One person walks right and is seen best in frames 4 and 17, another stands still.
    reds = {4: 250, 17: 240}
    frames = [draw((10 + 3 * i, 5, reds.get(i, 200)), (130, 65, 150)) for i in range(25)]
    file = write_video(tmp_path / "walk.avi", frames)
    pictures = read(file, camera="gate", every=1)
    walker = [picture for picture in pictures if picture.columns["tracklet"].endswith("-1")]
    # The interval is one second: frames 0 to 9, 10 to 19 and 20 to 24.
    assert [picture.columns["frame"] for picture in walker] == [4, 17, 20]
    for picture, red in zip(walker, (250, 240, 200), strict=True):
        frame = picture.columns["frame"]
        assert picture.columns["time"] == START + timedelta(seconds=frame / 10)
        assert picture.columns["camera"] == "gate"
        assert picture.path == f"{file}#frame={frame}&box={10 + 3 * frame},5,20,50"
        assert picture.image.mode == "RGB" and picture.image.size == (20, 50)
        assert picture.image.getcolors() == [(20 * 50, (red, 0, 0))]
    assert len(pictures) == 6
    # The tracklets of another file with the same name are different ones.
    (tmp_path / "other").mkdir()
    other = read(write_video(tmp_path / "other" / "walk.avi", frames), every=1)
    tracklets = [{picture.columns["tracklet"] for picture in some} for some in (pictures, other)]
    assert [len(some) for some in tracklets] == [2, 2] and tracklets[0].isdisjoint(tracklets[1])


def test_options_choose_the_frames_and_the_crops(tmp_path):
    file = write_video(tmp_path / "v.avi", [draw((20 + i, 5, 200), (130, 65, 120)) for i in range(20)])
    frames = [picture.columns["frame"] for picture in read(file, every=4, interval=0, min_score=0.6)]
    assert frames == [0, 4, 8, 12, 16]
    # By default five frames a second, so every second one of ten.
    assert {picture.columns["frame"] for picture in read(file, interval=0)} == set(range(0, 20, 2))
    assert "camera" not in read(file)[0].columns
    naive = read(file, start=START.replace(tzinfo=None))
    assert [picture.columns["time"] for picture in naive] == [picture.columns["time"] for picture in read(file)]


def test_the_command_passes_the_score_on(tmp_path, monkeypatch):
    from eccl.search import commands, video

    seen = {}
    monkeypatch.setattr(video, "read_video", lambda *words, **options: seen.update(options) or [])
    words = ["index", "--video", str(tmp_path / "v.avi"), "--min_detection", "0.2", "--every", "3", "--interval", "2"]
    commands._list_pictures(commands.make_parser().parse_args(words))
    assert seen == {"detector": "hog", "min_score": 0.2, "every": 3, "interval": 2.0}


def test_boxes_are_cut_at_the_border_of_the_frame(tmp_path):
    file = write_video(tmp_path / "v.avi", [draw(), draw()])
    detector = [Detection((-5, 100, 30, 50), 0.9), Detection((200, 0, 10, 10), 0.8), Detection((0, 0, 9, 9), 0.4)]
    (picture,) = read(file, detector=lambda frame: detector, every=2)
    assert picture.path.endswith("#frame=0&box=0,100,25,20") and picture.image.size == (25, 20)


def test_without_a_start_pictures_of_a_file_have_no_time(tmp_path, caplog):
    file = write_video(tmp_path / "v.avi", [draw((20, 5, 200))] * 3)
    (picture,) = read(file, start=None)
    assert "time" not in picture.columns
    assert f"{file} has no start time" in caplog.text


def test_a_video_that_breaks_off_gives_its_pictures_and_a_warning(tmp_path, caplog):
    noise = np.random.default_rng(0).integers(0, 60, (40, 120, 160, 3), dtype=np.uint8)
    for frame in noise:
        frame[20:70, 30:50] = (0, 0, 200)
    file = write_video(tmp_path / "v.avi", list(noise))
    whole = read(file, every=1)
    assert len(whole) == 4 and caplog.text == ""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    part = read(file, every=1)
    assert 1 <= len(part) < 4 and part[0].image == whole[0].image
    found = [record.message for record in caplog.records if "incomplete" in record.message]
    assert len(found) == 1 and re.search(r"only \d+ of 40 frames can be read", found[0])


def test_the_bar_counts_frames(tmp_path, capfd):
    file = write_video(tmp_path / "v.avi", [draw((20, 5, 200))] * 30)
    read(file, progress=True)
    assert "30/30" in capfd.readouterr().err


def test_a_gallery_has_no_crop_twice_when_a_video_is_indexed_again(tmp_path):
    file = write_video(tmp_path / "v.avi", [draw((10 + 3 * i, 5, 200 + i), (130, 65, 150)) for i in range(25)])
    with Gallery.open(*load_model(BACKBONE), uri=str(tmp_path / "gallery.db")) as gallery:
        # As if the first run was killed after its third picture.
        first = gallery.add(itertools.islice(read_video(file, "gate", START, detector=find_rectangles), 3))
        assert (first.added, first.known) == (3, 0)
        whole = gallery.add(read_video(file, "gate", START, detector=find_rectangles, progress=False))
        pictures = read(file, camera="gate")
        # The person who stands still looks the same in each interval.
        unlike = {picture.image.tobytes() for picture in pictures}
        assert whole.added == len(unlike) - 3 and whole.added + whole.known == len(pictures)
        matches = gallery.search("a person in red", where=Where(camera="gate"))
        assert len(matches) == len(unlike)
        for match in matches:
            (picture,) = [picture for picture in pictures if picture.path == match.path]
            assert {name: match.columns[name] for name in picture.columns} == picture.columns
            assert gallery.read_crop(match.id).tobytes() == picture.image.tobytes()


# Mistakes


def test_mistakes_are_errors_before_the_work_and_opencv_is_quiet(tmp_path, capfd):
    (tmp_path / "empty.avi").touch()
    (tmp_path / "noise.avi").write_bytes(np.random.default_rng(0).bytes(5000))
    # FFmpeg would play it as the picture of a terminal.
    (tmp_path / "text.txt").write_text("Wörter\n" * 2000)
    video = write_video(tmp_path / "v.avi", [draw()] * 2)
    for source, options, error, message in (
        (tmp_path / "none.avi", {}, FileNotFoundError, "none.avi does not exist"),
        (tmp_path, {}, ValueError, "is no video"),
        (tmp_path / "empty.avi", {}, ValueError, "empty.avi is no video"),
        (tmp_path / "noise.avi", {}, ValueError, "noise.avi is no video that OpenCV can read"),
        (tmp_path / "text.txt", {}, ValueError, "text.txt is no video"),
        ("file:///etc/passwd", {}, ValueError, "a URL must start with http, https, rtsp"),
        (video, {"every": 0}, ValueError, "every is 0, it must be at least 1"),
        (video, {"interval": -1}, ValueError, "interval is -1, it must be at least 0"),
        (video, {"timeout": float("nan")}, ValueError, "timeout is nan"),
        (video, {"detector": "hog", "min_score": -1}, ValueError, "min_score is -1"),
    ):
        with pytest.raises(error, match=message):
            # Nothing is consumed: the call itself refuses.
            read_video(source, **({"detector": find_rectangles} | options))
    assert capfd.readouterr() == ("", "")


def test_a_server_that_does_not_answer_is_given_up_in_time():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for scheme in ("http", "rtsp"):
            began = time.monotonic()
            with pytest.raises(ConnectionError) as caught:
                read_video(f"{scheme}://user:secret@127.0.0.1:{port}/a", detector=find_rectangles, timeout=1)
            assert time.monotonic() - began < 5
            assert f"{scheme}://127.0.0.1:{port}/a does not answer within 1 s" in str(caught.value)
            assert "secret" not in str(caught.value)


def test_a_missing_opencv_is_named(tmp_path, monkeypatch):
    file = write_video(tmp_path / "v.avi", [draw()])
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        read_video(file)


def test_an_opencv_without_hog_is_named(monkeypatch):
    monkeypatch.delattr(cv2, "HOGDescriptor")
    with pytest.raises(ImportError, match="opencv-python-headless<5"):
        load_detector("hog")


# Streams


class Camera(http.server.BaseHTTPRequestHandler):
    """Sends 60 JPEG pictures, 20 a second, as network cameras do: a person walks right, one pixel a picture."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        with contextlib.suppress(OSError):
            for number in range(60):
                content = cv2.imencode(".jpg", draw((number, 20, 255)))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
                self.wfile.write(head.encode() + content + b"\r\n")
                time.sleep(0.05)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def camera_url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://user:secret@127.0.0.1:{server.server_port}/stream"
        server.shutdown()


def find_red(frame):
    """A detector that takes a fifth of a second, in which four pictures come."""
    time.sleep(0.2)
    ys, xs = np.where((frame[:, :, 2] > 180) & (frame[:, :, 1] < 80))
    return [Detection((int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1), 1.0)] if len(xs) else []


def test_a_slow_detector_sees_the_newest_frames_of_a_stream(camera_url, caplog):
    began = datetime.now(UTC)
    pictures = read(camera_url, start=None, detector=find_red, every=1, interval=0)
    numbers = sorted(picture.columns["frame"] for picture in pictures)
    # FFmpeg reads some frames at once when it opens the stream; the others come four in each pause of the detector.
    assert 3 <= len(numbers) < 30 and numbers[-1] >= 50
    for picture in pictures:
        x = int(picture.path.rpartition("box=")[2].split(",")[0])
        assert abs(x - picture.columns["frame"]) <= 2  # JPEG blurs the border.
        assert began < picture.columns["time"] < datetime.now(UTC)
        assert "secret" not in picture.path + picture.columns["tracklet"]
    times = [picture.columns["time"] for picture in sorted(pictures, key=lambda picture: picture.columns["frame"])]
    assert times == sorted(times)
    assert "/stream has ended after 60 frames" in caplog.text and "secret" not in caplog.text


def test_a_stream_can_be_left_and_takes_no_start_and_no_second_process(camera_url, monkeypatch):
    pictures = read_video(camera_url, detector=find_red, every=1, interval=0, progress=False)
    next(pictures)
    threads = threading.active_count()
    pictures.close()
    assert threading.active_count() < threads
    with pytest.raises(ValueError, match="is a live stream"):
        read_video(camera_url, start=START, detector=find_red)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each process would see other frames"):
        read_video(camera_url, detector=find_red)


# A detector of transformers


@pytest.fixture(scope="session")
def make_yolos(tmp_path_factory):
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessorPil

    def make(*labels):
        folder = tmp_path_factory.mktemp("yolos")
        torch.manual_seed(0)
        config = YolosConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=[64, 96],
            patch_size=16, num_detection_tokens=6, use_mid_position_embeddings=False, initializer_range=0.2,
            id2label=dict(enumerate(labels)), label2id={label: number for number, label in enumerate(labels)},
        )  # fmt: skip
        model = YolosForObjectDetection(config)
        # The boxes and the labels of the tokens differ.
        torch.nn.init.normal_(model.vit.embeddings.detection_tokens, std=2)
        model.save_pretrained(folder)
        YolosImageProcessorPil(size={"height": 64, "width": 96}).save_pretrained(folder)
        return folder, model.eval()

    return make


def test_a_model_of_transformers_detects_persons(make_yolos, tmp_path):
    folder, model = make_yolos("car", "Person")
    frame = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    image = Image.fromarray(frame[:, :, ::-1]).resize((96, 64), Image.Resampling.BILINEAR)
    pixels = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        output = model(pixel_values=torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))
    expected = {}
    for logits, (x, y, width, height) in zip(output.logits[0], output.pred_boxes[0].tolist(), strict=True):
        probabilities = logits.softmax(-1)[:-1]
        if probabilities.argmax() == 1 and probabilities[1] >= 0.3:
            left, top = int((x - width / 2) * 200), int((y - height / 2) * 120)
            right, bottom = int((x + width / 2) * 200), int((y + height / 2) * 120)
            expected[left, top, right - left, bottom - top] = probabilities[1].item()
    assert 0 < len(expected) < 6
    found = dict(load_detector(str(folder), min_score=0.3)(frame))
    assert found.keys() == expected.keys()
    assert all(found[box] == pytest.approx(expected[box], abs=1e-3) for box in expected)
    # The same model on a video.
    pictures = read(write_video(tmp_path / "v.avi", [frame]), detector=str(folder), min_score=0.3)
    assert 0 < len(pictures) <= len(expected)


def test_a_model_that_knows_no_person_is_refused(make_yolos):
    with pytest.raises(ValueError, match="has no label person, only car, dog"):
        load_detector(str(make_yolos("car", "dog")[0]))
    with pytest.raises(OSError):
        load_detector("no-such-owner/no-such-detector")


# OpenCV's own detector on a street


def open_street():
    return cv2.VideoCapture(str(STREET), cv2.CAP_FFMPEG)


def find_foreground(frames):
    """For each number of a frame, the pixels that move, found by background subtraction."""
    subtractor = cv2.createBackgroundSubtractorMOG2(history=200)
    capture, masks = open_street(), {}
    for number in range(max(frames) + 1):
        mask = subtractor.apply(capture.read()[1])
        if number in frames:
            masks[number] = mask > 0
    return masks


def measure_people(pictures, first=0, part=np.s_[:, :]):
    """The share of the crops on something that moves, for a video of a part of the street from the frame `first` on."""
    masks = find_foreground({picture.columns["frame"] + first for picture in pictures})
    shares = []
    for picture in pictures:
        x, y, width, height = map(int, picture.path.rpartition("box=")[2].split(","))
        shares.append(masks[picture.columns["frame"] + first][part][y : y + height, x : x + width].mean())
    return np.mean(np.array(shares) > 0.15)


@needs_street
def test_hog_finds_people_on_a_street_and_the_same_ones_each_time(tmp_path):
    capture = open_street()
    part = np.s_[60:400, 180:760]  # A smaller picture takes less time.
    frames = [capture.read()[1][part] for _ in range(166)][160:]
    file = write_video(tmp_path / "street.avi", frames)
    options = {"detector": "hog", "every": 5, "interval": 0}
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        pictures = read(file, **options)
        cv2.setNumThreads(2)
        again = read(file, **options)
    finally:
        cv2.setNumThreads(threads)
    assert [(p.path, p.columns, p.image.tobytes()) for p in pictures] == [
        (p.path, p.columns, p.image.tobytes()) for p in again
    ]
    # Two frames with three to five people.
    assert 5 <= len(pictures) <= 12
    assert measure_people(pictures, 160, part) >= 0.8
    # The boxes are those of standing people, without their wide margins.
    assert 0.3 < np.median([picture.image.width / picture.image.height for picture in pictures]) < 0.45


@pytest.mark.slow
@needs_street
def test_ten_seconds_of_the_street(tmp_path, caplog):
    capture = open_street()
    file = write_video(tmp_path / "street.avi", [capture.read()[1] for _ in range(150)][50:])
    pictures = read(file, detector="hog", camera="street")
    tracklets = {picture.columns["tracklet"] for picture in pictures}
    assert 25 <= len(pictures) <= 75 and 5 <= len(tracklets) <= 40
    assert measure_people(pictures, 50) >= 0.85
    assert caplog.text == ""
    # A tracklet has at most one crop in each second.
    for tracklet in tracklets:
        frames = [picture.columns["frame"] for picture in pictures if picture.columns["tracklet"] == tracklet]
        assert len(frames) <= 1 + (max(frames) - min(frames) + 9) / 10
