"""Draws the synthetic benchmark and writes it in the raw layout of CUHK-PEDES, ICFG-PEDES or RSTPReid.

    python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --output_dir DIR --seed 0

The folder has the files of the real benchmark (JPEG files below `imgs/`, one annotation file), and `synthetic.json`:
the arguments, the oracle's Rank-1 on each split, the attributes of each person, the attributes that each caption
mentions, and which captions are wrong, if any.
"""

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from ...utils.command_line import follow_parent
from ...utils.files import complete_folder, read_json, require_new_folder
from .appearance import sample_appearance
from .captions import DOMAINS, choose_left_out, make_caption
from .drawing import draw_person
from .people import (
    ATTRIBUTES,
    MAX_LOOKALIKES,
    Person,
    attribute_labels,
    oracle_rank1,
    sample_lookalikes,
    sample_person,
)

ANNOTATION_FILES = {"cuhk_pedes": "reid_raw.json", "icfg_pedes": "ICFG-PEDES.json", "rstpreid": "data_captions.json"}
LABELS_FILE = "synthetic.json"
_CUHK_FOLDERS = ("cam_a", "cam_b", "CUHK01", "CUHK03", "Market", "test_query", "train_query")
# Number of persons that a process draws at a time.
_CHUNK_SIZE = 16
# How often another person is drawn until that person's caption is false of the person in the image.
_WRONG_CAPTION_TRIES = 100


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
        lookalikes: number of persons in each group of look-alikes, 1 to 100. The other persons of a group differ from
            its first person in exactly two attributes, never in gender or build. The last group of a split may be
            smaller.
        caption_noise: share of the captions of the training split that are wrong, at least 0 and below 1. A wrong
            caption describes another person of the training split and is false of the person in the image.
        agreement: the probability that a caption may mention a part (such as the shoes) that an earlier caption of the
            same image already mentions, 0 to 1. Below 1, the captions of an image repeat less.

    `caption_noise` and `agreement` change no image: benchmarks that differ only in them have the same images.

    Raises:
        ValueError: `layout` or `domain` is unknown, a size is negative or 0, ICFG-PEDES has a `val` split, a split has
            fewer images than persons or fewer captions than images, a factor, `lookalikes`, `caption_noise` or
            `agreement` is out of range, or `caption_noise` is above 0 and the training split has only one person.
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
    lookalikes: int = 1
    caption_noise: float = 0.0
    agreement: float = 1.0

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
        if not 1 <= self.lookalikes <= MAX_LOOKALIKES:
            raise ValueError(f"lookalikes is {self.lookalikes}, it must be from 1 to {MAX_LOOKALIKES}")
        if not 0 <= self.caption_noise < 1:
            raise ValueError(f"caption_noise is {self.caption_noise}, it must be at least 0 and below 1")
        if not 0 <= self.agreement <= 1:
            raise ValueError(f"agreement is {self.agreement}, it must be from 0 to 1")
        if self.caption_noise and self.train_ids == 1:
            raise ValueError(
                f"caption_noise is {self.caption_noise}, it must be 0: train_ids is 1, and a wrong caption needs "
                "another person"
            )
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
    """One person to draw.

    Args:
        split: `train`, `val` or `test`.
        person_id: the person, counted over all splits.
        group: id of the first person of the group of look-alikes.
        captions: number of captions of each image.
        wrong: for each image, the indices of its wrong captions.
    """

    split: str
    person_id: int
    group: int
    captions: list[int]
    wrong: list[list[int]]


class _DrawnPerson(NamedTuple):
    """A person, and the annotation's record of each image, with the keys `mentioned` and `wrong` in addition."""

    person: Person
    records: list[dict[str, Any]]


def _make_tasks(benchmark: SyntheticBenchmark) -> list[_Task]:
    tasks: list[_Task] = []
    # The training split comes first, so a position in the benchmark is also a position in the training split.
    wrong_positions, positions = _choose_wrong_captions(benchmark), count()
    for split, (ids, images, captions) in benchmark.counts.items():
        first_id = len(tasks)
        captions_of_images = iter(_spread(captions, images))
        for index, num_images in enumerate(_spread(images, ids)):
            group = first_id + _group_start(benchmark, index)
            num_captions = list(islice(captions_of_images, num_images))
            wrong = [[i for i in range(number) if next(positions) in wrong_positions] for number in num_captions]
            tasks.append(_Task(split, first_id + index, group, num_captions, wrong))
    return tasks


def _group_start(benchmark: SyntheticBenchmark, index: int) -> int:
    """Returns the index, within the split, of the first person of the group to which person `index` belongs."""
    return index - index % benchmark.lookalikes


def _choose_wrong_captions(benchmark: SyntheticBenchmark) -> set[int]:
    """Draws the positions of the wrong captions among all captions of the training split."""
    total = benchmark.counts["train"][2]
    positions = list(range(total))
    _random_stream(benchmark, "caption_noise").shuffle(positions)
    return set(positions[: round(benchmark.caption_noise * total)])


