"""The comparison of methods: its search, its statistics, its runs and its report."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from eccl.dataset_scripts.synthetic import SyntheticBenchmark, write_benchmark
from eccl.eval import compare_methods
from eccl.eval.compare_methods import choose_options, search
from eccl.eval.comparison.methods import ALL_METHODS, METHODS, REFERENCE, draw_trials
from eccl.eval.comparison.planning import Planner, Setting
from eccl.eval.comparison.report import (
    OUTPUTS,
    Outcome,
    Trial,
    draw_differences,
    draw_learning_curves,
    find_best,
    make_content,
    make_search_section,
    make_summary,
    make_tables,
    summarise,
)
from eccl.eval.comparison.runs import score_similarities, scores_from_json, scores_to_json
from eccl.eval.comparison.statistics import METRICS, PersonScores, mean_and_deviation, paired_bootstrap
from eccl.utils.shipped import find_recipe, list_recipes
from helpers import PATIENCE, ROOT, train_eccl

# -- The search


@given(st.integers(2, 9), st.integers(0, 50))
def test_each_trial_tries_another_part_of_every_span(trials, seed):
    space = {"learning_rate": (1e-4, 1e-2), "tal_temperature": (0.01, 0.04)}
    drawn = draw_trials(space, trials, seed)
    assert len(drawn) == trials and drawn[0] == {} and drawn == draw_trials(space, trials, seed)
    for name, (least, most) in space.items():
        places = sorted(np.log(options[name] / least) / np.log(most / least) * (trials - 1) for options in drawn[1:])
        # Three digits are kept, so a value can leave its part by a little.
        assert all(part - 0.02 <= place <= part + 1.02 for part, place in enumerate(places))


def test_without_a_space_there_is_one_trial():
    assert draw_trials({}, 7, 0) == [{}]


def test_every_method_has_a_recipe_and_every_recipe_a_method():
    recipes = {method.recipe for method in METHODS.values() if method.recipe}
    assert recipes == {name for name in list_recipes() if name.startswith("baselines/")}
    assert all(find_recipe(recipe).is_file() for recipe in recipes)
    assert METHODS[REFERENCE].recipe == "baselines/eccl" and METHODS["zero_shot"].recipe is None


@pytest.mark.parametrize("name", [name for name, method in ALL_METHODS.items() if method.recipe])
def test_the_training_command_takes_every_trial_of_every_method(name, tmp_path):
    method = ALL_METHODS[name]
    recipe, protocol = {}, yaml.safe_load(find_recipe("comparison").read_text())
    recipe |= yaml.safe_load(find_recipe(method.recipe).read_text())
    # The protocol is the same for each method: it must not set what a method sets.
    assert not {*recipe, *method.space, *method.changes} & {*protocol} - {"per_device_train_batch_size", "adam_epsilon"}
    for options in draw_trials(method.space, 3, 0):
        values = {**options, **method.changes, "output_dir": tmp_path}
        words = [word for option, value in values.items() for word in (f"--{option}", *str(value).split())]
        _, _, args = train_eccl.parse_arguments([method.recipe, "comparison", *words])
        assert args.max_steps == 120 and args.per_device_train_batch_size == 64
        assert all(getattr(args, option) == pytest.approx(value) for option, value in options.items())


# -- The statistics


def make_scores(rng, persons=40, better=0.0):
    queries = rng.integers(1, 5, persons)
    values = {metric: np.clip(rng.normal(60 + better, 15, persons), 0, 100) * queries for metric in METRICS}
    return PersonScores(queries, values)


def test_scores_by_person_are_those_of_the_metric():
    """The reference is a loop over the queries, with a full sort of each."""
    rng = np.random.default_rng(0)
    gallery_ids, query_ids = np.array([7, 3, 7, 9, 3, 9, 9]), np.array([9, 3, 7, 7, 3, 9])
    queries, gallery = rng.normal(size=(6, 5)).astype("f"), rng.normal(size=(7, 5)).astype("f")
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, gallery)]
    found = score_similarities(unit[0] @ unit[1].T, query_ids, gallery_ids)
    expected = {person: {"n": 0, **dict.fromkeys(METRICS, 0.0)} for person in (3, 7, 9)}
    for query, person in zip(unit[0], query_ids, strict=True):
        hits = np.flatnonzero(gallery_ids[np.argsort(-(unit[1] @ query))] == person) + 1
        entry = expected[int(person)]
        entry["n"] += 1
        for k in (1, 5, 10):
            entry[f"rank{k}"] += 100 * (hits[0] <= k)
        entry["mAP"] += 100 * np.mean(np.arange(1, len(hits) + 1) / hits)
        entry["mINP"] += 100 * len(hits) / hits[-1]
    assert found.queries.tolist() == [entry["n"] for entry in expected.values()]
    for metric in METRICS:
        np.testing.assert_allclose(found.sums[metric], [entry[metric] for entry in expected.values()], rtol=1e-6)
    total = sum(entry["mAP"] for entry in expected.values()) / len(query_ids)
    assert found.mean("mAP") == pytest.approx(total)
    again = scores_from_json(json.loads(json.dumps(scores_to_json(found))))
    assert again.mean("mINP") == pytest.approx(found.mean("mINP"), abs=1e-3)


def test_the_mean_and_the_deviation():
    mean, deviation = mean_and_deviation([1.0, 2.0, 6.0])
    assert (mean, deviation) == (3.0, pytest.approx(7**0.5))
    assert np.isnan(mean_and_deviation([1.0])[1])


def test_the_interval_over_persons_agrees_with_scipy():
    """scipy resamples the persons of one run; each person has the same number of queries, so a mean is a mean."""
    rng = np.random.default_rng(1)
    queries = np.full(60, 4)
    ours, theirs = (
        PersonScores(queries, {metric: 4 * rng.normal(60 + shift, 15, 60) for metric in METRICS}) for shift in (3, 0)
    )
    found = paired_bootstrap([ours], [theirs], "mAP", resamples=20_000)
    differences = (ours.sums["mAP"] - theirs.sums["mAP"]) / 4
    reference = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    spread = reference.high - reference.low
    assert found.difference == pytest.approx(differences.mean())
    assert abs(found.low - reference.low) < 0.04 * spread and abs(found.high - reference.high) < 0.04 * spread


def shift(base, points):
    """Every query of every person is better by so many points."""
    return PersonScores(base.queries, {name: sums + points * base.queries for name, sums in base.sums.items()})


def test_seeds_that_differ_widen_the_interval():
    base = make_scores(np.random.default_rng(3))
    alike = paired_bootstrap([shift(base, 2)] * 5, [base] * 5, "rank1")
    # The same shift for every person: only the seeds can make the interval wide.
    assert alike.low == pytest.approx(2) and alike.high == pytest.approx(2) and alike.excludes_zero
    spread = [shift(base, points) for points in (-4, 0, 2, 4, 8)]
    wide = paired_bootstrap(spread, [base] * 5, "rank1")
    # The interval of the t-test of these five differences.
    expected = stats.ttest_1samp([-4, 0, 2, 4, 8], 0).confidence_interval(0.95)
    assert wide.difference == pytest.approx(2) and not wide.excludes_zero
    assert wide.low == pytest.approx(expected.low, abs=0.25) and wide.high == pytest.approx(expected.high, abs=0.25)
    # A method that is not trained has one entry for all seeds.
    assert paired_bootstrap(spread, [base], "rank1") == wide


@pytest.mark.parametrize(
    ("persons", "seeds", "both", "least", "most"),
    # The last two are as in a comparison of ECCL with TAL: the same person is found with one seed and not with another.
    [
        (6.0, 0.0, 0.0, 0.84, 0.96),
        (0.0, 1.5, 0.0, 0.84, 0.96),
        (4.0, 1.0, 0.0, 0.84, 0.96),
        (3.0, 1.0, 12.0, 0.92, 1.0),
        (0.0, 0.0, 9.0, 0.92, 1.0),
    ],
)
def test_nine_in_ten_intervals_hold_the_true_difference(persons, seeds, both, least, most):
    """400 experiments with five seeds; the true difference is 1. Four standard errors of 90 % are 6 %.

    What differs by person and seed counts twice, so then the intervals are too wide.
    """
    rng = np.random.default_rng(5)
    queries = np.full(60, 2)
    base = PersonScores(queries, {"rank1": np.full(60, 100.0)})
    held = 0
    for experiment in range(400):
        of_persons = rng.normal(1, persons, 60)
        runs = [
            PersonScores(queries, {"rank1": 2 * (50 + of_persons + rng.normal(0, seeds) + rng.normal(0, both, 60))})
            for _ in range(5)
        ]
        interval = paired_bootstrap(runs, [base], "rank1", 300, 0.9, experiment)
        held += interval.low <= 1 <= interval.high
    assert least <= held / 400 <= most


def test_runs_that_do_not_belong_together_are_refused():
    rng = np.random.default_rng(6)
    one, other = make_scores(rng), make_scores(rng)
    with pytest.raises(ValueError, match="scored on different queries"):
        paired_bootstrap([one], [other], "rank1")
    with pytest.raises(ValueError, match="there are 3 and 2 runs: each seed needs a run of both methods"):
        paired_bootstrap([one] * 3, [one] * 2, "rank1")


# -- The report


@pytest.fixture
def outcome():
    base = make_scores(np.random.default_rng(7))

    def method(name, points, seeds=3, options=None):
        scores = [shift(base, points + seed) for seed in range(seeds)]
        history = [{"step": step, "eval_rank1": 50.0 + step} for step in (2, 4)]
        record = {"trained_parameters": 1234, "pairs_per_second": 80.0, "peak_memory": 2**30, "log_history": history}
        return Outcome(name, scores, [record] * seeds if seeds > 1 else [{}], options or {})

    methods = [method("zero_shot", -10, 1), method("tal", 5, options={"learning_rate": 0.002}), method("eccl", 6)]
    return summarise("usual", "A drawn benchmark", 98.7, methods, 500)


def test_the_table_shows_means_deviations_and_intervals(outcome):
    text = make_tables([outcome])
    base = outcome.outcomes[1].figures("rank1")
    assert f"| TAL | {np.mean(base):.2f} ± 1.00 |" in text
    # Each seed is better by exactly one point for each person.
    assert "**+1.00 (+1.00 to +1.00)**" in text and "The oracle's Rank-1 is 98.7." in text
    assert "| TAL | 1,234 | 80 | 1.00 | learning_rate 0.002 |" in text
    # A method that is not trained has no deviation and no costs, and the reference no difference to itself.
    assert re.search(r"\| zero-shot \| \d+\.\d\d \|", text) and text.count("zero-shot") == 2
    assert re.search(r"\| ECCL \|.*\| - \| - \|", text)
    content = make_content({"seeds": 3}, [outcome], {})["settings"]["usual"]
    assert content["methods"]["tal"]["reference_minus_this"]["mAP"]["difference"] == pytest.approx(1)
    assert "reference_minus_this" not in content["methods"]["eccl"]


def test_the_report_has_every_trial_of_the_search():
    base = make_scores(np.random.default_rng(3))
    figures = [base.mean(metric) for metric in ("rank1", "mAP")]
    tal = [Trial({}, base), Trial({"learning_rate": 0.2}, None), Trial({"learning_rate": 0.1}, shift(base, 2))]
    trials = {"zero_shot": [], "tal": [*tal, Trial({"learning_rate": 0.3}, shift(base, 2))]}
    # Of two equal trials the earlier one is chosen.
    assert find_best(trials["tal"]) is tal[2] and find_best(tal[1:2]) is None and find_best([]) is None
    cells = [f"{figure:.1f}, -, **{figure + 2:.1f}**, {figure + 2:.1f}" for figure in figures]
    assert make_search_section(trials).splitlines()[-1] == f"| TAL | {cells[0]} | {cells[1]} |"
    assert make_search_section({"zero_shot": []}) == make_search_section({}) == ""
    content = make_content({}, [], trials)["trials"]
    assert list(content) == ["tal"] and content["tal"][1] == {"options": {"learning_rate": 0.2}, "val": None}
    assert content["tal"][2]["options"] == {"learning_rate": 0.1}
    assert content["tal"][2]["val"]["mAP"] == pytest.approx(figures[1] + 2, abs=1e-3)
    assert content["tal"][2]["val"].keys() == set(METRICS)


def test_the_summary_has_all_settings_side_by_side(outcome):
    zero_shot, tal, eccl = outcome.outcomes
    broken = replace(tal, scores=[tal.scores[0], None, tal.scores[2]])
    other = summarise("hard", "x", None, [zero_shot, broken, eccl], 200)
    rows = [line.strip("| ").split(" | ") for line in make_summary([outcome, other]).splitlines()]
    assert rows[0] == ["method", "usual: Rank-1", "ECCL minus this", "hard: Rank-1", "ECCL minus this"]
    figures, base = tal.figures("rank1"), zero_shot.figures("rank1")[0]
    cells = [f"{np.mean(figures):.1f} ± 1.0", "**+1.0 (+1.0 to +1.0)**"]
    cells += [f"{np.mean(figures):.1f} ± 1.4 (1 of 3 seeds diverged)", "-"]
    assert rows[3] == ["TAL", *cells]
    low, high = other.intervals["rank1"]["zero_shot"][1:]
    assert rows[2][3:] == [f"{base:.1f}", f"**+17.0 ({low:+.1f} to {high:+.1f})**"]
    assert rows[4][0] == "ECCL" and rows[4][2] == rows[4][4] == "-"


def test_a_seed_without_scores_is_counted_and_its_method_not_compared(outcome):
    zero_shot, tal, eccl = outcome.outcomes
    broken = replace(tal, scores=[tal.scores[0], None, tal.scores[2]], records=[{"diverged": "step 3: ..."}] * 3)
    text = make_tables([summarise("usual", "x", None, [zero_shot, broken, eccl], 200)])
    assert re.search(r"\| TAL \(1 of 3 seeds diverged\) \| \d.*\| - \| - \|", text)
    assert re.search(r"\| zero-shot \|.*\+17\.00", text)
    # Without the reference, or without its scores, there is nothing to compare with.
    for outcomes in ([zero_shot, tal], [tal, replace(eccl, scores=[None] * 3)]):
        found = summarise("usual", "x", None, outcomes, 200)
        assert not any(found.intervals.values()) and "minus this" not in make_tables([found])
        assert draw_differences([found]).width > 300 and draw_learning_curves([found]).width > 300


def test_the_dots_of_the_picture_are_where_the_differences_are(outcome):
    picture = np.asarray(draw_differences([outcome])).astype(int)
    blue = np.abs(picture - [31, 97, 181]).max(axis=2) < 40
    rows = np.flatnonzero(blue.any(axis=1))
    upper, lower = (blue[part].nonzero()[1] for part in np.split(rows, [np.flatnonzero(np.diff(rows) > 5)[0] + 1]))
    # Both panels show +17 in the row of zero-shot and +1 in that of TAL.
    ticks = (np.median(upper[upper < upper.mean()]), np.median(lower[lower < lower.mean()]))
    assert ticks[0] - ticks[1] > 100
    assert np.ptp(upper) > 250 and np.ptp(lower) > 250


# -- The search


class FakePool:
    """Gives each run the figure of its method and trial."""

    def __init__(self, figures):
        self.figures, self.asked = figures, []

    def execute(self, runs, splits):
        self.asked += [run.title for run in runs]
        return [self._record(self.figures[run.method][int(run.name.removeprefix("trial-"))]) for run in runs]

    def _record(self, figure):
        if figure is None:
            return {"diverged": "step 2: the loss is nan"}
        return {"val": {"queries": [2, 1], **{metric: [2 * figure, figure] for metric in METRICS}}}


@pytest.fixture
def planner(backbone, tmp_path):
    return Planner(str(backbone), ["comparison"], None, 4, 2, tmp_path / "runs")


def test_the_search_takes_the_best_trial_of_each_method(planner):
    setting = Setting("s", "", None, {}, {"val": None}, {"train": "a", "val": "b", "test": "c"})
    figures = {
        "infonce": [10, 20, 30, 5],
        "tal": [90, 20, 30, 5],
        "irra": [None, 20, None, 50],
        "eccl": [1, 99, 2, 3],
    }
    pool = FakePool(figures)
    methods = ["zero_shot", *figures, "rank_2"]
    trials = search(planner, methods, setting, pool)
    assert [trial.scores and trial.scores.mean("mAP") for trial in trials["irra"]] == [None, 20, None, 50]
    chosen = choose_options(methods, trials)
    assert len(pool.asked) == 16 and list(chosen) == methods
    for method, best in (("infonce", 2), ("tal", 0), ("irra", 3), ("eccl", 1)):
        assert chosen[method] == planner.draw_trials(method)[best], method
    assert chosen["tal"] == chosen["zero_shot"] == {} and chosen["rank_2"] == chosen["eccl"] != {}
    # A variant alone asks for the search of the reference.
    alone = search(planner, ["rank_2"], setting, pool)
    assert list(alone) == ["eccl"] and choose_options(["rank_2"], alone) == {"rank_2": chosen["eccl"]}
    broken = search(planner, ["infonce", "tal"], setting, FakePool(figures | {"tal": [None] * 4}))
    with pytest.raises(ValueError, match="no trial of tal has a finite loss"):
        choose_options(["infonce", "tal"], broken)


def test_a_later_recipe_of_the_protocol_overrides_an_earlier_one(backbone, tmp_path):
    batch = tmp_path / "batch.yaml"
    batch.write_text("per_device_train_batch_size: 16\n")
    planner = Planner(str(backbone), ["comparison", str(batch)], None, 1, 1, tmp_path)
    (run,) = planner.final_runs(Setting("s", "", None, {}, None, {}), "tal", {})
    arguments = train_eccl.parse_arguments([*run.words, "--data_dir", "d", "--output_dir", "o"])[-1]
    expected = run.conditions["protocol"]
    assert expected["per_device_train_batch_size"] == 16 and expected["max_steps"] == 120
    assert (arguments.per_device_train_batch_size, arguments.max_steps) == (16, 120)


def test_a_run_is_used_again_only_under_the_same_conditions(planner, tmp_path):
    setting = Setting("s", "", None, {}, None, {"train": "a", "val": "b", "test": "c"})
    (run,) = planner.final_runs(setting, "tal", {"learning_rate": 0.002})[:1]
    assert run.read_record() is None and not run.is_trial and planner.trial_runs(setting, "tal")[0].is_trial
    run.folder.mkdir(parents=True)
    run.record_file.write_text(json.dumps({"conditions": dict(run.conditions), "val": {}}))
    assert run.read_record() is not None
    changed = replace(setting, digests={**setting.digests, "test": "d"})
    for changed_setting, rate, named in (
        (setting, 0.003, "options learning_rate: 0.002 instead of 0.003"),
        (changed, 0.002, "data test: c instead of d"),
    ):
        other = planner.final_runs(changed_setting, "tal", {"learning_rate": rate})[0]
        with pytest.raises(ValueError, match=rf"other conditions \({named}\): name another --output_dir") as raised:
            other.read_record()
        assert len(str(raised.value)) < 400


# -- The command

PROTOCOL = """
attn_implementation: eager
max_steps: 2
per_device_train_batch_size: 4
image_size: [32, 16]
lr_scheduler_type: cosine
logging_steps: 1
eval_strategy: steps
eval_steps: 1
save_strategy: "no"
load_best_model_at_end: false
disable_tqdm: true
report_to: none
"""


@pytest.fixture
def words(backbone, benchmark, tmp_path):
    """The command line of a comparison that takes a second a run, after the start of its process."""
    (tmp_path / "tiny.yaml").write_text(PROTOCOL)
    return [
        *("--dataset", "cuhk_pedes", "--data_dir", str(benchmark), "--model", str(backbone)),
        *("--protocol", str(tmp_path / "tiny.yaml"), "--output_dir", str(tmp_path / "out"), "--debug"),
        *("--resamples", "200"),
    ]


def running_under(folder):
    """The processes that have the folder in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            found += [file.parent.name] if any(word.startswith(f"{folder}/runs".encode()) for word in words) else []
    return found


