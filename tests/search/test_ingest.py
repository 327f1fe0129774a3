import csv
import json
import re
from datetime import UTC, datetime, timedelta, timezone

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eccl.search.ingest import PathPattern, find_pictures, from_dataset

MILLISECOND = timedelta(milliseconds=1)


@pytest.fixture
def photos(tmp_path):
    """Six pictures of two cameras, with their times in their names."""
    for camera in ("1", "2b"):
        folder = tmp_path / "photos" / f"cam{camera}"
        folder.mkdir(parents=True)
        for second in range(3):
            Image.new("RGB", (4, 8), (second, 0, 0)).save(folder / f"20240531_14000{second}_{second + 7:03}.jpg")
    return tmp_path / "photos"


def names(pictures):
    return [f"{picture.image.parent.name}/{picture.image.name}" for picture in pictures]


ALL = [f"cam{camera}/20240531_14000{second}_00{second + 7}.jpg" for camera in ("1", "2b") for second in range(3)]


def write_table(file, rows):
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0], delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return file


# Sources


def test_folders_files_globs_and_lists_give_the_same_pictures(photos, tmp_path, monkeypatch):
    (photos / "notes.md").touch()
    (tmp_path / "list.txt").write_text(
        "\ufeff" + "\n".join(f"photos/{name}" for name in ALL) + "\n\n", encoding="utf-8"
    )
    (tmp_path / "list.json").write_text(json.dumps([{"file_path": f"photos/{name}"} for name in ALL]))
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"image": f"photos/{name}"}) + "\n" for name in ALL))
    write_table(tmp_path / "list.csv", [{"filename": f"photos/{name}"} for name in ALL])
    write_table(tmp_path / "list.tsv", [{"file_name": str(photos / name)} for name in ALL])
    datasets.Dataset.from_list([{"path": f"photos/{name}"} for name in ALL]).to_parquet(str(tmp_path / "list.parquet"))
    monkeypatch.chdir(tmp_path)
    for source in (
        photos, "photos", "photos/cam*/*.jpg", "photos/**/*.jpg", "photos/**", "photos/cam*",
        [photos / "cam1", "photos/cam2b"],
        [photos / name for name in ALL], "list.txt", "list.json", "list.jsonl", "list.csv", "list.tsv", "list.parquet",
    ):  # fmt: skip
        pictures = find_pictures(source)
        assert names(pictures) == ALL, source
        assert all(picture.image.exists() and picture.columns == {} for picture in pictures)


def test_a_picture_of_several_sources_comes_once_and_keeps_the_columns_of_its_list(photos, tmp_path):
    table = write_table(tmp_path / "list.csv", [{"path": f"photos/{ALL[4]}", "coat": "red"}])
    pictures = find_pictures([photos, table, str(photos / "cam2b" / ".." / ALL[0])])
    assert names(pictures) == ALL
    assert [picture.columns for picture in pictures] == [{}, {}, {}, {}, {"coat": "red"}, {}]
    other = write_table(tmp_path / "other.csv", [{"path": f"photos/{ALL[4]}", "coat": "blue"}])
    with pytest.raises(ValueError, match="comes from two sources, with different columns"):
        find_pictures([table, other])


def test_files_that_are_no_images_are_counted(photos, caplog):
    (photos / "cam1" / "notes.md").touch()
    assert len(find_pictures(f"{photos}/cam1/*")) == 3
    assert ".md: 1" in caplog.text


def test_sources_without_pictures_are_refused(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.jpg\n")
    (tmp_path / "notes.md").touch()
    (tmp_path / "rows.json").write_text('[{"path": "a.jpg"}, 3]')
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "list.json").write_text('[{"path": "a.jpg", "captions": ["one", "two"]}]')
    write_table(tmp_path / "columns.csv", [{"picture": "a.jpg", "camera": "1"}])
    write_table(tmp_path / "blank.csv", [{"path": "a.jpg"}, {"path": " "}])
    write_table(tmp_path / "twice.csv", [{"path": "a.jpg"}, {"path": "./a.jpg"}])
    for source, error, message in (
        ([], ValueError, "there are no sources"),
        ("none", FileNotFoundError, "none does not exist"),
        ("empty", ValueError, "empty contains no images"),
        ("none/*.jpg", ValueError, r"none/\*.jpg matches no image"),
        ("*.md", ValueError, "matches no image, only .md: 1"),
        ("notes.md", ValueError, "notes.md is no source of pictures: its name must end in .*jpg.*.txt.*csv"),
        ("empty.txt", ValueError, "empty.txt contains no path"),
        ("latin.txt", ValueError, "latin.txt is not UTF-8"),
        ("rows.json", ValueError, "record 2 of .*rows.json is not an object"),
        ("none.json", ValueError, "none.json has no rows"),
        ("list.json", ValueError, r'record 1 of .*list.json has \["one", "two"\] as captions'),
        ("columns.csv", ValueError, r"columns.csv has no column of paths \(path, .*\), it has picture, camera"),
        ("blank.csv", ValueError, "record 2 of .*blank.csv has no path in the column path"),
        ("twice.csv", ValueError, "twice.csv has two rows for ./a.jpg"),
    ):
        with pytest.raises(error, match=message) as caught:
            find_pictures(str(tmp_path / source) if source else source)
        assert "\n" not in str(caught.value)


