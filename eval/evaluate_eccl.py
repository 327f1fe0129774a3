"""Scores checkpoints on benchmarks: every caption of a split queries every image of the split.

accelerate launch eval/evaluate_eccl.py --model DIR --dataset cuhk_pedes --data_dir DIR --output_dir OUT

Several --model, and several --dataset with one --data_dir each, score every model on every benchmark.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from eccl.hub.model_card import DIRECTIONS, METRICS
from eccl.utils.command_line import (
    CommandParser,
    add_data_options,
    add_shared_option,
    command,
    end_launched_process,
    say,
    tell,
)
from eccl.utils.files import (
    complete_file,
    locked_folder,
    read_json,
    require_absent,
    require_no_input,
    require_writable_folder,
)

if TYPE_CHECKING:
    from eccl.dataset_scripts.sources import DataSource
    from eccl.eval.scoring import Evaluation


_OUTPUTS = ("results.json", "results.md", "matching_curve.png", "rankings.png")


def make_parser() -> CommandParser:
    parser = CommandParser("eval/evaluate_eccl.py", __doc__)
    _add_input_options(parser)
    parser.add_argument(
        "--direction",
        choices=(*DIRECTIONS, "both"),
        default="text_to_image",
        help="which side gives the queries: captions (text_to_image), images (image_to_text), or each in turn (both)",
    )
    parser.add_argument(
        "--rerank", action="store_true", help="add a row for each model with its ranks re-ranked by visual neighbours"
    )
    add_shared_option(
        parser,
        "output_dir",
        required=False,
        help="folder for results.json, results.md and pictures (default: the tables are only printed)",
    )
    parser.add_argument(
        "--cache_dir",
        type=os.path.expanduser,
        help="folder that keeps the embeddings, so that a repeated evaluation reads them",
    )
    parser.add_argument(
        "--before",
        type=os.path.expanduser,
        help="results.json of an earlier evaluation, shown as a row of the same table",
    )
    add_shared_option(parser, "overwrite")
    add_shared_option(parser, "batch_size")
    add_shared_option(parser, "num_workers", help="number of worker processes that decode images, in each process")
    return parser


def _add_input_options(parser: CommandParser) -> None:
    add_shared_option(
        parser,
        "model",
        action="append",
        help="folder or Hub id of a merged model, an adapter, or a plain CLIP; may be given several times",
    )
    parser.add_argument(
        "--base", help="folder or Hub id of the model that adapters need (default: the adapter names it)"
    )
    # No `choices`: the list of benchmarks is in a package whose import takes a second.
    parser.add_argument(
        "--dataset",
        required=True,
        action="append",
        help="data set to score on: cuhk_pedes, icfg_pedes, rstpreid, synthetic_pedes, person_pairs, a file, a folder, "
        "a format such as parquet, or a data set of the Hub; may be given several times",
    )
    add_shared_option(
        parser,
        "data_dir",
        action="append",
        required=False,
        default=[],
        help="folder of the benchmark or the format; given once for each --dataset that needs one, in the same order",
    )
    add_data_options(parser)
    parser.add_argument("--split", default="test", help="split to score, or a part of it, for example test[:100]")
    parser.add_argument(
        "--eval_fraction",
        type=float,
        help="score the persons of --split that a training with this --eval_fraction and --seed has cut off",
    )
    add_shared_option(
        parser, "seed", default=None, help="seed of the training that has cut off the persons of --eval_fraction"
    )


def check_arguments(parser: CommandParser, options: argparse.Namespace) -> None:
    """Refuses options that contradict each other, and folders that cannot be written."""
    if (options.eval_fraction is None) != (options.seed is None):
        parser.error("--eval_fraction and --seed belong together: give both, as the training had them")
    if options.rerank and options.direction == "image_to_text":
        parser.error("--rerank only applies to text_to_image, because it compares images with images")
    if options.before and len(options.dataset) > 1:
        parser.error(f"--before shows one earlier evaluation, but there are {len(options.dataset)} --dataset: give one")
    if options.overwrite and not options.output_dir:
        parser.error("--overwrite only applies to --output_dir, which is missing")
    names = [path for path in map(os.path.expanduser, options.dataset) if os.path.exists(path)]
    inputs = {"--model": options.model, "--base": [options.base], "--data_dir": options.data_dir, "--dataset": names}
    for option in ("output_dir", "cache_dir"):
        if folder := getattr(options, option):
            for name, given in ((name, each) for name, values in inputs.items() for each in values):
                require_no_input(Path(folder), {name: given}, f"--{option}", may_contain_inputs=True)
            require_writable_folder(Path(folder))
    if options.output_dir:
        require_no_input(Path(options.output_dir, _OUTPUTS[0]), {"--before": options.before})


def make_sources(parser: CommandParser, options: argparse.Namespace) -> "list[DataSource]":
    """Makes the source of each `--dataset`, with its `--data_dir`; a path, or a data set of the Hub, needs none."""
    # Imported here, because the import takes a second.
    from eccl.dataset_scripts.sources import DataSource

    alone = [DataSource.of_options(options, name, None, "--dataset") for name in options.dataset]
    needs = [source.path is None and "/" not in source.name for source in alone]
    folders: list[str | None] = list(options.data_dir)
    if len(folders) != len(alone):
        if len(folders) != sum(needs):
            parser.error(
                f"there are {len(alone)} --dataset and {len(folders)} --data_dir: give one --data_dir for each "
                "--dataset that is no path and no data set of the Hub"
            )
        given = iter(folders)
        folders = [next(given) if needed else None for needed in needs]
    return [replace(source, data_dir=folder) for source, folder in zip(alone, folders, strict=True)]


def read_before(file: Path) -> dict[str, float]:
    """Reads the metrics of an earlier evaluation from its `results.json`.

    Raises:
        ValueError: the file is not JSON, or a metric in it is missing or not a number.
        OSError: the file cannot be read.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--before is {file}, which is not a results.json of an evaluation: {error}") from error
    metrics: dict[str, float] = {}
    for metric in METRICS:
        value = content.get(metric) if isinstance(content, dict) else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
            raise ValueError(f"--before is {file}, in which {metric} is {value!r}: it must be a number, in percent")
        metrics[metric] = value
    return metrics


