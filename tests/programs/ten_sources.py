"""One tiny data set in each of the ten forms that docs/data.md lists."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from eccl.dataset_scripts.export import main as export
from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark

# The annotation of each raw benchmark: the name of its file, and the key of the path.
RAW = {
    "cuhk_pedes": ("reid_raw.json", "file_path"),
    "icfg_pedes": ("ICFG-PEDES.json", "file_path"),
    "rstpreid": ("data_captions.json", "img_path"),
}
HUB_NAME = "me/tiny-pedes"


def make_sources(root: Path) -> dict[str, list[str]]:
    """Writes the data set in nine forms below `root`.

    Returns:
        For each form the options of the training command. The data set of the Hub is the folder `parquet`, which is not
        pushed here.
    """
    drawn = root / "drawn"
    sizes = {"train_ids": 4, "val_ids": 0, "test_ids": 2, "images_per_id": 2}
    write_benchmark(SyntheticBenchmark("cuhk_pedes", **sizes), drawn, num_workers=1)
    records = json.loads((drawn / "reid_raw.json").read_text())
    rows = [{name: record[name] for name in ("split", "id", "file_path", "captions")} for record in records]
    sources: dict[str, list[str]] = {}
    for name, (file, path_key) in RAW.items():
        folder = _copy_images(drawn, root / name)
        renamed = [{path_key if key == "file_path" else key: value for key, value in row.items()} for row in rows]
        (folder / file).write_text(json.dumps(renamed))
        sources[name] = ["--dataset_name", name, "--data_dir", str(folder)]
    export(["cuhk_pedes", "--data_dir", str(root / "cuhk_pedes"), "--output_dir", str(root / "parquet")])
    sources["a folder of Parquet"] = ["--dataset_name", str(root / "parquet")]
    sources["the Hub"] = ["--dataset_name", HUB_NAME]
    sources["imagefolder"] = _write_imagefolder(drawn, root / "imagefolder", rows)
    pairs = [
        {"image": row["file_path"], "caption": caption, "image_id": row["id"], "split": row["split"]}
        for row in rows
        for caption in row["captions"]
    ]
    folder = _copy_images(drawn, root / "flat")
    (folder / "pairs.json").write_text(json.dumps(pairs))
    sources["a flat JSON list"] = ["--dataset_name", "person_pairs", "--data_dir", str(folder)]
    folder = _copy_images(drawn, root / "table")
    _write_csv(folder / "mine.csv", [{**pair, "pid": pair.pop("image_id")} for pair in map(dict, pairs)])
    sources["a CSV file"] = ["--dataset_name", str(folder / "mine.csv"), "--columns", "person_id=pid"]
    folder = _copy_images(drawn, root / "splits")
    for split in ("train", "test"):
        lines = [json.dumps(row | {"split": split}) for row in rows if row["split"] == split]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    sources["one file a split"] = ["--dataset_name", str(folder)]
    snapshot = make_snapshot(root / "cuhk_pedes", root / "hub-cache" / "datasets--me--raw")
    sources["a snapshot of the Hub with links"] = ["--dataset_name", "cuhk_pedes", "--data_dir", str(snapshot)]
    return sources


def _copy_images(drawn: Path, folder: Path) -> Path:
    shutil.copytree(drawn / "imgs", folder / "imgs")
    return folder


def _write_csv(file: Path, rows: list[dict]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_imagefolder(drawn: Path, folder: Path, rows: list[dict]) -> list[str]:
    """Writes a folder a split, with the images and `metadata.parquet`, as the library reads it."""
    for split in ("train", "test"):
        own = [row for row in rows if row["split"] == split]
        for row in own:
            file = folder / split / row["file_path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(drawn / "imgs" / row["file_path"], file)
        columns = {
            "file_name": [row["file_path"] for row in own],
            "file_path": [row["file_path"] for row in own],
            "person_id": [row["id"] for row in own],
            "captions": [row["captions"] for row in own],
        }
        pq.write_table(pa.table(columns), folder / split / "metadata.parquet")
    return ["--dataset_name", "imagefolder", "--data_dir", str(folder)]


def make_snapshot(raw: Path, repository: Path) -> Path:
    """Copies a folder as `huggingface_hub.snapshot_download` lays it out: each file is a link into `blobs/`."""
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    for file in sorted(path for path in raw.rglob("*") if path.is_file()):
        content = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / file.relative_to(raw)
        link.parent.mkdir(parents=True, exist_ok=True)
        depth = len(link.relative_to(repository).parents) - 1
        link.symlink_to(Path(*[".."] * depth, "blobs", blob.name))
    return snapshot


def read_rows(splits) -> dict[str, list[list]]:
    """Returns the rows of all splits, with the digest of each image's pixels."""
    return {
        str(split): [
            [
                *(row[name] for name in ("person_id", "image_id", "captions", "file_path")),
                hashlib.sha256(row["image"].convert("RGB").tobytes()).hexdigest(),
            ]
            for row in rows
        ]
        for split, rows in splits.items()
    }
