"""The gallery, the same tests for the embedded store and for a Milvus server."""

import csv
import hashlib
import json
import shutil
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from engines import ENGINES
from PIL import Image, PngImagePlugin
from torch import nn

from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.hub.loading import load_model
from eccl.processing_eccl import list_images, read_image
from eccl.search.gallery import Gallery, Picture, Where
from eccl.search.store import VectorStore
from helpers import ROOT

BACKBONE = ROOT / "assets" / "synthetic-backbone"
SENTENCE, OTHER = "a woman in a red coat", "a man with a blue bag"
DAY = datetime(2026, 5, 31, tzinfo=UTC)


@pytest.fixture(scope="session")
def loaded():
    model, processor = load_model(BACKBONE)
    return model.cpu(), processor


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A folder with 48 drawn persons, and their features by path, made by the model alone."""
    folder = tmp_path_factory.mktemp("drawn")
    sizes = {"train_ids": 4, "val_ids": 8, "test_ids": 12, "images_per_id": 2}
    write_benchmark(SyntheticBenchmark("cuhk_pedes", **sizes), folder / "set", num_workers=1)
    return folder / "set"


def unit(features):
    return nn.functional.normalize(features, dim=-1)


@torch.no_grad()
def encode(loaded, image=None, text=None):
    """The oracle: the model itself, one input at a time."""
    model, processor = loaded
    if text is not None:
        return unit(model.get_text_features(**processor(text=[text], return_tensors="pt")).pooler_output)[0].numpy()
    pixels = processor(images=read_image(image), return_tensors="pt")["pixel_values"]
    return unit(model.get_image_features(pixels).pooler_output)[0].numpy()


@pytest.fixture(scope="session")
def features(loaded, drawn):
    return {str(path): encode(loaded, path) for path in list_images(drawn / "imgs")}


@pytest.fixture
def open_gallery(loaded, uri, collection, tmp_path):
    """Opens the test's gallery; the one that was open before is closed."""
    opened = []

    def open(model=None, processor=None, **options):
        for gallery in opened:
            gallery.close()
        opened.clear()
        options = {"crops": tmp_path / "crops"} | options
        opened.append(Gallery.open(model or loaded[0], processor or loaded[1], uri, collection, **options))
        return opened[0]

    yield open
    for gallery in opened:
        gallery.close()


def describe(number):
    """The columns of a picture of the tests: every column has gaps."""
    columns = {"camera": f"cam {number % 3}", "floor": number % 4, "zone": "ab"[number % 2]}
    if number % 5:
        columns["time"] = DAY + timedelta(minutes=number)
    if number % 3:
        columns["tracklet"] = f"track {number // 6}"
    return columns


@pytest.fixture(scope="module", params=ENGINES)
def searched(request, loaded, features, tmp_path_factory):
    """A gallery that the tests only search."""
    folder = tmp_path_factory.mktemp("searched")
    embedded = request.param == "embedded"
    uri = str(folder / "gallery.db") if embedded else request.getfixturevalue("server_address")
    with Gallery.open(*loaded, uri, f"searched_{uuid.uuid4().hex}", crops=folder / "crops") as gallery:
        yield fill(gallery, features)
        if not embedded:
            gallery.store.drop()


@pytest.fixture
def gallery(open_gallery, features):
    return fill(open_gallery(), features)


def fill(gallery, features):
    pictures = [Picture(path, describe(number)) for number, path in enumerate(features)]
    report = gallery.add(pictures, progress=False)
    assert (report.added, report.known, report.skipped) == (48, 0, [])
    return gallery


def rank(features, query, keep=lambda number: True):
    """The oracle: paths with their scores, the best first."""
    scored = [
        (-float(vector @ query), hashlib.sha256(Path(path).read_bytes()).hexdigest(), path)
        for number, (path, vector) in enumerate(features.items())
        if keep(number)
    ]
    return [(path, -score) for score, _, path in sorted(scored)]


def check(matches, expected):
    assert [match.path for match in matches] == [path for path, _ in expected]
    assert [match.score for match in matches] == pytest.approx([score for _, score in expected], abs=2e-5)


# -- Searching


