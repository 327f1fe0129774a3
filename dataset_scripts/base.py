"""The builder that the benchmarks share."""

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets

from . import annotations
from .annotations import (
    SPLIT_ALIASES,
    SPLITS,
    Layout,
    SplitSize,
    find_annotation,
    left_out,
    listed,
    read_records,
    size_differences,
)

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "person_id": datasets.Value("int32"),
        "image_id": datasets.Value("int32"),
        "captions": datasets.List(datasets.Value("string")),
        "file_path": datasets.Value("string"),
    }
)
_ALIAS = re.compile(rf"\b({'|'.join(SPLIT_ALIASES)})\b")


@dataclass
class PersonRetrievalConfig(datasets.BuilderConfig):
    """What `load_dataset(name, data_dir=..., **these)` takes.

    Args:
        layout: fixed by each benchmark.
        on_bad_image: `error`, or `skip` to leave unreadable images out with a warning.
    """

    layout: Layout | None = None
    on_bad_image: str = "error"

    def create_config_id(self, config_kwargs: dict, custom_features: datasets.Features | None = None) -> str:
        """Names the cache by content: another annotation, or an image that changed, is another data set."""
        if self.data_dir is None:
            raise ValueError(
                f'data_dir is missing: load_dataset("{self.name}", data_dir="/path/to/{self.layout.folder}")'
            )
        kwargs = {name: value for name, value in config_kwargs.items() if name != "data_files"}
        kwargs["content"] = _fingerprint(find_annotation(self.data_dir, self.layout))
        return super().create_config_id(kwargs, custom_features)


def _fingerprint(annotation: Path) -> str:
    """Of the annotation's content, of the place, size and times of every file below `imgs/`, and of what is checked."""
    digest = hashlib.sha256(annotation.read_bytes())
    digest.update(Path(annotations.__file__).read_bytes())
    for folder, subfolders, files in os.walk(annotation.parent / "imgs"):
        subfolders.sort()
        for name in sorted(files):
            status = os.stat(os.path.join(folder, name), follow_symlinks=False)
            # A change of permissions, too, is one that the second time tells.
            line = f"{folder}/{name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def canonical_split(split):
    """A split as `load_dataset` takes it, with `validation` for `val` resolved; anything that is no name stays."""
    if isinstance(split, (list, tuple)):
        return [canonical_split(part) for part in split]
    if isinstance(split, (str, datasets.NamedSplit)):
        return _ALIAS.sub(lambda alias: SPLIT_ALIASES[alias[0]], str(split))
    return split


class PersonRetrievalBuilder(datasets.GeneratorBasedBuilder):
    """One row an image: `image` (by path), `person_id`, `image_id` (0.. within the split), `captions`, `file_path`.

    Attributes:
        homepage: where the owners say how to get the data.
        terms: the licence and terms as the owners state them.
        citation: BibTeX.
    """

    BUILDER_CONFIG_CLASS = PersonRetrievalConfig
    homepage = terms = citation = ""

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description=self.__doc__ or "",
            features=FEATURES,
            homepage=self.homepage,
            license=self.terms,
            citation=self.citation,
        )

    @property
    def annotation(self) -> Path:
        """The annotation file that is read."""
        return find_annotation(self.config.data_dir, self.config.layout)

    def as_dataset(self, split=None, in_memory: bool = False):
        self._warn_of_left_out()
        return super().as_dataset(canonical_split(split), in_memory)

    def as_streaming_dataset(self, split=None, base_path: str | None = None):
        rows = super().as_streaming_dataset(canonical_split(split), base_path)
        self._warn_of_left_out()
        return rows

    @property
    def _known_images(self) -> Path:
        return Path(self._cache_dir_root) / "eccl-checked-images" / f"{_fingerprint(self.annotation)}.json"

    def _warn_of_left_out(self) -> None:
        """At every load: rows that come from the cache lack what was left out when it was made."""
        if self.config.on_bad_image == "skip":
            count, lines = left_out(self._known_images)
            if count:
                message = f"{self.annotation}: {count} unreadable images are left out: {listed(lines)}"
                warnings.warn(message, stacklevel=3)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        layout, annotation = self.config.layout, self.annotation
        records = read_records(annotation, layout, self.config.on_bad_image, self._known_images)
        by_split = {split: [record for record in records if record["split"] == split] for split in SPLITS}
        sizes = {
            split: SplitSize.of((record["person_id"] for record in own), (record["captions"] for record in own))
            for split, own in by_split.items()
            if own
        }
        if differences := size_differences(sizes, layout.published_sizes):
            warnings.warn(
                f"{annotation} is not the published {layout.folder}: " + "".join(f"\n- {line}" for line in differences),
                stacklevel=2,
            )
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"rows": list(enumerate(by_split[split]))})
            for split in sizes
        ]

    def _generate_examples(self, rows: list[tuple[int, dict]]):
        for image_id, record in rows:
            yield (
                image_id,
                {
                    "image": record["image"],
                    "person_id": record["person_id"],
                    "image_id": image_id,
                    "captions": record["captions"],
                    "file_path": record["file_path"],
                },
            )
