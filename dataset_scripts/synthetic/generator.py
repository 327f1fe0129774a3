"""Writes the synthetic person-retrieval benchmark in the raw layout of any of the three real ones.

    python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --output_dir DIR --seed 0

The output is a folder as users of that benchmark have it (JPEGs below `imgs/`, one annotation file) and beside it
`synthetic.json`: the arguments, the oracle's Rank-1 per split, and the attributes that were drawn and mentioned.
"""

import json
import os
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

from .captions import DOMAINS, make_caption
from .drawing import draw_person, sample_appearance
from .people import ATTRIBUTES, Person, attribute_labels, oracle_rank1, sample_person

ANNOTATION_FILES = {"cuhk_pedes": "reid_raw.json", "icfg_pedes": "ICFG-PEDES.json", "rstpreid": "data_captions.json"}
LABELS_FILE = "synthetic.json"
_CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")


# Ids, images and captions per split that --size names; without images and captions they are even per person and image.
SIZES: dict[str, dict] = {
    "small": {"train_ids": 300, "val_ids": 50, "test_ids": 150},
    "medium": {"train_ids": 3000, "val_ids": 200, "test_ids": 500},
    # CUHK-PEDES' own counts.
    "cuhk": {
        **{"train_ids": 11_003, "val_ids": 1_000, "test_ids": 1_000},
        "images": (34_054, 3_078, 3_074),
        "captions": (68_126, 6_158, 6_156),
    },
}


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
        images, captions: how many train, val and test have in all, in place of the two before: spread evenly, the
            first ones getting one more.
        mentions: factor on how often a caption mentions each attribute, above 0: below 1 makes captions vaguer.
        nuisance: factor on what differs between photographs of one person (place, scale, light, blur, noise,
            occlusion), at least 0; pose and background stay.

    Raises:
        ValueError: an unknown layout or domain, a negative or empty size, a `val` split in ICFG's layout, fewer images
            than people or captions than images, a factor out of range.
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
            raise ValueError(f"val_ids is {self.val_ids}, but ICFG-PEDES has no val split: it must be 0")
        for split, (ids, images, captions) in self.counts.items():
            if images < ids or captions < images:
                raise ValueError(
                    f"{split} has {ids} ids, {images} images and {captions} captions: each id needs an image, "
                    "and each image a caption"
                )

    @property
    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Ids, images and captions of each split."""
        counts = {}
        for index, split in enumerate(("train", "val", "test")):
            ids = getattr(self, f"{split}_ids")
            images = self.images[index] if self.images else ids * self.images_per_id
            counts[split] = (ids, images, self.captions[index] if self.captions else images * self.captions_per_image)
        return counts


class _Task(NamedTuple):
    """One person to draw: how many captions each of the images gets."""

    split: str
    person_id: int
    captions: list[int]


def _plan(benchmark: SyntheticBenchmark) -> list[_Task]:
    tasks = []
    for split, (ids, images, captions) in benchmark.counts.items():
        of_images = iter(_spread(captions, images))
        tasks += [
            _Task(split, len(tasks) + index, list(islice(of_images, count)))
            for index, count in enumerate(_spread(images, ids))
        ]
    return tasks


def _spread(total: int, parts: int) -> list[int]:
    """`total` in even parts, the first ones larger by one."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def _file_path(layout: str, split: str, person_id: int, index: int) -> str:
    if layout == "cuhk_pedes":
        return f"{_CUHK_FOLDERS[index % len(_CUHK_FOLDERS)]}/{person_id:06d}_{index:02d}.jpg"
    if layout == "icfg_pedes":
        return f"{'train' if split == 'train' else 'test'}/{person_id:06d}/{person_id:06d}_{index:02d}.jpg"
    return f"{person_id:06d}_c{index + 1}_{index:04d}.jpg"


def _make_person(benchmark: SyntheticBenchmark, task: _Task, image_root: str) -> tuple[Person, list[dict]]:
    """Draws and captions one person; each depends on the seed and the id alone, so processes can share the work."""
    rng = random.Random(f"{benchmark.seed}/{benchmark.domain}/{task.person_id}")
    person = sample_person(rng)
    appearance = sample_appearance(person, benchmark.domain, rng)
    records = []
    for index, count in enumerate(task.captions):
        path = _file_path(benchmark.layout, task.split, task.person_id, index)
        image = draw_person(person, appearance, benchmark.domain, rng, benchmark.nuisance)
        image.save(os.path.join(image_root, path), quality=rng.randint(45, 92))
        captions = [make_caption(person, benchmark.domain, rng, benchmark.mentions) for _ in range(count)]
        records.append(
            {
                "split": task.split,
                "captions": [caption for caption, _ in captions],
                "img_path" if benchmark.layout == "rstpreid" else "file_path": path,
                "id": task.person_id,
                "mentioned": [names for _, names in captions],
            }
        )
    return person, records


def _make_people(work: tuple[SyntheticBenchmark, list[_Task], str]) -> list[tuple[Person, list[dict]]]:
    benchmark, tasks, image_root = work
    return [_make_person(benchmark, task, image_root) for task in tasks]


def _settings(benchmark: SyntheticBenchmark) -> dict:
    """As JSON gives them back: it has no tuples."""
    return json.loads(json.dumps(asdict(benchmark)))


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
    output_dir = Path(output_dir).expanduser().absolute()
    labels_file = output_dir / LABELS_FILE
    if labels_file.is_file():
        report = json.loads(labels_file.read_text(encoding="utf-8"))
        if report["benchmark"] == _settings(benchmark):
            return {name: report[name] for name in ("benchmark", "counts", "oracle_rank1")}
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(
            f"{output_dir} is not empty and does not hold this benchmark: remove it or name another folder"
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as unfinished:
        folder = Path(unfinished) / "benchmark"
        report = _draw_all(benchmark, folder, num_workers)
        folder.replace(output_dir)
    return report


def _draw_all(benchmark: SyntheticBenchmark, folder: Path, num_workers: int) -> dict:
    image_root = folder / "imgs"
    tasks = _plan(benchmark)
    folders = {
        (image_root / _file_path(benchmark.layout, task.split, task.person_id, index)).parent
        for task in tasks
        for index in range(len(task.captions))
    }
    for image_folder in folders:
        image_folder.mkdir(parents=True, exist_ok=True)
    chunks = [(benchmark, tasks[start : start + 16], str(image_root)) for start in range(0, len(tasks), 16)]
    made: dict[str, list] = {split: [] for split in benchmark.counts}
    num_images = sum(len(task.captions) for task in tasks)
    with (
        ProcessPoolExecutor(num_workers) as pool,
        tqdm(total=num_images, unit="image", desc=f"drawing {benchmark.domain}") as progress,
    ):
        for (_, own, _), people in zip(chunks, pool.map(_make_people, chunks), strict=True):
            for task, drawn in zip(own, people, strict=True):
                made[task.split].append(drawn)
            progress.update(sum(len(task.captions) for task in own))
    records = [record for people in made.values() for _, own in people for record in own]
    report = {
        "benchmark": _settings(benchmark),
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