def test_pictures_are_ranked_by_cosine_similarity(searched, features, loaded):
    queries = [encode(loaded, text=text) for text in (SENTENCE, OTHER)]
    check(searched.search(SENTENCE, 5), rank(features, queries[0])[:5])
    both = searched.search([SENTENCE, OTHER], 48)
    for matches, query in zip(both, queries, strict=True):
        check(matches, rank(features, query))
    match = both[0][0]
    number = list(features).index(match.path)
    assert match.id == hashlib.sha256(Path(match.path).read_bytes()).hexdigest()
    given = describe(number)
    assert match.columns["camera"] == given["camera"] and match.columns["time"] == given.get("time")
    assert match.columns["tracklet"] == given.get("tracklet", "") and match.columns["floor"] == given["floor"]
    assert (match.columns["width"], match.columns["height"]) == Image.open(match.path).size
    assert abs(match.columns["added"] - datetime.now(UTC)) < timedelta(minutes=10)
    assert searched.search([]) == [] and len(searched) == 48


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        (Where(camera="cam 1"), lambda n: n % 3 == 1),
        (Where(camera=("cam 1", "cam 2")), lambda n: n % 3),
        (Where(start=DAY + timedelta(minutes=20)), lambda n: n % 5 and n >= 20),
        (Where(stop="2026-05-31T00:20:00"), lambda n: n % 5 and n < 20),
        (Where(start="2026-05-31T02:10:00+02:00", stop=DAY + timedelta(minutes=30)), lambda n: n % 5 and 10 <= n < 30),
        (Where(columns={"zone": "a"}), lambda n: n % 2 == 0),
        (Where(columns={"floor": [0, 3], "zone": "b"}), lambda n: n % 4 in (0, 3) and n % 2),
        (Where(columns={"tracklet": "track 2"}), lambda n: n % 3 and n // 6 == 2),
        (Where(camera="cam 0", columns={"floor": 1}, stop=DAY + timedelta(minutes=40)), lambda n: n in (9, 21, 33)),
        (Where(camera="nobody"), lambda n: False),
        (Where(columns={"zone": "a' or zone == 'b"}), lambda n: False),
    ],
)
def test_a_filter_gives_exactly_the_pictures_that_match(searched, features, loaded, where, keep):
    expected = rank(features, encode(loaded, text=SENTENCE), keep)
    for top_k in (1, 7, 48):
        check(searched.search(SENTENCE, top_k, where), expected[:top_k])


def test_pages_are_parts_of_the_whole(searched):
    whole = searched.search(SENTENCE, 48)
    pages = [searched.search(SENTENCE, 10, offset=start) for start in range(0, 60, 10)]
    # The last digits of a score can depend on the number of results.
    assert [match.id for page in pages for match in page] == [match.id for match in whole]
    assert [len(page) for page in pages] == [10, 10, 10, 10, 8, 0]


def test_the_order_of_time_is_that_of_the_same_matches(searched):
    matches = searched.search(SENTENCE, 15)
    ordered = searched.search(SENTENCE, 15, order="time")
    assert {match.id for match in matches} == {match.id for match in ordered}
    times = [match.columns["time"] for match in ordered]
    known = [time for time in times if time]
    assert known == sorted(known) and times == known + [None] * (15 - len(known)) and None in times


@pytest.mark.parametrize("column", ["tracklet", "camera", "zone"])
def test_grouping_keeps_the_best_of_each_value(searched, features, loaded, column):
    expected, seen = [], set()
    for path, score in rank(features, encode(loaded, text=SENTENCE), lambda n: n % 4):
        value = describe(list(features).index(path)).get(column, path)
        if value not in seen:
            expected.append((path, score))
        seen.add(value)
    where = Where(columns={"floor": [1, 2, 3]})
    check(searched.search(SENTENCE, 40, where, group_by=column), expected[:40])
    check(searched.search(SENTENCE, 2, where, group_by=column), expected[:2])
    check(searched.search(SENTENCE, 2, where, group_by=column, offset=1), expected[1:3])


def test_grouping_by_a_column_that_some_pictures_lack(open_gallery, features, loaded):
    gallery = open_gallery()
    paths = list(features)
    gallery.add([Picture(path, {"shift": n % 2} if n % 3 else {}) for n, path in enumerate(paths)], progress=False)
    single = [path for n, path in enumerate(paths) if not n % 3]
    expected, seen = [], set()
    for path, score in rank(features, encode(loaded, text=SENTENCE)):
        number = paths.index(path)
        value = number % 2 if number % 3 else path
        if value not in seen:
            expected.append((path, score))
        seen.add(value)
    assert len(expected) == len(single) + 2
    # A small number needs several rounds.
    for top_k in (1, 3, 10, 48):
        check(gallery.search(SENTENCE, top_k, group_by="shift"), expected[:top_k])


def test_negative_sentences_and_pictures_move_the_query(searched, features, loaded):
    text, negative = encode(loaded, text=SENTENCE), encode(loaded, text=OTHER)
    path = list(features)[7]
    image = features[path]

    def normal(vector):
        return vector / np.linalg.norm(vector)

    check(searched.search(SENTENCE, 9, negative=OTHER), rank(features, normal(text - 0.5 * negative))[:9])
    check(searched.search(None, 9, image=path), rank(features, image)[:9])
    check(searched.search(SENTENCE, 9, image=Image.open(path)), rank(features, normal(text + image))[:9])
    both = searched.search(SENTENCE, 9, image=path, negative=OTHER)
    check(both, rank(features, normal(text + image - 0.5 * negative))[:9])
    assert searched.search(None, 1, image=path)[0].path == path