# Patterns


def test_a_pattern_reads_camera_and_time(photos):
    pictures = find_pictures(photos, "cam{camera}/{time:%Y%m%d_%H%M%S}_*.jpg")
    assert [picture.columns for picture in pictures] == [
        {"camera": camera, "time": datetime(2024, 5, 31, 14, 0, second, tzinfo=UTC)}
        for camera in ("1", "2b")
        for second in range(3)
    ]


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("{camera}_{frame:d}.png", "/a/c_1_0042.png", {"camera": "c_1", "frame": 42}),
        ("{camera}_*.png", "/a/c_1_0042.png", {"camera": "c"}),
        ("{camera}.png", "/a/b/c.jpg", None),
        ("a/{camera}.png", "/b/da/c.png", None),
        ("/a/{camera}.png", "/a/c.png", {"camera": "c"}),
        ("/a/{camera}.png", "/b/a/c.png", None),
        ("{camera}/*.png", "/a/b/c.png", {"camera": "b"}),
        ("{camera}/**/*.png", "/x/y.png", {"camera": "x"}),
        ("site{site}/**/{tracklet}/*", "/siteA/b/c/t9/f.png", {"site": "A", "tracklet": "t9"}),
        ("a.b/{x}", "/aXb/c", None),
        ("[{x}](+)", "/[1](+)", {"x": "1"}),
        ("{x:d}.png", "/-7.png", None),
        (
            "{time:%Y-%m-%dT%H.%M.%S%z}_*",
            "/2024-05-31T14.00.00+0200_x",
            {"time": datetime(2024, 5, 31, 12, tzinfo=UTC)},
        ),
        ("{time:%Y/%j/%H}h.png", "/2024/366/23h.png", {"time": datetime(2024, 12, 31, 23, tzinfo=UTC)}),
        (
            "{time:%Y-%m-%d}/cam{camera}_{time:%H%M%S.%f}.jpg",
            "/2024-05-31/cam3_140001.25.jpg",
            {"time": datetime(2024, 5, 31, 14, 0, 1, 250_000, tzinfo=UTC), "camera": "3"},
        ),
        ("{time:%y%m%d_%I%p}.jpg", "/240531_02PM.jpg", {"time": datetime(2024, 5, 31, 14, tzinfo=UTC)}),
        ("{time:%Y%m%d}.jpg", "/20241331.jpg", None),
        ("{time:%d%%%m%%%Y}.jpg", "/01%02%2024.jpg", {"time": datetime(2024, 2, 1, tzinfo=UTC)}),
    ],
)
def test_patterns(pattern, path, expected):
    assert PathPattern(pattern).match(path) == expected


