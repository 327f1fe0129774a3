"""The search page without a browser: its API, its routes, its door, its command, and the texts that it writes."""

import base64
import csv
import io
import json
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from app_helpers import HOSTILE_CAMERA, HOSTILE_NOTE, PICTURES, draw_person, encode_jpeg, make_gallery, served
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eccl.search import app as app_command
from eccl.search.app import Settings, make_app, read_users
from eccl.search.app_guard import Desk, RateLimiter
from eccl.search.app_page import _apply, _fill_controls, _read_controls
from eccl.search.app_service import Pictures
from eccl.search.app_settings import hash_password, is_password
from eccl.search.app_views import (
    Query,
    parse_link,
    show_cards,
    show_details,
    show_status,
    show_timeline,
    to_link,
)
from eccl.search.explanation import explain
from eccl.search.gallery import Where
from helpers import wait_until

SENTENCE = "a woman in a red coat"
LIMITS = Settings(requests_per_minute=1_000_000, most_pixels=10_000, largest_upload=50_000)
ADDRESS = "http://127.0.0.1:7860"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory, backbone):
    with make_gallery(tmp_path_factory.mktemp("gallery"), backbone) as gallery:
        yield gallery


@pytest.fixture(scope="module")
def client(gallery):
    with TestClient(make_app(gallery, LIMITS), base_url=ADDRESS) as client:
        yield client


def search(client, **query):
    answer = client.post("/api/search", json=query)
    assert answer.status_code == 200, answer.text
    return answer.json()["matches"]


def picture_file(**sizes) -> bytes:
    return encode_jpeg(draw_person(7).resize((sizes.get("width", 24), sizes.get("height", 48))))


# --- searching ---


@pytest.mark.parametrize(
    ("query", "options"),
    [
        ({}, {}),
        ({"top_k": 3, "offset": 4}, {"top_k": 3, "offset": 4}),
        ({"cameras": [HOSTILE_CAMERA]}, {"where": Where(camera=HOSTILE_CAMERA)}),
        ({"start": "2026-05-01 09:00", "stop": "2026-05-01T10:00Z"},
         {"where": Where(start="2026-05-01 09:00", stop="2026-05-01 10:00")}),
        ({"columns": {"floor": 1}}, {"where": Where(columns={"floor": 1})}),
        ({"columns": {"floor": "1"}}, {"where": Where(columns={"floor": 1})}),
        ({"columns": {"note": HOSTILE_NOTE}}, {"where": Where(columns={"note": HOSTILE_NOTE})}),
        ({"negative": "a backpack"}, {"negative": "a backpack"}),
        ({"group_by": "tracklet"}, {"group_by": "tracklet"}),
        ({"order": "time"}, {"order": "time"}),
        ({"min_score": 0.0}, {"min_score": 0.0}),
    ],
)  # fmt: skip
def test_the_api_finds_what_the_gallery_finds(client, gallery, query, options):
    found = search(client, sentence=SENTENCE, **query)
    expected = gallery.search(SENTENCE, **{"top_k": 20, **options})
    assert found and [match["id"] for match in found] == [match.id for match in expected]
    assert [match["score"] for match in found] == pytest.approx([match.score for match in expected], abs=1e-5)
    assert [match["camera"] for match in found] == [match.columns["camera"] for match in expected]
    assert [match["time"] for match in found] == [match.columns["time"].isoformat() for match in expected]


def test_marked_results_move_the_query(client, gallery):
    plain = search(client, sentence=SENTENCE, top_k=PICTURES)
    like, unlike = [plain[-1]["id"]], [plain[0]["id"]]
    found = search(client, sentence=SENTENCE, top_k=PICTURES, like=like, unlike=unlike)
    assert [match["id"] for match in found] == [m.id for m in gallery.refine(SENTENCE, like, unlike, PICTURES)]
    assert [match["id"] for match in found] != [match["id"] for match in plain]


