"""The report of a comparison: tables, JSON, and pictures with error bars."""

import colorsys
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from ...hub.model_card import METRICS as TITLES
from ...utils.files import complete_file
from ...utils.text import plain_markdown, printable
from .methods import ALL_METHODS, REFERENCE
from .statistics import METRICS, Interval, PersonScores, mean_and_deviation, paired_bootstrap

OUTPUTS = ("comparison.json", "comparison.md", "differences.png", "learning_curves.png")
COMPARED = ("rank1", "mAP")
"""The metrics whose differences have an interval."""
# Pictures are drawn at twice the size and reduced, for smooth edges.
_SCALE = 2
_BETTER, _WORSE, _UNCLEAR = (31, 97, 181), (176, 40, 60), (90, 90, 90)
_FONT = 13 * _SCALE
_GREY = (222, 222, 222)


@dataclass(frozen=True)
class Trial:
    """One run of a search.

    Args:
        options: the options that it has tried; none if it has those of the recipe.
        scores: the scores on the validation split; `None` if the loss was not finite.
    """

    options: Mapping[str, float]
    scores: PersonScores | None


def find_best(trials: Sequence[Trial]) -> Trial | None:
    """Returns the first trial with the highest mAP; `None` if no trial has scores.

    mAP counts every relevant image, so on a small split it is less noisy than Rank-1.
    """
    finite = [(trial.scores.mean("mAP"), trial) for trial in trials if trial.scores is not None]
    return max(finite, key=lambda pair: pair[0])[1] if finite else None


