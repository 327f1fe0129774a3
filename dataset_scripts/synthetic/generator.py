"""Draws the synthetic benchmark and writes it in the raw layout of CUHK-PEDES, ICFG-PEDES or RSTPReid.

    python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --output_dir DIR --seed 0

The folder has the files of the real benchmark (JPEG files below `imgs/`, one annotation file), and `synthetic.json`:
the arguments, the oracle's Rank-1 on each split, the attributes of each person, and the attributes that each caption
mentions.
"""

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ...utils.command_line import follow_parent
from ...utils.files import complete_folder, read_json, require_new_folder
from .appearance import sample_appearance
from .captions import DOMAINS, make_caption
from .drawing import draw_person
from .people import ATTRIBUTES, Person, attribute_labels, oracle_rank1, sample_person

ANNOTATION_FILES = {"cuhk_pedes": "reid_raw.json", "icfg_pedes": "ICFG-PEDES.json", "rstpreid": "data_captions.json"}
LABELS_FILE = "synthetic.json"
_CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")
# Number of persons that a process draws at a time.
_CHUNK_SIZE = 16


# The sizes that --size names. Without `images` and `captions`, every person has as many images, and every image as many
# captions, as the others.
SIZES: dict[str, dict[str, Any]] = {
    "small": {"train_ids": 300, "val_ids": 50, "test_ids": 150},
    "medium": {"train_ids": 3000, "val_ids": 200, "test_ids": 500},
    # The sizes of CUHK-PEDES.
    "cuhk": {
        **{"train_ids": 11_003, "val_ids": 1_000, "test_ids": 1_000},
        "images": (34_054, 3_078, 3_074),
        "captions": (68_126, 6_158, 6_156),
    },
}


@dataclass(frozen=True)
class SyntheticBenchmark:
    """The arguments that determine every byte of a benchmark, with one version of Pillow and numpy.

    Args:
        layout: `cuhk_pedes`, `icfg_pedes` or `rstpreid`.
        seed: seed of all random choices. Benchmarks with different seeds have no picture in common.
        domain: `source`, or `target`, the shifted variant: other shades, backgrounds, camera and vocabulary.
        train_ids, val_ids, test_ids: number of persons in each split.
        images_per_id: number of photographs of each person.
        captions_per_image: number of captions of each photograph.
        images, captions: total numbers in train, val and test, instead of `images_per_id` and `captions_per_image`.
            They are spread evenly; the first persons or images get one more if the total does not divide.
        mentions: factor on how often a caption mentions each attribute; must be above 0. Below 1, captions are vaguer.
        nuisance: factor on how much photographs of one person differ in place, scale, light, blur, noise and
            obstacles; must be at least 0. Pose and background always differ.

    Raises:
        ValueError: `layout` or `domain` is unknown, a size is negative or 0, ICFG-PEDES has a `val` split, a split has
            fewer images than persons or fewer captions than images, or a factor is out of range.
    """

    layout: str
    seed: int = 0
    domain: str = "source"
    train_ids: int = 300
    val_ids: int = 50
    test_ids: int = 150
    images_per_id: int = 4
    captions_per_image: int = 2
    images: tuple[int, int, int] | None = None
    captions: tuple[int, int, int] | None = None
    mentions: float = 1.0
    nuisance: float = 1.0

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
        if not self.mentions > 0:
            raise ValueError(f"mentions is {self.mentions}, it must be above 0")
        if not self.nuisance >= 0:
            raise ValueError(f"nuisance is {self.nuisance}, it must not be negative")
        if self.layout == "icfg_pedes" and self.val_ids:
            raise ValueError(f"val_ids is {self.val_ids}, it must be 0: ICFG-PEDES has no val split")
        for split, (ids, images, captions) in self.counts.items():
            if images < ids or captions < images:
                raise ValueError(
                    f"{split} has {ids} ids, {images} images and {captions} captions: it must have at least one image "
                    "for each id, and at least one caption for each image"
                )

    @property
    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Numbers of ids, images and captions of each split."""
        counts = {}
        for index, split in enumerate(("train", "val", "test")):
            ids = getattr(self, f"{split}_ids")
            images = self.images[index] if self.images else ids * self.images_per_id
            counts[split] = (ids, images, self.captions[index] if self.captions else images * self.captions_per_image)
        return counts


class _Task(NamedTuple):
    """One person to draw; `captions` has the number of captions of each image."""

    split: str
    person_id: int
    captions: list[int]


class _DrawnPerson(NamedTuple):
    """A person, and the annotation's record of each image, with the key `mentioned` in addition."""

    person: Person
    records: list[dict[str, Any]]