def _random_stream(benchmark: SyntheticBenchmark, *names: int | str) -> random.Random:
    """Returns a random stream that depends only on the seed, the domain and the names."""
    return random.Random("/".join(map(str, (benchmark.seed, benchmark.domain, *names))))


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
    rng = _random_stream(benchmark, task.person_id)
    person = sample_person(rng)
    if task.person_id != task.group:
        person = _find_person(benchmark, task.person_id, task.group)
    appearance = sample_appearance(person, benchmark.domain, rng)
    records = []
    for index, num_captions in enumerate(task.captions):
        path = _file_path(benchmark.layout, task.split, task.person_id, index)
        image = draw_person(person, appearance, benchmark.domain, rng, benchmark.nuisance)
        image.save(os.path.join(image_root, path), quality=rng.randint(45, 92))
        # A caption that is replaced below is drawn here all the same: the person's next images then do not change.
        captions = [make_caption(person, benchmark.domain, rng, benchmark.mentions) for _ in range(num_captions)]
        if benchmark.agreement < 1:
            captions = _vary_captions(
                benchmark, person, captions, _random_stream(benchmark, task.person_id, index, "agreement")
            )
        for number in task.wrong[index]:
            stream = _random_stream(benchmark, task.person_id, index, number, "wrong")
            captions[number] = (_make_wrong_caption(benchmark, person, task.person_id, stream), [])
        records.append(
            {
                "split": task.split,
                "captions": [caption for caption, _ in captions],
                "img_path" if benchmark.layout == "rstpreid" else "file_path": path,
                "id": task.person_id,
                "mentioned": [names for _, names in captions],
                "wrong": task.wrong[index],
            }
        )
    return _DrawnPerson(person, records)


def _find_person(benchmark: SyntheticBenchmark, person_id: int, group: int) -> Person:
    """Draws the attributes of any person; `group` is the id of the first person of that person's group."""
    first = sample_person(_random_stream(benchmark, group))
    return [first, *sample_lookalikes(first, person_id - group, _random_stream(benchmark, group, "lookalikes"))][-1]


def _vary_captions(
    benchmark: SyntheticBenchmark, person: Person, captions: list[tuple[str, list[str]]], rng: random.Random
) -> list[tuple[str, list[str]]]:
    """Keeps the first caption of an image, and writes the later ones so that they repeat less."""
    varied, earlier = captions[:1], set(captions[0][1])
    for _ in captions[1:]:
        left_out = choose_left_out(earlier, benchmark.agreement, rng)
        varied.append(make_caption(person, benchmark.domain, rng, benchmark.mentions, left_out))
        earlier |= set(varied[-1][1])
    return varied


def _make_wrong_caption(benchmark: SyntheticBenchmark, person: Person, person_id: int, rng: random.Random) -> str:
    """Writes a caption of another person of the training split that is false of this person."""
    for _ in range(_WRONG_CAPTION_TRIES):
        # The ids of the training split start at 0.
        other_id = rng.randrange(benchmark.train_ids - 1)
        other_id += other_id >= person_id
        other = _find_person(benchmark, other_id, _group_start(benchmark, other_id))
        caption, names = make_caption(other, benchmark.domain, rng, benchmark.mentions)
        if any(other[name] != person[name] for name in names):
            return caption
    raise ValueError(
        f"caption_noise is {benchmark.caption_noise}, but {_WRONG_CAPTION_TRIES} captions of other persons are all "
        f"true of person {person_id}: raise train_ids or mentions"
    )


def _make_people(work: tuple[SyntheticBenchmark, list[_Task], str]) -> list[_DrawnPerson]:
    benchmark, tasks, image_root = work
    return [_make_person(benchmark, task, image_root) for task in tasks]


def _settings(benchmark: SyntheticBenchmark) -> dict[str, Any]:
    """Returns the arguments as JSON gives them back: lists instead of tuples."""
    return json.loads(json.dumps(asdict(benchmark)))


# Defaults of the arguments that the first version did not have. `synthetic.json` leaves them out, as the first version
# did, so that the file keeps its bytes.
_LATER_DEFAULTS = {name: getattr(SyntheticBenchmark, name) for name in ("lookalikes", "caption_noise", "agreement")}


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
        ValueError: `num_workers` is below 1, or `caption_noise` is above 0 and 100 captions of other persons are all
            true of a person, because the training split is too small or `mentions` too low.
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
    saved, settings = _LATER_DEFAULTS | report.get("benchmark", {}), _settings(benchmark)
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
        "benchmark": {
            name: value
            for name, value in _settings(benchmark).items()
            if name not in _LATER_DEFAULTS or value != _LATER_DEFAULTS[name]
        },
        "counts": {split: _count(drawn_people) for split, drawn_people in people.items()},
        "oracle_rank1": {split: _split_oracle(drawn_people) for split, drawn_people in people.items() if drawn_people},
    }
    everyone = [drawn for drawn_people in people.values() for drawn in drawn_people]
    records = [record for drawn in everyone for record in drawn.records]
    labels: dict[str, Any] = {
        "attributes": {name: list(values) for name, values in ATTRIBUTES.items()},
        "people": {drawn.records[0]["id"]: attribute_labels(drawn.person) for drawn in everyone},
        # The annotation itself does not get these two.
        "mentioned": {_path_of(record): record.pop("mentioned") for record in records},
    }
    wrong = {_path_of(record): record.pop("wrong") for record in records}
    if benchmark.caption_noise > 0:
        labels["wrong"] = {path: numbers for path, numbers in wrong.items() if numbers}
    annotation = folder / ANNOTATION_FILES[benchmark.layout]
    annotation.write_text(json.dumps(records, indent=1), encoding="utf-8")
    (folder / LABELS_FILE).write_text(json.dumps(report | labels), encoding="utf-8")
    return report


def _path_of(record: dict[str, Any]) -> str:
    return record.get("file_path") or record["img_path"]


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
        for number, names in enumerate(record["mentioned"])
        if number not in record["wrong"]
    ]
    num_wrong = sum(len(record["wrong"]) for drawn in people for record in drawn.records)
    images = [len(drawn.records) for drawn in people]
    return oracle_rank1([drawn.person for drawn in people], images, queries, num_wrong)
