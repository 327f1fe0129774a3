"""Checks a data set completely, and prints its sizes, caption lengths, image sizes, and what is doubtful in it.

python -m eccl.dataset_scripts.describe cuhk_pedes --data_dir /data/CUHK-PEDES
"""

import argparse
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import datasets
from PIL import Image

from ..utils.command_line import CommandParser, add_data_options, add_shared_option, command, say, tell
from ..utils.files import complete_file, require_no_input, require_picture_path
from .annotations import SplitSize
from .quality import (
    Finding,
    ImageFacts,
    find_doubtful_captions,
    find_doubtful_images,
    find_doubtful_persons,
    read_image_facts,
    to_json,
)
from .sources import DataSource

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# The longest caption, in tokens, of the published model: CLIP has 77 positions, and prompts take 4 of them.
_MAX_TEXT_LENGTH = 73


class Lengths(NamedTuple):
    """Caption lengths in tokens, start and end tokens included; `too_long` is the number of captions over the limit."""

    shortest: int
    median: float
    mean: float
    percentile_95: int
    longest: int
    too_long: int


def caption_lengths(captions: Sequence[str], tokenizer: "CLIPTokenizer", limit: int = _MAX_TEXT_LENGTH) -> Lengths:
    """Counts the tokens of captions.

    Args:
        captions: at least one caption.
        tokenizer: a CLIP tokenizer.
        limit: maximum length in tokens; longer captions are truncated in training and in evaluation.
    """
    from ..processing_eccl import clean_caption

    ids = tokenizer([clean_caption(caption) for caption in captions])["input_ids"]
    lengths = sorted(map(len, ids))
    return Lengths(
        lengths[0],
        statistics.median(lengths),
        statistics.mean(lengths),
        lengths[(95 * len(lengths) - 1) // 100],
        lengths[-1],
        sum(length > limit for length in lengths),
    )


def size_table(splits: datasets.DatasetDict, published: dict[str, SplitSize]) -> str:
    """Makes a Markdown table with the ids, images and captions of each split, and the published size if it differs."""
    lines = ["| split | ids | images | captions | published |", "|---|--:|--:|--:|---|"]
    for split, dataset in splits.items():
        size = SplitSize.of(dataset["person_id"], dataset["captions"])
        published_size = published.get(split)
        if published_size is None:
            verdict = "not published"
        else:
            verdict = "the same" if published_size == size else str(published_size)
        lines.append(f"| {split} | {size.ids:,} | {size.images:,} | {size.captions:,} | {verdict} |")
    return "\n".join(lines)


def _describe_captions(lengths: Lengths, count: int, tokenizer_name: str) -> str:
    return (
        f"captions, in tokens of {tokenizer_name}: {lengths.shortest} to {lengths.longest}, median {lengths.median:g}, "
        f"mean {lengths.mean:.1f}, 95% up to {lengths.percentile_95}; {lengths.too_long:,} of {count:,} are "
        f"longer than {_MAX_TEXT_LENGTH} and will be truncated"
    )


def _describe_images(facts: Sequence[ImageFacts]) -> Iterator[str]:
    widths, heights = sorted(fact.width for fact in facts), sorted(fact.height for fact in facts)
    kinds = Counter((fact.width, fact.height, fact.mode) for fact in facts)
    common = ", ".join(
        f"{width} x {height} {mode} ({count:,})" for (width, height, mode), count in kinds.most_common(3)
    )
    yield (
        f"images, width x height: {widths[0]} to {widths[-1]} x {heights[0]} to {heights[-1]}, median "
        f"{statistics.median(widths):g} x {statistics.median(heights):g}, most often {common}"
    )
    # Pillow's modes for one grey channel of more than 8 bits start with these letters.
    deep = sum(fact.mode.startswith(("I", "F")) for fact in facts)
    if deep:
        yield f"{deep:,} images have more than 8 bits per channel: they are scaled to 8 bits when they are read"
    if any(fact.hash is None for fact in facts):
        yield "images that look alike were not searched: that needs the package imagehash (pip install imagehash)"


def _describe_findings(findings: Sequence[Finding]) -> Iterator[str]:
    """Yields a line for each thing that was found, with its examples below, and one line for all that were not."""
    for finding in findings:
        if finding.count:
            yield f"{finding.count:,} {finding.title}"
            yield from (f"  {example}" for example in finding.examples)
    if absent := [finding.title for finding in findings if not finding.count]:
        yield "not found:"
        yield from (f"  {title}" for title in absent)


def _check_outputs(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """Checks that the picture and the report can be written, before the data set is read; returns their paths."""
    picture, report = (Path(each).expanduser().absolute() if each else None for each in (options.output, options.json))
    for file, option in ((picture, "--output"), (report, "--json")):
        if file is None:
            continue
        if option == "--output" and file.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"--output is {file}, it must end like a picture file, for example in .png")
        if option == "--json" and file.suffix.lower() != ".json":
            raise ValueError(f"--json is {file}, it must end in .json")
        if not file.parent.is_dir():
            raise FileNotFoundError(f"{option} is {file}, but {file.parent} is not a folder")
        require_no_input(file, {"--data_dir": options.data_dir}, option)
        folder = Path(options.name).expanduser().absolute()
        if folder.is_dir() and file.is_relative_to(folder):
            raise ValueError(f"{option} is {file}, inside the data set {folder}: name a file outside it")
    if picture is not None:
        require_picture_path(picture)
    return picture, report


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.dataset_scripts.describe", __doc__)
    parser.add_argument(
        "name", help="data set to describe: a benchmark, person_pairs, a file, a folder, a format, or one of the Hub"
    )
    add_shared_option(parser, "data_dir", required=False)
    add_data_options(parser)
    add_shared_option(parser, "tokenizer")
    add_shared_option(
        parser, "output", help="picture file to write, for example a .png: random images with their captions"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=os.path.expanduser, help="file to write the same report to, as JSON"
    )
    add_shared_option(parser, "seed", help="seed that chooses the images in the picture")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    picture, report = _check_outputs(options)
    source = DataSource.of_options(options, options.name, options.data_dir, "name")
    say(f"checking {source}")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    from ..processing_eccl import load_tokenizer
    from ..utils.sheets import draw_contact_sheet
    from ..utils.shipped import clip_tokenizer

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else clip_tokenizer()
    data = source.load()
    splits = data.splits
    say("looking for what is doubtful")
    captions = [caption for dataset in splits.values() for of_image in dataset["captions"] for caption in of_image]
    lengths = caption_lengths(captions, tokenizer)
    facts = {split: read_image_facts(dataset) for split, dataset in splits.items()}
    bad_captions = Finding(
        "captions_left_out",
        "captions that cannot be used and are left out",
        len(data.bad_captions),
        data.bad_captions[:3],
    )
    findings = [
        bad_captions,
        *find_doubtful_captions(splits, tokenizer, _MAX_TEXT_LENGTH),
        *find_doubtful_images(splits, facts),
        *find_doubtful_persons(splits),
    ]
    tell(str(source))
    tell()
    for line in size_table(splits, data.layout.published_sizes if data.layout else {}).splitlines():
        tell(line)
    tell()
    tell(_describe_captions(lengths, len(captions), options.tokenizer or "CLIP"))
    for line in _describe_images([fact for of_split in facts.values() for fact in of_split]):
        tell(line)
    tell()
    for line in _describe_findings(findings):
        tell(line)
    if report:
        sizes = {
            split: SplitSize.of(dataset["person_id"], dataset["captions"])._asdict()
            for split, dataset in splits.items()
        }
        content = {"name": source.title, "splits": sizes, "caption_tokens": lengths._asdict(), "findings": findings}
        with complete_file(report) as unfinished:
            unfinished.write_text(to_json(content), encoding="utf-8")
        tell(f"report: {report}")
    if picture:
        all_splits = datasets.concatenate_datasets(list(splits.values()))
        with complete_file(picture) as unfinished:
            draw_contact_sheet(all_splits, seed=options.seed).save(unfinished)
        tell(f"picture: {picture}")


if __name__ == "__main__":
    main()