def _make_tasks(benchmark: SyntheticBenchmark) -> list[_Task]:
    tasks: list[_Task] = []
    for split, (ids, images, captions) in benchmark.counts.items():
        captions_of_images = iter(_spread(captions, images))
        for num_images in _spread(images, ids):
            tasks.append(_Task(split, len(tasks), list(islice(captions_of_images, num_images))))
    return tasks


def _spread(total: int, parts: int) -> list[int]:
    """Divides `total` into even parts; the first ones are larger by one if it does not divide."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def _file_path(layout: str, split: str, person_id: int, index: int) -> str:
    if layout == "cuhk_pedes":
        return f"{_CUHK_FOLDERS[index % len(_CUHK_FOLDERS)]}/{person_id:06d}_{index:02d}.jpg"
    if layout == "icfg_pedes":
        return f"{'train' if split == 'train' else 'test'}/{person_id:06d}/{person_id:06d}_{index:02d}.jpg"
    return f"{person_id:06d}_c{index + 1}_{index:04d}.jpg"


def _make_person(benchmark: SyntheticBenchmark, task: _Task, image_root: str) -> _DrawnPerson:
    """Draws the images of one person and writes their captions.

    The result depends only on the arguments and the id, so several processes can share the work.
    """
    rng = random.Random(f"{benchmark.seed}/{benchmark.domain}/{task.person_id}")
    person = sample_person(rng)
    appearance = sample_appearance(person, benchmark.domain, rng)
    records = []
    for index, num_captions in enumerate(task.captions):
        path = _file_path(benchmark.layout, task.split, task.person_id, index)
        image = draw_person(person, appearance, benchmark.domain, rng, benchmark.nuisance)
        image.save(os.path.join(image_root, path), quality=rng.randint(45, 92))
        captions = [make_caption(person, benchmark.domain, rng, benchmark.mentions) for _ in range(num_captions)]
        records.append(
            {
                "split": task.split,
                "captions": [caption for caption, _ in captions],
                "img_path" if benchmark.layout == "rstpreid" else "file_path": path,
                "id": task.person_id,
                "mentioned": [names for _, names in captions],
            }
        )
    return _DrawnPerson(person, records)


def _make_people(work: tuple[SyntheticBenchmark, list[_Task], str]) -> list[_DrawnPerson]:
    benchmark, tasks, image_root = work
    return [_make_person(benchmark, task, image_root) for task in tasks]


def _settings(benchmark: SyntheticBenchmark) -> dict[str, Any]:
    """Returns the arguments as JSON gives them back: lists instead of tuples."""
    return json.loads(json.dumps(asdict(benchmark)))


def write_benchmark(benchmark: SyntheticBenchmark, output_dir: str | Path, num_workers: int = 2) -> dict[str, Any]:
    """Draws the benchmark and writes it to `output_dir`, which appears only when it is complete.

    A folder that already contains the same benchmark is not changed.

    Args:
        benchmark: the benchmark to draw.
        output_dir: a new or empty folder.
        num_workers: number of processes that draw.

    Returns:
        The content of `synthetic.json` without the labels: `benchmark` (the arguments), `counts` and `oracle_rank1` of
        each split.

    Raises:
        ValueError: `num_workers` is below 1.
        FileExistsError: the folder contains something else.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}, it must be at least 1")
    output_dir = Path(output_dir).expanduser().absolute()
    if (report := _read_report(output_dir, benchmark)) is not None:
        return report
    require_new_folder(output_dir)
    with complete_folder(output_dir) as folder:
        people = _draw_people(benchmark, folder / "imgs", num_workers)
        return _write_annotation(benchmark, people, folder)


