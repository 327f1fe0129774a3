"""Training from a stream: the pairs, their order, and what a stream cannot do."""

import hashlib
import itertools
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import CLIPTokenizer

from eccl.dataset_scripts.records import Checks
from eccl.dataset_scripts.sources import DataSource
from eccl.modeling_eccl import ECCLModel
from eccl.processing_eccl import ECCLProcessor
from eccl.training.streaming import StreamedPairs
from helpers import train_eccl


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """The library waits for its threads, five seconds, each time that a shuffled stream ends."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture
def parquet(benchmark, tmp_path):
    """The training split of the benchmark in two Parquet files, with other names of columns, one caption a row."""
    records = [each for each in json.loads((benchmark / "reid_raw.json").read_text()) if each["split"] == "train"]
    rows = [
        {
            "img": {"bytes": (benchmark / "imgs" / each["file_path"]).read_bytes(), "path": None},
            "pid": f"person {each['id']}",
            "text": each["captions"],
            "file_path": each["file_path"],
        }
        for each in records
    ]
    (tmp_path / "set").mkdir()
    for number, part in enumerate((rows[:3], rows[3:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "set" / f"train-{number:05d}-of-00002.parquet")
    return tmp_path / "set"


@pytest.fixture
def processor(backbone):
    model = ECCLModel.from_clip(str(backbone), image_size=(32, 16), prompt_depth=2)
    return ECCLProcessor.for_model(model.config, CLIPTokenizer.from_pretrained(backbone))


def make_pairs(folder, processor, **changes):
    rows = DataSource(str(folder), columns={"person_id": "pid"}).stream("train")
    return StreamedPairs(rows, "a stream", processor, **changes)


def test_each_pass_has_every_image_once_and_the_next_pass_its_next_caption(parquet, processor, benchmark):
    records = [each for each in json.loads((benchmark / "reid_raw.json").read_text()) if each["split"] == "train"]
    pairs = make_pairs(parquet, processor, augment=False)
    items = list(itertools.islice(pairs, 3 * len(records)))
    passes = [items[start : start + len(records)] for start in range(0, len(items), len(records))]
    expected = {each["file_path"]: each for each in records}
    for one_pass in passes:
        assert sorted(item["file_path"] for item in one_pass) == sorted(expected)
    orders = [[item["file_path"] for item in one_pass] for one_pass in passes]
    assert orders[0] != orders[1]
    drawn = [{item["file_path"]: item["caption"] for item in one_pass} for one_pass in passes]
    for path, record in expected.items():
        assert {drawn[0][path], drawn[1][path]} == set(record["captions"]) and drawn[0][path] == drawn[2][path]
    # The first pass does not start with the first caption of every image.
    assert 0 < sum(drawn[0][path] == record["captions"][0] for path, record in expected.items()) < len(expected)
    # Labels tell the persons apart, as their ids do.
    labels = {item["file_path"]: item["person_label"] for item in passes[0]}
    for first, second in itertools.combinations(records, 2):
        same = labels[first["file_path"]] == labels[second["file_path"]]
        assert same == (first["id"] == second["id"])
    assert len({item["image_index"] for item in passes[0]}) == len(records)


def test_the_items_depend_on_the_seed_alone(parquet, processor):
    first, again, other = (list(itertools.islice(make_pairs(parquet, processor, seed=seed), 12)) for seed in (1, 1, 2))
    for item, same in zip(first, again, strict=True):
        assert item["file_path"] == same["file_path"] and torch.equal(item["pixel_values"], same["pixel_values"])
    assert [item["file_path"] for item in first] != [item["file_path"] for item in other]
    # Without augmentation the pixels are those of evaluation.
    plain = next(iter(make_pairs(parquet, processor, augment=False)))
    stored = {
        row["file_path"]: row["image"]
        for row in DataSource(str(parquet), columns=["person_id=pid"]).load().splits["train"]
    }
    pixels = processor.image_processor(stored[plain["file_path"]], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(plain["pixel_values"], pixels)


@pytest.mark.parametrize("world_size", [2, 3])
def test_in_each_pass_the_processes_read_different_rows(parquet, processor, monkeypatch, world_size):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        paths = [item["file_path"] for item in itertools.islice(make_pairs(parquet, processor), 5)]
        # Two processes get a file each, of 3 and of 5 rows. Of three processes, each gets every third row.
        first_file = pq.read_table(parquet / "train-00000-of-00002.parquet")["file_path"].to_pylist()
        size = (3 if paths[0] in first_file else 5) if world_size == 2 else len(range(rank, 8, 3))
        parts.append(paths[:size])
    assert len({path for part in parts for path in part}) == sum(map(len, parts)) == 8


def test_a_faulty_row_stops_the_stream_or_is_left_out(parquet, processor, caplog):
    table = pq.read_table(parquet / "train-00000-of-00002.parquet").to_pylist()
    table[1]["img"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(table), parquet / "train-00000-of-00002.parquet")
    bad = table[1]["file_path"]
    with pytest.raises(ValueError, match=rf"a stream, {bad}: .*cannot be"):
        list(itertools.islice(make_pairs(parquet, processor), 16))
    paths = [item["file_path"] for item in itertools.islice(make_pairs(parquet, processor, skip_bad_images=True), 14)]
    assert bad not in paths and len(set(paths)) == 7 and f"{bad}: left out" in caplog.text
    for change, message in (
        ({"text": ["red", "..."]}, r"set, split train, the row of '.*': text is '\.\.\.', it must be"),
        ({"pid": ""}, "pid is '', it must be a whole number or a text"),
    ):
        pq.write_table(pa.Table.from_pylist([table[0] | change]), parquet / "train-00000-of-00002.parquet")
        with pytest.raises(ValueError, match=message):
            list(itertools.islice(make_pairs(parquet, processor), 16))


def test_a_stream_of_bad_images_alone_is_refused(parquet, processor):
    for file in parquet.glob("*.parquet"):
        rows = [row | {"img": {"bytes": b"no", "path": None}} for row in pq.read_table(file).to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows), file)
    with pytest.raises(ValueError, match="a stream: no image can be read, 8 are left out"):
        list(make_pairs(parquet, processor, skip_bad_images=True))


def test_bad_captions_of_a_stream_are_left_out_on_request(parquet, processor):
    file = parquet / "train-00000-of-00002.parquet"
    rows = pq.read_table(file).to_pylist()
    rows[0]["text"], rows[1]["text"] = ["red", " "], ["..."]
    pq.write_table(pa.Table.from_pylist(rows), file)
    source = DataSource(str(parquet), columns={"person_id": "pid"}, checks=Checks(on_bad_caption="skip"))
    pairs = StreamedPairs(source.stream("train"), "x", processor, augment=False)
    items = list(itertools.islice(pairs, 14))
    assert {item["caption"] for item in items if item["file_path"] == rows[0]["file_path"]} == {"red"}
    assert rows[1]["file_path"] not in {item["file_path"] for item in items}


def test_an_image_without_a_path_is_named_by_its_bytes(parquet, processor, benchmark):
    for file in parquet.glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns("file_path"), file)
    items = list(itertools.islice(make_pairs(parquet, processor, augment=False), 8))
    pictures = [path.read_bytes() for path in (benchmark / "imgs").rglob("*.*")]
    names = {hashlib.sha256(content).hexdigest()[:16] for content in pictures}
    assert len({item["file_path"] for item in items}) == len({item["image_index"] for item in items}) == 8
    assert {item["file_path"] for item in items} <= names


def test_a_list_with_mapped_columns_is_streamed(benchmark, processor, tmp_path):
    records = [each for each in json.loads((benchmark / "reid_raw.json").read_text()) if each["split"] == "train"]
    rows = [{"crop": each["file_path"], "who": each["id"], "sentence": each["captions"]} for each in records]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    columns = {"image": "crop", "person_id": "who"}
    source = DataSource(str(tmp_path / "list.json"), str(benchmark), columns=columns)
    items = list(itertools.islice(StreamedPairs(source.stream("train"), "x", processor), 8))
    assert {item["file_path"] for item in items} == {each["file_path"] for each in records}


def digest(folder):
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_run_from_a_stream_is_resumed_bit_for_bit(parquet, backbone, tmp_path):
    def train(output_dir, steps, *more):
        words = ["--dataset_name", str(parquet), "--columns", "person_id=pid", "--streaming", "True"]
        words += ["--init_from", str(backbone), "--image_size", "32", "16", "--prompt_depth", "2"]
        words += ["--losses", "tal=1", "masked_language_modelling=0.5", "--interaction_depth", "1"]
        words += ["--max_steps", str(steps), "--lr_scheduler_type", "constant", "--eval_strategy", "no"]
        words += ["--save_strategy", "steps", "--save_steps", "1", "--per_device_train_batch_size", "3"]
        words += ["--dataloader_num_workers", "0", "--use_cpu", "True", "--disable_tqdm", "True", "--debug"]
        train_eccl.main([*words, "--output_dir", str(output_dir), *more])

    train(tmp_path / "whole", 5)
    train(tmp_path / "parts", 2)
    train(tmp_path / "parts", 5, "--resume_from_checkpoint", str(tmp_path / "parts" / "checkpoint-2"))
    assert digest(tmp_path / "whole") == digest(tmp_path / "parts")
    train(tmp_path / "other", 5, "--seed", "7")
    assert digest(tmp_path / "other") != digest(tmp_path / "whole")
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "set, read as a stream" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--max_steps 2 --lr_scheduler_type cosine --eval_strategy no",
            "identity_memory, instance_memory must know all",
        ),
        ("--losses tal=1 --lr_scheduler_type cosine --eval_strategy no", "a stream has no end: give max_steps"),
        ("--losses tal=1 --max_steps 2 --eval_strategy no", "a stream has no epochs: give another lr_scheduler_type"),
        ("--losses tal=1 --max_steps 2 --lr_scheduler_type cosine", "a stream has no split to evaluate on"),
        ("--losses attribute=1 --max_steps 2 --lr_scheduler_type cosine --eval_strategy no", "attribute must know all"),
        (
            "--losses tal=1 --max_steps 2 --lr_scheduler_type cosine --eval_strategy no --sampler identity",
            "a stream is read in its own order",
        ),
        (
            "--losses tal=1 --max_steps 2 --lr_scheduler_type cosine --eval_strategy no --train_split query",
            "has no query split, only train",
        ),
    ],
)
def test_what_a_stream_cannot_do_is_refused(parquet, backbone, tmp_path, words, message):
    common = ["--dataset_name", str(parquet), "--columns", "person_id=pid", "--streaming", "True", "--use_cpu", "True"]
    common += ["--init_from", str(backbone), "--image_size", "32", "16", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=message):
        train_eccl.main([*common, *words.split(), "--pairs_per_person", "2", "--debug"])
    assert not (tmp_path / "out").exists()
    if "memory" in message:
        with pytest.raises(ValueError, match="streaming needs init_from"):
            scratch = [word for word in common if word not in ("--init_from", str(backbone))]
            train_eccl.main([*scratch, *words.split(), "--debug"])


def test_a_benchmark_is_streamed_after_its_checks(benchmark, processor):
    rows = DataSource("cuhk_pedes", str(benchmark)).stream("train")
    items = list(itertools.islice(StreamedPairs(rows, "x", processor, augment=False), 8))
    assert len({item["file_path"] for item in items}) == 8 and np.isfinite(items[0]["pixel_values"].numpy()).all()
