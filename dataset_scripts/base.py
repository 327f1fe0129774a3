"""The builder class that the benchmarks share."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from . import annotations
from .annotations import (
    SPLIT_ALIASES,
    SPLITS,
    Layout,
    Record,
    SplitSize,
    find_annotation,
    format_problems,
    read_records,
    read_skipped_images,
    size_differences,
)
from .synthetic import LABELS_FILE

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


@dataclass(kw_only=True)
class PersonRetrievalConfig(datasets.BuilderConfig):
    """The arguments that `load_dataset(name, data_dir=..., ...)` accepts.

    Args:
        layout: the layout of the benchmark; each benchmark sets it.
        on_bad_image: `error`, or `skip` to leave unreadable images out with a warning.
    """

    layout: Layout
    on_bad_image: str = "error"

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: datasets.Features | None = None) -> str:
        """Names the cache after the content: a changed annotation or image gives another data set."""
        if self.data_dir is None:
            raise ValueError(
                f'data_dir is missing: load_dataset("{self.name}", data_dir="/path/to/{self.layout.folder}")'
            )
        kwargs = {name: value for name, value in config_kwargs.items() if name != "data_files"}
        kwargs["content"] = _fingerprint(find_annotation(self.data_dir, self.layout))
        return super().create_config_id(kwargs, custom_features)


def _fingerprint(annotation: Path) -> str:
    """Returns a digest of the annotation's content, of the checks, and of every file below `imgs/`.

    For these files, it covers the path, the size and the times of the last changes.
    """
    digest = hashlib.sha256(annotation.read_bytes())
    digest.update(Path(annotations.__file__).read_bytes())
    for folder, subfolders, files in os.walk(annotation.parent / "imgs"):
        subfolders.sort()
        for name in sorted(files):
            status = os.stat(os.path.join(folder, name), follow_symlinks=False)
            # A change of permissions changes only st_ctime.
            line = f"{folder}/{name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def canonical_split(split: Any) -> Any:
    """Replaces `validation` by `val` in a split as `load_dataset` takes it, and in each split of a list.

    Anything that is not a name or a list is returned unchanged.
    """
    if isinstance(split, (list, tuple)):
        return [canonical_split(part) for part in split]
    if isinstance(split, (str, datasets.NamedSplit)):
        return _ALIAS.sub(lambda alias: SPLIT_ALIASES[alias[0]], str(split))
    return split


def image_paths(dataset: datasets.Dataset) -> list[str]:
    """Returns the path of each image of a split, in the order of its rows."""
    return [image["path"] for image in dataset.cast_column("image", datasets.Image(decode=False))["image"]]


def published_differences(layout: Layout, split: str, dataset: datasets.Dataset) -> list[str]:
    """Compares the size of a split with the published size.

    Args:
        layout: the layout of the benchmark; it has the published sizes.
        split: `train`, `val` or `test`.
        dataset: the split itself, with the columns `person_id` and `captions`.

    Returns:
        One line with both sizes if they differ. Empty if they are equal, or if no size of this split was published.
    """
    if split not in layout.published_sizes:
        return []
    size = SplitSize.of(dataset["person_id"], dataset["captions"])
    return size_differences({split: size}, {split: layout.published_sizes[split]})


class PersonRetrievalBuilder(datasets.GeneratorBasedBuilder):
    """A data set with one row per image.

    The columns are `image` (by path), `person_id`, `image_id` (counts from 0 in each split), `captions` and
    `file_path`.

    Attributes:
        homepage: the page where the owners explain how to get the data.
        terms: the licence and the terms, as the owners state them.
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
        """The path of the annotation file."""
        return find_annotation(self.config.data_dir, self.config.layout)

    def as_dataset(self, split: Any = None, in_memory: bool = False) -> datasets.Dataset | datasets.DatasetDict:
        self._warn_about_skipped_images()
        return super().as_dataset(canonical_split(split), in_memory)

    def as_streaming_dataset(
        self, split: Any = None, base_path: str | None = None
    ) -> datasets.IterableDataset | datasets.IterableDatasetDict:
        dataset = super().as_streaming_dataset(canonical_split(split), base_path)
        self._warn_about_skipped_images()
        return dataset

    @property
    def _known_images(self) -> Path:
        return Path(self._cache_dir_root) / "eccl-checked-images" / f"{_fingerprint(self.annotation)}.json"

    def _warn_about_skipped_images(self) -> None:
        """Warns at every load, because a cached data set lacks the images that were skipped when it was made."""
        if self.config.on_bad_image == "skip":
            count, lines = read_skipped_images(self._known_images)
            if count:
                message = f"{self.annotation}: {count} unreadable images are left out: {format_problems(lines)}"
                warnings.warn(message, stacklevel=3)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        annotation = self.annotation
        records = read_records(annotation, self.config.layout, self.config.on_bad_image, self._known_images)
        records_of = {split: [record for record in records if record["split"] == split] for split in SPLITS}
        records_of = {split: split_records for split, split_records in records_of.items() if split_records}
        self._warn_about_sizes(annotation, records_of)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"numbered_records": list(enumerate(split_records))})
            for split, split_records in records_of.items()
        ]

    def _warn_about_sizes(self, annotation: Path, records_of: dict[str, list[Record]]) -> None:
        """Warns if the sizes are not the published ones, unless the data set says that it is synthetic."""
        if (annotation.parent / LABELS_FILE).is_file():
            return
        layout = self.config.layout
        sizes = {
            split: SplitSize.of(
                (record["person_id"] for record in split_records), (record["captions"] for record in split_records)
            )
            for split, split_records in records_of.items()
        }
        if differences := size_differences(sizes, layout.published_sizes):
            lines = "".join(f"\n- {line}" for line in differences)
            warnings.warn(f"{annotation} is not the published {layout.folder}: {lines}", stacklevel=3)

    def _generate_examples(self, numbered_records: list[tuple[int, Record]]) -> Iterator[tuple[int, dict[str, Any]]]:
        for image_id, record in numbered_records:
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