@contextlib.contextmanager
def claim_outputs(folder: Path | None, overwrite: bool) -> Iterator[None]:
    """Locks the folder of the results in the main process, which writes to it.

    Raises:
        FileExistsError: the folder has results, and `overwrite` is false; or it has such files of something else.
        BlockingIOError: another evaluation is writing to the folder.
    """
    if folder is None or int(os.environ.get("RANK", "0")):
        yield
        return
    with locked_folder(folder):
        outputs = [folder / name for name in _OUTPUTS]
        require_absent(outputs, overwrite)
        if any(path.exists() for path in outputs) and not _is_evaluation(outputs[0]):
            raise FileExistsError(
                f"{folder} has files that no evaluation wrote: nothing is overwritten, name another one"
            )
        yield


def _is_evaluation(file: Path) -> bool:
    try:
        return isinstance(read_json(file).get("results"), list)
    except (ValueError, OSError):
        return False


@command
def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    check_arguments(parser, options)
    sources = make_sources(parser, options)
    before = read_before(Path(options.before)) if options.before else None
    folder = Path(options.output_dir) if options.output_dir else None
    with claim_outputs(folder, options.overwrite):
        say("evaluate_eccl: loading torch and transformers")
        # Imported here, so that --help and a mistake in the arguments answer at once.
        from eccl.eval.scoring import Settings, check_names, evaluate_models, load_benchmarks

        check_names(options.model, options.base)
        benchmarks = load_benchmarks(sources, options.split, options.eval_fraction, options.seed or 0)
        settings = Settings(
            directions=tuple(DIRECTIONS) if options.direction == "both" else (options.direction,),
            rerank=options.rerank,
            base=options.base,
            cache_dir=options.cache_dir,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            # Two models with this label would share a row of the table.
            label="after" if before and len(options.model) == 1 else None,
        )
        evaluation = evaluate_models(options.model, benchmarks, settings)
        # The outcome is in the main process only.
        if evaluation.results:
            report(evaluation, before, benchmarks[0].oracle if len(benchmarks) == 1 else None, folder)


def report(
    evaluation: "Evaluation", before: dict[str, float] | None, oracle: float | None, folder: Path | None
) -> None:
    """Prints the tables, and writes the figures of all results and the pictures.

    Args:
        evaluation: the outcome; `rankings.png` shows the split behind its first result.
        before: metrics of an earlier evaluation.
        oracle: the oracle's Rank-1, in percent.
        folder: folder to write to; `None` writes nothing.
    """
    from eccl.eval.pictures import draw_matching_curves
    from eccl.eval.reports import hide_paths, make_report, write_report
    from eccl.eval.scoring import picture_rankings

    summary: dict[str, object] = dict(evaluation.results[0].metrics)
    if before:
        summary["before"] = before
    if oracle is not None:
        summary["oracle_rank1"] = oracle
    for line in make_report(evaluation.results, before, oracle).splitlines():
        tell(line)
    if folder is None:
        return
    pictures = {"matching_curve.png": draw_matching_curves(evaluation.first_ranks)}
    if evaluation.first and evaluation.first.direction == "text_to_image":
        pictures["rankings.png"] = picture_rankings(evaluation.first)
    write_report(folder, hide_paths(evaluation.results), summary, before, oracle)
    for name, picture in pictures.items():
        with complete_file(folder / name) as unfinished:
            picture.save(unfinished)
    # `rankings.png` of an earlier evaluation would not belong to this one.
    for name in set(_OUTPUTS[2:]) - pictures.keys():
        (folder / name).unlink(missing_ok=True)
    tell(f"written: {', '.join(str(folder / name) for name in (*_OUTPUTS[:2], *pictures))}")


if __name__ == "__main__":
    main()
    end_launched_process()
