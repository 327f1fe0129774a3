"""Compares methods under one protocol: the same backbone, data, steps, search and evaluation, over several seeds.

python -m eccl.eval.compare_methods --output_dir DIR

Each method is a recipe. A small search on the validation split sets its rates and its own settings, with the same
number of trials for each method. Then it is trained with each seed, and the test split is scored once, at the end. A
comparison that was stopped continues with the same command. docs/evidence.md describes the protocol.
"""

import argparse
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.command_line import CommandParser, add_shared_option, at_least, command, say, tell
from ..utils.files import complete_file, locked_folder, read_json, require_no_input, require_writable_folder
from ..utils.shipped import find_recipe, shipped_backbone

if TYPE_CHECKING:
    import datasets

    from .comparison.planning import Planner, Setting
    from .comparison.report import SettingOutcome, Trial
    from .comparison.runs import Pool, Run
    from .comparison.statistics import PersonScores

DEFAULT_METHODS = ("zero_shot", "infonce", "irra", "tal", "lora_only", "eccl")
DEFAULT_SETTINGS = ("usual", "look_alike", "noisy_captions")
_MARKER = "comparison_of_methods.txt"


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.compare_methods", __doc__)
    add_shared_option(parser, "output_dir", help="folder for the report, the data sets and the runs")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        default=list(DEFAULT_METHODS),
        help="methods to compare; all names the methods of the field, ablations names ECCL and its variants, and a "
        "wrong name lists what exists",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        metavar="SETTING",
        help="drawn benchmarks to compare on; a wrong name lists those that exist (default: "
        f"{' '.join(DEFAULT_SETTINGS)})",
    )
    parser.add_argument("--dataset", help="data set to compare on instead; it needs train, val and test: rstpreid")
    add_shared_option(parser, "data_dir", required=False, help="folder of --dataset")
    add_shared_option(
        parser, "model", required=False, help="folder or Hub id of the backbone (default: the shipped backbone)"
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        default=["comparison"],
        metavar="RECIPE",
        help="recipes with the steps and the batch size, the same for each method; a later recipe overrides an earlier "
        "one (default: comparison)",
    )
    parser.add_argument("--seeds", type=at_least(1), default=5, help="number of trainings of each method and setting")
    parser.add_argument(
        "--trials",
        type=at_least(1),
        default=8,
        help="number of trials of the search for each method, on the first setting; 1 takes the recipe's own rates",
    )
    parser.add_argument("--steps", type=at_least(1), help="number of steps of each training (default: the protocol's)")
    parser.add_argument("--jobs", type=at_least(1), default=os.cpu_count() or 1, help="number of trainings at a time")
    parser.add_argument("--threads", type=at_least(1), default=1, help="number of threads of each training")
    parser.add_argument("--resamples", type=at_least(100), default=10_000, help="number of resamples of the bootstrap")
    add_shared_option(parser, "batch_size")
    return parser


def check_options(parser: CommandParser, options: argparse.Namespace) -> None:
    """Checks the options before anything is loaded, and completes the names of methods and settings."""
    from .comparison.methods import ABLATIONS, ALL_METHODS, METHODS, REFERENCE, SETTINGS

    groups = {"all": list(METHODS), "ablations": [REFERENCE, *ABLATIONS]}
    options.methods = list(dict.fromkeys(name for given in options.methods for name in groups.get(given, [given])))
    if options.dataset and options.settings:
        parser.error("--settings are drawn benchmarks, and --dataset names another one: give one of the two")
    if options.data_dir and not options.dataset:
        parser.error("--data_dir is the folder of --dataset, which is missing")
    settings = options.settings or list(DEFAULT_SETTINGS)
    options.settings = [] if options.dataset else list(dict.fromkeys(settings))
    for name, given, known in (("methods", options.methods, ALL_METHODS), ("settings", options.settings, SETTINGS)):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"--{name} has {unknown[0]!r}, it must be among {', '.join(known)}")