@pytest.mark.slow
def test_a_comparison_that_was_killed_continues(words, tmp_path):
    words += ["--methods", "zero_shot", "eccl", "--seeds", "2", "--trials", "2"]
    out = tmp_path / "out"
    first = subprocess.Popen([sys.executable, "-m", "eccl.eval.compare_methods", *words])
    deadline = time.monotonic() + PATIENCE
    while not list(out.glob("runs/*/*/*/run.json")) and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.1)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    # The trainings that it has started end with it.
    deadline = time.monotonic() + 60
    while running_under(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not running_under(out)
    before = {path: path.read_bytes() for path in out.glob("runs/*/*/*/run.json")}
    assert before and not list(out.rglob("test.json")) and not (out / OUTPUTS[0]).exists()
    compare_methods.main(words)
    records = {path.relative_to(out / "runs" / "cuhk_pedes").parent.as_posix() for path in out.rglob("run.json")}
    trained = {f"eccl/{name}" for name in ("trial-0", "trial-1", "seed-0", "seed-1")}
    assert records == {"zero_shot/seed-0"} | trained
    assert all(path.read_bytes() == content for path, content in before.items())
    content = json.loads((out / "comparison.json").read_text())["settings"]["cuhk_pedes"]["methods"]
    assert [len(content[method]["test"]["rank1"]) for method in ("zero_shot", "eccl")] == [1, 2]
    assert content["zero_shot"]["reference_minus_this"].keys() == {"rank1", "mAP"}
    assert (
        set(content["eccl"]["options"]) <= set(METHODS["eccl"].space) and content["eccl"]["costs"]["peak_memory"] > 1e8
    )
    assert all(Image.open(out / name).width > 300 for name in OUTPUTS if name.endswith(".png"))
    # Models are removed after they are scored.
    assert not list(out.glob("runs/*/*/*/model"))
    # The chosen trial is the one with the higher mAP on the validation split.
    trials = [json.loads((out / f"runs/cuhk_pedes/eccl/trial-{n}/run.json").read_text()) for n in range(2)]
    figures = [scores_from_json(trial["val"]).mean("mAP") for trial in trials]
    assert "val" not in json.loads((out / "runs/cuhk_pedes/eccl/seed-0/run.json").read_text())
    assert bool(content["eccl"]["options"]) == (figures[1] > figures[0])
    reported = json.loads((out / "comparison.json").read_text())["trials"]["eccl"]
    assert [trial["val"]["mAP"] for trial in reported] == pytest.approx(figures, abs=1e-3)
    report = (out / "comparison.md").read_text()
    assert reported[0]["options"] == {} and "searched on cuhk_pedes" in report and "## The search" in report
    # The same command again trains nothing, and scores nothing again.
    times = {path: path.stat().st_mtime_ns for path in [*out.rglob("run.json"), *out.rglob("test.json")]}
    compare_methods.main(words)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(ValueError, match=r"was written under other conditions \(options .*: name another --output_dir"):
        compare_methods.main([*words, "--steps", "3"])


@pytest.mark.slow
def test_a_training_that_fails_stops_the_comparison(words, tmp_path):
    (tmp_path / "tiny.yaml").write_text(PROTOCOL.replace("max_steps: 2", "max_steps: 0"))
    with pytest.raises(ValueError, match=r"the training of cuhk_pedes, tal, seed-0 has failed: error: max_steps is 0"):
        compare_methods.main([*words, "--methods", "tal", "--trials", "1", "--seeds", "1"])
    # A trial whose loss is not finite is none; without any other, there is nothing to choose.
    (tmp_path / "tiny.yaml").write_text(PROTOCOL + "learning_rate: 1.0e+30\nlora_learning_rate: 1.0e+30\n")
    compare_methods.main([*words, "--methods", "zero_shot", "tal", "--trials", "1", "--seeds", "1"])
    report = (tmp_path / "out" / "comparison.md").read_text()
    assert "| TAL (1 of 1 seeds diverged) | - |" in report and "search" not in report


@pytest.mark.slow
def test_the_quick_comparison_of_the_makefile_draws_searches_trains_and_scores(tmp_path):
    """`make compare-quick` with two of its methods, which takes a quarter of the time."""
    printed = subprocess.run(
        ["make", "--dry-run", "compare-quick", f"DEMO={tmp_path}"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    (command,) = [line for line in printed.splitlines() if "eccl.eval.compare_methods" in line]
    seeds = {"zero_shot": 1, "eccl": 2}
    assert seeds.keys() < set(compare_methods.DEFAULT_METHODS)
    subprocess.run([sys.executable, *command.split()[1:], "--methods", *seeds], cwd=tmp_path, check=True)
    content = json.loads((tmp_path / "comparison-quick" / "comparison.json").read_text())
    assert list(content["settings"]) == ["quick"] and 50 < content["settings"]["quick"]["oracle_rank1"] <= 100
    methods = content["settings"]["quick"]["methods"]
    assert {name: len(method["test"]["rank1"]) for name, method in methods.items()} == seeds
    assert {name: len(trials) for name, trials in content["trials"].items()} == {"eccl": 2}
    report = (tmp_path / "comparison-quick" / "comparison.md").read_text()
    assert all(f"| {METHODS[name].title} | " in report for name in methods) and "The oracle's Rank-1 is" in report


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "irrra"], "--methods has 'irrra', it must be among zero_shot, infonce"),
        (["--settings", "quick"], "--settings are drawn benchmarks, and --dataset names another one"),
        (["--protocol", "none"], "there is no recipe 'none'"),
        (["--protocol", "alias.yaml"], "it has an alias (*name), which a recipe must not have"),
        (["--seeds", "0"], "argument --seeds: 0 is too small"),
    ],
)
def test_a_mistake_is_one_line_before_the_work(words, more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alias.yaml").write_text("max_steps: &steps 2\neval_steps: *steps\n")
    with pytest.raises(SystemExit) as exited:
        compare_methods.main([word for word in words if word != "--debug"] + more)
    error = capsys.readouterr().err.splitlines()[-1]
    assert exited.value.code == 2 and error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_and_a_data_set_without_val_are_refused(words, benchmark, backbone, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"has files that no comparison wrote \(thesis.txt\)"):
        compare_methods.main(words)
    icfg = tmp_path / "icfg"
    write_benchmark(SyntheticBenchmark("icfg_pedes", train_ids=2, val_ids=0, test_ids=1, images_per_id=1), icfg, 1)
    words[words.index("cuhk_pedes")] = "icfg_pedes"
    words[words.index(str(benchmark))] = str(icfg)
    words[words.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    with pytest.raises(ValueError, match="icfg_pedes has no split val: a comparison trains on train, searches on val"):
        compare_methods.main(words)