def test_a_path_stays_on_the_machine(client, gallery):
    answer = client.post("/api/search", json={"sentence": SENTENCE, "top_k": PICTURES})
    assert sorted(match["name"] for match in answer.json()["matches"]) == [f"person {row:02}.jpg" for row in range(30)]
    assert "imgs" not in answer.text and str(gallery.crops.parent) not in answer.text


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({}, "the query is empty"),
        ({"sentence": "  "}, "the query is empty"),
        ({"sentence": "x" * 10_000}, "sentence has 10,000 characters, at most 1,000"),
        ({"sentence": "a", "negative": "x" * 1_001}, "negative has 1,001 characters"),
        ({"sentence": "a", "limit": 3}, "unknown field 'limit'"),
        ({"sentence": 3}, "sentence must be a text, not '3'"),
        ({"sentence": "a", "top_k": 0}, "top_k is '0', it must be a whole number from 1 to 16,384"),
        ({"sentence": "a", "top_k": 16_385}, "top_k is '16385'"),
        ({"sentence": "a", "top_k": True}, "top_k is 'True'"),
        ({"sentence": "a", "top_k": 2.5}, "top_k is '2.5'"),
        ({"sentence": "a", "offset": 16_384}, "at most 16,384"),
        ({"sentence": "a", "min_score": 2}, "min_score is '2'"),
        ({"sentence": "a", "order": "random"}, "order is 'random', it must be score or time"),
        ({"sentence": "a", "columns": {"colour": "red"}}, "no column 'colour'"),
        ({"sentence": "a", "columns": {"floor": "ground"}}, "floor is 'ground', the column has the type int"),
        ({"sentence": "a", "columns": {"floor": [1]}}, "the value of column 'floor' must be"),
        ({"sentence": "a", "columns": ["floor"]}, "columns must be an object"),
        ({"sentence": "a", "group_by": "colour"}, "no column 'colour'"),
        ({"sentence": "a", "cameras": "north"}, "cameras must be a list"),
        ({"sentence": "a", "cameras": ["north"] * 101}, "cameras must be a list of at most 100"),
        ({"sentence": "a", "start": "yesterday"}, "'yesterday' is no time"),
        ({"sentence": "a", "like": ["../../etc/passwd"]}, "like must be a list of ids"),
        ({"sentence": "a", "like": ["0" * 64]}, f"no picture {'0' * 64}"),
        ({"picture": "0" * 32}, "the query picture is not held any more"),
        ([1], "the request must be a JSON object"),
    ],
)
def test_a_mistake_is_told_in_words(client, query, words):
    answer = client.post("/api/search", json=query)
    assert answer.status_code == 400 and words in answer.json()["error"], answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"top_k": NaN, "sentence": "a"}'])
def test_a_body_that_is_no_json_is_a_mistake(client, body):
    answer = client.post("/api/search", content=body)
    assert answer.status_code == 400 and answer.json()["error"]


def test_nobody_fits_in_a_calibrated_gallery(client, gallery, monkeypatch):
    monkeypatch.setattr(gallery, "threshold", 0.999)
    assert search(client, sentence=SENTENCE) == []
    words = show_status(Query(SENTENCE), 0, False, 0.999)
    assert words.startswith("Nobody fits for “a woman in a red coat”") and "0.999" in words
    assert show_status(Query(SENTENCE), 0, False, None).startswith("No picture passes the filters")
    assert show_status(Query(SENTENCE, negative="a hat"), 0, False, 0.999).startswith("No picture passes the filters")


def test_an_error_of_the_store_names_no_address(client, gallery, monkeypatch, capsys):
    def fail(*_, **__):
        raise ConnectionError("the server 10.1.2.3 does not answer")

    monkeypatch.setattr(gallery, "search", fail)
    answer = client.post("/api/search", json={"sentence": SENTENCE})
    assert answer.status_code == 503 and answer.json() == {"error": "the gallery does not answer: try again later"}
    assert "10.1.2.3" in capsys.readouterr().err