def test_refining_moves_the_query_to_what_is_liked(searched, features, loaded):
    query = encode(loaded, text=SENTENCE)
    matches = searched.search(SENTENCE, 10)
    like, unlike = [matches[3].id, matches[8].id], [matches[0].id]
    right = (features[matches[3].path] + features[matches[8].path]) / 2
    moved = query + 0.75 * right - 0.25 * features[matches[0].path]
    found = searched.refine(SENTENCE, like, unlike, 12, Where(camera="cam 1"))
    check(found, rank(features, moved / np.linalg.norm(moved), lambda n: n % 3 == 1)[:12])
    assert searched.refine(SENTENCE, top_k=10) == matches
    for arguments, message in (
        ((SENTENCE, ["0" * 64]), "the gallery has no picture 0{64}"),
        ((SENTENCE, like, like), "is marked as right and as wrong"),
    ):
        with pytest.raises(ValueError, match=message):
            searched.refine(*arguments)


def test_wrong_searches_are_refused(searched, features):
    path = next(iter(features))
    for arguments, options, message in (
        ((None,), {}, "the query is empty: give a sentence, a picture, or both"),
        (("",), {}, "the query is '', it must be a sentence"),
        (("  \n",), {}, "it must be a sentence"),
        ((["a man", ""],), {}, "the query is '', it must be a sentence"),
        ((5,), {}, "the query is 5, it must be a sentence"),
        (("a" * 1_001,), {}, "the query has 1,001 characters, at most 1,000 are allowed"),
        (("red " * 100,), {}, "the query has 102 tokens, the model reads only 77: shorten it"),
        ((SENTENCE,), {"negative": ""}, "it must be a sentence"),
        ((SENTENCE,), {"negative": "red " * 100}, "102 tokens"),
        ((SENTENCE, 0), {}, "top_k is 0, it must be a whole number, at least 1"),
        ((SENTENCE, 16_385), {}, "top_k is 16,385, at most 16,384 are allowed"),
        ((SENTENCE, 10), {"offset": 16_380}, "top_k and offset are 16,390 together, at most 16,384"),
        ((SENTENCE, 2.5), {}, "top_k is 2.5"),
        ((SENTENCE,), {"offset": -1}, "offset is -1, it must be a whole number, at least 0"),
        ((SENTENCE,), {"order": "size"}, "order is 'size', it must be score or time"),
        ((SENTENCE,), {"group_by": "shoe"}, "no column 'shoe', its columns are camera, floor, time, tracklet, zone"),
        (
            (SENTENCE, 5, Where(columns={"shoe": 1})),
            {},
            "no column 'shoe', its columns are camera, floor, height, tracklet, width, zone",
        ),
        ((SENTENCE, 5, Where(columns={"floor": "1"})), {}, "floor is '1' of type str, the column has the type int"),
        ((SENTENCE, 5, Where(start="yesterday")), {}, "'yesterday' is no time: it must be in ISO form"),
        ((SENTENCE, 5, Where(start=DAY, stop=DAY)), {}, "is not before the stop"),
        ((SENTENCE, 5, Where(camera=("cam\x00",))), {}, "must not contain control characters"),
        ((SENTENCE,), {"image": ROOT / "setup.cfg"}, "setup.cfg cannot be read as an image"),
        ((SENTENCE,), {"image": path, "negative": 3}, "the query is 3, it must be a sentence"),
        ((SENTENCE,), {"min_score": float("nan")}, "min_score is nan, it must be a number from -1 to 1"),
        (([None, SENTENCE],), {"image": path}, "a list of queries must contain sentences only"),
        ((SENTENCE, 5, Where(camera=5.5)), {}, "camera is 5.5 of type float, it must be a text"),
        ((SENTENCE, 5, Where(columns={"zone": None})), {}, "zone is None, it must be a value or a list of values"),
    ):
        with pytest.raises(ValueError, match=message):
            searched.search(*arguments, **options)


# -- Adding


def test_a_second_call_adds_only_what_is_new(gallery, open_gallery, features, monkeypatch):
    paths = list(features)
    gallery = open_gallery()
    encoded = []
    monkeypatch.setattr(gallery, "encode_pixels", lambda pixels: encoded.append(len(pixels)) or pytest.fail("encoded"))
    report = gallery.add(paths, progress=False)
    assert (report.added, report.known) == (0, 48) and not encoded and len(gallery) == 48


def test_the_same_bytes_are_one_picture(open_gallery, features, tmp_path):
    gallery = open_gallery()
    first = next(iter(features))
    copy = tmp_path / "copy.jpg"
    shutil.copy(first, copy)
    data = Path(first).read_bytes()
    report = gallery.add([first, copy, {"bytes": data, "path": "x"}, first], progress=False)
    assert (report.added, report.known, len(gallery)) == (1, 3, 1)


def test_a_file_that_moved_keeps_its_row(open_gallery, features, tmp_path):
    gallery = open_gallery()
    old, new = tmp_path / "old.jpg", tmp_path / "new.jpg"
    shutil.copy(next(iter(features)), old)
    gallery.add([Picture(old, {"camera": "north"})], progress=False)
    old.rename(new)
    assert gallery.add([new], progress=False).known == 1
    (match,) = gallery.search(SENTENCE)
    assert match.path == str(new) and match.columns["camera"] == "north" and gallery.read_crop(match.id).width


