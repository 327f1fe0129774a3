"""Draws the synthetic person-retrieval benchmark and writes it in the raw layout of one of the three real benchmarks.

python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --output_dir DIR --seed 0
"""

import argparse
import os
from typing import Any

from ...utils.command_line import CommandParser, add_shared_option, command, say, tell
from .captions import DOMAINS
from .generator import ANNOTATION_FILES, SIZES, SyntheticBenchmark, write_benchmark

_NOT_GIVEN = argparse.SUPPRESS
_COUNTS = ("train_ids", "val_ids", "test_ids", "images_per_id", "captions_per_image")
# Sizes in which a layout differs from the other ones, as the real benchmarks do.
_LAYOUT_SIZES: dict[str, dict[str, int]] = {
    "icfg_pedes": {"val_ids": 0, "captions_per_image": 1},
    "rstpreid": {"images_per_id": 5},
}


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.dataset_scripts.synthetic", __doc__)
    parser.add_argument(
        "--layout", choices=list(ANNOTATION_FILES), default="cuhk_pedes", help="benchmark whose raw layout is written"
    )
    add_shared_option(parser, "output_dir", help="new or empty folder to write the benchmark to")
    add_shared_option(parser, "seed")
    parser.add_argument(
        "--domain",
        choices=DOMAINS,
        default="source",
        help="source, or target: the variant with other shades, backgrounds, camera and words",
    )
    parser.add_argument(
        "--size",
        choices=list(SIZES),
        default="small",
        help="small trains on 300 persons, medium on 3,000; cuhk has all the sizes of CUHK-PEDES (11,003 persons)",
    )
    _add_size_options(parser)
    parser.add_argument(
        "--mentions",
        type=float,
        default=1.0,
        help="factor on how often a caption mentions each attribute, above 0; below 1, captions are vaguer",
    )
    parser.add_argument(
        "--nuisance",
        type=float,
        default=1.0,
        help="factor on how much the photographs of one person differ, at least 0; above 1, they differ more",
    )
    _add_correspondence_options(parser)
    add_shared_option(parser, "num_workers", default=os.cpu_count() or 1, help="number of processes that draw")
    return parser


def _add_size_options(parser: CommandParser) -> None:
    counts = parser.add_argument_group("sizes that replace those of --size")
    counts.add_argument("--train_ids", type=int, default=_NOT_GIVEN, help="number of persons in the train split")
    counts.add_argument(
        "--val_ids", type=int, default=_NOT_GIVEN, help="number of persons in the val split; must be 0 for icfg_pedes"
    )
    counts.add_argument("--test_ids", type=int, default=_NOT_GIVEN, help="number of persons in the test split")
    counts.add_argument(
        "--images_per_id",
        type=int,
        default=_NOT_GIVEN,
        help="number of photographs of each person (default: 4, or 5 for rstpreid)",
    )
    counts.add_argument(
        "--captions_per_image",
        type=int,
        default=_NOT_GIVEN,
        help="number of captions of each photograph (default: 2, or 1 for icfg_pedes)",
    )


def _add_correspondence_options(parser: CommandParser) -> None:
    options = parser.add_argument_group("how captions and images correspond")
    options.add_argument(
        "--lookalikes",
        type=int,
        default=1,
        help="number of persons in each group of look-alikes, 1 to 100; the other persons of a group differ from its "
        "first person in exactly two attributes",
    )
    options.add_argument(
        "--caption_noise",
        type=float,
        default=0.0,
        help="share of the train split's captions that are wrong, at least 0 and below 1; a wrong caption describes "
        "another person of the split",
    )
    options.add_argument(
        "--agreement",
        type=float,
        default=1.0,
        help="probability that a caption may mention a part, such as the shoes, that an earlier caption of the same "
        "image already mentions, 0 to 1; below 1, the captions of an image repeat less",
    )


def make_benchmark(options: argparse.Namespace) -> SyntheticBenchmark:
    """Completes the options with the defaults of the size and of the layout.

    Raises:
        ValueError: the options do not fit together, see [`SyntheticBenchmark`].
    """
    given = {name: value for name, value in vars(options).items() if name in _COUNTS}
    sizes: dict[str, Any] = dict(SIZES[options.size])
    if given:
        # The exact totals of --size hold only for its number of persons.
        sizes = {name: value for name, value in sizes.items() if name.endswith("_ids")}
    if "images" not in sizes:
        sizes |= _LAYOUT_SIZES.get(options.layout, {})
    return SyntheticBenchmark(
        layout=options.layout,
        seed=options.seed,
        domain=options.domain,
        mentions=options.mentions,
        nuisance=options.nuisance,
        lookalikes=options.lookalikes,
        caption_noise=options.caption_noise,
        agreement=options.agreement,
        **(sizes | given),
    )


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    benchmark = make_benchmark(options)
    say(f"writing the synthetic benchmark to {options.output_dir}")
    report = write_benchmark(benchmark, options.output_dir, options.num_workers)
    tell(f"{options.output_dir}: {options.layout} layout, {options.domain} domain, seed {options.seed}")
    for split, counts in report["counts"].items():
        if counts["ids"]:
            sizes = ", ".join(f"{count} {name}" for name, count in counts.items())
            tell(f"  {split:5}  {sizes}, oracle Rank-1 {report['oracle_rank1'][split]:.1f}%")


if __name__ == "__main__":
    main()