# --- pictures ---


def test_a_crop_leaves_without_its_metadata(client, gallery):
    (match,) = [match for match in gallery.search(SENTENCE, PICTURES) if match.path.endswith("00.jpg")]
    stored = Path(match.path).read_bytes()
    assert b"SECRETNAME" in stored and Image.open(io.BytesIO(stored)).getexif().get_ifd(0x8825)
    answer = client.get(f"/crop/{match.id}")
    picture = Image.open(io.BytesIO(answer.content))
    assert answer.headers["content-type"] == "image/jpeg" and answer.headers["cache-control"] == "private, no-store"
    assert b"SECRETNAME" not in answer.content and b"Exif" not in answer.content and not picture.getexif()
    # The stored file lies on its side.
    expected = np.asarray(draw_person(0).rotate(-90, expand=True), dtype=int)
    assert np.abs(np.asarray(picture, dtype=int) - expected).mean() < 6


def test_a_large_crop_is_made_smaller(client, gallery, tmp_path):
    file = tmp_path / "large.png"
    Image.new("RGB", (1000, 2000), (1, 2, 3)).save(file)
    gallery.add([file], progress=False)
    (match,) = [match for match in gallery.search(SENTENCE, 100) if match.path == str(file)]
    assert Image.open(io.BytesIO(client.get(f"/crop/{match.id}").content)).size == (384, 768)
    file.write_bytes(picture_file())
    changed = client.get(f"/crop/{match.id}")
    file.unlink()
    for answer in (changed, client.get(f"/crop/{match.id}")):
        assert answer.status_code == 410 and "another picture now" in answer.json()["error"]
        assert "large.png" not in answer.text
    gallery.remove([match.id])
    assert client.get(f"/crop/{match.id}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/crop/../../etc/passwd", "/crop/%2e%2e%2f%2e%2e%2fetc%2fpasswd", f"/crop/{'0' * 63}", f"/crop/{'g' * 64}",
        f"/crop/{'0' * 64}", f"/crop/{'0' * 64}/..", "/gradio_api/file=/etc/passwd", "/file=/etc/passwd",
        "/gradio_api/file/etc/passwd", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/file=http://127.0.0.1:1/x",
        "/static/../../../../etc/passwd", "/assets/%2e%2e/%2e%2e/routes.py", "/svelte/../../routes.py",
        "/gradio_api/runs", "/monitoring", "/docs", "/openapi.json", "/gradio_api/openapi.json",
        "/gradio_api/deep_link", "/gradio_api/custom_component/x/y/z/../../../../etc/passwd",
        "/pwa_icon", "/gradio_api/vibe-code",
    ],
)  # fmt: skip
def test_no_other_file_is_served(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "root:" not in answer.text and "import " not in answer.text, path


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/run/search", "/gradio_api/process_recording"])
def test_no_file_comes_in_through_gradio(client, path):
    assert client.post(path, files={"files": ("a.jpg", picture_file())}).status_code == 404


def test_a_picture_is_a_query_and_touches_no_disk(client, gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answer = client.post("/api/picture", content=Path(gallery.search(SENTENCE, 1)[0].path).read_bytes())
    assert answer.status_code == 200, answer.text
    found = search(client, picture=answer.json()["picture"])
    assert found[0]["id"] == gallery.search(SENTENCE, 1)[0].id and found[0]["score"] == pytest.approx(1, abs=1e-4)
    both = search(client, picture=answer.json()["picture"], sentence=SENTENCE)
    picture = gallery.read_crop(found[0]["id"])
    assert [match["id"] for match in both] == [match.id for match in gallery.search(SENTENCE, 20, image=picture)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"", 400, "the file is not a picture"),
        (b"no picture", 400, "the file is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 400, "the file is not a picture"),
        (picture_file()[:200], 400, "picture"),
        (picture_file(width=101, height=100), 400, "the picture has 10,100 pixels, at most 10,000 are read"),
        (b"x" * 50_001, 413, "the request has 50,001 bytes, at most 50,000 are read"),
    ],
)
def test_a_wrong_upload_is_refused_in_words(client, content, status, words):
    answer = client.post("/api/picture", content=content)
    assert answer.status_code == status and words in answer.json()["error"]


def test_a_body_must_say_its_length(client):
    answer = client.post("/api/picture", content=iter([b"x" * 100_000]))
    assert answer.status_code == 411
    assert client.post("/api/search", content=b" " * 300_000).status_code == 413


def test_old_query_pictures_are_forgotten(monkeypatch):
    pictures = Pictures(10_000)
    first, _ = pictures.add(picture_file())
    keys = [pictures.add(picture_file())[0] for _ in range(100)]
    with pytest.raises(ValueError, match="choose it again"):
        pictures.get(first)
    monkeypatch.setattr("eccl.search.app_service._PICTURE_AGE", -1)
    with pytest.raises(ValueError, match="choose it again"):
        pictures.get(keys[-1])


def test_a_heat_map_shows_the_chosen_words(client, gallery):
    match = gallery.search(SENTENCE, 1)[0]
    explanation = explain(gallery.model, gallery.processor, gallery.read_crop(match.id), SENTENCE)
    assert len(explanation.words) == 6

    def draw(**values) -> bytes:
        answer = client.get(f"/heat/{match.id}", params={"sentence": SENTENCE, **values})
        assert answer.headers["content-type"] == "image/jpeg", answer.text
        return answer.content

    maps = [draw(), *(draw(words=str(word)) for word in range(6)), draw(words="4,5")]
    assert len({*maps}) == 8 and all(Image.open(io.BytesIO(each)).height == 480 for each in maps)
    for words in ("6", "-1", "x", ",", "9" * 5_000):
        answer = client.get(f"/heat/{match.id}", params={"sentence": SENTENCE, "words": words})
        assert answer.status_code == 400 and "numbers" in answer.json()["error"], words
    assert client.get(f"/heat/{match.id}").status_code == 400
    assert client.get(f"/heat/{'0' * 64}", params={"sentence": SENTENCE}).status_code == 404
    assert client.get(f"/heat/{match.id}", params={"sentence": "x" * 2_000}).status_code == 400


# --- limits ---


def test_a_client_that_asks_too_often_waits(gallery):
    with TestClient(make_app(gallery, replace(LIMITS, requests_per_minute=8)), base_url=ADDRESS) as client:
        found = [client.post("/api/search", json={"sentence": SENTENCE}).status_code for _ in range(4)]
        refused = client.get("/export.csv", params={"sentence": SENTENCE})
    assert found == [200, 200, 429, 429]
    assert refused.status_code == 429 and "you ask too often" in refused.json()["error"]


def test_a_bucket_fills_with_time(monkeypatch):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    limiter = RateLimiter(60)
    assert [limiter.take("a") for _ in range(16)] == [True] * 15 + [False]
    assert limiter.take("b")
    now += 2.5
    assert [limiter.take("a") for _ in range(3)] == [True, True, False]
    assert limiter.take("a", cost=0.5)


def test_a_full_queue_says_so(gallery, monkeypatch):
    go, waiting = threading.Event(), []

    def wait(*_, **__):
        waiting.append(1)
        assert go.wait(60)
        return []

    monkeypatch.setattr(gallery, "search", wait)
    few = replace(LIMITS, workers=1, waiting=1)
    with TestClient(make_app(gallery, few), base_url=ADDRESS) as client:
        answers = []
        ask = lambda: answers.append(client.post("/api/search", json={"sentence": SENTENCE}))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(3)]
        threads[0].start()
        wait_until(lambda: waiting)
        # One of the two others waits for its turn.
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: answers)
        assert client.get("/healthz").text == "ok"
        go.set()
        for thread in threads:
            thread.join()
    assert [answer.status_code for answer in answers] == [503, 200, 200]
    assert "too many searches are waiting" in answers[0].json()["error"]