@given(
    st.from_regex(r"[A-Za-z0-9-]+", fullmatch=True),
    st.from_regex(r"[^/\0\n]+", fullmatch=True).filter(lambda name: name not in (".", "..")),
    st.datetimes(datetime(1000, 1, 1), datetime(9999, 1, 1), timezones=st.just(timezone(timedelta(hours=-3)))),
    st.integers(0, 10**9),
)
def test_a_pattern_reads_back_what_was_written(camera, site, time, frame):
    time = time.replace(microsecond=0)
    path = f"/x/{site}/cam{camera}/{time:%Y%m%d_%H%M%S%z}_{frame:06}.jpg"
    values = PathPattern("{site}/cam{camera}/{time:%Y%m%d_%H%M%S%z}_{frame:d}.jpg").match(path)
    assert values == {"camera": camera, "site": site, "time": time, "frame": frame}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.jpg", "names no column"),
        ("cam{camera/*.jpg", "a brace without its partner"),
        ("cam}/{camera}", "a brace without its partner"),
        ("{}/*.jpg", "has the column ''"),
        ("{2nd}.jpg", "has the column '2nd'"),
        ("{camera}/{camera}.jpg", "has {camera} twice"),
        ("{camera:d}.jpg", "only {time:FORMAT} has a format"),
        ("{frame:04d}.jpg", "only {time:FORMAT} has a format"),
        ("{time}.jpg", "needs a format for the time"),
        ("{time:%Y%m%d%Q}.jpg", "has %Q in its time, it may have %Y, "),
        ("{time:%Y%m%d%}.jpg", "has % in its time"),
        ("{time:%Y%m%d%H%H}.jpg", "has a part of the time twice"),
        ("{time:%Y%m%d}_{time:%Y}.jpg", "has a part of the time twice"),
        ("{time:%H%M%S}.jpg", "has no whole date"),
        ("{camera}/**.jpg", "has \\*\\* without a slash behind it"),
    ],
)
def test_malformed_patterns_are_refused(pattern, message):
    with pytest.raises(ValueError, match=message) as caught:
        find_pictures("anything", pattern)
    assert repr(pattern) in str(caught.value)


def test_pictures_that_do_not_match_are_counted_and_all_of_them_refused(photos, caplog):
    pictures = find_pictures(photos, "cam{camera:}/*_007.jpg".replace(":", ""))
    assert [picture.columns for picture in pictures] == [{"camera": "1"}, {}, {}, {"camera": "2b"}, {}, {}]
    (record,) = caplog.records
    assert record.message.startswith(
        "4 of 6 pictures do not match the pattern 'cam{camera}/*_007.jpg' and get no camera"
    )
    assert record.message.endswith(str(photos / ALL[1]))
    with pytest.raises(
        ValueError, match=f"no path matches the pattern .* for example {re.escape(str(photos / ALL[0]))}"
    ):
        find_pictures(photos, "camera{camera}/*")


# Tables


