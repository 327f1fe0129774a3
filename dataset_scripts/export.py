"""Exports a data set as Parquet files with a dataset card; `load_dataset(FOLDER)` reads them without this project.

python -m eccl.dataset_scripts.export cuhk_pedes --data_dir /data/CUHK-PEDES --output_dir cuhk-pedes
"""

from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets.info import DatasetInfosDict
from datasets.table import embed_table_storage
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData

from ..hub.publish import publish, require_publishable
from ..utils.command_line import (
    CommandParser,
    add_data_options,
    add_shared_option,
    command,
    require_push,
    say,
    tell,
)
from ..utils.files import complete_folder, read_json, require_new_folder, require_writable_folder
from ..utils.text import plain_markdown
from .base import PersonRetrievalBuilder, image_sizes
from .describe import size_table
from .persons import person_column
from .sources import DataSource, PersonData
from .synthetic import LABELS_FILE

# Bytes of images per file. The library aims at the same size. The export needs about twice as much memory.
_SHARD_BYTES = 300 * 2**20
_SYNTHETIC = "synthetic_pedes"
_SHEET = "contact_sheet.jpg"


def write_parquet(splits: datasets.DatasetDict, folder: Path, shard_bytes: int = _SHARD_BYTES) -> datasets.DatasetInfo:
    """Writes each split as `data/SPLIT-00000-of-00002.parquet` and so on, with the images inside.

    Args:
        splits: the splits to write.
        folder: the folder in which `data/` is made.
        shard_bytes: approximate number of bytes of images in each file.

    Returns:
        The sizes and the features of the splits, for the card.
    """
    (folder / "data").mkdir(parents=True)
    sizes, file_bytes = datasets.SplitDict(), 0
    for split, dataset in splits.items():
        num_shards = max(1, -(-sum(image_sizes(dataset)) // shard_bytes))
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


@dataclass(frozen=True)
class Subject:
    """The facts about a data set that its card states.

    Attributes:
        title: its name.
        description: a paragraph.
        terms: the licence and the terms, as the owners state them.
        homepage: the page of the owners; empty if it is unknown.
        citation: BibTeX, or empty.
        licence: the identifier of the licence in the metadata of the card.
        licence_name: the name of a licence that has no identifier.
    """

    title: str
    description: str
    terms: str
    homepage: str = ""
    citation: str = ""
    licence: str = "other"
    licence_name: str | None = None

    @classmethod
    def of(cls, data: PersonData, title: str) -> "Subject":
        """Describes a loaded data set; `title` is the name of one that is no benchmark."""
        builder = data.builder
        if data.layout is None or not isinstance(builder, PersonRetrievalBuilder):
            description = "A data set for text-to-image person retrieval."
            terms = "Not stated. The terms of the owners of the images and of the captions apply."
            return cls(title, description, terms, licence_name="terms-of-the-owners")
        is_synthetic = builder.config.name == _SYNTHETIC
        return cls(
            data.layout.folder,
            " ".join((builder.info.description or "").split()),
            builder.terms,
            builder.homepage,
            builder.citation,
            "apache-2.0" if is_synthetic else "other",
            None if is_synthetic else f"{builder.config.name.replace('_', '-')}-terms",
        )


def make_card(subject: Subject, data: PersonData, info: datasets.DatasetInfo) -> str:
    """Makes the dataset card: the metadata block (`configs`, `dataset_info`, licence), statistics, terms, citation.

    Args:
        subject: what the card says about the data set.
        data: the data set.
        info: its sizes and features, from [`write_parquet`].
    """
    statistics = size_table(data.splits, data.layout.published_sizes if data.layout else {})
    sections = [
        f"---\n{_make_metadata(subject, data.splits, info).to_yaml()}\n---",
        f"# {plain_markdown(subject.title)}",
        subject.description,
        f"A row is an image: `image`, `person_id` ({_describe_persons(data.splits)}), `image_id` (counts from 0 in "
        "each split), `captions`, `file_path` (in the original data set). In text-to-image retrieval, every caption of "
        "a split is a query, and all images of the split are the gallery.",
        f"## Statistics\n\n{statistics}",
    ]
    if data.builder.config.name == _SYNTHETIC and data.folder is not None:
        sections.append(_make_synthetic_section(data.folder))
    sections += [
        f"## Licence and terms\n\n{subject.terms}" + (f"\n\n{subject.homepage}" if subject.homepage else ""),
        "## Uses that are ruled out\n\nFinding people by description is surveillance technology. This data set is for "
        "research. Do not use it to identify or track people, or to make decisions about them.",
    ]
    if subject.citation:
        sections.append(f"## Citation\n\n```bibtex\n{subject.citation}\n```")
    return "\n\n".join(sections) + "\n"


def _describe_persons(splits: datasets.DatasetDict) -> str:
    persons = [set(person_column(dataset).tolist()) for dataset in splits.values()]
    is_apart = sum(map(len, persons)) == len(set().union(*persons))
    return "a person is in one split only" if is_apart else "some persons are in several splits"


def _make_metadata(subject: Subject, splits: datasets.DatasetDict, info: datasets.DatasetInfo) -> DatasetCardData:
    metadata = DatasetCardData(
        language="en",
        license=subject.licence,
        license_name=subject.licence_name,
        license_link=subject.homepage or None,
        pretty_name=subject.title,
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


def export(data: PersonData, title: str, output_dir: Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes a data set as Parquet to `output_dir`, which appears only when it is complete.

    Args:
        data: the data set.
        title: its name, for the card; a benchmark has its own.
        output_dir: a new or empty folder.
        shard_bytes: approximate number of bytes of images in each file.

    Raises:
        FileExistsError: `output_dir` is not empty.
    """
    from ..utils.sheets import draw_contact_sheet

    require_new_folder(output_dir)
    splits = data.splits
    with complete_folder(output_dir) as folder:
        info = write_parquet(splits, folder, shard_bytes)
        card = make_card(Subject.of(data, title), data, info)
        (folder / "README.md").write_text(card, "utf-8", "backslashreplace")
        if data.builder.config.name == _SYNTHETIC:
            draw_contact_sheet(splits["test" if "test" in splits else "train"]).save(folder / _SHEET, quality=85)


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.dataset_scripts.export", __doc__)
    parser.add_argument(
        "name", help="data set to export: a benchmark, person_pairs, a file, a folder, a format, or one of the Hub"
    )
    add_shared_option(parser, "data_dir", required=False)
    add_shared_option(parser, "output_dir", help="new or empty folder to write to")
    add_data_options(parser)
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
    require_writable_folder(output_dir)
    if options.push_to_hub:
        require_publishable(options.push_to_hub, "data set", options.public)
    source = DataSource.of_options(options, options.name, options.data_dir, "name")
    say(f"checking {source}")
    export(source.load(), source.title, output_dir)
    tell(f'{options.output_dir}: load it anywhere with datasets.load_dataset("{options.output_dir}")')
    if options.push_to_hub:
        name = publish(output_dir, options.push_to_hub, options.public, "Export of a person-retrieval data set")
        reason = "" if options.public else ", private: the owners give the benchmarks for research, on request"
        tell(f"pushed to {name}{reason}")


if __name__ == "__main__":
    main()