def test_a_folder_a_generator_and_a_data_set_give_the_same_gallery(open_gallery, drawn, features, loaded):
    expected = rank(features, encode(loaded, text=SENTENCE))
    gallery = open_gallery()
    assert gallery.add(drawn / "imgs", progress=False, batch_size=5).added == 48
    check(gallery.search(SENTENCE, 48), expected)
    dataset = datasets.Dataset.from_dict({"image": list(features)}).cast_column("image", datasets.Image())
    for images in ((path for path in features), dataset, dataset["image"]):
        assert gallery.add(images, progress=False).added == 0
    assert len(gallery) == 48


def test_known_pictures_get_new_columns_and_replaced_files_new_rows(open_gallery, features, tmp_path):
    gallery = open_gallery()
    files = []
    for number, path in enumerate(list(features)[:4]):
        files.append(tmp_path / f"{number}.jpg")
        shutil.copy(path, files[-1])
    gallery.add(files[:3], columns={"camera": "north"}, progress=False)
    report = gallery.add(files, columns={"camera": ["north", "south", "south", "east"], "floor": 3}, progress=False)
    assert (report.added, report.known, report.updated, report.replaced) == (1, 3, 3, 0)
    assert gallery.add(files, columns={"floor": 3}, progress=False).updated == 0
    gallery = open_gallery()
    found = {match.path: match.columns for match in gallery.search(SENTENCE)}
    assert [found[str(file)]["camera"] for file in files] == ["north", "south", "south", "east"]
    assert gallery.columns == {"floor": "int"} and gallery.cameras == ["east", "north", "south"]
    assert all(columns["floor"] == 3 for columns in found.values())
    old = {match.path: match.id for match in gallery.search(SENTENCE)}
    shutil.copy(list(features)[9], files[0])
    report = gallery.add(files, progress=False)
    assert (report.added, report.known, report.replaced) == (1, 3, 1)
    new = {match.path: match.id for match in gallery.search(SENTENCE)}
    assert new.keys() == old.keys() and [path for path in old if old[path] != new[path]] == [str(files[0])]
    assert gallery.verify().is_sound


def test_an_interrupted_stream_keeps_what_it_has_given(open_gallery, features):
    def stream():
        for number, path in enumerate(features):
            if number == 10:
                raise KeyboardInterrupt
            yield path

    gallery = open_gallery()
    with pytest.raises(KeyboardInterrupt):
        gallery.add(stream(), progress=False)
    assert len(gallery) == 10


def test_galleries_of_one_store_have_their_own_crops(loaded, features, tmp_path):
    pictures = [Image.open(path) for path in list(features)[:2]]
    for name in ("one", "two"):
        with Gallery.open(*loaded, tmp_path / "gallery.db", name) as gallery:
            gallery.add(pictures, progress=False)
    with Gallery.open(None, None, tmp_path / "gallery.db", "one", create=False) as gallery:
        assert gallery.remove(path=pictures[0].filename) == 1 and gallery.remove(path=pictures[1].filename) == 1
        with pytest.raises(ValueError, match="the gallery was opened without its model"):
            gallery.search(SENTENCE)
    with Gallery.open(*loaded, tmp_path / "gallery.db", "two") as gallery:
        report = gallery.verify()
        assert report.is_sound and report.pictures == 2


def test_crops_are_not_forgotten_without_their_folder(open_gallery, features):
    gallery = open_gallery()
    gallery.add([Image.open(next(iter(features)))], progress=False)
    gallery.crops = None
    with pytest.raises(ValueError, match="1 of these pictures are in the folder of crops: give crops=FOLDER"):
        gallery.remove([gallery.search(SENTENCE)[0].id])
    assert len(gallery) == 1


def test_the_path_of_a_video_removes_its_crops(open_gallery, features, tmp_path):
    gallery = open_gallery()
    pictures = [Image.open(path).convert("RGB") for path in list(features)[:3]]
    videos = [tmp_path / "a.avi", tmp_path / "a.avi", tmp_path / "ab.avi"]
    named = [
        Picture(image, path=f"{video}#frame={n}") for n, (image, video) in enumerate(zip(pictures, videos, strict=True))
    ]
    gallery.add(named, progress=False)
    with pytest.raises(ValueError, match="path is empty"):
        gallery.remove(path=" ")
    assert gallery.remove(path=tmp_path / "a.avi") == 2 and len(gallery) == 1
    assert len(list(gallery.crops.iterdir())) == 1


def test_pictures_without_a_file_are_kept_and_can_be_shown(open_gallery, features, tmp_path):
    gallery = open_gallery()
    picture = Image.open(next(iter(features))).convert("RGB")
    data = Path(list(features)[1]).read_bytes()
    pictures = [Picture(picture, {"frame": 12}, "video.avi#12"), {"bytes": data, "path": "train/1.jpg"}]
    assert gallery.add(pictures, progress=False).added == 2
    by_path = {match.path: match for match in gallery.search(SENTENCE)}
    assert by_path.keys() == {"video.avi#12", "train/1.jpg"} and by_path["video.avi#12"].columns["frame"] == 12
    assert np.array_equal(gallery.read_crop(by_path["video.avi#12"].id), picture)
    assert (gallery.crops / by_path["train/1.jpg"].id).read_bytes() == data
    assert gallery.add(pictures, progress=False).known == 2
    gallery = open_gallery(crops=None)
    gallery.crops = None
    with pytest.raises(ValueError, match="a picture without a file needs a folder to be kept in: give crops=FOLDER"):
        gallery.add([picture.rotate(180)], progress=False)


