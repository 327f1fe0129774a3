"""The rows of the speed benchmark, and the table, the JSON and the picture that are made of them."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ...utils.files import complete_file

if TYPE_CHECKING:
    from PIL import Image

OUTPUTS = ("speed.json", "speed.md", "speed.png")
# Before the run, and during it: above this many busy cores, the ratios mean little.
_IDLE = 0.5
# The picture is drawn at twice the size and reduced, for smooth edges.
_SCALE = 2
_GOOD, _BAD = (34, 139, 84), (176, 40, 60)


class Spread(NamedTuple):
    """The median, the least and the largest of several measurements."""

    median: float
    least: float
    most: float


def spread(values: Iterable[float]) -> Spread:
    """Summarises measurements.

    Raises:
        statistics.StatisticsError: there are none.
    """
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[0], ordered[-1])


class Budget(NamedTuple):
    """What one of the figures of a row must be: at most, or at least, this much."""

    figure: Literal["value", "ratio", "share"]
    bound: Literal["at most", "at least"]
    limit: float


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        part: the part of the benchmark that measured it.
        name: what was measured.
        unit: the unit of `value` and of `reference_value`.
        value: our figure.
        reference: name of what it is compared with; empty if there is nothing.
        reference_value: the figure of the reference.
        ratio: `value / reference_value`, summarised over the rounds.
        share: the share of the machine's matrix rate that is reached, summarised over the rounds.
        budgets: what the figures must be.
    """

    part: str
    name: str
    unit: str
    value: Spread
    reference: str = ""
    reference_value: Spread | None = None
    ratio: Spread | None = None
    share: Spread | None = None
    budgets: tuple[Budget, ...] = ()

    def figure(self, budget: Budget) -> float:
        """Returns the median of the figure that a budget is about.

        Raises:
            ValueError: the row does not have this figure.
        """
        found: Spread | None = getattr(self, budget.figure)
        if found is None:
            raise ValueError(f"the row {self.name!r} has a budget for its {budget.figure}, which was not measured")
        return found.median

    def meets(self, budget: Budget) -> bool:
        """Tells whether a budget is met."""
        figure = self.figure(budget)
        return figure <= budget.limit if budget.bound == "at most" else figure >= budget.limit


@dataclass(frozen=True)
class SweepRow:
    """A training step, or encoding, at one batch size and with one setting of the model.

    Attributes:
        name: task, model, dtype, attention, and whether it is compiled.
        batch_size: number of pairs.
        seconds: of a step; `None` if it failed.
        tokens: of a pair: image patches, class token, caption and prompts.
        peak_bytes: the most memory of the device that was in use; `None` if the device does not count it.
        share: the share of the matrix rate that was measured with the same batch size and dtype.
        problem: why there are no figures; empty if there are.
    """

    name: str
    batch_size: int
    seconds: Spread | None
    tokens: int
    peak_bytes: int | None = None
    share: float | None = None
    problem: str = ""


TABLE_HEAD = (
    "| what | ours | compared with | ours / that | share of the matrix rate | budget | met |",
    "|---|---|---|---|---|---|---|",
)
SWEEP_HEAD = (
    "| what | batch | s a step | pairs/s | tokens/s | peak GiB | share of the matrix rate |",
    "|---|--:|---|--:|--:|--:|--:|",
)


def format_row(row: Row) -> str:
    """Makes a line of the table: medians, with the least and the largest in brackets."""
    reference = f"{row.reference}: {_format(row.reference_value, row.unit)}" if row.reference_value else row.reference
    cells = [row.name, _format(row.value, row.unit), reference or "-", _format(row.ratio), _format(row.share)]
    cells.append("; ".join(_describe(budget, row.unit) for budget in row.budgets) or "-")
    cells.append("; ".join("yes" if row.meets(budget) else "no" for budget in row.budgets) or "-")
    return f"| {' | '.join(cells)} |"


def format_sweep_row(row: SweepRow) -> str:
    """Makes a line of the table of batch sizes."""
    if row.seconds is None:
        return f"| {row.name} | {row.batch_size} | {row.problem} | - | - | - | - |"
    pairs = row.batch_size / row.seconds.median
    peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
    share = "-" if row.share is None else f"{row.share:.2f}"
    return (
        f"| {row.name} | {row.batch_size} | {_format(row.seconds)} | {pairs:,.0f} | {pairs * row.tokens:,.0f} | {peak} "
        f"| {share} |"
    )


def _format(value: Spread | None, unit: str = "") -> str:
    if value is None:
        return "-"
    median, *ends = (_short(number) for number in value)
    text = f"{median} {unit}".rstrip()
    return text if value.least == value.most else f"{text} ({' to '.join(ends)})"


def _short(number: float) -> str:
    """Writes a number with three digits; a large one with its thousands."""
    if not number or abs(number) >= 100:
        return f"{number:,.0f}"
    return f"{number:.{max(0, 2 - math.floor(math.log10(abs(number))))}f}"


def _describe(budget: Budget, unit: str) -> str:
    names = {"value": "", "ratio": " x", "share": " of the rate"}
    text = f"{budget.bound} {budget.limit:.3g}{names[budget.figure]}"
    return f"{text} {unit}".rstrip() if budget.figure == "value" else text


