"""Shows what a benchmark holds, once it passed every check: sizes, caption lengths, image sizes, and a contact sheet.

python -m eccl.dataset_scripts.describe cuhk_pedes --data_dir /data/CUHK-PEDES
"""

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import datasets
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from ..processing_eccl import clean_caption
from ..utils.sheets import draw_contact_sheet
from ..utils.shipped import clip_tokenizer
from . import BENCHMARKS
from .annotations import SplitSize

# Room for a caption in the published model: CLIP's 77 positions less 4 prompts.
_MAX_TEXT_LENGTH = 73


class Lengths(NamedTuple):
    """How long captions are, in tokens with the start and end token."""

    shortest: int
    median: float
    mean: float
    percentile_95: int
    longest: int
    too_long: int


def caption_lengths(captions: Sequence[str], tokenizer: CLIPTokenizer, limit: int = _MAX_TEXT_LENGTH) -> Lengths:
    """Counts the tokens of captions; `too_long` of them have more than `limit` and will be cut."""
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
    """How many images have each width, height and mode (Pillow's: RGB, L, I;16, ...), read from their headers."""

    def read(path: str) -> tuple[int, int, str]:
        with Image.open(path) as image:
            return (*image.size, image.mode)

    with ThreadPoolExecutor() as pool:
        return Counter(tqdm(pool.map(read, paths), total=len(paths), desc="image sizes", unit="image", leave=False))


def size_table(splits: datasets.DatasetDict, published: dict[str, SplitSize]) -> str:
    """A Markdown table of ids, images and captions per split, with the published ones and whether they agree."""
    lines = ["| split | ids | images | captions | published |", "|---|--:|--:|--:|---|"]
    for split, rows in splits.items():
        size = SplitSize.of(rows["person_id"], rows["captions"])
        theirs = published.get(split)
        verdict = "not published" if theirs is None else "the same" if theirs == size else f"{theirs}"
        lines.append(f"| {split} | {size.ids:,} | {size.images:,} | {size.captions:,} | {verdict} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eccl.dataset_scripts.describe", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--data_dir", required=True, help="the benchmark's folder, or the one that holds it")
    parser.add_argument("--on_bad_image", choices=("error", "skip"), default="error")
    parser.add_argument("--tokenizer", help="folder or Hub id of a CLIP tokenizer; CLIP's own by default")
    parser.add_argument("--sheet", default="contact_sheet.png", help="the picture to write")
    parser.add_argument("--seed", type=int, default=0, help="of the rows in the picture")
    options = parser.parse_args(arguments)
    sheet = Path(options.sheet).expanduser().absolute()
    try:
        if sheet.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"{sheet} does not end as a picture does, in .png for one")
        if not sheet.parent.is_dir():
            raise FileNotFoundError(f"{sheet.parent} is not a folder: the picture cannot be written there")
        tokenizer = CLIPTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else clip_tokenizer()
        builder = datasets.load_dataset_builder(
            options.name, data_dir=options.data_dir, on_bad_image=options.on_bad_image
        )
        builder.download_and_prepare()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    splits = builder.as_dataset()
    print(f"{options.name} in {options.data_dir}\n")
    print(size_table(splits, builder.config.layout.published_sizes))
    captions = [caption for rows in splits.values() for own in rows["captions"] for caption in own]
    lengths = caption_lengths(captions, tokenizer)
    print(
        f"\ncaptions, in tokens of {options.tokenizer or 'CLIP'}: {lengths.shortest} to {lengths.longest}, median "
        f"{lengths.median:g}, mean {lengths.mean:.1f}, 95% up to {lengths.percentile_95}; {lengths.too_long:,} of "
        f"{len(captions):,} are longer than {_MAX_TEXT_LENGTH} and will be cut"
    )
    paths = [
        image["path"]
        for rows in splits.values()
        for image in rows.cast_column("image", datasets.Image(decode=False))["image"]
    ]
    kinds = image_kinds(paths)
    widths, heights = (sorted(kind[axis] for kind in kinds.elements()) for axis in (0, 1))
    common = ", ".join(
        f"{width} x {height} {mode} ({count:,})" for (width, height, mode), count in kinds.most_common(3)
    )
    print(
        f"images, width x height: {widths[0]} to {widths[-1]} x {heights[0]} to {heights[-1]}, median "
        f"{statistics.median(widths):g} x {statistics.median(heights):g}, most often {common}"
    )
    deep = sum(count for (_, _, mode), count in kinds.items() if mode.startswith(("I", "F")))
    if deep:
        print(f"{deep:,} images have more than 8 bits a channel: all above 255 becomes white, convert them first")
    everything = datasets.concatenate_datasets(list(splits.values()))
    draw_contact_sheet(everything, seed=options.seed).save(sheet)
    print(f"written: {sheet}")


if __name__ == "__main__":
    main()