def test_a_picture_that_changed_is_not_shown(open_gallery, features, tmp_path):
    gallery = open_gallery()
    file = tmp_path / "a.jpg"
    shutil.copy(next(iter(features)), file)
    gallery.add([file], progress=False)
    (match,) = gallery.search(SENTENCE)
    shutil.copy(list(features)[1], file)
    with pytest.raises(ValueError, match=r"the file is another picture than the one that was indexed: .*a.jpg"):
        gallery.read_crop(match.id)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"the file of the picture is gone: .*a.jpg"):
        gallery.read_crop(match.id)
    with pytest.raises(KeyError, match="the gallery has no picture"):
        gallery.read_crop("../../etc/passwd")


def test_unreadable_pictures_are_refused_or_skipped_with_a_list(open_gallery, features, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "folder.jpg").mkdir()
    good = list(features)[:3]
    bad = [tmp_path / "broken.jpg", tmp_path / "none.jpg", tmp_path / "folder.jpg", {"bytes": b"", "path": "e.png"}]
    gallery = open_gallery()
    messages = (
        "broken.jpg cannot be read",
        "none.jpg cannot be read: No such",
        "not a regular file",
        "e.png cannot be",
    )
    for picture, message in zip(bad, messages, strict=True):
        with pytest.raises(ValueError, match=message):
            gallery.add([*good, picture], progress=False)
    report = gallery.add([*bad, *good], on_bad_image="skip", progress=False)
    assert report.added == 3 and len(report.skipped) == 4 and len(gallery) == 3
    for name in ("broken.jpg", "none.jpg", "folder.jpg", "e.png"):
        assert sum(name in line for line in report.skipped) == 1