def test_a_desk_forgets_those_who_leave():
    import anyio

    async def leave_and_come() -> list[str]:
        desk, done = Desk(1, 1), []
        async with desk.turn():
            with anyio.move_on_after(0.05):
                async with desk.turn():
                    done.append("never")
        for _ in range(3):
            async with desk.turn():
                done.append("turn")
        return done

    assert anyio.run(leave_and_come) == ["turn"] * 3


# --- the door ---


def basic(name: str, password: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()}


def test_every_route_but_one_needs_the_password(gallery):
    users = {"ann": hash_password("correct horse"), "bob": hash_password("another horse")}
    some = gallery.search(SENTENCE, 1)[0].id
    paths = ["/", "/config", "/gradio_api/info", f"/crop/{some}", f"/heat/{some}?sentence=a", "/export.csv?sentence=a"]
    with TestClient(make_app(gallery, replace(LIMITS, users=users)), base_url=ADDRESS) as client:
        assert client.get("/healthz").text == "ok"
        for path in [*paths, "/theme.css", "/nothing", "/gradio_api/file=/etc/passwd"]:
            answer = client.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic "), path
        for path in ("/api/search", "/api/picture", "/gradio_api/queue/join", "/gradio_api/call/search"):
            assert client.post(path, json={"sentence": SENTENCE}).status_code == 401, path
        for path in paths:
            assert client.get(path, headers=basic("ann", "correct horse")).status_code == 200, path
        assert client.get("/", headers=basic("bob", "another horse")).status_code == 200
        wrong = [
            basic("ann", "another horse"),
            basic("eve", "correct horse"),
            basic("", ""),
            {"authorization": "Basic x"},
        ]
        wrong += [{"authorization": "Bearer correct horse"}, basic("ann", "")]
        assert {client.get("/", headers=headers).status_code for headers in wrong} == {401}
        tries = [client.get("/", headers=basic("ann", f"guess {guess}")).status_code for guess in range(12)]
        assert 429 in tries and client.get("/healthz").text == "ok"
        # Guessing does not lock out a user who is logged in.
        assert client.get("/", headers=basic("ann", "correct horse")).status_code == 200


