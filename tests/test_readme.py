"""Runs the commands and snippets in README.md and docs/*.md, and checks that nothing in them is outdated.

The pages are run as a reader would run them: in a folder that looks like a clone, block after block. Three things
differ. The benchmarks in `/data` are small synthetic ones in the same layouts. The Hub is one on this machine, with a
small CLIP under the name of the real one. Commands that would take hours get the arguments in `SHORTER` in addition.
Commands that cannot run here are in `NOT_RUN` with the reason; their arguments are still checked.
"""

import argparse
import functools
import importlib
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Collection
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from hub_server import LoopbackHub
from pages import PAGES, ROOT, SCRIPTS, Block, read_blocks, shell_commands
from scipy import stats
from transformers import CLIPConfig, CLIPModel

import train_eccl
from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.eval import compare_methods
from eccl.eval.comparison.methods import ABLATIONS, ALL_METHODS
from eccl.eval.comparison.methods import SETTINGS as DRAWN
from eccl.eval.comparison.runs import scores_from_json
from eccl.eval.comparison.statistics import PersonScores, paired_bootstrap
from eccl.utils.shipped import clip_tokenizer

BLOCKS = [block for page in PAGES for block in read_blocks(page)]
TRAINING = ("train_eccl.py", "eccl.train_eccl")
# Added to every training command: the published run takes hours.
SHORTER = (
    *("--max_steps", "2", "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "32"),
    *("--dataloader_num_workers", "0", "--prompt_depth", "2", "--disable_tqdm", "True"),
)
# Lines of printed output that the shorter training changes.
CHANGED_BY_SHORTER = ("| after ",)
# Parts of commands that are not run, with the reason.
NOT_RUN = {
    "pip install": "tests/programs/wheel_check.py runs the installation",
    "pip wheel": "tests/programs/wheel_check.py runs the installation",
    "make test": "this test is a part of it",
    "benchmarks.explanation": "it takes minutes; tests/eval/test_explanation_benchmark.py runs it with few pictures",
    "benchmarks.speed": "it takes twenty minutes; tests/eval/test_speed_benchmark.py runs it with a tiny model",
    "eccl-compare": "it takes hours; tests/eval/test_comparison.py compares methods with few steps",
    **{
        f"runs/{method}-{benchmark}-1": "tests/training/test_recipes.py trains each method on each benchmark"
        for method in ("eccl", "irra")
        for benchmark in ("cuhk_pedes", "icfg_pedes")
    },
    "eccl-app": "it serves until it is stopped; tests/search/test_browser.py opens the page",
    "eight_gpus.yaml": "it needs eight GPUs; tests/training/test_launch_configs.py starts it on CPUs",
}
DEMO_COMMAND = re.compile(r"\.venv/bin/(python -m eccl|accelerate launch)")
# Warnings that a reader cannot act on, or that a command of the README should avoid.
UNWANTED = (
    "not passed to `accelerate launch`",
    "is_gradient_checkpointing",
    "set the attention implementation for the sub-config",
    "worker processes in total",
    "find_unused_parameters",
    "FutureWarning",
)


def module_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """Returns the module that a command runs and the arguments that the module gets."""
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch = launch_command_parser().parse_args(words[2:])
        script, arguments = launch.training_script, launch.training_script_args
        return (script if launch.module else f"eccl.{script.removesuffix('.py').replace('/', '.')}"), arguments
    if words[0] in SCRIPTS:
        return SCRIPTS[words[0]].partition(":")[0], words[1:]
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] == "python" and words[1].startswith("tests/programs/"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
        return "", []
    raise AssertionError(f"the test does not know how to run {words[0]}")


def check_arguments(words: list[str]) -> None:
    """Fails if the parser of a command refuses its arguments."""
    if words[0] == "pip":
        assert words[1] in ("install", "wheel"), words
    elif words[0] == "make":
        assert set(words[1:]) <= make_targets(), words
    else:
        module, arguments = module_and_arguments(words)
        if module == "eccl.train_eccl":
            train_eccl.parse_arguments(arguments)
        elif module:
            if module == "eccl.dataset_scripts.synthetic":
                module += ".__main__"
            importlib.import_module(module).make_parser().parse_args(arguments)


@functools.cache
def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def options_of(parser) -> set[str]:
    found = {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(options_of, action.choices.values()))
    return found


@functools.cache
def known_options() -> set[str]:
    """Returns every option of the commands, of accelerate's launcher, and of the pip commands in the README."""
    from accelerate.commands.launch import launch_command_parser

    known = {"--constraint", "--no-deps", "--wheel-dir"} | options_of(launch_command_parser())
    for script in SCRIPTS.values():
        known |= options_of(importlib.import_module(script.partition(":")[0]).make_parser())
    for benchmark in (ROOT / "eval" / "benchmarks").glob("[a-z]*.py"):
        if "def make_parser()" in benchmark.read_text():
            known |= options_of(importlib.import_module(f"eccl.eval.benchmarks.{benchmark.stem}").make_parser())
    return known | options_of(train_eccl.make_parser())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_of_a_known_kind_and_its_arguments_are_accepted(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language == "yaml":
        assert {f"--{name}" for name in yaml.safe_load(block.text)} <= known_options()
    elif block.language == "text":
        earlier = [other for other in BLOCKS if other.page == block.page and other.line < block.line]
        assert earlier and earlier[-1].language in ("sh", "python"), f"{block} follows no command that could print it"
    else:
        assert block.language in ("sh", ""), f"{block}: the test does not know the language {block.language}"
        for words in shell_commands(block):
            check_arguments(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_targets_and_options_in_the_text_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)]+)\)", text) if ":" not in link):
        linked = (page.parent / target).resolve() if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"
    for target in re.findall(r"`make ([\w-]+)", text):
        assert target in make_targets(), f"{page.name} names `make {target}`"
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert option in known_options(), f"{page.name} names {option}"


