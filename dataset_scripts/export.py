"""Exports a benchmark as Parquet files with a dataset card; `load_dataset(FOLDER)` reads them without this project.

python -m eccl.dataset_scripts.export cuhk_pedes --data_dir /data/CUHK-PEDES --output_dir cuhk-pedes
"""

import os
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from ..hub.publish import publish, require_publishable
from ..utils.command_line import CommandParser, add_shared_option, command, require_push, say, tell
from ..utils.files import complete_folder, read_json, require_new_folder
from ..utils.text import plain_markdown
from . import BENCHMARKS
from .base import image_paths
from .describe import size_table
from .synthetic import LABELS_FILE

# Bytes of images per file. The library aims at the same size. The export needs about twice as much memory.
_SHARD_BYTES = 300 * 2**20
_SYNTHETIC = "synthetic_pedes"
_SHEET = "contact_sheet.jpg"


def write_parquet(splits: datasets.DatasetDict, folder: Path, shard_bytes: int = _SHARD_BYTES) -> datasets.DatasetInfo:
    """Writes each split as `data/SPLIT-00000-of-00002.parquet` and so on, with the images inside.

    Args:
        splits: the splits to write; their images are files.
        folder: the folder in which `data/` is made.
        shard_bytes: approximate number of bytes of images in each file.

    Returns:
        The sizes and the features of the splits, for the card.
    """
    (folder / "data").mkdir(parents=True)
    sizes, file_bytes = datasets.SplitDict(), 0
    for split, dataset in splits.items():
        num_shards = max(1, -(-sum(map(os.path.getsize, image_paths(dataset))) // shard_bytes))
        num_bytes = 0
        for index in range(num_shards):
            shard = dataset.shard(num_shards, index, contiguous=True).with_format("arrow")
            shard = shard.map(embed_table_storage, batched=True, batch_size=100, keep_in_memory=True)
            file = folder / "data" / f"{split}-{index:05d}-of-{num_shards:05d}.parquet"
            num_bytes += shard.with_format(None).to_parquet(file)
            file_bytes += file.stat().st_size
        sizes.add(datasets.SplitInfo(name=split, num_bytes=num_bytes, num_examples=len(dataset)))
    return datasets.DatasetInfo(
        features=next(iter(splits.values())).features,
        splits=sizes,
        dataset_size=sum(size.num_bytes for size in sizes.values()),
        download_size=file_bytes,
    )


def make_card(
    builder: datasets.DatasetBuilder, splits: datasets.DatasetDict, info: datasets.DatasetInfo, data_dir: Path
) -> str:
    """Makes the dataset card: the metadata block (`configs`, `dataset_info`, licence), statistics, terms, citation.

    Args:
        builder: the prepared builder of the benchmark.
        splits: its splits.
        info: their sizes and features, from [`write_parquet`].
        data_dir: the folder that contains the annotation.
    """
    title = builder.config.layout.folder
    statistics = size_table(splits, builder.config.layout.published_sizes)
    sections = [
        f"---\n{_make_metadata(builder, splits, info).to_yaml()}\n---",
        f"# {title}",
        " ".join((builder.info.description or "").split()),
        "A row is an image: `image`, `person_id` (a person is in one split only), `image_id` (counts from 0 in each "
        "split), `captions`, `file_path` (in the original download). In text-to-image retrieval, every caption of a "
        "split is a query, and all images of the split are the gallery.",
        f"## Statistics\n\n{statistics}",
    ]
    if builder.config.name == _SYNTHETIC:
        sections.append(_make_synthetic_section(data_dir))
    sections += [
        f"## Licence and terms\n\n{builder.terms}" + (f"\n\n{builder.homepage}" if builder.homepage else ""),
        "## Uses that are ruled out\n\nFinding people by description is surveillance technology. This data set is for "
        "research. Do not use it to identify or track people, or to make decisions about them.",
    ]
    if builder.citation:
        sections.append(f"## Citation\n\n```bibtex\n{builder.citation}\n```")
    return "\n\n".join(sections) + "\n"


def _make_metadata(
    builder: datasets.DatasetBuilder, splits: datasets.DatasetDict, info: datasets.DatasetInfo
) -> DatasetCardData:
    is_synthetic = builder.config.name == _SYNTHETIC
    metadata = DatasetCardData(
        language="en",
        license="apache-2.0" if is_synthetic else "other",
        license_name=None if is_synthetic else f"{builder.config.name.replace('_', '-')}-terms",
        license_link=None if is_synthetic else builder.homepage,
        pretty_name=builder.config.layout.folder,
        tags=["person-retrieval", "text-to-image-retrieval"],
    )
    files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    MetadataConfigs({"default": {"data_files": files}}).to_dataset_card_data(metadata)
    DatasetInfosDict({"default": info}).to_dataset_card_data(metadata)
    return metadata


def _make_synthetic_section(data_dir: Path) -> str:
    known = read_json(data_dir / LABELS_FILE)
    arguments = ", ".join(
        plain_markdown(f"{name} {value}") for name, value in known["benchmark"].items() if value is not None
    )
    oracle = ", ".join(f"{split} {value:.1f}%" for split, value in known["oracle_rank1"].items())
    attributes = "\n".join(
        f"| {plain_markdown(name)} | {plain_markdown(', '.join(values))} |"
        for name, values in known["attributes"].items()
    )
    return (
        "## How it was made\n\nThe images are drawn with Pillow, and a grammar writes the captions. The arguments: "
        f"{arguments}.\n\n"
        "Oracle Rank-1, the expected Rank-1 of a reader who recognises every attribute that a caption mentions: "
        f"{oracle}.\n\n"
        f"| attribute | values |\n|---|---|\n{attributes}\n\n![random images with their captions]({_SHEET})"
    )


def export(builder: datasets.DatasetBuilder, output_dir: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes a data set as Parquet to `output_dir`, which appears only when it is complete.

    Args:
        builder: a prepared builder.
        output_dir: a new or empty folder.
        shard_bytes: approximate number of bytes of images in each file.

    Raises:
        FileExistsError: `output_dir` is not empty.
    """
    from ..utils.sheets import draw_contact_sheet

    require_new_folder(output_dir)
    splits = builder.as_dataset()
    with complete_folder(output_dir) as folder:
        info = write_parquet(splits, folder, shard_bytes)
        card = make_card(builder, splits, info, builder.annotation.parent)
        (folder / "README.md").write_text(card, "utf-8", "backslashreplace")
        if builder.config.name == _SYNTHETIC:
            draw_contact_sheet(splits["test" if "test" in splits else "train"]).save(folder / _SHEET, quality=85)


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.dataset_scripts.export", __doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="benchmark to export")
    add_shared_option(parser, "data_dir")
    add_shared_option(parser, "output_dir", help="new or empty folder to write to")
    add_shared_option(parser, "on_bad_image")
    parser.add_argument(
        "--push_to_hub",
        metavar="USER/NAME",
        help="name of a data set on the Hub to upload the folder to; a new data set is private",
    )
    add_shared_option(
        parser,
        "public",
        help="with --push_to_hub: let everybody read the data set; only if the terms of the benchmark allow it",
    )
    return parser


@command
def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    require_push(parser, options)
    output_dir = Path(options.output_dir).expanduser().absolute()
    require_new_folder(output_dir)
    if options.push_to_hub:
        require_publishable(options.push_to_hub, "data set", options.public)
    say(f"checking {options.name} in {options.data_dir}")
    builder = datasets.load_dataset_builder(options.name, data_dir=options.data_dir, on_bad_image=options.on_bad_image)
    builder.download_and_prepare()
    export(builder, output_dir)
    tell(f'{options.output_dir}: load it anywhere with datasets.load_dataset("{options.output_dir}")')
    if options.push_to_hub:
        name = publish(output_dir, options.push_to_hub, options.public, "Export of a person-retrieval benchmark")
        reason = "" if options.public else ", private: the owners give the benchmarks for research, on request"
        tell(f"pushed to {name}{reason}")


if __name__ == "__main__":
    main()
