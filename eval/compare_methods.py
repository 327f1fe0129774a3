"""Compares methods under one protocol: the same backbone, data, steps, search and evaluation, over several seeds.

python -m eccl.eval.compare_methods --output_dir DIR

Each method is a recipe. A small search on the validation split sets its rates and its own settings, with the same
number of trials for each method. Then it is trained with each seed, and the test split is scored once, at the end. A
comparison that was stopped continues with the same command. docs/evidence.md describes the protocol.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.command_line import CommandParser, add_shared_option, at_least, command, say, tell
from ..utils.files import complete_file, locked_folder, require_no_input, require_writable_folder
from ..utils.shipped import find_recipe, shipped_backbone

if TYPE_CHECKING:
    import datasets

    from .comparison.report import SettingOutcome
    from .comparison.runs import Pool, Run

DEFAULT_METHODS = ("zero_shot", "infonce", "irra", "tal", "lora_only", "eccl")
DEFAULT_SETTINGS = ("usual", "look_alike", "noisy_captions")
# Seeds of the trials are far from those of the final runs, which are 0, 1, 2, ...
_SEARCH_SEED = 1000
_MARKER = "comparison_of_methods.txt"


@dataclass(frozen=True)
class Setting:
    """A data set that methods are compared on.

    Args:
        name: its name in the report.
        description: the data set in words.
        oracle: the oracle's Rank-1 on the test split; `None` if it is unknown.
        options: the options of the training command that say where it is.
        splits: its splits.
        digest: digest of the training and validation splits.
    """

    name: str
    description: str
    oracle: float | None
    options: Mapping[str, str]
    splits: "datasets.DatasetDict"
    digest: str


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
    parser.add_argument("--dataset", help="compare on this data set instead, which needs a val split: rstpreid, ...")
    add_shared_option(parser, "data_dir", required=False, help="folder of --dataset")
    add_shared_option(
        parser, "model", required=False, help="folder or Hub id of the backbone (default: the shipped backbone)"
    )
    parser.add_argument(
        "--protocol", default="comparison", help="recipe with the steps and the batch size, the same for each method"
    )
    parser.add_argument("--seeds", type=at_least(1), default=5, help="number of trainings of each method and setting")
    parser.add_argument(
        "--trials",
        type=at_least(1),
        default=8,
        help="number of trials of the search for each method, on the first setting; 1 takes the recipes as they are",
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
    options.methods = [name for given in options.methods for name in groups.get(given, [given])]
    if options.dataset and options.settings:
        parser.error("--settings are drawn benchmarks, and --dataset names another one: give one of the two")
    if bool(options.dataset) != bool(options.data_dir):
        parser.error("--dataset and --data_dir belong together: give both")
    options.settings = [] if options.dataset else options.settings or list(DEFAULT_SETTINGS)
    for name, given, known in (("methods", options.methods, ALL_METHODS), ("settings", options.settings, SETTINGS)):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"--{name} has {unknown[0]!r}, it must be among {', '.join(known)}")
        if len(set(given)) < len(given):
            parser.error(f"--{name} names one of them twice: {' '.join(given)}")


@command
def main(arguments: list[str]) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    check_options(parser, options)
    find_recipe(options.protocol)
    model = options.model or str(shipped_backbone())
    folder = Path(options.output_dir)
    require_no_input(folder, {"--model": model, "--data_dir": options.data_dir})
    require_writable_folder(folder)
    say("compare_methods: loading torch and transformers")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    import transformers

    from .comparison.runs import Pool

    transformers.logging.disable_progress_bar()
    planner = Planner(options, model, folder)
    with locked_folder(folder):
        _claim(folder)
        settings = prepare_settings(options, folder)
        outcomes = compare(planner, settings, Pool(options.jobs, options.threads, options.batch_size))
        report(planner, outcomes)


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


def prepare_settings(options: argparse.Namespace, folder: Path) -> list[Setting]:
    """Draws the benchmarks of the settings, or loads the data set of the user.

    Raises:
        ValueError: the data set of the user has no split `train`, `val` or `test`.
    """
    from ..dataset_scripts.synthetic.generator import write_benchmark
    from .comparison.methods import SETTINGS

    if options.dataset:
        where = {"dataset_name": options.dataset, "data_dir": options.data_dir}
        return [_load_setting(options.dataset, str(options.dataset), None, where)]
    settings = []
    for name in options.settings:
        say(f"drawing {name}")
        data_dir = folder / "data" / name
        drawn = write_benchmark(SETTINGS[name], data_dir, options.jobs)
        counts = ", ".join(
            f"{split} {each['ids']:,} persons, {each['images']:,} images, {each['captions']:,} captions"
            for split, each in drawn["counts"].items()
        )
        where = {"dataset_name": "synthetic_pedes", "data_dir": str(data_dir)}
        settings.append(_load_setting(name, f"Drawn benchmark: {counts}", drawn["oracle_rank1"]["test"], where))
    return settings


def _load_setting(name: str, description: str, oracle: float | None, where: Mapping[str, str]) -> Setting:
    from ..dataset_scripts.sources import DataSource
    from ..training.fingerprint import digest_split

    splits = DataSource(where["dataset_name"], where["data_dir"], option="--dataset").load().splits
    missing = [split for split in ("train", "val", "test") if split not in splits]
    if missing:
        raise ValueError(
            f"{name} has no split {missing[0]}: a comparison trains on train, searches on val, and scores test"
        )
    digest = " ".join(digest_split(splits[split]) for split in ("train", "val"))
    return Setting(name, description, oracle, where, splits, digest)


def compare(planner: "Planner", settings: Sequence[Setting], pool: "Pool") -> "list[SettingOutcome]":
    """Searches on the first setting, trains with each seed on all of them, and then scores the test splits."""
    from .comparison.methods import ALL_METHODS
    from .comparison.report import Outcome, SettingOutcome

    methods = planner.options.methods
    validation = {setting.name: setting.splits["val"] for setting in settings}
    chosen = search(planner, settings[0], pool, validation)
    say(f"training on {', '.join(validation)}")
    final = {
        (setting.name, method): planner.final_runs(setting, method, chosen[method])
        for setting in settings
        for method in methods
    }
    pool.execute([run for runs in final.values() for run in runs], validation)
    say("scoring the test splits")
    test = {setting.name: setting.splits["test"] for setting in settings}
    scored = score_tests([run for runs in final.values() for run in runs], test, pool)
    outcomes = []
    for setting in settings:
        of_setting = []
        for method in methods:
            runs = final[setting.name, method]
            records: list[Mapping[str, Any]] = [run.read_record() or {} for run in runs]
            trained = ALL_METHODS[method].recipe is not None
            scores = [scored[run.folder] for run in runs]
            of_setting.append(Outcome(method, scores, records if trained else [], chosen[method]))
        outcomes.append(SettingOutcome(setting.name, setting.description, setting.oracle, of_setting))
    return outcomes


class Planner:
    """Makes the runs of a comparison.

    Args:
        options: the options of the command.
        model: folder or Hub id of the backbone.
        folder: the folder of the comparison.

    Raises:
        ValueError: the backbone is damaged, or has prompts.
        OSError: there is no such backbone.
    """

    def __init__(self, options: argparse.Namespace, model: str, folder: Path):
        from ..hub.digests import digest_model
        from ..hub.loading import load_model

        self.options, self.model, self.folder = options, model, folder
        backbone = load_model(model)[0]
        if backbone.prompt_learner is not None:
            raise ValueError(f"{model} has prompts: a comparison starts from a CLIP, or an ECCL model without prompts")
        self._backbone = digest_model(backbone)

    def trial_runs(self, setting: Setting, method: str) -> "list[Run]":
        """The runs of the search of one method; none if there is nothing to search for."""
        return [
            self._make_run(setting, method, f"trial-{number}", _SEARCH_SEED, trial)
            for number, trial in enumerate(self.trials(method))
        ]

    def trials(self, method: str) -> list[dict[str, float]]:
        """The options of each trial of a method; empty if there is nothing to search for."""
        from .comparison.methods import ALL_METHODS, draw_trials

        space = ALL_METHODS[method].space
        return draw_trials(space, self.options.trials, _SEARCH_SEED) if space and self.options.trials > 1 else []

    def final_runs(self, setting: Setting, method: str, chosen: Mapping[str, float]) -> "list[Run]":
        """One run for each seed; one in all for a method that is not trained."""
        from .comparison.methods import ALL_METHODS

        seeds = self.options.seeds if ALL_METHODS[method].recipe else 1
        return [self._make_run(setting, method, f"seed-{seed}", seed, chosen) for seed in range(seeds)]

    def _make_run(self, setting: Setting, method: str, name: str, seed: int, chosen: Mapping[str, float]) -> "Run":
        from .comparison.methods import ALL_METHODS
        from .comparison.runs import Run

        recipe, changes = ALL_METHODS[method].recipe, ALL_METHODS[method].changes
        conditions = {"backbone": self._backbone, "data": setting.digest}
        words: tuple[str, ...] | None = None
        if recipe is not None:
            values = {"seed": seed, "eval_split": "val", **chosen, **changes}
            if self.options.steps:
                part = max(1, self.options.steps // 3)
                values |= {"max_steps": self.options.steps, "eval_steps": part, "logging_steps": part}
            recipes = (recipe, self.options.protocol)
            words = (
                *recipes,
                *(word for option, value in values.items() for word in (f"--{option}", *str(value).split())),
            )
            conditions |= {each: find_recipe(each).read_text(encoding="utf-8") for each in recipes}
        folder = self.folder / "runs" / setting.name / method / name
        return Run(setting.name, method, name, words, self.model, setting.options, folder, conditions)


def search(
    planner: Planner, setting: Setting, pool: "Pool", validation: "Mapping[str, datasets.Dataset]"
) -> dict[str, dict[str, float]]:
    """Chooses the options of each method: those of the trial with the highest mAP on the validation split.

    Raises:
        ValueError: no trial of a method has a finite loss.
    """
    from .comparison.methods import ALL_METHODS, REFERENCE
    from .comparison.runs import to_scores

    # A variant of the reference takes its options from the search of the reference.
    variants = [method for method in planner.options.methods if ALL_METHODS[method].changes]
    searched = dict.fromkeys([*planner.options.methods, *([REFERENCE] if variants else [])])
    runs = {method: planner.trial_runs(setting, method) for method in searched}
    if any(runs.values()):
        say(f"searching on {setting.name}")
    records = iter(pool.execute([run for each in runs.values() for run in each], validation))
    chosen: dict[str, dict[str, float]] = {}
    for method, of_method in runs.items():
        trials, chosen[method] = planner.trials(method), {}
        # mAP counts every relevant image, so on a small split it is less noisy than Rank-1.
        figures = [
            -1.0 if "diverged" in record else to_scores(record["val"]).mean("mAP")
            for record, _ in zip(records, of_method, strict=False)
        ]
        if figures and max(figures) < 0:
            raise ValueError(f"no trial of {method} has a finite loss: narrow its search space")
        if figures:
            chosen[method] = trials[figures.index(max(figures))]
    return chosen | {method: chosen[REFERENCE] for method in variants}


def score_tests(runs: "Sequence[Run]", splits: "Mapping[str, datasets.Dataset]", pool: "Pool") -> dict[Path, Any]:
    """Scores each run on the test split of its setting, once, and removes its model; returns the scores by folder."""
    import json
    import shutil

    from ..utils.files import read_json
    from .comparison.runs import from_scores, to_scores

    def finish(run: "Run") -> None:
        file = run.folder / "test.json"
        if not file.is_file():
            scores = from_scores(pool.score(run.model, splits[run.setting]))
            with complete_file(file) as unfinished:
                unfinished.write_text(json.dumps(scores) + "\n", encoding="utf-8")
        if run.words is not None:
            shutil.rmtree(run.model, ignore_errors=True)

    diverged = [run.title for run in runs if "diverged" in (run.read_record() or {})]
    if diverged:
        raise ValueError(f"{diverged[0]}: its loss is not finite, so it has no scores; search with more --trials")
    pool.map(finish, runs)
    return {run.folder: to_scores(read_json(run.folder / "test.json")) for run in runs}


def report(planner: Planner, outcomes: "Sequence[SettingOutcome]") -> None:
    """Prints the tables, and writes them with the pictures."""
    import torch
    import transformers

    from .comparison.report import OUTPUTS, make_tables, write_outputs

    options, folder = planner.options, planner.folder
    header = {
        "backbone": Path(planner.model).name,
        "protocol": Path(options.protocol).stem,
        **({"steps": options.steps} if options.steps else {}),
        "seeds": options.seeds,
        "trials": options.trials,
        "searched_on": outcomes[0].name,
        "resamples": options.resamples,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    for line in make_tables(outcomes, options.resamples).splitlines():
        tell(line)
    write_outputs(folder, header, outcomes, options.resamples)
    tell(f"written: {', '.join(str(folder / name) for name in OUTPUTS)}")


if __name__ == "__main__":
    main()