def test_the_commands_of_the_readme_are_those_of_setup_cfg():
    rows = re.findall(r"^\| `(eccl-[\w-]+)` \| `([\w.]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert dict(rows) == {
        name: entry.removesuffix(":main").removesuffix(".__main__") for name, entry in SCRIPTS.items()
    }


def read_comparison(folder: str) -> dict:
    """The methods of each setting, as `eccl-compare` has written them to a folder under docs/comparison."""
    content = json.loads((ROOT / "docs" / "comparison" / folder / "comparison.json").read_text())
    for setting in content["settings"].values():
        of_reference = statistics.mean(setting["methods"]["eccl"]["test"]["rank1"])
        for method in setting["methods"].values():
            if found := method.get("reference_minus_this", {}).get("rank1"):
                expected = of_reference - statistics.mean(method["test"]["rank1"])
                assert found["difference"] == pytest.approx(expected, abs=1e-3)
    return {name: setting["methods"] for name, setting in content["settings"].items()}


def read_trials(folder: str) -> dict[str, list[dict]]:
    """The trials of the search of each method, from the same file."""
    return json.loads((ROOT / "docs" / "comparison" / folder / "comparison.json").read_text())["trials"]


def read_words(page: str) -> str:
    """The text of a page with single spaces instead of line ends."""
    return " ".join((ROOT / page).read_text().split())