def test_wrong_columns_are_refused_with_the_name_of_the_picture(open_gallery, features):
    gallery = open_gallery()
    first, second = list(features)[:2]
    gallery.add([Picture(first, {"floor": 1, "speed": 2})], columns={"zone": "a"}, progress=False)
    assert gallery.columns == {"floor": "int", "speed": "int", "zone": "str"} and gallery.cameras == []
    for columns, message in (
        ({"floor": "1"}, "floor is '1' of type str, the column has the type int"),
        ({"floor": True}, "floor is True of type bool, the column has the type int"),
        ({"floor": 2**63}, "it must fit in 64 bits"),
        ({"a b": 1}, "'a b' cannot be a column: a name consists of letters, digits and _"),
        ({"id": "1"}, "'id' cannot be a column"),
        ({"score": 1.0}, "'score' cannot be a column"),
        ({"new": [1]}, "new is .1. of type list, it must be a text, a number or a truth value"),
        ({"camera": 1.5}, "camera is 1.5 of type float, it must be a text"),
        ({"camera": "x" * 257}, "camera has 257 bytes, at most 256 are allowed"),
        ({"zone": "\ud800"}, "which is not valid text"),
        ({"time": "noon"}, "'noon' is no time"),
        ({"time": 10**18}, "is no time"),
        ({"time": "0001-01-01T00:00:00+08:00"}, "'0001-01-01T00:00:00.08:00' is no time"),
        ({"speed": 0.5}, "speed is 0.5 of type float, the column has the type int"),
        ({"width": 3}, "'width' cannot be a column"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            gallery.add([Picture(second, columns)], on_bad_image="skip", progress=False)
        assert str(raised.value).startswith(f"{second}: ")
    for images, columns, message in (
        ([first, second], {"zone": ["a"]}, "the column zone has 1 values, but there are more pictures"),
        ([first], {"zone": ["a", "b"]}, "the column zone has 2 values, but there are only 1 pictures"),
        ([5], None, "picture 1 is of type int, it must be a path or a PIL image"),
        ([{"photo": 1}], None, "picture 1 has no field 'image', it has only photo"),
        (7, None, "images is of type int"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.add(images, columns=columns, progress=False)
    assert len(gallery) == 1


def test_columns_for_all_pictures_and_for_each(open_gallery, features):
    gallery = open_gallery()
    paths = list(features)[:4]
    gallery.add(paths, columns={"camera": "north", "speed": [1.5, 2, None, 0.0], "ok": True}, progress=False)
    found = {match.path: match.columns for match in gallery.search(SENTENCE)}
    assert [found[path].get("speed") for path in paths] == [1.5, 2.0, None, 0.0]
    assert all(found[path]["camera"] == "north" and found[path]["ok"] is True for path in paths)
    assert gallery.cameras == ["north"]
    assert {match.path for match in gallery.search(SENTENCE, where=Where(columns={"speed": [2, 0.0]}))} == {
        paths[1],
        paths[3],
    }


# -- Changing and removing


def test_removed_pictures_are_gone(gallery, features, loaded, drawn):
    query = encode(loaded, text=SENTENCE)
    paths = list(features)
    ids = {match.path: match.id for match in gallery.search(SENTENCE, 48)}
    assert gallery.remove([ids[paths[0]], ids[paths[1]]]) == 2
    assert gallery.remove(where=Where(camera="cam 2")) == 16
    assert gallery.remove(path=paths[3]) == 1
    gone = {0, 1, 3}
    check(gallery.search(SENTENCE, 48), rank(features, query, lambda n: n not in gone and n % 3 != 2))
    assert gallery.remove(path=drawn / "im") == 0
    for options, message in (
        ({}, "give either ids, or where, or path"),
        ({"ids": [], "path": "x"}, "give either ids, or where, or path"),
        ({"where": Where()}, "the filter has no condition: it would remove every picture"),
        ({"ids": [ids[paths[0]]]}, "the gallery has no picture .* .1 of 1 ids are unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.remove(**options)
    left = len(gallery)
    assert gallery.remove(path=drawn) == left and gallery.search(SENTENCE) == [] and len(gallery) == 0
    assert gallery.add(paths[:2], progress=False).added == 2
    assert all(Image.open(path) for path in paths)


def test_old_pictures_expire(open_gallery, features):
    gallery = open_gallery()
    paths = list(features)[:4]
    now = datetime.now(UTC)
    times = [now - timedelta(days=40), now - timedelta(days=20), now - timedelta(days=10), None]
    gallery.add([Picture(path, {"time": time}) for path, time in zip(paths, times, strict=True)], progress=False)
    left = lambda: {match.path for match in gallery.search(SENTENCE)}  # noqa: E731
    assert gallery.expire(timedelta(days=30)) == 1 and left() == {*paths[1:]}
    assert gallery.expire(now - timedelta(days=15)) == 1 and left() == {*paths[2:]}
    assert gallery.expire(timedelta(days=30)) == 0
    for age in (datetime.now(UTC) + timedelta(minutes=1), timedelta(0), timedelta(days=-1)):
        with pytest.raises(ValueError, match="every picture would be too old"):
            gallery.expire(age)
    with pytest.raises(ValueError, match="which is before the year 1"):
        gallery.expire(timedelta(days=999_999))
    # A picture without a time is as old as its place in the gallery.
    assert gallery.expire(datetime.now(UTC)) == 2 and left() == set()


def test_columns_can_be_changed(gallery, open_gallery, features, loaded):
    before = gallery.search(SENTENCE, 48)
    match = before[5]
    gallery.update(match.id, camera="south", floor=9, colour="red", time="2026-01-01T00:00:00", zone=None)
    gallery = open_gallery()
    after = gallery.search(SENTENCE, 48)
    assert [each.id for each in after] == [each.id for each in before]
    assert after[5].columns == {
        **{name: value for name, value in match.columns.items() if name != "zone"},
        **{"camera": "south", "floor": 9, "colour": "red", "time": datetime(2026, 1, 1, tzinfo=UTC)},
    }
    assert gallery.cameras == ["cam 0", "cam 1", "cam 2", "south"] and gallery.columns["colour"] == "str"
    for arguments, message in (
        ({"floor": "x"}, "floor is 'x' of type str"),
        ({"shoe": None}, "no column 'shoe'"),
        ({"path": "x"}, "'path' cannot be a column"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.update(match.id, **arguments)
    with pytest.raises(ValueError, match="the gallery has no picture x"):
        gallery.update("x", floor=1)
    gallery.update(match.id, camera=None, time=None, tracklet=None)
    columns = gallery.get([match.id])[match.id].columns
    assert (columns["camera"], columns["time"], columns["tracklet"], columns["floor"]) == ("", None, "", 9)
    assert len(gallery.search(SENTENCE, 48, group_by="zone")) == 3


# -- Looking after a gallery


def test_another_model_or_format_is_refused_by_name(gallery, open_gallery, loaded):
    other = load_model(BACKBONE)[0].cpu()
    with torch.no_grad():
        other.visual_projection.weight[0, 0] += 1e-3
    other.config._name_or_path = "other-model"
    with pytest.raises(ValueError, match=r"was made with the model .*synthetic-backbone \(.*\), this is other-model"):
        open_gallery(other)
    changed = load_model(BACKBONE)[1]
    changed.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="weights or processor differ"):
        open_gallery(processor=changed)
    # The same weights, but another activation: the vectors would differ.
    other = load_model(BACKBONE)[0].cpu()
    other.config.vision_config.hidden_act = "relu"
    with pytest.raises(ValueError, match="weights or processor differ"):
        open_gallery(other)
    gallery = open_gallery()
    assert len(gallery) == 48
    gallery.store.set_properties({"format": "0"})
    with pytest.raises(ValueError, match="has the format 0, this version reads the format 1: index again"):
        open_gallery()


def test_info_counts(searched, features):
    info = searched.info()
    assert (info.pictures, info.cameras) == (48, {"cam 0": 16, "cam 1": 16, "cam 2": 16})
    assert info.oldest == DAY + timedelta(minutes=1) and info.newest == DAY + timedelta(minutes=47)
    assert info.columns == {"floor": "int", "zone": "str"} and info.threshold is None
    assert info.model.endswith("synthetic-backbone") and "ilvus" in info.engine
    assert info.first_added <= info.last_added <= datetime.now(UTC)


def test_verify_finds_what_is_wrong(open_gallery, features, tmp_path):
    gallery = open_gallery()
    files = []
    for number, path in enumerate(list(features)[:5]):
        files.append(tmp_path / f"{number}.jpg")
        shutil.copy(path, files[-1])
    gallery.add([*files, Image.open(list(features)[6])], progress=False)
    report = gallery.verify()
    assert report.is_sound and report.pictures == 6
    ids = {match.path: match.id for match in gallery.search(SENTENCE)}
    files[0].unlink()
    shutil.copy(files[2], files[1])
    row = gallery.store.get([ids[str(files[3])]])[ids[str(files[3])]]
    gallery.store.upsert([row | {"vector": -np.asarray(row["vector"])}])
    (gallery.crops / "spare").write_bytes(b"")
    report = gallery.verify()
    assert not report.is_sound
    assert (report.missing, report.changed) == ([ids[str(files[0])]], [ids[str(files[1])]])
    assert report.wrong_vectors == [ids[str(files[3])]] and report.spare_crops == ["spare"]


def test_a_threshold_has_the_wanted_precision_and_search_says_that_nobody_fits(gallery, open_gallery, drawn, loaded):
    split = datasets.load_dataset("cuhk_pedes", data_dir=str(drawn), split="val")
    images = [encode(loaded, row["image"]) for row in split]
    pairs, best = [], []
    for row in split:
        for caption in row["captions"]:
            query = encode(loaded, text=caption)
            rights = [other["person_id"] == row["person_id"] for other in split]
            scores = [float(image @ query) for image in images]
            scored = sorted(zip(scores, rights, strict=True), reverse=True)[:5]
            pairs += scored
            best.append(scored[0][0])

    def precision_at(threshold):
        kept = [right for score, right in pairs if score >= threshold]
        return sum(kept) / len(kept)

    found = gallery.calibrate(split, precision=0.8, top_k=5)
    assert found.precision == pytest.approx(precision_at(found.threshold - 1e-5)) and found.precision >= 0.8
    assert not any(precision_at(score) >= 0.8 for score, _ in pairs if score < found.threshold - 1e-5)
    assert found.answered == pytest.approx(sum(score >= found.threshold - 1e-5 for score in best) / len(best))
    assert (found.queries, found.pictures, found.top_k) == (len(best), len(split), 5)
    gallery = open_gallery()
    assert gallery.threshold == found.threshold == gallery.info().threshold
    everyone = gallery.search(SENTENCE, 48, min_score=-1)
    assert len(everyone) == 48
    assert gallery.search(SENTENCE, 48) == [match for match in everyone if match.score >= found.threshold]
    worst = next(match for match in reversed(everyone) if match.columns["time"])
    moment = worst.columns["time"]
    alone = Where(start=moment, stop=moment + timedelta(milliseconds=1))
    assert worst.score < found.threshold and gallery.search(SENTENCE, where=alone) == []
    assert [match.id for match in gallery.search(SENTENCE, where=alone, min_score=-1)] == [worst.id]
    # Scores of other queries have another range.
    assert len(gallery.search(SENTENCE, 48, negative=OTHER)) == 48
    assert len(gallery.refine(SENTENCE, [everyone[0].id], top_k=48)) == 48
    for options, message in (
        ({"precision": 0}, "precision is 0, it must be above 0"),
        ({"precision": 1.1}, "precision is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.calibrate(split, **options)
    # Two persons who look the same: half of the matches with the best score are wrong.
    twins = [{"image": split[0]["image"], "captions": ["a man"], "person_id": person} for person in (1, 2)]
    with pytest.raises(ValueError, match=r"no score gives a precision of 0.9: the best is 0.500"):
        gallery.calibrate(datasets.Dataset.from_list(twins, features=split.select_columns([*twins[0]]).features))
    assert gallery.threshold == found.threshold


def read_table(file):
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def test_export(searched, features, tmp_path):
    matches = searched.search(SENTENCE, 5)
    searched.export(tmp_path / "found.csv", matches)
    searched.export(tmp_path / "all.csv", where=Where(camera="cam 1"))
    searched.export(tmp_path / "found.png", matches)
    searched.export(tmp_path / "crops-of-all", where=Where(columns={"floor": 3}))
    rows = read_table(tmp_path / "found.csv")
    assert [row["id"] for row in rows] == [match.id for match in matches]
    assert [float(row["score"]) for row in rows] == pytest.approx([match.score for match in matches], abs=1e-6)
    for row, match in zip(rows, matches, strict=True):
        time = match.columns["time"]
        assert row["camera"] == match.columns["camera"] and row["time"] == (time.isoformat() if time else "")
        assert row["floor"] == str(match.columns["floor"]) and row["path"] == match.path
    rows = read_table(tmp_path / "all.csv")
    assert {row["path"] for row in rows} == {path for n, path in enumerate(features) if n % 3 == 1}
    assert {row["score"] for row in rows} == {""}
    assert Image.open(tmp_path / "found.png").height > 240
    written = list((tmp_path / "crops-of-all").glob("*.jpg"))
    assert len(written) == 12 and (tmp_path / "crops-of-all" / "pictures.csv").exists()
    for options, message in (
        ({"file": tmp_path / "x.csv", "matches": matches, "where": Where()}, "give either matches or where"),
        ({"file": tmp_path / "x.txt", "matches": matches}, "does not end like a picture file"),
        ({"file": tmp_path / "x.png", "matches": []}, "there are no pictures to draw"),
    ):
        with pytest.raises(ValueError, match=message):
            searched.export(**options)
    with pytest.raises(FileExistsError):
        searched.export(tmp_path / "crops-of-all", matches)
    assert not (tmp_path / "x.csv").exists() and not (tmp_path / "x.png").exists()


# -- The embedded gallery alone


@pytest.fixture
def embedded(loaded, tmp_path):
    with Gallery.open(*loaded, tmp_path / "gallery.db") as gallery:
        yield gallery


def test_a_table_has_no_formulas(embedded, features, tmp_path):
    texts = ["=1+1", "+1", "-1", "@x", "safe"]
    pictures = [Picture(path, {"camera": text}) for path, text in zip(list(features)[:5], texts, strict=True)]
    embedded.add(pictures, progress=False)
    embedded.export(tmp_path / "all.csv")
    cells = {row["camera"] for row in read_table(tmp_path / "all.csv")}
    assert cells == {"'=1+1", "'+1", "'-1", "'@x", "safe"}


def test_exported_pictures_have_no_metadata(embedded, tmp_path):
    note = PngImagePlugin.PngInfo()
    note.add_text("GPS", "SECRET-PLACE")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((40, 80), 50).convert("RGB").save(tmp_path / "a.png", pnginfo=note, exif=exif)
    embedded.add([tmp_path / "a.png"], progress=False)
    embedded.export(tmp_path / "out")
    (file,) = (tmp_path / "out").glob("*.jpg")
    image = Image.open(file)
    assert image.size == (80, 40) and b"SECRET" not in file.read_bytes() and not image.getexif()


def test_what_is_removed_leaves_no_trace_on_the_disk(loaded, features, tmp_path, monkeypatch):
    """Everything below one folder is searched: the store, the crops, temporary files, logs."""
    place = tmp_path / "place"
    for name in ("home", "tmp"):
        (place / name).mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    monkeypatch.setenv("HOME", str(place / "home"))
    picture = Image.open(next(iter(features))).convert("RGB")
    other = Image.open(list(features)[1]).convert("RGB")
    with Gallery.open(*loaded, place / "gallery.db") as gallery:
        time = datetime(2020, 1, 1, tzinfo=UTC)
        gallery.add(
            [
                Picture(picture, {"note": "SECRET-NOTE", "time": time}, "SECRET-NAME"),
                Picture(other, {"note": "kept"}, "kept"),
            ],
            progress=False,
        )
        secret, kept = (next(m for m in gallery.search(SENTENCE) if m.path == path) for path in ("SECRET-NAME", "kept"))
        vectors = {m.id: np.asarray(gallery.store.get([m.id])[m.id]["vector"], np.float32) for m in (secret, kept)}
        data = (place / "gallery.crops" / "gallery" / secret.id).read_bytes()

        def traces(match, texts):
            content = b"".join(file.read_bytes() for file in place.rglob("*") if file.is_file())
            names = "".join(str(file) for file in place.rglob("*"))
            found = {text for text in (*texts, match.id) if text.encode() in content or text in names}
            return found | ({"vector"} if vectors[match.id].tobytes() in content else set())

        gallery.store._client.flush(gallery.store.name)
        assert traces(secret, ("SECRET-NAME", "SECRET-NOTE")) == {"SECRET-NAME", "SECRET-NOTE", secret.id, "vector"}
        assert gallery.expire(timedelta(days=365)) == 1
        assert traces(secret, ("SECRET-NAME", "SECRET-NOTE")) == set()
        assert not any(data in file.read_bytes() for file in place.rglob("*") if file.is_file())
        assert traces(kept, ("kept",)) == {"kept", kept.id, "vector"}
        assert gallery.read_crop(kept.id).size == other.size
    assert traces(secret, ("SECRET-NAME", "SECRET-NOTE")) == set()


def test_an_empty_gallery_and_one_that_is_not_there(embedded, loaded, tmp_path):
    info = embedded.info()
    assert (info.pictures, info.cameras, info.oldest, info.last_added) == (0, {}, None, None)
    assert embedded.search(SENTENCE) == [] and embedded.verify().is_sound
    embedded.close()
    embedded.close()
    with pytest.raises(FileNotFoundError, match="has no gallery named 'other'"):
        Gallery.open(*loaded, tmp_path / "gallery.db", "other", create=False)
    store = VectorStore.open(str(tmp_path / "gallery.db"), "gallery")
    assert json.loads(store.properties["columns"]) == {}
    store.close()