def describe_load(before: float, others: float | None) -> str:
    """Says how busy the machine was, with a warning if the ratios mean little.

    Args:
        before: load average of the last minute before the run.
        others: number of cores that other processes kept busy during the run; `None` if it is unknown.
    """
    during = "unknown" if others is None else f"{others:.2f}"
    text = f"load average before the run {before:.2f}, cores busy with other processes during the run {during}"
    if before > _IDLE or (others or 0) > _IDLE:
        text += "; WARNING: the machine was not idle, so the ratios mean little"
    return text


def make_markdown(header: Mapping[str, Any], rows: Sequence[Row], sweep: Sequence[SweepRow]) -> str:
    """Makes the text of `speed.md`: the machine, the load, and the tables."""
    lines = [describe_header(header), "", describe_load(header["load_before"], header["busy_with_others"]), ""]
    if rows:
        lines += [*TABLE_HEAD, *map(format_row, rows), ""]
    if sweep:
        lines += [*SWEEP_HEAD, *map(format_sweep_row, sweep), ""]
    return "\n".join(lines)


def describe_header(header: Mapping[str, Any]) -> str:
    """Names the machine, the versions and the settings, without the load."""
    return ", ".join(f"{name.replace('_', ' ')} {header[name]}" for name in header if name not in _OF_THE_LOAD)


_OF_THE_LOAD = ("load_before", "busy_with_others")


def draw_budgets(rows: Sequence[Row]) -> "Image.Image":
    """Draws a bar for each budget: how much of it is used. A bar that ends before the line at 100 % meets its budget.

    Of a budget "at most", the figure divided by the limit is drawn; of a budget "at least", the limit divided by the
    figure.
    """
    from PIL import Image, ImageDraw

    bars = [(row, budget, _used(row, budget)) for row in rows for budget in row.budgets]
    width, left, right, line_height, top = (_SCALE * size for size in (1000, 520, 150, 24, 34))
    height = top + len(bars) * line_height + _SCALE * 10
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = 13 * _SCALE
    full = (width - left - right) / max(1.5, *(min(used, 3) for *_, used in bars)) if bars else 1
    title = "share of the budget that is used (the line: 100 %)"
    draw.text((left, top / 2), title, "black", font_size=font, anchor="lm")
    labels: list[tuple[float, float, str]] = []
    for index, (row, budget, used) in enumerate(bars):
        y, end = top + index * line_height, left + full * min(used, 3)
        colour = _GOOD if row.meets(budget) else _BAD
        draw.rectangle((left, y + 3 * _SCALE, end, y + line_height - 3 * _SCALE), fill=colour)
        labels.append((8 * _SCALE, y + line_height / 2, _label(row, budget)))
        labels.append((end + 6 * _SCALE, y + line_height / 2, f"{_short(row.figure(budget))} ({used:.0%})"))
    draw.line((left + full, top, left + full, height), fill="black", width=_SCALE)
    for x, middle, text in labels:
        # With a white edge: the line can be behind it.
        draw.text((x, middle), text, "black", font_size=font, anchor="lm", stroke_width=3 * _SCALE, stroke_fill="white")
    return image.resize((width // _SCALE, height // _SCALE), Image.Resampling.LANCZOS)


def _label(row: Row, budget: Budget) -> str:
    names = {"value": row.unit, "ratio": "ratio", "share": "share of the rate"}
    return f"{row.name}: {names[budget.figure]}, {budget.bound} {budget.limit:.3g}"


def _used(row: Row, budget: Budget) -> float:
    figure = row.figure(budget)
    if budget.bound == "at most":
        # A limit of 0 is a count that must be 0.
        return figure / budget.limit if budget.limit else float(figure > 0) * 2
    return budget.limit / figure


def write_outputs(folder: Path, header: Mapping[str, Any], rows: Sequence[Row], sweep: Sequence[SweepRow]) -> None:
    """Writes `speed.json`, `speed.md` and `speed.png`; without a row that has a budget, there is no picture."""
    content = {
        "header": dict(header),
        "rows": [_plain(row) | {"met": [row.meets(budget) for budget in row.budgets]} for row in rows],
        "sweep": [_plain(row) for row in sweep],
    }
    with complete_file(folder / OUTPUTS[0]) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    with complete_file(folder / OUTPUTS[1]) as unfinished:
        unfinished.write_text(make_markdown(header, rows, sweep), encoding="utf-8")
    if any(row.budgets for row in rows):
        with complete_file(folder / OUTPUTS[2]) as unfinished:
            draw_budgets(rows).save(unfinished)
    else:
        # The picture of an earlier run would not belong to this one.
        (folder / OUTPUTS[2]).unlink(missing_ok=True)


def _plain(row: Row | SweepRow) -> dict[str, Any]:
    """Turns a row into objects of JSON; a tuple would lose the names of its fields."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    values |= {name: value._asdict() for name, value in values.items() if isinstance(value, Spread)}
    return values | {"budgets": [budget._asdict() for budget in row.budgets]} if isinstance(row, Row) else values


__all__ = [
    "OUTPUTS",
    "SWEEP_HEAD",
    "TABLE_HEAD",
    "Budget",
    "Row",
    "Spread",
    "SweepRow",
    "describe_header",
    "describe_load",
    "draw_budgets",
    "format_row",
    "format_sweep_row",
    "make_markdown",
    "spread",
    "write_outputs",
]