def read_table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without the line below its head."""
    section = (ROOT / page).read_text().split(f"{heading}\n")[1]
    lines = section[section.index("\n|") :].lstrip("\n").split("\n\n")[0].splitlines()
    return [line.strip("| ").split(" | ") for line in lines[:1] + lines[2:]]


def require_figures(cell: str, method: dict) -> None:
    """Fails unless a cell shows the mean and the deviation of Rank-1 over the seeds."""
    figures = method["test"]["rank1"]
    mean, *spread = map(float, cell.split(" ± "))
    # A figure such as 79.55 can be rounded in both directions.
    assert mean == pytest.approx(statistics.mean(figures), abs=0.0501) and len(figures) in (1, 5)
    assert len(figures) == 1 or spread == pytest.approx([statistics.stdev(figures)], abs=0.0501)


def show_interval(difference: float, low: float, high: float) -> str:
    """A difference with its interval, as a table shows it."""
    text = f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def show_difference(method: dict, metric: str) -> str:
    """The difference of ECCL to a method, as a table shows it."""
    found = method.get("reference_minus_this", {}).get(metric)
    return show_interval(**found) if found else "-"


def test_the_table_of_methods_shows_the_figures_of_the_comparison():
    compared = read_comparison(".")
    head, *rows = read_table("README.md", "## What each part brings")
    assert [cell.removesuffix(": Rank-1") for cell in head[1::2]] == list(compared) and len(compared) == 3
    for column, methods in enumerate(compared.values()):
        for row, method in zip(rows, methods.values(), strict=True):
            require_figures(row[1 + 2 * column], method)
            assert row[2 + 2 * column] == show_difference(method, "rank1")
    assert len(rows) == 6
    readme = read_words("README.md")
    for folder, setting, text in (
        (
            "batch_16_steps_120",
            "usual",
            "they bring {difference:.1f} points of Rank-1 in 120 steps ({low:.1f} to {high:.1f})",
        ),
        ("batch_16", "usual", "and {difference:.1f} in 480 steps ({low:.1f} to {high:.1f})"),
        ("steps_480", "persons_3000", "the memories bring {difference:.1f} points ({low:.1f} to {high:.1f})"),
    ):
        found = read_comparison(folder)[setting]["tal"]["reference_minus_this"]["rank1"]
        assert text.format(**found) in readme


def test_the_page_shows_the_first_and_the_chosen_trial_of_each_method():
    trials = read_trials(".")
    text = (ROOT / "docs" / "evidence.md").read_text().split("**The rates matter more")[1].split("\n\n")[0]
    shown = [tuple(map(float, pair)) for pair in re.findall(r"(\d+\.\d) and (\d+\.\d)\s+for", text)]
    expected = []
    for of_method in trials.values():
        chosen = max(of_method, key=lambda trial: trial["val"]["mAP"])
        expected.append((round(of_method[0]["val"]["rank1"], 1), round(chosen["val"]["rank1"], 1)))
    assert shown == expected and len(shown) == 5


# The rows of the table: the folder of the comparison, its setting, and the pairs of a batch and the steps.
CONDITIONS = {
    "300 persons": ("settings", "persons_300", 64, 120),
    "500 persons, eight images of each": ("settings", "images_8", 64, 120),
    "1,000 persons": ("settings", "usual", 64, 120),
    "1,000 persons, 480 steps": ("steps_480", "usual", 64, 480),
    "1,000 persons, four captions of each image": ("captions_4", "captions_4", 64, 120),
    "1,000 persons, captions that agree only partly": ("settings", "partial_captions", 64, 120),
    "1,000 persons, a fifth of the captions wrong": (".", "noisy_captions", 64, 120),
    "1,000 persons, look-alike": (".", "look_alike", 64, 120),
    "2,000 persons, two images of each": ("settings", "images_2", 64, 120),
    "3,000 persons": ("settings", "persons_3000", 64, 120),
    "3,000 persons, 480 steps": ("steps_480", "persons_3000", 64, 480),
    "1,000 persons, batches of 16": ("batch_16_steps_120", "usual", 16, 120),
    "1,000 persons, batches of 16, 480 steps": ("batch_16", "usual", 16, 480),
    "11,000 persons": ("settings", "persons_11000", 64, 120),
}


ENDS = ("persons_300", "images_8")
OTHER_CAPTIONS_OR_PERSONS = ("partial_captions", "noisy_captions", "look_alike")


def expected_share(persons: int, batch: int) -> float:
    """The share of the persons, in percent, that a batch is expected to have if each of its pairs is of any person."""
    return 100 * (1 - (1 - 1 / persons) ** batch)


def test_the_table_of_conditions_shows_the_figures_of_the_comparisons():
    _, *rows = read_table("docs/evidence.md", "## When the memories help")
    assert [row[0] for row in rows] == list(CONDITIONS)
    for row, (folder, setting, batch, steps) in zip(rows, CONDITIONS.values(), strict=True):
        methods = read_comparison(folder)[setting]
        persons = DRAWN[setting].train_ids
        assert row[0].startswith(f"{persons:,} persons")
        assert float(row[1].removesuffix(" %")) == pytest.approx(
            expected_share(persons, batch), abs=0.05 if "." in row[1] else 0.5
        )
        assert float(row[2]) == pytest.approx(batch * steps / persons, abs=0.05 if "." in row[2] else 0.5)
        require_figures(row[3], methods["tal"])
        require_figures(row[4], methods["eccl"])
        assert row[5:] == [show_difference(methods["tal"], metric) for metric in ("rank1", "mAP")]


def read_gains(metric: str) -> list[tuple[float, dict]]:
    """For each condition the share of the persons in a batch, and the difference to TAL."""
    return [
        (
            expected_share(DRAWN[setting].train_ids, batch),
            read_comparison(folder)[setting]["tal"]["reference_minus_this"][metric],
        )
        for folder, setting, batch, _ in CONDITIONS.values()
    ]


def test_the_pages_have_the_correlation_of_the_gain_with_the_share_of_the_persons():
    # The conditions without both ends of the table, and without those that differ in their data only.
    middle = [name for name, (_, setting, batch, _) in CONDITIONS.items() if batch == 64 and setting not in ENDS]
    same_data = [name for name in middle if CONDITIONS[name][1] not in OTHER_CAPTIONS_OR_PERSONS]
    assert (len(CONDITIONS), len(middle), len(same_data)) == (14, 10, 7)

    def correlate(names: Collection[str]):
        """The correlation in Rank-1 and in mAP."""
        found = [
            [
                (share, gain["difference"])
                for name, (share, gain) in zip(CONDITIONS, read_gains(metric), strict=True)
                if name in names
            ]
            for metric in ("rank1", "mAP")
        ]
        return [stats.spearmanr(*zip(*pairs, strict=True)) for pairs in found]

    page, readme = map(read_words, ("docs/evidence.md", "README.md"))
    rank1, mean_precision = correlate(CONDITIONS)
    assert f"this difference is {rank1.statistic:.2f} in Rank-1 and {mean_precision.statistic:.2f} in mAP" in page
    assert f"the rank correlation between this share and the gain is {rank1.statistic:.2f}." in readme
    rank1, mean_precision = correlate(middle)
    assert f"it is {rank1.statistic:.2f} in Rank-1 and {mean_precision.statistic:.2f} in mAP" in page
    assert f"with a probability of {rank1.pvalue:.1g} and {mean_precision.pvalue:.1g}." in page
    assert f"it is {rank1.statistic:.2f}, which could be chance" in readme
    rank1, mean_precision = correlate(same_data)
    assert f"correlation is {rank1.statistic:+.2f} in Rank-1 and {mean_precision.statistic:.2f} in mAP" in page


def test_the_page_counts_the_conditions_in_which_the_memories_are_better():
    gains = read_gains("rank1")
    few, many = ([gain for share, gain in gains if (share < 4) == is_few] for is_few in (True, False))
    page, readme = map(read_words, ("docs/evidence.md", "README.md"))
    sizes = [gain["difference"] for gain in few]
    assert len(few) == sum(size > 0 for size in sizes) == 6 and len(many) == 8
    assert f"about 3 % of the persons or less, by {min(sizes):.1f} to {max(sizes):.1f} points" in page
    assert sum(gain["difference"] < 0 for gain in many) == 5 and "it is below 0 in five of eight" in page
    assert sum(gain["low"] <= 0 <= gain["high"] for _, gain in gains) == 11
    assert "The intervals of eleven conditions contain 0" in page
    assert "eleven of the intervals contain 0, and five gains are negative" in readme
    only_persons = [
        read_comparison("settings")[name]["tal"]["reference_minus_this"]["rank1"]["difference"]
        for name in ("persons_300", "usual", "persons_3000", "persons_11000")
    ]
    assert "the differences are {:+.1f}, {:+.1f}, {:+.1f} and {:+.1f}".format(*only_persons) in page


def test_the_page_counts_the_trials_in_which_the_memories_are_better():
    better = {}
    for folder in ("batch_16_steps_120", "batch_16", "settings"):
        trials = read_trials(folder)
        pairs = list(zip(trials["tal"], trials["eccl"], strict=True))
        assert all(tal["options"].items() <= eccl["options"].items() for tal, eccl in pairs) and len(pairs) == 8
        better[folder] = [(eccl["val"]["rank1"], tal["val"]["rank1"]) for tal, eccl in pairs]
    counts = [sum(eccl > tal for eccl, tal in figures) for figures in better.values()]
    assert counts == [8, 7, 5]
    page = read_words("docs/evidence.md")
    assert "in all eight trials of 120 steps, and in seven of the eight trials of 480 steps" in page
    assert "ECCL is higher in five of the eight trials" in page
    largest = max(better["batch_16_steps_120"], key=lambda pair: pair[0] - pair[1])
    assert "after 120 steps, ECCL has {:.1f} and TAL {:.1f}".format(*largest) in page
    collapsed = [pair for pair in better["batch_16"] if pair[1] < 2]
    shown = "a Rank-1 of {:.1f}, which is chance among 100 persons, where ECCL has {:.1f} and {:.1f}"
    assert shown.format(collapsed[0][1], *(pair[0] for pair in collapsed)) in page


def test_the_table_of_equal_rates_shows_the_figures_of_the_comparison():
    compared, losses = read_comparison("same_rates"), read_comparison("losses")
    _, *rows = read_table("docs/evidence.md", "### With the same rates")
    assert [row[0] for row in rows] == ["300 persons", "1,000 persons"]
    for row, setting in zip(rows, ("persons_300", "usual"), strict=True):
        methods = compared[setting]
        require_figures(row[1], methods["tal"])
        require_figures(row[2], methods["eccl"])
        assert row[3:] == [show_difference(methods["tal"], metric) for metric in ("rank1", "mAP")]
        # These are the options that the search has chosen for TAL.
        assert methods["tal"]["test"] == losses[setting]["tal"]["test"]
    protocol = yaml.safe_load(
        next(block.text for block in BLOCKS if block.language == "yaml" and "# same_rates.yaml" in block.text)
    )
    assert protocol == losses["usual"]["memories_only"]["options"] | losses["usual"]["tal"]["options"]
    gains = [compared[name]["tal"]["reference_minus_this"]["mAP"] for name in ("usual", "persons_300")]
    shown = (
        "they bring {:.1f} points of mAP with 1,000 persons ({:.1f} to {:.1f}) and {:.1f} with 300 ({:.1f} to {:.1f})"
    )
    assert shown.format(*gains[0].values(), *gains[1].values()) in read_words("README.md")


def test_the_pages_have_the_times_of_the_trainings_of_eccl_and_of_tal():
    def compare(folder: str, setting: str) -> float:
        methods = read_comparison(folder)[setting]
        return methods["eccl"]["costs"]["seconds"] / methods["tal"]["costs"]["seconds"]

    usual = [compare(folder, "usual") for folder in (".", "losses")]
    others = [compare("settings", f"persons_{persons}") for persons in (300, 3000, 11000)]
    page, readme = map(read_words, ("docs/evidence.md", "README.md"))
    assert (
        "took {1:.1f} times as long as one of TAL with 300 persons, {0[0]:.1f} to {0[1]:.1f} times with 1,000, "
        "{2:.1f} times with 3,000, and {3:.1f} times with 11,000"
    ).format(usual, *others) in page
    shown = (
        f"{usual[0]:.1f} to {usual[1]:.1f} times as long as with TAL, and {others[-1]:.1f} times with 11,000 persons"
    )
    assert shown in readme


def test_the_table_of_losses_shows_the_figures_of_the_comparison():
    compared = read_comparison("losses")
    head, *rows = read_table("docs/evidence.md", "## What each loss brings")
    settings = sorted(compared, key=lambda setting: DRAWN[setting].train_ids)
    assert head[1:] == [f"{DRAWN[setting].train_ids:,} persons" for setting in settings]
    for (title, *cells), name in zip(rows, compared["usual"], strict=True):
        assert title == ALL_METHODS[name].title
        for cell, setting in zip(cells, settings, strict=True):
            require_figures(cell, compared[setting][name])
    first = read_comparison(".")["usual"]
    rates = [
        [compared["usual"][name]["options"][option] for option in ("learning_rate", "lora_learning_rate")]
        for name in ("tal", "memories_only")
    ]
    assert rates[0] == rates[1] and "The search has chosen the same rates for both." in read_words("docs/evidence.md")
    # Their searches and trainings were made again for this report, with the same figures.
    again = compared["usual"].keys() & first.keys()
    assert again == {"infonce", "tal", "eccl"}
    assert all(compared["usual"][name]["test"] == first[name]["test"] for name in again)
    before, now = map(read_trials, (".", "losses"))
    assert all(now[name] == before[name] for name in again)


def read_variants() -> dict:
    """The methods of both reports of the variants. ECCL was trained for each of them, with the same figures."""
    first, second = (read_comparison(folder)["usual"] for folder in ("variants", "more_variants"))
    assert first.keys() & second.keys() == {"eccl"} and first["eccl"]["test"] == second["eccl"]["test"]
    return first | second


@pytest.mark.parametrize(
    ("heading", "read"),
    [
        ("## Variants of ECCL", read_variants),
        ("### Two changes of the losses", lambda: read_comparison("experiments")["usual"]),
    ],
    ids=["variants", "experiments"],
)
def test_the_table_of_variants_shows_the_figures_of_the_comparison(heading, read):
    methods = read()
    _, *rows = read_table("docs/evidence.md", heading)
    # The rows are in the order of the code, and methods that were removed come first.
    names = sorted(methods, key=lambda name: list(ALL_METHODS).index(name) if name in ALL_METHODS else -1)
    for row, name in zip(rows, names, strict=True):
        # A method that was removed has its title in its report only.
        assert name not in ALL_METHODS or row[0] == ALL_METHODS[name].title
        require_figures(row[1], methods[name])
        assert row[2:] == [show_difference(methods[name], metric) for metric in ("rank1", "mAP")]


def test_the_page_counts_the_ablations_that_have_not_been_run():
    missing = ABLATIONS.keys() - read_variants().keys()
    page = read_words("docs/evidence.md")
    assert f"{len(missing)} of the {len(ABLATIONS)} ablations" in page


@pytest.fixture
def records(tmp_path) -> Path:
    """A folder with the records that the project ships, as `tar` would unpack them."""
    with tarfile.open(ROOT / "docs" / "comparison" / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def read_scores(records: Path) -> dict[tuple[str, str], list[PersonScores]]:
    """The scores of each seed on the test split, by setting and method."""
    scores: dict[tuple[str, str], list[PersonScores]] = {}
    for file in sorted(records.glob("runs/*/*/seed-*/test.json")):
        setting, method = file.parts[-4:-2]
        scores.setdefault((setting, method), []).append(scores_from_json(json.loads(file.read_text())))
    return scores


def test_the_figures_of_the_reports_are_those_of_the_records(records):
    """Computes each mean and each interval again, from the scores of each person."""
    scores, found = read_scores(records), set()
    # The other reports have another protocol.
    for folder in (".", "settings", "losses", "variants", "more_variants", "captions_4"):
        for setting, methods in read_comparison(folder).items():
            for name in methods.keys() & {method for of_setting, method in scores if of_setting == setting}:
                runs, reported = scores[setting, name], methods[name]
                for metric, figures in reported["test"].items():
                    assert [each.mean(metric) for each in runs] == pytest.approx(figures, abs=1e-3)
                for metric, interval in reported.get("reference_minus_this", {}).items():
                    again = paired_bootstrap(scores[setting, "eccl"], runs, metric)
                    assert again == pytest.approx(tuple(interval.values()), abs=1e-6)
                found.add((setting, name))
    assert found == scores.keys()


@pytest.mark.parametrize(
    ("metric", "heading"),
    [
        ("rank1", "The differences in Rank-1:"),
        ("mAP", "The differences in mAP:"),
    ],
)
def test_the_differences_of_the_losses_are_computed_from_the_records(metric, heading, records):
    scores, methods = read_scores(records), read_comparison("losses")
    _, *rows = read_table("docs/evidence.md", heading)
    names = {ALL_METHODS[name].title.removesuffix(", no TAL"): name for name in methods["usual"]}
    assert {title.split(" minus ")[0] for title, *_ in rows} == {"ECCL", "TAL", "both memories"}
    for title, *cells in rows:
        first, second = (names[part] for part in title.split(" minus "))
        assert cells == [
            show_interval(*paired_bootstrap(scores[setting, first], scores[setting, second], metric))
            for setting in sorted(methods, key=lambda setting: DRAWN[setting].train_ids)
        ]


def test_the_table_of_drifts_is_computed_from_the_records(records):
    head, *rows = read_table("docs/evidence.md", "### How old the rows are")
    shown = {
        "300 persons": ("persons_300", "eccl"),
        "1,000 persons": ("usual", "eccl"),
        "1,000 persons, no augmentation": ("usual", "no_augmentation"),
        "3,000 persons": ("persons_3000", "eccl"),
        "11,000 persons": ("persons_11000", "eccl"),
    }
    assert [title for title, *_ in rows] == list(shown)
    for (_, *cells), (setting, method) in zip(rows, shown.values(), strict=True):
        logs = [
            json.loads(file.read_text())["log_history"]
            for file in sorted((records / "runs" / setting / method).glob("seed-*/run.json"))
        ]
        assert len(logs) == 5
        persons, images = DRAWN[setting].train_ids, DRAWN[setting].train_ids * DRAWN[setting].images_per_id
        for of_memory, rows_of_memory, memory in ((cells[:3], persons, "identity"), (cells[3:], images, "instance")):
            drifts = []
            for rows_of in ("image", "text"):
                key = f"{memory}_memory_drift_{rows_of}"
                last = [[entry for entry in log if key in entry][-1] for log in logs]
                assert {entry["step"] for entry in last} == {120}
                drifts.append(f"{statistics.mean(entry[key] for entry in last):.2f}")
            assert of_memory == [f"{64 * 120 / rows_of_memory:.1f}", *drifts]
    assert head[1:] == [
        f"{memory} memory: {column}" for memory in ("identity", "instance") for column in ("updates", "images", "texts")
    ]


@pytest.mark.slow
def test_the_records_are_used_again_and_nothing_is_trained(records, capfd):
    conditions = json.loads((records / "runs" / "usual" / "eccl" / "seed-0" / "run.json").read_text())["conditions"]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if conditions["versions"] != versions:
        pytest.skip(f"the records are of {conditions['versions']}, and this is {versions}")
    compare_methods.main(["--methods", "tal", "eccl", "--settings", "usual", "--output_dir", str(records)])
    printed = capfd.readouterr().err
    assert "16 of 16 runs have finished before" in printed and "10 of 10 runs have finished before" in printed
    again, reported = (
        json.loads((folder / "comparison.json").read_text()) for folder in (records, ROOT / "docs" / "comparison")
    )
    for name in ("tal", "eccl"):
        now, before = (each["settings"]["usual"]["methods"][name] for each in (again, reported))
        # The costs depend on the machine.
        assert now | {"costs": {}} == before | {"costs": {}} and again["trials"][name] == reported["trials"][name]


def test_the_page_lists_the_settings():
    _, *rows = read_table("docs/evidence.md", "Other settings and methods:")
    assert re.findall(r"`(\w+)`", " ".join(row[0] for row in rows)) == list(DRAWN)


def test_the_tables_of_published_figures_show_those_of_the_file():
    published = json.loads((ROOT / "eval" / "published_results.json").read_text())
    page = (ROOT / "docs" / "reproduce.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if re.match(r"\| .* \d\d\.\d\d / ", line)]
    for name, *cells in rows:
        expected = []
        for benchmark in ("cuhk_pedes", "icfg_pedes", "rstpreid"):
            found = next((row for row in published[benchmark] if row["method"] == name), None)
            figures = [found[metric] for metric in ("rank1", "rank5", "rank10", "mAP")] if found else []
            expected.append(" / ".join("-" if each is None else f"{each:.2f}" for each in figures) or "-")
        assert [cell for cell in cells if cell == "-" or " / " in cell] == expected, name
    # The published row of CMPM/C has other encoders: the text names it.
    assert {name for name, *_ in rows} == {row["method"] for row in published["cuhk_pedes"]} - {"CMPM/C"}


def test_the_loops_of_the_page_give_commands_that_the_programs_take(tmp_path):
    """Runs the `~~~sh` blocks of docs/reproduce.md with programs that write their arguments down and train nothing."""
    for name in ("accelerate", "eccl-evaluate"):
        (tmp_path / name).write_text(
            f"""#!{sys.executable}
