"""Writes the synthetic person-retrieval benchmark in the raw layout of any of the three real ones.

python -m eccl.dataset_scripts.synthetic --layout cuhk_pedes --output_dir DIR --seed 0
"""

import argparse
import os

from .captions import DOMAINS
from .generator import ANNOTATION_FILES, SIZES, SyntheticBenchmark, write_benchmark

_PER_ITEM = ("images_per_id", "captions_per_image")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m eccl.dataset_scripts.synthetic", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--layout", choices=list(ANNOTATION_FILES), default="cuhk_pedes", help="raw layout to write")
    parser.add_argument("--output_dir", required=True, help="a new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain", choices=DOMAINS, default="source", help="target is the shifted variant")
    parser.add_argument(
        "--size", choices=list(SIZES), default="small", help="300, 3,000 or CUHK-PEDES' 11,003 people to train on"
    )
    parser.add_argument("--train_ids", type=int, help="people in the train split, in place of --size")
    parser.add_argument("--val_ids", type=int, help="people in the val split (0 for icfg_pedes)")
    parser.add_argument("--test_ids", type=int, help="people in the test split")
    parser.add_argument("--images_per_id", type=int, help="photographs a person (default: 4; 5 for rstpreid)")
    parser.add_argument("--captions_per_image", type=int, help="captions a photograph (default: 2; 1 for icfg_pedes)")
    parser.add_argument("--mentions", type=float, default=1.0, help="below 1, captions mention less")
    parser.add_argument("--nuisance", type=float, default=1.0, help="above 1, photographs of one person differ more")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes that draw")
    options = vars(parser.parse_args(arguments))
    output_dir, num_workers = options.pop("output_dir"), options.pop("num_workers")
    size = dict(SIZES[options.pop("size")])
    by_layout = {
        "icfg_pedes": {"val_ids": 0, "captions_per_image": 1},
        "rstpreid": {"images_per_id": 5},
    }
    if any(options[name] is not None for name in ("train_ids", "val_ids", "test_ids", *_PER_ITEM)):
        # Exact totals hold for the people that they were counted for.
        size = {name: value for name, value in size.items() if name.endswith("_ids")}
    defaults = size | (by_layout.get(options["layout"], {}) if "images" not in size else {})
    given = {name: value for name, value in options.items() if value is not None}
    options = defaults | given
    try:
        report = write_benchmark(SyntheticBenchmark(**options), output_dir, num_workers)
    except (ValueError, FileExistsError) as error:
        parser.error(str(error))
    print(f"{output_dir}: {options['layout']} layout, {options['domain']} domain, seed {options['seed']}")
    for split, counts in report["counts"].items():
        if counts["ids"]:
            sizes = ", ".join(f"{count} {name}" for name, count in counts.items())
            print(f"  {split:5}  {sizes}, oracle Rank-1 {report['oracle_rank1'][split]:.1f}%")


if __name__ == "__main__":
    main()
