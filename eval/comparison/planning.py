"""What a comparison runs: its data sets, and the trainings of each method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ...dataset_scripts.sources import DataSource
from ...dataset_scripts.synthetic.generator import write_benchmark
from ...hub.digests import digest_encoder
from ...hub.loading import load_model
from ...training.fingerprint import digest_split
from ...utils.command_line import say
from ...utils.recipes import read_recipe
from ...utils.shipped import find_recipe
from .methods import ALL_METHODS, SETTINGS, draw_trials
from .runs import Run

# Far from the seeds of the final runs, which are 0, 1, 2, ...
SEARCH_SEED = 1000
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Setting:
    """A data set that methods are compared on.

    Args:
        name: its name in the report, and that of its folders.
        description: the data set in words.
        oracle: the oracle's Rank-1 on the test split, in percent; `None` if it is unknown.
        options: the options of the training command that say where it is.
        splits: its splits.
        digests: a digest of each of `train`, `val` and `test`, by name.
    """

    name: str
    description: str
    oracle: float | None
    options: Mapping[str, str]
    splits: datasets.DatasetDict
    digests: Mapping[str, str]


def draw_settings(names: Sequence[str], folder: Path, num_workers: int) -> list[Setting]:
    """Draws the benchmarks of the settings into `folder`; those that are there already are not drawn again."""
    settings = []
    for name in names:
        say(f"drawing {name}")
        drawn = write_benchmark(SETTINGS[name], folder / name, num_workers)
        counts = "; ".join(
            f"{split}: {each['ids']:,} persons, {each['images']:,} images, {each['captions']:,} captions"
            for split, each in drawn["counts"].items()
        )
        source = DataSource("synthetic_pedes", str(folder / name))
        settings.append(_load(name, f"Drawn benchmark. {counts}", drawn["oracle_rank1"]["test"], source))
    return settings


def load_setting(source: DataSource) -> Setting:
    """Loads a data set of the user.

    Raises:
        ValueError: the data set has faults, or no split `train`, `val` or `test`.
        OSError: the data set is not there.
    """
    return _load(source.title.replace("/", "--"), source.title, None, source)


def _load(name: str, description: str, oracle: float | None, source: DataSource) -> Setting:
    splits = source.load().splits
    missing = [split for split in _SPLITS if split not in splits]
    if missing:
        raise ValueError(
            f"{source.title} has no split {missing[0]}: a comparison trains on train, searches on val, and scores test"
        )
    options = {"dataset_name": source.name} | ({"data_dir": source.data_dir} if source.data_dir else {})
    digests = {split: digest_split(splits[split]) for split in _SPLITS}
    return Setting(name, description, oracle, options, splits, digests)


class Planner:
    """Makes the runs of a comparison.

    Args:
        model: folder or Hub id of the backbone.
        protocol: names or paths of the recipes that all trainings share; a later one overrides an earlier one.
        steps: number of steps of each training, instead of the protocol's.
        trials: number of trials of each search.
        seeds: number of final trainings of each method.
        folder: the folder of the runs.

    Raises:
        ValueError: the backbone is damaged, or has prompts; or a recipe is no mapping.
        OSError: there is no such backbone or recipe.
    """

    def __init__(self, model: str, protocol: Sequence[str], steps: int | None, trials: int, seeds: int, folder: Path):
        self.model, self.protocol, self.steps = model, protocol, steps
        self.num_trials, self.seeds, self.folder = trials, seeds, folder
        self._protocol = {name: value for each in protocol for name, value in read_recipe(find_recipe(each)).items()}
        backbone, processor = load_model(model)
        if backbone.prompt_learner is not None:
            raise ValueError(f"{model} has prompts: a comparison starts from a CLIP, or an ECCL model without prompts")
        self._backbone = digest_encoder(backbone, processor)

    def draw_trials(self, method: str) -> list[dict[str, float]]:
        """The options of each trial of a method; empty if there is nothing to search for."""
        space = ALL_METHODS[method].space
        return draw_trials(space, self.num_trials, SEARCH_SEED) if space and self.num_trials > 1 else []

    def trial_runs(self, setting: Setting, method: str) -> list[Run]:
        """The runs of the search of one method, one for each of its trials."""
        return [
            self._make_run(setting, method, f"trial-{number}", SEARCH_SEED, trial, is_trial=True)
            for number, trial in enumerate(self.draw_trials(method))
        ]

    def final_runs(self, setting: Setting, method: str, chosen: Mapping[str, float]) -> list[Run]:
        """The runs whose test scores count: one for each seed; a method that is not trained has one run.

        Args:
            setting, method: the names of both are those of the run.
            chosen: the options from the search.
        """
        seeds = self.seeds if ALL_METHODS[method].recipe else 1
        return [self._make_run(setting, method, f"seed-{seed}", seed, chosen, is_trial=False) for seed in range(seeds)]

    def _make_run(
        self, setting: Setting, method: str, name: str, seed: int, chosen: Mapping[str, float], is_trial: bool
    ) -> Run:
        recipe = ALL_METHODS[method].recipe
        conditions: dict[str, Any] = {
            "backbone": self._backbone,
            "data": dict(setting.digests),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        words: tuple[str, ...] | None = None
        if recipe is not None:
            options = {"seed": seed, "eval_split": "val", **self._step_options(), **chosen}
            options |= ALL_METHODS[method].changes
            words = (recipe, *self.protocol)
            words += tuple(word for name, value in options.items() for word in (f"--{name}", *str(value).split()))
            conditions |= {"recipe": read_recipe(find_recipe(recipe)), "protocol": self._protocol, "options": options}
        folder = self.folder / setting.name / method / name
        return Run(setting.name, method, name, words, self.model, setting.options, folder, conditions, is_trial)

    def _step_options(self) -> dict[str, int]:
        """The options that make a training shorter or longer than the protocol says."""
        if self.steps is None:
            return {}
        part = max(1, self.steps // 3)
        options = {"max_steps": self.steps, "eval_steps": part, "logging_steps": part}
        if "warmup_steps" in self._protocol:
            options["warmup_steps"] = self.steps // 10
        return options


__all__ = ["SEARCH_SEED", "Planner", "Setting", "draw_settings", "load_setting"]