import json, pathlib, sys
words = sys.argv[1:]
with open("commands.txt", "a") as log:
    log.write(json.dumps([{name!r}, *words]) + "\\n")
if {name!r} == "accelerate":
    pathlib.Path(words[words.index("--output_dir") + 1]).mkdir(parents=True)
"""
        )
        (tmp_path / name).chmod(0o755)
    page = (ROOT / "docs" / "reproduce.md").read_text()
    blocks = re.findall(r"^~~~sh\n(.*?)^~~~$", page, re.MULTILINE | re.DOTALL)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", "".join(blocks)], cwd=tmp_path, env=variables, check=True)
    *trainings, evaluation = map(json.loads, (tmp_path / "commands.txt").read_text().splitlines())
    benchmarks = {"cuhk_pedes": "CUHK-PEDES", "icfg_pedes": "ICFG-PEDES", "rstpreid": "RSTPReid"}
    runs = set()
    for words in trainings:
        check_arguments(words)
        recipes, seed = train_eccl.name_recipes(module_and_arguments(words)[1]), words[words.index("--seed") + 1]
        folder, data = (words[words.index(option) + 1] for option in ("--output_dir", "--data_dir"))
        benchmark, method = recipes[0].removeprefix("eccl_"), recipes[1].removeprefix("baselines/")
        assert folder == f"runs/best2-{method}-{benchmark}-{seed}" and len(recipes) == 2
        assert data == f"/data/{benchmarks[benchmark]}"
        runs.add((method, benchmark, seed))
    methods = {path.stem for path in (ROOT / "recipes" / "baselines").glob("*.yaml")}
    assert runs == {(m, b, s) for m in methods for b in benchmarks for s in "123"} and len(trainings) == len(runs)
    check_arguments(evaluation)
    assert evaluation.count("--model") == sum(benchmark == "rstpreid" for _, benchmark, _ in runs)


def test_every_exception_is_still_needed():
    commands = [" ".join(words) for block in BLOCKS if block.language == "sh" for words in shell_commands(block)]
    for part in NOT_RUN:
        assert any(part in command for command in commands), f"no page has {part}: remove it from NOT_RUN"


class Reader:
    """A folder that looks like a clone after `make demo`, with the files that the pages name.

    Args:
        folder: an empty folder.
        hub: stands for the Hub.

    Attributes:
        demo_output: what `make demo` printed.
        unwanted: a line for each command that printed one of the phrases in `UNWANTED`.
    """

    def __init__(self, folder: Path, hub: LoopbackHub):
        self.folder, self.demo_output, self.unwanted = folder, "", []
        self.variables = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_XET": "1",
        }
        for path in ROOT.iterdir():
            if not path.name.startswith(".") and path.name not in ("demo", "build", "dist", "data", "runs"):
                (folder / path.name).symlink_to(path)

    def run(self, *command: str) -> str:
        """Runs a command, notes unwanted warnings, and returns what the command printed on stdout."""
        command = [re.sub(r"(?<![\w.])/data/", f"{self.folder}/data/", word) for word in command]
        done = subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        self.unwanted += [f"{' '.join(command)[:200]}: {phrase}" for phrase in UNWANTED if phrase in done.stderr]
        return done.stdout

    def run_words(self, words: list[str]) -> str:
        """Runs a command of a page; a command that trains gets the arguments in `SHORTER` in addition."""
        if any(part in " ".join(words) for part in NOT_RUN):
            return ""
        if words == ["make", "demo"]:
            return "".join(map(self.run_words, demo_commands()))
        if any(part in words for part in TRAINING):
            # Several blocks train into the same folder; a reader runs one of them.
            fresh = () if "--resume_from_checkpoint" in words else ("--overwrite", "True")
            words = [*words, *SHORTER, *fresh]
        if words[0] == "accelerate":
            return self.run(sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:])
        if words[0] in SCRIPTS:
            return self.run(sys.executable, "-m", SCRIPTS[words[0]].partition(":")[0], *words[1:])
        assert words[0] == "python", f"{words}: the test does not know how to run it; NOT_RUN gives reasons not to"
        return self.run(sys.executable, *words[1:])

    def run_block(self, block: Block) -> str:
        if block.language == "python":
            return self.run(sys.executable, "-c", block.text)
        return "".join(map(self.run_words, shell_commands(block)))


def demo_commands() -> list[list[str]]:
    """Returns the commands that `make demo` runs, apart from the installation."""
    lines = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [shlex.split(line.removeprefix(".venv/bin/")) for line in lines.splitlines() if DEMO_COMMAND.match(line)]


def agrees(expected: str, printed: str) -> bool:
    """Whether two lines have the same words; numbers with a decimal point may differ by the processor's rounding."""
    ours, theirs = (re.split(r"(\d+\.\d+)", " ".join(line.split())) for line in (expected, printed))
    return len(ours) == len(theirs) and all(
        math.isclose(float(a), float(b), rel_tol=0.01, abs_tol=0.005) if index % 2 else a == b
        for index, (a, b) in enumerate(zip(ours, theirs, strict=True))
    )