@dataclass(frozen=True)
class Outcome:
    """The final runs of one method in one setting.

    Args:
        method: a name in `ALL_METHODS`.
        scores: the scores on the test split, one entry for each seed; one in all if nothing is trained. `None`
            stands for a run whose loss was not finite.
        records: the record of each run, see [`~eccl.eval.comparison.runs.Run`].
        options: the options from the search, and those that make a variant.
    """

    method: str
    scores: Sequence[PersonScores | None]
    records: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The name of the method, with the number of runs whose loss was not finite."""
        return ALL_METHODS[self.method].title + self.note

    @property
    def note(self) -> str:
        """Says how many runs had a loss that was not finite; empty if none had."""
        diverged = self.scores.count(None)
        return f" ({diverged} of {len(self.scores)} seeds diverged)" if diverged else ""

    @property
    def is_trained(self) -> bool:
        return ALL_METHODS[self.method].recipe is not None

    def figures(self, metric: str) -> list[float]:
        """The figure of each seed, in percent; those of runs whose loss was not finite are missing."""
        return [scores.mean(metric) for scores in self.scores if scores is not None]

    def median(self, name: str) -> float | None:
        """The median of a number in the records; `None` if they do not have it."""
        values = [record[name] for record in self.records if record.get(name) is not None]
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class SettingOutcome:
    """All methods in one setting.

    Args:
        name: name of the setting.
        description: the data set in words.
        oracle: the oracle's Rank-1 on the test split, in percent; `None` if it is unknown.
        outcomes: one entry for each method.
        intervals: for each compared metric and each method, how much better the reference is. A method is missing if a
            run of it, or of the reference, has no scores.
    """

    name: str
    description: str
    oracle: float | None
    outcomes: Sequence[Outcome]
    intervals: Mapping[str, Mapping[str, Interval]]


def summarise(
    name: str, description: str, oracle: float | None, outcomes: Sequence[Outcome], resamples: int
) -> SettingOutcome:
    """Compares each method of a setting with the reference, if the reference is among them.

    Args:
        name, description, oracle, outcomes: see [`SettingOutcome`].
        resamples: number of resamples of the bootstrap.
    """
    complete = {each.method: _complete_scores(each) for each in outcomes}
    reference = complete.pop(REFERENCE, [])
    intervals = {
        metric: {
            method: paired_bootstrap(reference, scores, metric, resamples)
            for method, scores in complete.items()
            if reference and scores
        }
        for metric in COMPARED
    }
    return SettingOutcome(name, description, oracle, outcomes, intervals)


def _complete_scores(outcome: Outcome) -> list[PersonScores]:
    """The scores of all seeds; empty if those of a seed are missing."""
    scores = [each for each in outcome.scores if each is not None]
    return scores if len(scores) == len(outcome.scores) else []


def make_summary(settings: Sequence[SettingOutcome]) -> str:
    """Makes one table in Markdown with Rank-1 of each method in each setting, and how much better the reference is.

    Args:
        settings: they have the same methods in the same order.
    """
    metric = COMPARED[0]
    head, columns = ["method"], [[ALL_METHODS[each.method].title for each in settings[0].outcomes]]
    for setting in settings:
        head.append(f"{plain_markdown(setting.name)}: {TITLES[metric]}")
        columns.append([_with_deviation(each.figures(metric), 1) + each.note for each in setting.outcomes])
        if intervals := setting.intervals[metric]:
            head.append(f"{ALL_METHODS[REFERENCE].title} minus this")
            columns.append([_with_ends(intervals.get(each.method), 1) for each in setting.outcomes])
    return _table(head, list(zip(*columns, strict=True)))


def make_tables(settings: Sequence[SettingOutcome]) -> str:
    """Makes the report in Markdown: the summary, and for each setting a table of figures and a table of costs."""
    parts = [make_summary(settings)]
    for setting in settings:
        compared = [metric for metric in COMPARED if setting.intervals[metric]]
        head = ["method", *(TITLES[metric] for metric in METRICS)]
        head += [f"{ALL_METHODS[REFERENCE].title} minus this, {TITLES[metric]}" for metric in compared]
        rows = []
        for each in setting.outcomes:
            cells = [_with_deviation(each.figures(metric)) for metric in METRICS]
            cells += [_with_ends(setting.intervals[metric].get(each.method)) for metric in compared]
            rows.append([each.title, *cells])
        oracle = "" if setting.oracle is None else f" The oracle's Rank-1 is {setting.oracle:.1f}."
        parts.append(f"## {plain_markdown(setting.name)}\n\n{plain_markdown(setting.description)}.{oracle}")
        parts.append(_table(head, rows))
        parts.append(_table(_COST_HEAD, [_cost_row(each) for each in setting.outcomes if each.is_trained]))
    return "\n\n".join(parts)


def make_search_section(trials: Mapping[str, Sequence[Trial]]) -> str:
    """Makes the section on the search: Rank-1 and mAP of each trial on the validation split.

    Args:
        trials: for each method its trials in order. Methods without trials are left out.

    Returns:
        Markdown; empty if there are no trials.
    """
    rows = []
    for method, of_method in trials.items():
        best = find_best(of_method)
        cells = [", ".join(_trial_cell(trial, metric, trial is best) for trial in of_method) for metric in COMPARED]
        rows += [[ALL_METHODS[method].title, *cells]] if of_method else []
    if not rows:
        return ""
    head = ["method", *(f"{TITLES[metric]} of each trial" for metric in COMPARED)]
    text = (
        "These are figures on the validation split. The first trial has the rates and the temperatures of the recipe. "
        "The trial with the highest mAP was chosen; it is bold. A dash stands for a loss that was not finite."
    )
    return f"## The search\n\n{text}\n\n{_table(head, rows)}"


def _trial_cell(trial: Trial, metric: str, is_best: bool) -> str:
    if trial.scores is None:
        return "-"
    text = f"{trial.scores.mean(metric):.1f}"
    return f"**{text}**" if is_best else text


_COST_HEAD = [
    "method",
    "trained parameters",
    "pairs a second",
    "peak memory of the process, GiB",
    "options",
]


def _cost_row(outcome: Outcome) -> list[str]:
    parameters, rate, memory = (
        outcome.median(name) for name in ("trained_parameters", "pairs_per_second", "peak_memory")
    )
    options = ", ".join(f"{name} {value}" for name, value in outcome.options.items())
    return [
        outcome.title,
        "-" if parameters is None else f"{parameters:,.0f}",
        "-" if rate is None else f"{rate:.0f}",
        "-" if memory is None else f"{memory / 2**30:.2f}",
        options or "those of the recipes",
    ]


def _with_deviation(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "-"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" if math.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _with_ends(interval: Interval | None, digits: int = 2) -> str:
    if interval is None:
        return "-"
    difference, low, high = (f"{value:+.{digits}f}" for value in interval[:3])
    text = f"{difference} ({low} to {high})"
    return f"**{text}**" if interval.excludes_zero else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' + '--:|' * (len(head) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def make_content(
    header: Mapping[str, Any], settings: Sequence[SettingOutcome], trials: Mapping[str, Sequence[Trial]]
) -> dict[str, Any]:
    """Makes the content of `comparison.json`: every figure of every seed, the intervals, the costs, and the trials."""
    searched = {
        method: [
            {
                "options": dict(trial.options),
                "val": trial.scores and {metric: round(trial.scores.mean(metric), 4) for metric in METRICS},
            }
            for trial in of_method
        ]
        for method, of_method in trials.items()
        if of_method
    }
    content: dict[str, Any] = {"header": dict(header), "trials": searched, "settings": {}}
    for setting in settings:
        methods: dict[str, dict[str, Any]] = {}
        for each in setting.outcomes:
            methods[each.method] = {
                "test": {metric: [round(value, 4) for value in each.figures(metric)] for metric in METRICS},
                "options": dict(each.options),
                "costs": {
                    name: each.median(name)
                    for name in ("trained_parameters", "pairs_per_second", "peak_memory", "seconds")
                },
            }
        for metric, intervals in setting.intervals.items():
            for method, interval in intervals.items():
                methods[method].setdefault("reference_minus_this", {})[metric] = interval._asdict()
        content["settings"][setting.name] = {
            "description": setting.description,
            "oracle_rank1": setting.oracle,
            "methods": methods,
        }
    return content


def draw_differences(settings: Sequence[SettingOutcome]) -> Image.Image:
    """Draws how much better the reference is than each method, with intervals: a panel for each setting and metric."""
    panels = [
        (f"{setting.name}, {TITLES[metric]}", setting.intervals[metric]) for setting in settings for metric in COMPARED
    ]
    methods = list(dict.fromkeys(method for _, intervals in panels for method in intervals))
    ends = [end for _, intervals in panels for interval in intervals.values() for end in (interval.low, interval.high)]
    low, high = min([-1.0, *ends]), max([1.0, *ends])
    left, width, line, top, bottom = (_SCALE * size for size in (230, 300, 24, 34, 44))
    columns = len(COMPARED)
    panel_height = top + bottom + line * len(methods)
    rows = -(-len(panels) // columns)
    image = Image.new("RGB", (left + columns * (width + 30 * _SCALE), rows * panel_height), "white")
    draw = ImageDraw.Draw(image)
    for index, (title, intervals) in enumerate(panels):
        x0, y0 = left + (index % columns) * (width + 30 * _SCALE), (index // columns) * panel_height

        def place(value: float, x0: int = x0) -> float:
            return x0 + (value - low) / (high - low) * width

        draw.text((x0, y0 + top / 2), printable(title), "black", font_size=_FONT, anchor="lm")
        foot = y0 + top + line * len(methods)
        for tick in _ticks(low, high):
            draw.line((place(tick), y0 + top, place(tick), foot), fill="black" if tick == 0 else _GREY, width=_SCALE)
            label = f"{tick:+g}" if tick else "0"
            draw.text((place(tick), foot + 4 * _SCALE), label, "black", font_size=_FONT, anchor="mt")
        for number, method in enumerate(methods):
            y = y0 + top + line * (number + 0.5)
            if index % columns == 0:
                draw.text((left - 10 * _SCALE, y), ALL_METHODS[method].title, "black", font_size=_FONT, anchor="rm")
            if (interval := intervals.get(method)) is None:
                continue
            colour = _BETTER if interval.low > 0 else _WORSE if interval.high < 0 else _UNCLEAR
            draw.line((place(interval.low), y, place(interval.high), y), fill=colour, width=2 * _SCALE)
            radius, x = 4 * _SCALE, place(interval.difference)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        if index // columns == rows - 1:
            text = f"points by which {ALL_METHODS[REFERENCE].title} is better"
            draw.text((x0 + width / 2, foot + 22 * _SCALE), text, "black", font_size=_FONT, anchor="mt")
    return image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.LANCZOS)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, at most nine."""
    step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50, 100) if (high - low) / step <= 8)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def draw_learning_curves(settings: Sequence[SettingOutcome]) -> Image.Image:
    """Draws Rank-1 on the validation split over the steps: the mean of the seeds, and their range as bars."""
    width, height, line = (_SCALE * size for size in (520, 300, 22))
    methods = list(dict.fromkeys(each.method for setting in settings for each in setting.outcomes if each.is_trained))
    hues = {method: number / len(methods) for number, method in enumerate(methods)}
    colours = {method: _to_colour(hue) for method, hue in hues.items()}
    columns = min(2, len(settings))
    rows = -(-len(settings) // columns)
    image = Image.new("RGB", (columns * width, rows * height + line * len(methods)), "white")
    draw = ImageDraw.Draw(image)
    for index, setting in enumerate(settings):
        curves = {each.method: _curve(each) for each in setting.outcomes if each.is_trained}
        corner = (index % columns) * width, (index // columns) * height
        _draw_curves(draw, (*corner, width, height), setting.name, curves, colours)
    for number, method in enumerate(methods):
        y, left = rows * height + line * (number + 0.5), 60 * _SCALE
        draw.line((left, y, left + 24 * _SCALE, y), fill=colours[method], width=3 * _SCALE)
        draw.text((left + 32 * _SCALE, y), ALL_METHODS[method].title, "black", font_size=_FONT, anchor="lm")
    return image.resize((image.width // _SCALE, image.height // _SCALE), Image.Resampling.LANCZOS)


def _to_colour(hue: float) -> tuple[int, int, int]:
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.9, 0.75))
    return red, green, blue


def _draw_curves(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    name: str,
    curves: Mapping[str, Mapping[int, Sequence[float]]],
    colours: Mapping[str, tuple[int, int, int]],
) -> None:
    """Draws the curves of one setting into a box: left, top, width, height."""
    values = [value for curve in curves.values() for entries in curve.values() for value in entries]
    if not values:
        return
    steps = sorted({step for curve in curves.values() for step in curve})
    low, high = math.floor(min(values)), math.ceil(max(values)) + 1
    left, top = box[0] + 60 * _SCALE, box[1] + 34 * _SCALE
    width, height = box[2] - 80 * _SCALE, box[3] - 84 * _SCALE

    def place(step: int, value: float) -> tuple[float, float]:
        across = (step - steps[0]) / max(1, steps[-1] - steps[0])
        return left + across * width, top + (high - value) / (high - low) * height

    title = f"{name}: Rank-1 on val over the steps"
    draw.text((left, top - 17 * _SCALE), printable(title), "black", font_size=_FONT, anchor="lm")
    for tick in _ticks(low, high):
        y = place(steps[0], tick)[1]
        draw.line((left, y, left + width, y), fill=_GREY, width=_SCALE)
        draw.text((left - 6 * _SCALE, y), f"{tick:g}", "black", font_size=_FONT, anchor="rm")
    for step in steps:
        x, y = place(step, low)
        draw.text((x, y + 6 * _SCALE), str(step), "black", font_size=_FONT, anchor="mt")
    for method, curve in curves.items():
        points = [place(step, sum(entries) / len(entries)) for step, entries in sorted(curve.items())]
        draw.line(points, fill=colours[method], width=2 * _SCALE)
        for step, entries in curve.items():
            ends = (*place(step, min(entries)), *place(step, max(entries)))
            draw.line(ends, fill=colours[method], width=_SCALE)


def _curve(outcome: Outcome) -> dict[int, list[float]]:
    """Rank-1 of each seed on the validation split, by step."""
    curve: dict[int, list[float]] = {}
    for record in outcome.records:
        # A training that keeps the best of its models evaluates it once more at the end.
        history = reversed(record.get("log_history", []))
        by_step = {entry["step"]: entry["eval_rank1"] for entry in history if "eval_rank1" in entry}
        for step, value in by_step.items():
            curve.setdefault(step, []).append(value)
    return curve


def write_outputs(
    folder: Path,
    header: Mapping[str, Any],
    settings: Sequence[SettingOutcome],
    trials: Mapping[str, Sequence[Trial]],
) -> None:
    """Writes `comparison.json`, `comparison.md`, `differences.png` and `learning_curves.png`.

    Args:
        folder: it must exist.
        header: what the figures depend on.
        settings: the outcomes.
        trials: for each method its trials.
    """
    about = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in header.items())
    parts = [plain_markdown(about), make_tables(settings), make_search_section(trials)]
    texts = {
        OUTPUTS[0]: json.dumps(make_content(header, settings, trials), indent=1) + "\n",
        OUTPUTS[1]: "\n\n".join(filter(None, parts)) + "\n",
    }
    for name, text in texts.items():
        with complete_file(folder / name) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    pictures = {OUTPUTS[2]: draw_differences(settings), OUTPUTS[3]: draw_learning_curves(settings)}
    for name, picture in pictures.items():
        with complete_file(folder / name) as unfinished:
            picture.save(unfinished)


__all__ = [
    "COMPARED",
    "OUTPUTS",
    "Outcome",
    "SettingOutcome",
    "Trial",
    "draw_differences",
    "draw_learning_curves",
    "find_best",
    "make_content",
    "make_search_section",
    "make_summary",
    "make_tables",
    "summarise",
    "write_outputs",
]