@command
def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    check_options(parser, options)
    for recipe in options.protocol:
        find_recipe(recipe)
    model, folder = options.model or str(shipped_backbone()), Path(options.output_dir)
    inputs = {"--model": model, "--data_dir": options.data_dir}
    if options.dataset and os.path.exists(options.dataset):
        inputs["--dataset"] = options.dataset
    require_no_input(folder, inputs)
    require_writable_folder(folder)
    say("compare_methods: loading torch and transformers")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    import transformers

    from ..dataset_scripts.sources import DataSource
    from .comparison.planning import Planner, draw_settings, load_setting
    from .comparison.report import OUTPUTS, make_tables, write_outputs
    from .comparison.runs import Pool

    transformers.logging.disable_progress_bar()
    planner = Planner(model, options.protocol, options.steps, options.trials, options.seeds, folder / "runs")
    with locked_folder(folder):
        _claim(folder)
        if options.dataset:
            settings = [load_setting(DataSource(options.dataset, options.data_dir, option="--dataset"))]
        else:
            settings = draw_settings(options.settings, folder / "data", options.jobs)
        pool = Pool(options.jobs, options.threads, options.batch_size)
        trials = search(planner, options.methods, settings[0], pool)
        outcomes = compare(planner, choose_options(options.methods, trials), settings, pool, options.resamples)
        for line in make_tables(outcomes).splitlines():
            tell(line)
        write_outputs(folder, describe(planner, options, settings), outcomes, trials)
        tell(f"written: {', '.join(str(folder / name) for name in OUTPUTS)}")


def _claim(folder: Path) -> None:
    """Marks a new folder as that of a comparison.

    Raises:
        FileExistsError: the folder has files of something else.
    """
    marker = folder / _MARKER
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others and not marker.is_file():
        raise FileExistsError(f"{folder} has files that no comparison wrote ({others[0]}): name another folder")
    marker.write_text("eccl-compare writes to this folder, and continues here when it is called again.\n")