def test_a_password_is_kept_as_a_salted_hash():
    first, second = hash_password("correct horse"), hash_password("correct horse")
    assert first != second and "horse" not in first
    assert is_password("correct horse", first) and is_password("correct horse", second)
    assert not is_password("Correct horse", first)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no user"),
        ("ann:secret", "line 1 of the users is not NAME:scrypt:SALT:HASH"),
        (f"ann:{'scrypt:' + '0' * 32 + ':' + '0' * 128}\n\nann:{'scrypt:' + '0' * 32 + ':' + '0' * 128}", "line 3"),
        (f":{'scrypt:' + '0' * 32 + ':' + '0' * 128}", "line 1"),
    ],
)
def test_a_wrong_file_of_users_is_refused(text, words):
    with pytest.raises(ValueError, match=words) as raised:
        read_users(text)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ({"host": "[::1]:7860"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "localhost.evil.example:7860"}, 421),
        ({"host": ""}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, 200),
    ],
)
def test_other_sites_cannot_ask(client, headers, status):
    assert client.get("/", headers=headers).status_code == status
    if headers.get("sec-fetch-site") == "cross-site":
        assert client.post("/api/search", json={"sentence": "a"}, headers=headers).status_code == 403


def test_hosts_can_have_a_pattern(gallery):
    with TestClient(make_app(gallery, replace(LIMITS, hosts=("*.hf.space",))), base_url=ADDRESS) as client:
        assert client.get("/", headers={"host": "me-space.hf.space"}).status_code == 200
        assert client.get("/", headers={"host": "hf.space.evil.example"}).status_code == 421
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", ["/", "/healthz", "/nothing", "/gradio_api/info", "/theme.css"])
def test_every_answer_has_the_headers(client, path):
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy and "http" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "private, no-store"