def _read_report(output_dir: Path, benchmark: SyntheticBenchmark) -> dict[str, Any] | None:
    """Returns the report of a folder that contains the same benchmark, or `None` if it contains no benchmark.

    Raises:
        FileExistsError: the folder contains a benchmark with other arguments.
    """
    labels_file = output_dir / LABELS_FILE
    if not labels_file.is_file():
        return None
    report = read_json(labels_file)
    saved, settings = report.get("benchmark", {}), _settings(benchmark)
    if saved != settings:
        names = [name for name, value in settings.items() if saved.get(name) != value]
        different = ", ".join(f"{name} {saved.get(name)} instead of {settings[name]}" for name in names)
        raise FileExistsError(
            f"{output_dir} is not empty: it contains a benchmark with other arguments ({different}); "
            "remove the folder or name another one"
        )
    return {name: report[name] for name in ("benchmark", "counts", "oracle_rank1")}


def _draw_people(benchmark: SyntheticBenchmark, image_root: Path, num_workers: int) -> dict[str, list[_DrawnPerson]]:
    """Draws all images into `image_root`, and returns the persons of each split."""
    tasks = _make_tasks(benchmark)
    for image_folder in {
        (image_root / _file_path(benchmark.layout, task.split, task.person_id, index)).parent
        for task in tasks
        for index in range(len(task.captions))
    }:
        image_folder.mkdir(parents=True, exist_ok=True)
    chunks = [tasks[start : start + _CHUNK_SIZE] for start in range(0, len(tasks), _CHUNK_SIZE)]
    people: dict[str, list[_DrawnPerson]] = {split: [] for split in benchmark.counts}
    num_images = sum(len(task.captions) for task in tasks)
    with (
        ProcessPoolExecutor(num_workers, initializer=follow_parent) as pool,
        tqdm(total=num_images, unit="image", desc=f"drawing {benchmark.domain}") as progress,
    ):
        results = pool.map(_make_people, [(benchmark, chunk, str(image_root)) for chunk in chunks])
        for chunk, drawn_people in zip(chunks, results, strict=True):
            for task, drawn in zip(chunk, drawn_people, strict=True):
                people[task.split].append(drawn)
                progress.update(len(drawn.records))
    return people


def _write_annotation(
    benchmark: SyntheticBenchmark, people: dict[str, list[_DrawnPerson]], folder: Path
) -> dict[str, Any]:
    """Writes the annotation and `synthetic.json`, and returns the report; `people` has the persons of each split."""
    report = {
        "benchmark": _settings(benchmark),
        "counts": {split: _count(drawn_people) for split, drawn_people in people.items()},
        "oracle_rank1": {split: _split_oracle(drawn_people) for split, drawn_people in people.items() if drawn_people},
    }
    everyone = [drawn for drawn_people in people.values() for drawn in drawn_people]
    records = [record for drawn in everyone for record in drawn.records]
    labels = {
        "attributes": {name: list(values) for name, values in ATTRIBUTES.items()},
        "people": {drawn.records[0]["id"]: attribute_labels(drawn.person) for drawn in everyone},
        # The annotation itself does not get the mentioned attributes.
        "mentioned": {record.get("file_path", record.get("img_path")): record.pop("mentioned") for record in records},
    }
    annotation = folder / ANNOTATION_FILES[benchmark.layout]
    annotation.write_text(json.dumps(records, indent=1), encoding="utf-8")
    (folder / LABELS_FILE).write_text(json.dumps(report | labels), encoding="utf-8")
    return report


def _count(people: list[_DrawnPerson]) -> dict[str, int]:
    return {
        "ids": len(people),
        "images": sum(len(drawn.records) for drawn in people),
        "captions": sum(len(record["captions"]) for drawn in people for record in drawn.records),
    }


def _split_oracle(people: list[_DrawnPerson]) -> float:
    queries = [
        (index, names)
        for index, drawn in enumerate(people)
        for record in drawn.records
        for names in record["mentioned"]
    ]
    return oracle_rank1([drawn.person for drawn in people], [len(drawn.records) for drawn in people], queries)
