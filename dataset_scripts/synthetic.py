"""Writes the synthetic person-retrieval benchmark in the raw layout of any of the three real ones.

    python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --output_dir DIR --seed 0

The output is a folder as users of that benchmark have it (JPEGs below `imgs/`, one annotation file) and beside it
`synthetic.json`: the arguments, the oracle's Rank-1 per split, and the attributes that were drawn and mentioned.
"""

import argparse
import json
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm.auto import tqdm

from .synthetic_captions import DOMAINS, make_caption
from .synthetic_drawing import draw_person, sample_appearance
from .synthetic_people import ATTRIBUTES, Person, attribute_labels, oracle_rank1, sample_person

ANNOTATION_FILES = {"cuhk_pedes": "reid_raw.json", "icfg_pedes": "ICFG-PEDES.json", "rstpreid": "data_captions.json"}
LABELS_FILE = "synthetic.json"
_CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")


@dataclass(frozen=True)
class SyntheticBenchmark:
    """The arguments that determine every byte of a benchmark.

    Args:
        layout: `cuhk_pedes`, `icfg_pedes` or `rstpreid`.
        seed: two seeds share no person and no picture.
        domain: `source`, or `target`, the shifted variant: other shades, backgrounds, camera and vocabulary.
        train_ids, val_ids, test_ids: people per split; a person is in one split only.
        images_per_id: photographs of each person.
        captions_per_image: captions of each photograph.

    Raises:
        ValueError: an unknown layout or domain, a negative or empty size, a `val` split in ICFG's layout.
    """

    layout: str
    seed: int = 0
    domain: str = "source"
    train_ids: int = 300
    val_ids: int = 50
    test_ids: int = 150
    images_per_id: int = 4
    captions_per_image: int = 2

    def __post_init__(self) -> None:
        for field, allowed in (("layout", tuple(ANNOTATION_FILES)), ("domain", DOMAINS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} is {getattr(self, field)!r}, it must be one of {', '.join(allowed)}")
        for field in ("train_ids", "val_ids", "test_ids"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field} is {getattr(self, field)}, it must not be negative")
        for field in ("images_per_id", "captions_per_image"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, it must be at least 1")
        if self.layout == "icfg_pedes" and self.val_ids:
            raise ValueError(f"val_ids is {self.val_ids}, but ICFG-PEDES has no val split: it must be 0")

    @property
    def splits(self) -> dict[str, int]:
        return {"train": self.train_ids, "val": self.val_ids, "test": self.test_ids}


def _file_path(layout: str, split: str, person_id: int, index: int) -> str:
    if layout == "cuhk_pedes":
        return f"{_CUHK_FOLDERS[index % len(_CUHK_FOLDERS)]}/{person_id:06d}_{index:02d}.jpg"
    if layout == "icfg_pedes":
        return f"{'train' if split == 'train' else 'test'}/{person_id:06d}/{person_id:06d}_{index:02d}.jpg"
    return f"{person_id:06d}_c{index + 1}_{index:04d}.jpg"


def _make_person(
    benchmark: SyntheticBenchmark, split: str, person_id: int, image_root: str
) -> tuple[Person, list[dict]]:
    """Draws and captions one person; each depends on the seed and the id alone, so processes can share the work."""
    rng = random.Random(f"{benchmark.seed}/{benchmark.domain}/{person_id}")
    person = sample_person(rng)
    appearance = sample_appearance(person, benchmark.domain, rng)
    records = []
    for index in range(benchmark.images_per_id):
        path = _file_path(benchmark.layout, split, person_id, index)
        image = draw_person(person, appearance, benchmark.domain, rng)
        image.save(os.path.join(image_root, path), quality=rng.randint(45, 92))
        captions = [make_caption(person, benchmark.domain, rng) for _ in range(benchmark.captions_per_image)]
        records.append(
            {
                "split": split,
                "captions": [caption for caption, _ in captions],
                "img_path" if benchmark.layout == "rstpreid" else "file_path": path,
                "id": person_id,
                "mentioned": [names for _, names in captions],
            }
        )
    return person, records


def _make_people(work: tuple[SyntheticBenchmark, str, list[int], str]) -> list[tuple[Person, list[dict]]]:
    benchmark, split, person_ids, image_root = work
    return [_make_person(benchmark, split, person_id, image_root) for person_id in person_ids]


def _split_oracle(made: list[tuple[Person, list[dict]]]) -> float:
    queries = [
        (index, names) for index, (_, records) in enumerate(made) for record in records for names in record["mentioned"]
    ]
    return oracle_rank1([person for person, _ in made], [len(records) for _, records in made], queries)


def write_benchmark(benchmark: SyntheticBenchmark, output_dir: str | Path, num_workers: int = 2) -> dict:
    """Draws the benchmark and writes it to `output_dir`, which appears only when everything is there.

    A folder that already holds the same benchmark is left as it is.

    Args:
        benchmark: what to draw.
        output_dir: a new or empty folder.
        num_workers: processes that draw.

    Returns:
        The content of `synthetic.json` but for the people: `benchmark`, `counts` and `oracle_rank1` per split.

    Raises:
        FileExistsError: the folder holds anything else.
    """
    output_dir = Path(output_dir)
    labels_file = output_dir / LABELS_FILE
    if labels_file.is_file():
        report = json.loads(labels_file.read_text(encoding="utf-8"))
        if report["benchmark"] == asdict(benchmark):
            return {name: report[name] for name in ("benchmark", "counts", "oracle_rank1")}
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"{output_dir} is not empty and does not hold this benchmark: remove it or name another folder"
        )
    partial = output_dir.with_name(output_dir.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    try:
        report = _draw_all(benchmark, partial, num_workers)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if output_dir.exists():
        output_dir.rmdir()
    partial.rename(output_dir)
    return report


def _draw_all(benchmark: SyntheticBenchmark, folder: Path, num_workers: int) -> dict:
    image_root = folder / "imgs"
    chunks, first_id = [], 0
    for split, size in benchmark.splits.items():
        for start in range(first_id, first_id + size, 16):
            chunks.append((benchmark, split, list(range(start, min(start + 16, first_id + size))), str(image_root)))
        for person_id in range(first_id, first_id + size):
            for index in range(benchmark.images_per_id):
                path = image_root / _file_path(benchmark.layout, split, person_id, index)
                path.parent.mkdir(parents=True, exist_ok=True)
        first_id += size
    made: dict[str, list] = {split: [] for split in benchmark.splits}
    with (
        ProcessPoolExecutor(num_workers) as pool,
        tqdm(total=first_id * benchmark.images_per_id, unit="image", desc=f"drawing {benchmark.domain}") as progress,
    ):
        for chunk, people in zip(chunks, pool.map(_make_people, chunks), strict=True):
            made[chunk[1]].extend(people)
            progress.update(len(people) * benchmark.images_per_id)
    records = [record for people in made.values() for _, own in people for record in own]
    report = {
        "benchmark": asdict(benchmark),
        "counts": {
            split: {
                "ids": len(people),
                "images": sum(len(own) for _, own in people),
                "captions": sum(len(record["captions"]) for _, own in people for record in own),
            }
            for split, people in made.items()
        },
        "oracle_rank1": {split: _split_oracle(people) for split, people in made.items() if people},
    }
    labels = {
        "attributes": {name: list(values) for name, values in ATTRIBUTES.items()},
        "people": {own[0]["id"]: attribute_labels(person) for people in made.values() for person, own in people},
        "mentioned": {record.get("file_path", record.get("img_path")): record.pop("mentioned") for record in records},
    }
    annotation = folder / ANNOTATION_FILES[benchmark.layout]
    annotation.write_text(json.dumps(records, indent=1), encoding="utf-8")
    (folder / LABELS_FILE).write_text(json.dumps(report | labels), encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eccl.dataset_scripts.synthetic", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--layout", choices=list(ANNOTATION_FILES), default="cuhk_pedes", help="raw layout to write")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", choices=DOMAINS, default="source", help="target is the shifted variant")
    parser.add_argument("--train_ids", type=int, default=300, help="people in the train split")
    parser.add_argument("--val_ids", type=int, help="people in the val split (default: 50; 0 for icfg_pedes)")
    parser.add_argument("--test_ids", type=int, default=150, help="people in the test split")
    parser.add_argument("--images_per_id", type=int, help="photographs a person (default: 4; 5 for rstpreid)")
    parser.add_argument("--captions_per_image", type=int, help="captions a photograph (default: 2; 1 for icfg_pedes)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes that draw")
    options = vars(parser.parse_args(arguments))
    output_dir, num_workers = options.pop("output_dir"), options.pop("num_workers")
    for name, usual, exceptions in (
        ("val_ids", 50, {"icfg_pedes": 0}),
        ("images_per_id", 4, {"rstpreid": 5}),
        ("captions_per_image", 2, {"icfg_pedes": 1}),
    ):
        if options[name] is None:
            options[name] = exceptions.get(options["layout"], usual)
    try:
        report = write_benchmark(SyntheticBenchmark(**options), output_dir, num_workers)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{output_dir}: {options['layout']} layout, {options['domain']} domain, seed {options['seed']}")
    for split, counts in report["counts"].items():
        if counts["ids"]:
            sizes = ", ".join(f"{count} {name}" for name, count in counts.items())
            print(f"  {split:5}  {sizes}, oracle Rank-1 {report['oracle_rank1'][split]:.1f}%")


if __name__ == "__main__":
    main()
