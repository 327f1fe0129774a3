"""Writes a benchmark as Parquet shards with a dataset card, which plain `load_dataset(FOLDER)` reads anywhere.

python -m eccl.dataset_scripts.export cuhk_pedes --data_dir /data/CUHK-PEDES --output_dir cuhk-pedes
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from . import BENCHMARKS
from .describe import draw_contact_sheet, size_table
from .synthetic import LABELS_FILE

# Bytes of images in a shard: what the library itself aims at, and what memory an export takes twice.
_SHARD_BYTES = 300 * 2**20
_SYNTHETIC = "synthetic_pedes"
_SHEET = "contact_sheet.jpg"


def write_parquet(splits: datasets.DatasetDict, folder: Path, shard_bytes: int = _SHARD_BYTES) -> datasets.DatasetInfo:
    """Writes each split as `data/SPLIT-00000-of-00002.parquet`, images inside.

    Args:
        splits: whose images are files.
        folder: gets `data/`.
        shard_bytes: about how many bytes of images a shard holds.

    Returns:
        The splits' sizes and features, for the card.
    """
    (folder / "data").mkdir(parents=True)
    sizes, written = datasets.SplitDict(), 0
    for split, rows in splits.items():
        paths = [image["path"] for image in rows.cast_column("image", datasets.Image(decode=False))["image"]]
        num_shards = max(1, -(-sum(map(os.path.getsize, paths)) // shard_bytes))
        num_bytes = 0
        for index in range(num_shards):
            shard = rows.shard(num_shards, index, contiguous=True).with_format("arrow")
            shard = shard.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True)
            file = folder / "data" / f"{split}-{index:05d}-of-{num_shards:05d}.parquet"
            num_bytes += shard.with_format(None).to_parquet(file)
            written += file.stat().st_size
        sizes.add(datasets.SplitInfo(name=split, num_bytes=num_bytes, num_examples=len(rows)))
    return datasets.DatasetInfo(
        features=next(iter(splits.values())).features,
        splits=sizes,
        dataset_size=sum(size.num_bytes for size in sizes.values()),
        download_size=written,
    )


def make_card(
    builder: datasets.DatasetBuilder, splits: datasets.DatasetDict, info: datasets.DatasetInfo, data_dir: Path
) -> str:
    """The dataset card: its metadata block (`configs`, `dataset_info`, licence), statistics, terms and citation."""
    synthetic = builder.config.name == _SYNTHETIC
    data = DatasetCardData(
        language="en",
        license="apache-2.0" if synthetic else "other",
        license_name=None if synthetic else f"{builder.config.name.replace('_', '-')}-terms",
        license_link=None if synthetic else builder.homepage,
        pretty_name=builder.config.layout.folder,
        tags=["person-retrieval", "text-to-image-retrieval"],
    )
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(data)
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    statistics = size_table(splits, builder.config.layout.published_sizes)
    description = " ".join((builder.info.description or "").split())
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {builder.config.layout.folder}",
        description,
        "A row is an image: `image`, `person_id` (a person is in one split only), `image_id` (from 0 within the "
        "split), `captions`, `file_path` (in the original download). For text-to-image retrieval every caption of a "
        "split queries every image of it.",
        f"## Statistics\n\n{statistics}",
    ]
    if synthetic:
        sections.append(_synthetic_section(data_dir))
    sections += [
        f"## Licence and terms\n\n{builder.terms}" + (f"\n\n{builder.homepage}" if builder.homepage else ""),
        "## What it must not be used for\n\nFinding people by description is surveillance technology. This is for "
        "research; it is not fit to identify, track or make decisions about anyone.",
    ]
    if builder.citation:
        sections.append(f"## Citation\n\n```bibtex\n{builder.citation}\n```")
    return "\n\n".join(sections) + "\n"


def _synthetic_section(data_dir: Path) -> str:
    known = json.loads((data_dir / LABELS_FILE).read_text(encoding="utf-8"))
    arguments = ", ".join(f"{name} {value}" for name, value in known["benchmark"].items() if value is not None)
    oracle = ", ".join(f"{split} {value:.1f}%" for split, value in known["oracle_rank1"].items())
    attributes = "\n".join(f"| {name} | {', '.join(values)} |" for name, values in known["attributes"].items())
    return (
        f"## How it was made\n\nDrawn with Pillow and captioned by a grammar: {arguments}.\n\n"
        f"Oracle Rank-1, of a reader who recognises every attribute that a caption mentions: {oracle}.\n\n"
        f"| attribute | values |\n|---|---|\n{attributes}\n\n![random rows]({_SHEET})"
    )


def export(builder: datasets.DatasetBuilder, output_dir: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes a prepared builder's data set to `output_dir`, which appears only when everything is there.

    Raises:
        FileExistsError: `output_dir` is not empty.
    """
    check_new(output_dir)
    splits = builder.as_dataset()
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as unfinished:
        folder = Path(unfinished) / "export"
        info = write_parquet(splits, folder, shard_bytes)
        (folder / "README.md").write_text(make_card(builder, splits, info, builder.annotation.parent), encoding="utf-8")
        if builder.config.name == _SYNTHETIC:
            draw_contact_sheet(splits["test" if "test" in splits else "train"]).save(folder / _SHEET, quality=85)
        folder.replace(output_dir)


def check_new(output_dir: Path) -> None:
    """Raises `FileExistsError` where something would be written over."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not an empty folder: nothing is written over it")


def push(folder: Path, name: str, public: bool) -> str:
    """Uploads an exported folder as a data set; private, unless `public`.

    Returns:
        The full name on the Hub.

    Raises:
        ValueError: a public repository of that name exists, and `public` is not set.
    """
    api = HfApi()
    try:
        exists_in_public = not api.repo_info(name, repo_type="dataset").private
    except RepositoryNotFoundError:
        exists_in_public = False
    if exists_in_public and not public:
        raise ValueError(f"{name} is a public repository: --public says that these data may be in it")
    name = api.create_repo(name, repo_type="dataset", private=not public, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=name, repo_type="dataset", folder_path=folder, commit_message="Export of a person-retrieval benchmark"
    )
    return name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eccl.dataset_scripts.export", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--data_dir", required=True, help="the benchmark's folder, or the one that holds it")
    parser.add_argument("--output_dir", required=True, help="a new or empty folder")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    parser.add_argument("--push_to_hub", metavar="USER/NAME", help="upload the folder, as a private data set")
    parser.add_argument("--public", action="store_true", help="... as a public one: only where the terms allow it")
    options = parser.parse_args(arguments)
    if options.public and not options.push_to_hub:
        parser.error("--public is about --push_to_hub, which is not given")
    output_dir = Path(options.output_dir).expanduser().absolute()
    try:
        check_new(output_dir)
        builder = datasets.load_dataset_builder(
            options.name, data_dir=options.data_dir, on_bad_image=options.on_bad_image
        )
        builder.download_and_prepare()
        export(builder, output_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f'{options.output_dir}: datasets.load_dataset("{options.output_dir}") reads it anywhere')
    if options.push_to_hub:
        try:
            name = push(output_dir, options.push_to_hub, options.public)
        except ValueError as error:
            sys.exit(f"error: {error}")
        reason = "" if options.public else ", private: the benchmarks are for research on request, from their owners"
        print(f"pushed to {name}{reason}")


if __name__ == "__main__":
    main()