def test_a_table_gives_columns_with_their_types(photos):
    times = ["2024-05-31T14:00:00", "2024-05-31 14:00+02:00", "1717164000000", "", "2024-05-31", "0"]
    rows = [
        {
            "path": name, "camera": "07", "tracklet": "3", "time": time, "whole": f"{index - 3}",
            "number": f"{index}.5", "mixed": "4" if index else "2.5e-1", "id": f"00{index}", "code": "12e4",
            "text": ("a", "", " b ")[index % 3], "large": "12345678901234567890",
        }
        for index, (name, time) in enumerate(zip(ALL, times, strict=True))
    ]  # fmt: skip
    pictures = find_pictures(photos, metadata=write_table(photos / "table.csv", rows))
    assert names(pictures) == ALL
    assert pictures[0].columns == {
        "camera": "07", "tracklet": "3", "time": datetime(2024, 5, 31, 14, tzinfo=UTC).timestamp() * 1000,
        "whole": -3, "number": 0.5, "mixed": 0.25, "id": "000", "code": "12e4", "text": "a",
        "large": "12345678901234567890",
    }  # fmt: skip
    assert [type(picture.columns["mixed"]) for picture in pictures] == [float] * 6
    assert [type(picture.columns["whole"]) for picture in pictures] == [int] * 6
    assert [picture.columns.get("text") for picture in pictures] == ["a", None, "b"] * 2
    zero = datetime(1970, 1, 1, tzinfo=UTC)
    expected = [(datetime(2024, 5, 31, hour, tzinfo=UTC) - zero) // MILLISECOND for hour in (14, 12, 14, 0)]
    assert [picture.columns.get("time") for picture in pictures] == [*expected[:3], None, expected[3], 0]


def test_values_of_json_keep_their_types(photos, tmp_path):
    row = {"path": f"photos/{ALL[0]}", "camera": 7, "zone": "12", "score": 0.5, "seen": True, "nothing": None}
    (tmp_path / "table.jsonl").write_text(json.dumps(row))
    (picture,) = find_pictures(tmp_path / "table.jsonl")
    assert picture.columns == {"camera": "7", "zone": "12", "score": 0.5, "seen": True}


def test_a_table_is_read_relative_to_itself_or_to_a_source(photos, tmp_path):
    (tmp_path / "tables").mkdir()
    for file, prefix in ((photos / "t.csv", ""), (tmp_path / "t.csv", "photos/"), (tmp_path / "tables" / "t.csv", "")):
        table = write_table(file, [{"image": prefix + name, "number": index} for index, name in enumerate(ALL)])
        assert [picture.columns["number"] for picture in find_pictures(photos, metadata=table)] == list(range(6))


def test_rows_and_pictures_without_each_other_are_counted(photos, caplog):
    table = write_table(photos / "t.csv", [{"path": path, "x": "1"} for path in (ALL[0], ALL[5], "gone.jpg")])
    pictures = find_pictures(photos, metadata=table)
    assert [picture.columns for picture in pictures] == [{"x": 1}, {}, {}, {}, {}, {"x": 1}]
    messages = [record.message for record in caplog.records if str(table) in record.message]
    assert messages == [
        f"1 rows of {table} are for no picture among the sources, the first: gone.jpg",
        f"4 of 6 pictures have no row in {table}, the first: {photos / ALL[1]}",
    ]


def test_faults_of_tables_are_refused(photos, tmp_path):
    def refuse(rows, message, pattern=None, sources=photos):
        table = write_table(photos / "t.csv", rows)
        with pytest.raises(ValueError, match=message):
            find_pictures(sources, pattern, table)

    refuse([{"path": "gone.jpg"}], "has a row for none of the 6 pictures: its first row is for gone.jpg")
    refuse([{"path": ALL[0]}, {"path": f"cam1/../{ALL[0]}"}], "has two rows for cam1/../cam1")
    refuse([{"path": ALL[0], "time": "yesterday"}], "record 1 of .*t.csv: 'yesterday' is no time")
    refuse([{"path": ALL[0], "camera": "x"}], "both give camera: leave it out", "cam{camera}/*")
    first = write_table(tmp_path / "first.csv", [{"path": f"photos/{ALL[0]}", "coat": "red"}])
    refuse([{"path": ALL[0], "coat": "red"}], "t.csv and the list of .* both give coat", sources=first)
    # The same name in the folders of two sources.
    refuse([{"path": "20240531_140000_007.jpg"}], "is in several folders", sources=[photos / "cam1", photos / "cam2b"])
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        find_pictures(photos, metadata=tmp_path / "none.csv")


def test_a_pattern_and_a_table_together(photos):
    table = write_table(photos / "t.csv", [{"path": name, "coat": "red"} for name in ALL])
    pictures = find_pictures(photos, "cam{camera}/*", table)
    assert pictures[5].columns == {"camera": "2b", "coat": "red"}


# Data sets


def test_a_data_set_gives_undecoded_pictures_with_columns(photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    Image.new("RGB", (3, 6)).save(tmp_path / "inner.png")
    content = (tmp_path / "inner.png").read_bytes()
    paths = [str(photos / ALL[0]), "inner.png", str(tmp_path / "broken.jpg")]
    dataset = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": data, "path": path} for data, path in zip([None, content, None], paths, strict=True)],
            "file_path": ["a", "b", "c"],
            "camera": ["1", None, "2"],
            "coat": [0, 1, 1],
            "captions": [["x"], [], []],
        }
    )
    dataset = dataset.cast_column("image", datasets.Image()).cast_column(
        "coat", datasets.ClassLabel(names=["red", "blue"])
    )
    pictures = from_dataset(dataset, ["camera", "coat"])
    assert len(pictures) == 3
    assert [picture.columns for picture in pictures] == [
        {"camera": "1", "coat": "red"},
        {"coat": "blue"},
        {"camera": "2", "coat": "blue"},
    ]
    # A file stays a file; a picture within the data set has its name.
    assert pictures[0].image == str(photos / ALL[0]) and pictures[2].image == str(tmp_path / "broken.jpg")
    assert pictures[1].path == "b" and pictures[1].image["bytes"] == content
    assert [picture.columns["coat"] for picture in pictures[1:]] == ["blue", "blue"]
    assert from_dataset(dataset)[0].columns == {}
    for wrong, columns, message in (
        (dataset, ["coats"], "has no column coats, it has image, "),
        (dataset, ["captions"], "column captions of the data set holds .*, it must hold single values"),
        (dataset.remove_columns("image"), [], "has no column image with images"),
        (datasets.DatasetDict(train=dataset, test=dataset), [], "choose one of train, test"),
    ):
        with pytest.raises(ValueError, match=message):
            from_dataset(wrong, columns)
