"""The builder class that the benchmarks share."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.compute as pc

from . import CODE_HASH
from .annotations import (
    SPLIT_ALIASES,
    SPLITS,
    Layout,
    SplitSize,
    find_annotation,
    read_records,
    size_differences,
)
from .image_checks import Record
from .messages import format_problems
from .paths import walk_files
from .records import Checks, LeftOut, read_left_out
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


class Files(NamedTuple):
    """The files of a data set.

    Attributes:
        annotations: the annotation files, each with the split that its name tells, if any.
        folder: the folder of the images.
    """

    annotations: dict[Path, str | None]
    folder: Path


@dataclass(kw_only=True)
class PersonRetrievalConfig(datasets.BuilderConfig):
    """The arguments that `load_dataset(name, data_dir=..., ...)` accepts.

    Args:
        layout: the layout of the benchmark; each benchmark sets it.
        on_bad_image, on_bad_caption, fix_paths, follow_links: see [`~eccl.dataset_scripts.records.Checks`]. Whatever is
            left out or read in another way is named in a warning.
    """

    layout: Layout
    on_bad_image: str = "error"
    on_bad_caption: str = "error"
    fix_paths: bool = False
    follow_links: bool = False

    @property
    def checks(self) -> Checks:
        """What happens to faulty images, captions and paths."""
        return Checks(self.on_bad_image, self.on_bad_caption, self.fix_paths, self.follow_links)

    def find_files(self) -> Files:
        """Finds the annotation and the images.

        Raises:
            ValueError: `data_dir` is missing, or `data_files` is given.
            FileNotFoundError: there is no annotation.
        """
        if self.data_dir is None:
            raise ValueError(
                f'data_dir is missing: load_dataset("{self.name}", data_dir="/path/to/{self.layout.folder}")'
            )
        if self.data_files:
            raise ValueError(f"{self.name} finds its files in data_dir and has no use for data_files: leave it out")
        annotation = find_annotation(self.data_dir, self.layout)
        return Files({annotation: None}, annotation.parent / "imgs")

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: datasets.Features | None = None) -> str:
        """Names the cache after the content: a changed annotation or image gives another data set."""
        kwargs = {name: value for name, value in config_kwargs.items() if name != "data_files"}
        kwargs["content"] = self.fingerprint()
        return super().create_config_id(kwargs, custom_features)

    def fingerprint(self) -> str:
        """Computes a digest of the annotations' content, of the checks, and of every image file; once, then it is kept.

        For the image files, it covers the path, the size and the times of the last changes.
        """
        if "_fingerprint" not in vars(self):
            self._fingerprint = self._compute_fingerprint()
        return self._fingerprint

    def _compute_fingerprint(self) -> str:
        files = self.find_files()
        # All arguments count, those of a subclass, too.
        arguments = {name: value for name, value in vars(self).items() if name not in ("name", "version", "data_files")}
        arguments["annotations"] = [(str(file), split) for file, split in files.annotations.items()]
        digest = hashlib.sha256(repr(sorted(arguments.items(), key=str)).encode("utf-8", "surrogatepass"))
        digest.update(CODE_HASH.encode())
        for annotation in files.annotations:
            digest.update(annotation.read_bytes())
        for path in self._list_images(files):
            digest.update(describe_file(files.folder / path, self.follow_links))
        return digest.hexdigest()

    def _list_images(self, files: Files) -> Iterable[str]:
        """Returns the paths, below the folder of the images, of the files that the data set depends on."""
        return walk_files(files.folder, self.follow_links)


def describe_file(path: Path, follow_links: bool = True) -> bytes:
    """Returns the path of a file, its size and the times of its last changes, or that it is missing."""
    try:
        status = os.stat(path, follow_symlinks=follow_links)
        # A change of permissions changes only st_ctime.
        line = f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
    except (OSError, ValueError):  # It is missing, a dangling link, or its name is too long or no name.
        line = f"{path} missing\n"
    return line.encode("utf-8", "surrogatepass")


def canonical_split(split: Any) -> Any:
    """Replaces `validation` by `val` in a split as `load_dataset` takes it, and in each split of a list.

    Anything that is not a name or a list is returned unchanged.
    """
    if isinstance(split, (list, tuple)):
        return [canonical_split(part) for part in split]
    if isinstance(split, (str, datasets.NamedSplit)):
        return _ALIAS.sub(lambda alias: SPLIT_ALIASES[alias[0]], str(split))
    return split


def undecoded_images(dataset: datasets.Dataset, column: str = "image") -> datasets.Dataset:
    """Returns the images of a split alone, each as a dict with `bytes` and `path`, which `read_image` takes."""
    return dataset.select_columns(column).cast_column(column, datasets.Image(decode=False))


def image_paths(dataset: datasets.Dataset) -> list[str]:
    """Returns the path of each image of a split, in the order of its rows."""
    return [image["path"] for image in undecoded_images(dataset)["image"]]


def image_sizes(dataset: datasets.Dataset) -> list[int]:
    """Returns the number of bytes of each image of a split, in the order of its rows."""
    sizes = []
    for rows in undecoded_images(dataset).with_format("arrow").iter(1_000):
        stored = pc.binary_length(pc.struct_field(rows["image"], "bytes")).to_pylist()
        paths = pc.struct_field(rows["image"], "path").to_pylist()
        sizes += [os.path.getsize(path) if size is None else size for size, path in zip(stored, paths, strict=True)]
    return sizes


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
        """The path of the annotation file; the first one, if there are several."""
        return next(iter(self.config.find_files().annotations))

    def as_dataset(self, split: Any = None, in_memory: bool = False) -> datasets.Dataset | datasets.DatasetDict:
        self._warn_about_left_out()
        return super().as_dataset(canonical_split(split), in_memory)

    def as_streaming_dataset(
        self, split: Any = None, base_path: str | None = None
    ) -> datasets.IterableDataset | datasets.IterableDatasetDict:
        dataset = super().as_streaming_dataset(canonical_split(split), base_path)
        self._warn_about_left_out()
        return dataset

    @property
    def _known(self) -> Path:
        return Path(self._cache_dir_root) / "eccl-checked-images" / f"{self.config.fingerprint()}.json"

    def _warn_about_left_out(self) -> None:
        """Warns at every load, because a cached data set lacks what was left out when it was made."""
        checks = self.config.checks
        if checks == Checks(follow_links=checks.follow_links):
            return
        left_out, source = self.read_left_out(), ", ".join(map(str, self.config.find_files().annotations))
        counted = [
            (left_out.num_images if checks.on_bad_image == "skip" else 0, "unreadable images are left out", "images"),
            (len(left_out.captions), "captions are left out", "captions"),
            (len(left_out.paths), "kinds of paths are read in another way", "paths"),
        ]
        for count, what, name in counted:
            if count:
                lines = format_problems(getattr(left_out, name))
                warnings.warn(f"{source}: {count} {what}: {lines}", stacklevel=3)

    def read_left_out(self) -> LeftOut:
        """Returns how the prepared data set differs from its annotation."""
        return read_left_out(self._known)

    def _read_records(self) -> list[Record]:
        return read_records(self.annotation, self.config.layout, self.config.checks, self._known)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        records = self._read_records()
        order = {split: index for index, split in enumerate(SPLITS)}
        splits = sorted(
            {record["split"] for record in records}, key=lambda split: (order.get(split, len(order)), split)
        )
        records_of = {split: [record for record in records if record["split"] == split] for split in splits}
        self._warn_about_sizes(records_of)
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"numbered_records": list(enumerate(split_records))})
            for split, split_records in records_of.items()
        ]

    def _warn_about_sizes(self, records_of: dict[str, list[Record]]) -> None:
        """Warns if the sizes are not the published ones, unless the data set says that it is synthetic."""
        annotation = self.annotation
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
