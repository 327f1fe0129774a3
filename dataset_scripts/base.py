"""The builder that the benchmarks share."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import datasets

from .annotations import SPLITS, Layout, find_annotation, read_records

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "person_id": datasets.Value("int32"),
        "image_id": datasets.Value("int32"),
        "captions": datasets.List(datasets.Value("string")),
        "file_path": datasets.Value("string"),
    }
)


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
    digest = hashlib.sha256(annotation.read_bytes())
    for folder, subfolders, files in os.walk(annotation.parent / "imgs"):
        subfolders.sort()
        for name in sorted(files):
            status = os.stat(os.path.join(folder, name), follow_symlinks=False)
            digest.update(f"{folder}/{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class PersonRetrievalBuilder(datasets.GeneratorBasedBuilder):
    """One row an image: `image` (by path), `person_id`, `image_id` (0.. within the split), `captions`, `file_path`."""

    BUILDER_CONFIG_CLASS = PersonRetrievalConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=self.__doc__ or "", features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        annotation = find_annotation(self.config.data_dir, self.config.layout)
        records = read_records(annotation, self.config.layout, self.config.on_bad_image)
        by_split = {split: [record for record in records if record["split"] == split] for split in SPLITS}
        return [
            datasets.SplitGenerator(name=split, gen_kwargs={"rows": list(enumerate(own))})
            for split, own in by_split.items()
            if own
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