def tiny_clip(folder: Path) -> None:
    """Writes a CLIP with random weights, 16 x 16 pixel patches and CLIP's own tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=sizes, vision_config={**sizes, "patch_size": 16}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)


def original_checkpoint(file: Path) -> None:
    """Writes a checkpoint of the original code with the vocabulary and the image size of the published model."""
    content = torch.load(ROOT / "tests" / "goldens" / "eccl_original.pth", weights_only=True)
    state, generator = content["model"], torch.Generator().manual_seed(0)
    for name, rows in (
        ("clip_model.token_embedding.weight", 49_408),
        ("image_encoder.positional_embedding", 1 + 24 * 8),
    ):
        state[name] = torch.randn(rows, state[name].shape[1], generator=generator)
    torch.save(content, file)


def pretrained_checkpoint(file: Path) -> None:
    """Writes a checkpoint as MLLM4Text-ReID has it, with the vocabulary and the image size of the published model."""
    content = torch.load(ROOT / "tests" / "goldens" / "irra_pretrained.pth", weights_only=True)
    state, generator = content["model"], torch.Generator().manual_seed(0)
    for name, rows in (("token_embedding.weight", 49_408), ("visual.positional_embedding", 1 + 24 * 8)):
        width = state[f"base_model.{name}"].shape[1]
        state[f"base_model.{name}"] = torch.randn(rows, width, generator=generator)
    torch.save(content, file)


def write_own_data(reader: "Reader", hub: LoopbackHub) -> None:
    """Writes `/data/mine.csv`, and puts a data set on the Hub: both have the images of RSTPReid."""
    data = reader.folder / "data"
    records = json.loads((data / "RSTPReid" / "data_captions.json").read_text())
    lines = ["image,caption,pid"]
    for record in records:
        lines += [f'RSTPReid/imgs/{record["img_path"]},"{caption}",{record["id"]}' for caption in record["captions"]]
    (data / "mine.csv").write_text("\n".join(lines))
    (data / "crops.csv").write_text("\n".join(["crop,sentence,who", *lines[1:]]))
    words = ["rstpreid", "--data_dir", "/data/RSTPReid", "--output_dir", "for-the-hub"]
    reader.run(sys.executable, "-m", "eccl.dataset_scripts.export", *words)
    exported = reader.folder / "for-the-hub"
    files = {path.relative_to(exported).as_posix(): path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    hub.repositories["dataset", "me/my-pedes"] = {"private": True, "commits": [("0" * 40, files)]}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    hub = LoopbackHub()
    folder = tmp_path_factory.mktemp("reader")
    tiny_clip(folder / "clip")
    files = {path.name: path.read_bytes() for path in (folder / "clip").iterdir()}
    hub.repositories["model", "openai/clip-vit-base-patch16"] = {"private": False, "commits": [("0" * 40, files)]}
    reader = Reader(folder, hub)
    for layout, name in (("cuhk_pedes", "CUHK-PEDES"), ("icfg_pedes", "ICFG-PEDES"), ("rstpreid", "RSTPReid")):
        sizes = {"train_ids": 4, "val_ids": 0 if layout == "icfg_pedes" else 2, "test_ids": 2, "images_per_id": 2}
        write_benchmark(SyntheticBenchmark(layout, **sizes), folder / "data" / name, num_workers=1)
    write_own_data(reader, hub)
    original_checkpoint(folder / "best.pth")
    pretrained_checkpoint(folder / "best2.pth")
    reader.demo_output = reader.run_words(["make", "demo"])
    shutil.copy(next((folder / "demo" / "data" / "imgs").rglob("*.jpg")), folder / "person.jpg")
    words = ["train_eccl.py", "recipes/eccl_rstpreid.yaml", "--data_dir", "/data/RSTPReid", "--eval_strategy", "no"]
    words += ["--save_strategy", "no", "--load_best_model_at_end", "False", "--output_dir", "runs/rstpreid"]
    reader.run_words(["python", *words, "--init_from", "openai/clip-vit-base-patch16"])
    shutil.copytree(folder / "runs" / "rstpreid", folder / "runs" / "cuhk")
    yield reader
    hub.close()


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs_and_prints_what_the_page_says(page, reader):
    printed = ""
    for block in read_blocks(page):
        if block.language == "text":
            lines = iter(printed.splitlines())
            for expected in block.text.splitlines():
                if not expected.startswith(CHANGED_BY_SHORTER):
                    assert any(agrees(expected, line) for line in lines), f"{block}: {expected!r} not in:\n{printed}"
        elif block.language != "yaml":
            is_demo = "make demo" in block.text
            printed = reader.demo_output if is_demo else reader.run_block(block)


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
def test_no_command_of_the_pages_printed_an_unwanted_warning(reader):
    assert not reader.unwanted, "\n".join(reader.unwanted)