def describe(planner: "Planner", options: argparse.Namespace, settings: "Sequence[Setting]") -> dict[str, object]:
    """Returns what the figures depend on, for the head of the report."""
    import torch
    import transformers

    return {
        "backbone": Path(planner.model).name,
        "protocol": " + ".join(Path(recipe).stem for recipe in options.protocol),
        **({"steps": options.steps} if options.steps else {}),
        "seeds": options.seeds,
        "trials": options.trials,
        # With one trial there is no search: each method has the options of its recipe.
        **({"searched_on": settings[0].name} if options.trials > 1 else {}),
        "resamples": options.resamples,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def search(planner: "Planner", methods: Sequence[str], setting: "Setting", pool: "Pool") -> "dict[str, list[Trial]]":
    """Tries options for each method and scores them on the validation split.

    A variant of the reference is not searched for; the reference is, instead.

    Args:
        planner: makes the runs.
        methods: names of methods.
        setting: the data set of the search.
        pool: executes the runs.

    Returns:
        For each method that was searched its trials; an empty list if there is nothing to search for.

    Raises:
        ValueError: a training has failed, or a run in the folder was made under other conditions.
    """
    from .comparison.report import Trial
    from .comparison.runs import scores_from_json

    searched = list(dict.fromkeys(map(_tuned_method, methods)))
    runs = {method: planner.trial_runs(setting, method) for method in searched}
    if any(runs.values()):
        say(f"searching on {setting.name}")
    in_order = [run for of_method in runs.values() for run in of_method]
    executed = pool.execute(in_order, {setting.name: setting.splits["val"]})
    records = dict(zip([run.folder for run in in_order], executed, strict=True))
    scores = {
        folder: None if "diverged" in record else scores_from_json(record["val"]) for folder, record in records.items()
    }
    return {
        method: [
            Trial(options, scores[run.folder])
            for options, run in zip(planner.draw_trials(method), of_method, strict=True)
        ]
        for method, of_method in runs.items()
    }


def _tuned_method(method: str) -> str:
    """The method whose search chooses the options of a method: the reference for its variants."""
    from .comparison.methods import ALL_METHODS, REFERENCE

    return REFERENCE if ALL_METHODS[method].changes else method


def choose_options(methods: Sequence[str], trials: "Mapping[str, Sequence[Trial]]") -> dict[str, Mapping[str, float]]:
    """Chooses the options of each method: those of its best trial, see [`~eccl.eval.comparison.report.find_best`].

    Args:
        methods: names of methods.
        trials: the result of [`search`]. A method without trials has no options.

    Raises:
        ValueError: no trial of a method has a finite loss.
    """
    from .comparison.report import find_best

    chosen: dict[str, Mapping[str, float]] = {}
    for method in methods:
        of_method = trials[_tuned_method(method)]
        best = find_best(of_method)
        if of_method and best is None:
            raise ValueError(
                f"no trial of {_tuned_method(method)} has a finite loss: lower the ranges of its learning rates"
            )
        chosen[method] = best.options if best else {}
    return chosen


def compare(
    planner: "Planner",
    chosen: Mapping[str, Mapping[str, float]],
    settings: "Sequence[Setting]",
    pool: "Pool",
    resamples: int,
) -> "list[SettingOutcome]":
    """Trains each method with each seed on all settings, and then scores the test splits.

    Args:
        planner: makes the runs.
        chosen: for each method its options from the search.
        settings: the data sets.
        pool: executes the runs.
        resamples: number of resamples of the bootstrap.

    Returns:
        The outcomes in the order of `settings` and `chosen`.

    Raises:
        ValueError: a training has failed, or a run in the folder was made under other conditions.
    """
    from .comparison.methods import ALL_METHODS
    from .comparison.report import Outcome, summarise

    validation = {setting.name: setting.splits["val"] for setting in settings}
    say(f"training on {', '.join(validation)}")
    final = {
        (setting.name, method): planner.final_runs(setting, method, options)
        for setting in settings
        for method, options in chosen.items()
    }
    runs = [run for of_method in final.values() for run in of_method]
    records = dict(zip([run.folder for run in runs], pool.execute(runs, validation), strict=True))
    say("scoring the test splits")
    test = {setting.name: setting.splits["test"] for setting in settings}
    # A run whose loss was not finite has no model.
    scores = score_tests([run for run in runs if "diverged" not in records[run.folder]], test, pool)
    outcomes = []
    for setting in settings:
        of_setting = [
            Outcome(
                method,
                [scores.get(run.folder) for run in final[setting.name, method]],
                [records[run.folder] for run in final[setting.name, method]],
                {**options, **ALL_METHODS[method].changes},
            )
            for method, options in chosen.items()
        ]
        outcomes.append(summarise(setting.name, setting.description, setting.oracle, of_setting, resamples))
    return outcomes


def score_tests(
    runs: "Sequence[Run]", splits: "Mapping[str, datasets.Dataset]", pool: "Pool"
) -> "dict[Path, PersonScores]":
    """Scores each run on the test split of its setting, once, and then removes its model.

    Args:
        runs: runs that have finished.
        splits: the test split of each setting, by name.
        pool: scores several runs at a time.

    Returns:
        The scores by the folder of the run.
    """
    from .comparison.runs import TEST_FILE, scores_from_json, scores_to_json

    def finish(run: "Run") -> None:
        file = run.folder / TEST_FILE
        if not file.is_file():
            scores = scores_to_json(pool.score(run.model, splits[run.setting]))
            with complete_file(file) as unfinished:
                unfinished.write_text(json.dumps(scores) + "\n", encoding="utf-8")
        if run.words is not None:
            shutil.rmtree(run.model, ignore_errors=True)

    pool.map(finish, runs)
    return {run.folder: scores_from_json(read_json(run.folder / TEST_FILE)) for run in runs}


if __name__ == "__main__":
    main()