def test_the_audit_log_has_no_trace_of_a_picture(gallery, tmp_path):
    log = tmp_path / "logs" / "audit.jsonl"
    with TestClient(make_app(gallery, replace(LIMITS, audit_log=log)), base_url=ADDRESS) as client:
        matches = search(client, sentence=SENTENCE, cameras=["north"], top_k=5)
        ids = [match["id"] for match in matches]
        search(client, sentence=SENTENCE, like=ids[:2])
        picture = client.post("/api/picture", content=picture_file()).json()["picture"]
        search(client, picture=picture)
        client.get(f"/heat/{ids[0]}", params={"sentence": SENTENCE})
        client.get("/export.csv", params={"sentence": SENTENCE, "top_k": 7})
        client.post("/api/search", json={"sentence": ""})
    text = log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["action"] for line in lines] == ["search", "search", "search", "explain", "export"]
    assert lines[0]["query"] == {"sentence": SENTENCE, "cameras": ["north"], "order": "score", "top_k": 5}
    assert lines[0]["results"] == 5 and lines[0]["client"] == "testclient" and lines[1]["query"]["like"] == 2
    assert lines[2]["query"]["picture"] is True and lines[4]["results"] == 7
    assert not any(secret in text for secret in (*ids, picture, "person ", "imgs"))
    assert log.stat().st_mode & 0o777 == 0o600


# --- texts ---

texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20).map(str.strip)
ids = st.text("0123456789abcdef", min_size=64, max_size=64)
queries = st.builds(
    Query,
    sentence=texts,
    negative=texts,
    cameras=st.lists(texts.filter(bool), max_size=3).map(tuple),
    start=texts,
    stop=texts,
    columns=st.dictionaries(texts.filter(bool), texts.filter(bool), max_size=2),
    group_by=st.sampled_from(["", "tracklet"]),
    order=st.sampled_from(["score", "time"]),
    min_score=st.none() | st.floats(-1, 1),
    top_k=st.integers(1, 16_384),
    offset=st.integers(0, 16_384),
    like=st.lists(ids, max_size=2).map(tuple),
    unlike=st.lists(ids, max_size=2).map(tuple),
)


@given(queries)
@settings(max_examples=100, deadline=None)
def test_a_link_keeps_the_query(query):
    assert parse_link(to_link(query)) == query
    assert "\n" not in to_link(query) and '"' not in to_link(query)


