"""Checks a benchmark completely, and prints its sizes, its caption lengths and its image sizes.

python -m eccl.dataset_scripts.describe cuhk_pedes --data_dir /data/CUHK-PEDES
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import datasets
from PIL import Image
from tqdm.auto import tqdm

from ..utils.command_line import CommandParser, add_shared_option, command, say, tell
from ..utils.files import complete_file, require_no_input, require_picture_path
from . import BENCHMARKS
from .annotations import SplitSize
from .base import image_paths

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


def image_kinds(paths: Sequence[str]) -> Counter[tuple[int, int, str]]:
    """Counts the images of each width, height and mode.

    Only the headers of the files are read. The modes are those of Pillow (RGB, L, I;16, ...).
    """

    def read_header(path: str) -> tuple[int, int, str]:
        with Image.open(path) as image:
            return (*image.size, image.mode)

    with ThreadPoolExecutor() as pool:
        headers = pool.map(read_header, paths)
        return Counter(tqdm(headers, total=len(paths), desc="image sizes", unit="image", leave=False))


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


def _describe_captions(captions: Sequence[str], tokenizer: "CLIPTokenizer", tokenizer_name: str) -> str:
    lengths = caption_lengths(captions, tokenizer)
    return (
        f"captions, in tokens of {tokenizer_name}: {lengths.shortest} to {lengths.longest}, median {lengths.median:g}, "
        f"mean {lengths.mean:.1f}, 95% up to {lengths.percentile_95}; {lengths.too_long:,} of {len(captions):,} are "
        f"longer than {_MAX_TEXT_LENGTH} and will be truncated"
    )


def _describe_images(paths: Sequence[str]) -> Iterable[str]:
    kinds = image_kinds(paths)
    widths = sorted(width for width, _, _ in kinds.elements())
    heights = sorted(height for _, height, _ in kinds.elements())
    common = ", ".join(
        f"{width} x {height} {mode} ({count:,})" for (width, height, mode), count in kinds.most_common(3)
    )
    yield (
        f"images, width x height: {widths[0]} to {widths[-1]} x {heights[0]} to {heights[-1]}, median "
        f"{statistics.median(widths):g} x {statistics.median(heights):g}, most often {common}"
    )
    deep = sum(count for (_, _, mode), count in kinds.items() if mode.startswith(("I", "F")))
    if deep:
        yield f"{deep:,} images have more than 8 bits per channel: they are scaled to 8 bits when they are read"


def _check_output(output: Path) -> None:
    """Checks that a picture can be written, before the benchmark is read."""
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--output is {output}, it must end like a picture file, for example in .png")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"--output is {output}, but {output.parent} is not a folder")
    require_picture_path(output)


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.dataset_scripts.describe", __doc__)
    parser.add_argument("name", choices=BENCHMARKS, help="benchmark to describe")
    add_shared_option(parser, "data_dir")
    add_shared_option(parser, "on_bad_image")
    add_shared_option(parser, "tokenizer")
    add_shared_option(
        parser, "output", help="picture file to write, for example a .png: random images with their captions"
    )
    add_shared_option(parser, "seed", help="seed that chooses the images in the picture")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    output = Path(options.output).expanduser().absolute() if options.output else None
    if output:
        _check_output(output)
        require_no_input(output, {"--data_dir": options.data_dir}, "--output")
    say(f"checking {options.name} in {options.data_dir}")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    from ..processing_eccl import load_tokenizer
    from ..utils.sheets import draw_contact_sheet
    from ..utils.shipped import clip_tokenizer

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else clip_tokenizer()
    builder = datasets.load_dataset_builder(options.name, data_dir=options.data_dir, on_bad_image=options.on_bad_image)
    builder.download_and_prepare()
    splits = builder.as_dataset()
    tell(f"{options.name} in {options.data_dir}")
    tell()
    for line in size_table(splits, builder.config.layout.published_sizes).splitlines():
        tell(line)
    tell()
    captions = [
        caption
        for dataset in splits.values()
        for captions_of_image in dataset["captions"]
        for caption in captions_of_image
    ]
    tell(_describe_captions(captions, tokenizer, options.tokenizer or "CLIP"))
    for line in _describe_images([path for dataset in splits.values() for path in image_paths(dataset)]):
        tell(line)
    if output:
        all_splits = datasets.concatenate_datasets(list(splits.values()))
        with complete_file(output) as unfinished:
            draw_contact_sheet(all_splits, seed=options.seed).save(unfinished)
        tell(f"picture: {output}")


if __name__ == "__main__":
    main()