def test_a_link_has_no_picture_and_may_have_words_of_gradio():
    query = Query(SENTENCE, picture="0" * 32)
    assert to_link(query) == "sentence=a+woman+in+a+red+coat"
    assert parse_link(to_link(query, keep_picture=True)) == query
    assert parse_link("__theme=dark") == Query() and Query().is_empty
    for link, words in (
        ("top_k=x", "top_k is 'x'"),
        ("nonsense=1", "unknown field 'nonsense'"),
        ("like=1", "like must"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_link(link)


def test_the_controls_make_the_query_and_show_it():
    query = Query(SENTENCE, "a hat", "", ("north",), "2026-05-01", "", {"floor": "2"}, "tracklet", "time", 0.25, 30)
    assert _read_controls("", *_fill_controls(query)) == query
    assert _read_controls("", *_fill_controls(Query())) == Query()
    with pytest.raises(ValueError, match="choose the column"):
        _read_controls("", *_fill_controls(Query())[:6], "2", *_fill_controls(Query())[7:])
    with pytest.raises(ValueError, match="the lowest score is 'high'"):
        _read_controls("", *_fill_controls(Query())[:9], "high", 20)


def test_a_button_changes_the_query():
    one, two = "1" * 64, "2" * 64
    query = Query(SENTENCE, top_k=10)
    assert _apply(query, "on", "").offset == 10 and _apply(query, "back", "").offset == 0
    liked = _apply(replace(query, offset=10), "like", one)
    assert liked == replace(query, like=(one,))
    assert _apply(liked, "unlike", one) == replace(query, unlike=(one,))
    assert _apply(liked, "like", one) == query
    assert _apply(liked, "like", two).like == (one, two)
    for action, id in (("like", "../x"), ("delete", one), ("like", "")):
        with pytest.raises(ValueError):
            _apply(query, action, id)


class _Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_hostile_texts_stay_texts(gallery):
    hostile = "\"'><script>alert(1)</script><img src=x onerror=alert(1)>${alert(1)}{{this}}"
    matches = gallery.search(SENTENCE, PICTURES)
    query = Query(hostile, hostile, cameras=(HOSTILE_CAMERA,), columns={"note": HOSTILE_NOTE}, start=hostile)
    details = show_details(matches[0], hostile, [(hostile, 0.5), ("coat", 0.1)])
    shown = {
        "cards": show_cards(matches, query, True),
        "status": show_status(query, 3, True, None),
        "nothing": show_status(query, 0, True, None),
        "timeline": show_timeline(matches),
        "details": details,
        "other": show_details(matches[1], "", []),
    }
    for name, html in shown.items():
        for tag, attributes in _Tags(html).tags:
            assert tag not in ("script", "iframe", "object"), name
            assert not any(attribute.startswith("on") for attribute in attributes), name
            assert tag != "img" or (attributes["src"] or "").startswith(("crop/", "heat/")), name
            assert all(url.startswith(("?", "export.csv?")) for url in [attributes.get("href")] if url), name
    assert HOSTILE_CAMERA in _Tags(shown["cards"]).text and HOSTILE_CAMERA in _Tags(shown["timeline"]).text
    assert HOSTILE_NOTE in _Tags(shown["details"] + shown["other"]).text
    assert hostile in _Tags(shown["status"]).text


def test_results_have_words_for_those_who_do_not_see(gallery):
    matches = gallery.search(SENTENCE, 3)
    tags = _Tags(show_cards(matches, Query(SENTENCE, offset=20), True)).tags
    pictures = [attributes for tag, attributes in tags if tag == "img"]
    assert [picture["alt"].split(", ")[0] for picture in pictures] == ["Result 21", "Result 22", "Result 23"]
    assert all(f"score {match.score:.3f}" in p["alt"] for match, p in zip(matches, pictures, strict=True))
    pressed = [attributes["aria-pressed"] for _, attributes in tags if "aria-pressed" in attributes]
    assert pressed == ["false"] * 6
    liked = _Tags(show_cards(matches, Query(SENTENCE, like=(matches[1].id,)), False)).tags
    assert [a["data-id"] for _, a in liked if a.get("aria-pressed") == "true"] == [matches[1].id]


def test_the_timeline_counts_every_result(gallery):
    html = show_timeline(gallery.search(SENTENCE, PICTURES))
    cells = [attributes["title"] for tag, attributes in _Tags(html).tags if tag == "i"]
    assert len(cells) == 48 and sum(int(cell.split()[0]) for cell in cells) == PICTURES
    assert "2026-05-01 08:00:00" in html and "2026-05-01 12:50:00" in html
    assert show_timeline([]) == "" and show_timeline(gallery.search(SENTENCE, 1)) == ""


def test_the_table_has_every_column_and_no_formula(client, gallery):
    answer = client.get("/export.csv?" + to_link(Query(SENTENCE, top_k=PICTURES)))
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    matches = gallery.search(SENTENCE, PICTURES)
    assert [row["id"] for row in rows] == [match.id for match in matches]
    assert [float(row["score"]) for row in rows] == pytest.approx([match.score for match in matches], abs=1e-5)
    assert {row["note"] for row in rows} == {"'=1+1", HOSTILE_NOTE} and {row["floor"] for row in rows} == {
        "0",
        "1",
        "2",
    }
    assert {row["time"][:10] for row in rows} == {"2026-05-01"} and rows[0]["rank"] == "1"
    assert answer.headers["content-disposition"].startswith("attachment")
    empty = client.get("/export.csv?sentence=a&start=2030-01-01")
    assert empty.text == "rank,id,score,name\r\n"


# --- clients and the command ---


def test_gradio_client_searches_and_is_told_mistakes(gallery):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    users = {"ann": hash_password("correct horse")}
    with served(make_app(gallery, replace(LIMITS, users=users))) as url:
        client = Client(url, headers=basic("ann", "correct horse"), verbose=False, analytics_enabled=False)
        found = client.predict({"sentence": SENTENCE, "top_k": 4}, api_name="/search")
        assert [match["id"] for match in found["matches"]] == [match.id for match in gallery.search(SENTENCE, 4)]
        with pytest.raises(AppError, match="sentence has 10,000 characters, at most 1,000"):
            client.predict({"sentence": "x" * 10_000}, api_name="/search")
        assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/search"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "there is no gallery gallery.db"),
        (("--model", "m", "--host", "0.0.0.0"), "--host is 0.0.0.0, which other machines reach: give --auth_file"),
        (("--model", "m", "--host", "::"), "give --auth_file"),
        (("--model", "m", "--host", "0.0.0.0", "--auth_file", "none"), "none"),
        (("--token_env", "ECCL_NO_SUCH"), "there is no such environment variable"),
        (("--model", "m", "--port", "x"), "'x' is not a whole number"),
        (("--add_user", "ann"), "--add_user needs --auth_file"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as raised:
        app_command.main(list(words))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert raised.value.code == 2 and message in line


def test_a_taken_port_is_one_line(capsys):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit):
        app_command.main(["--model", "m", "--port", str(taken.getsockname()[1])])
    assert "in use" in capsys.readouterr().err


def test_users_are_added_with_a_password(tmp_path, monkeypatch, capsys):
    file = tmp_path / "users"
    for name in ("ann", "bob"):
        monkeypatch.setattr("sys.stdin", io.StringIO("correct horse\n"))
        app_command.main(["--add_user", name, "--auth_file", str(file)])
    users = read_users(file.read_text())
    assert list(users) == ["ann", "bob"] and is_password("correct horse", users["bob"])
    assert file.stat().st_mode & 0o777 == 0o600 and "horse" not in capsys.readouterr().out
    for name, password, message in (("ann", "correct horse", "already"), ("a:b", "x", "colon"), ("eve", "short", "8")):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{password}\n"))
        with pytest.raises(SystemExit):
            app_command.main(["--add_user", name, "--auth_file", str(file)])
        assert message in capsys.readouterr().err
    assert list(read_users(file.read_text())) == ["ann", "bob"]


def test_help_loads_no_large_library():
    code = "import sys, eccl.search.app as a\ntry: a.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--auth_file" in done.stdout
    assert not {"torch", "transformers", "gradio", "pymilvus"} & set(done.stdout.split("\n")[-2].split())


@pytest.mark.slow
def test_the_command_opens_the_page_and_ends_with_ctrl_c(tmp_path, backbone):
    import signal
    import urllib.request

    make_gallery(tmp_path / "data", backbone).close()
    words = ["--gallery", str(tmp_path / "data" / "gallery.db"), "--model", str(backbone), "--port", "0"]
    command = [sys.executable, "-m", "eccl.search.app", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = line.split()[2]
        body = json.dumps({"sentence": SENTENCE, "top_k": 3}).encode()
        with urllib.request.urlopen(f"{url}api/search", body) as answer:
            assert len(json.loads(answer.read())["matches"]) == 3
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and SENTENCE not in errors
