"""The report of an evaluation: tables with the published figures, JSON, and the metadata block for a model card."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..hub.model_card import DIRECTIONS, METRICS, Result, format_table, to_eval_results
from ..utils.files import complete_file
from ..utils.text import plain_markdown, printable

_PUBLISHED = Path(__file__).parent / "published_results.json"


def published_rows(dataset: str) -> dict[str, dict[str, float | None]]:
    """Returns the figures that the authors of each method published for a benchmark, by name of the table row.

    The names of the rows end in `(published)`. There are no rows for the synthetic benchmark.
    """
    methods = json.loads(_PUBLISHED.read_text(encoding="utf-8")).get(dataset, [])
    return {f"{method['method']} (published)": {metric: method[metric] for metric in METRICS} for method in methods}


def make_report(results: Sequence[Result], before: dict[str, float] | None = None, oracle: float | None = None) -> str:
    """Makes one section for each data set, split and direction: the protocol in words, then a table.

    Args:
        results: in the order of the sections and rows.
        before: metrics of an earlier evaluation; a row of the text-to-image tables.
        oracle: Rank-1 of a reader who recognises everything that a caption mentions; also such a row.
    """
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dataset, result.data_dir, result.split, result.direction), []).append(result)
    return "\n\n".join(_make_section(group, before, oracle) for group in groups.values())


def _make_section(results: list[Result], before: dict[str, float] | None, oracle: float | None) -> str:
    """Makes a section from results that differ only in the model and the kind of ranking."""
    first = results[0]
    to_image = first.direction == "text_to_image"
    query, answer = ("caption", "image") if to_image else ("image", "caption")
    paragraphs = [
        f"{_name_data(first)}, split {first.split}, {DIRECTIONS[first.direction]}: "
        f"every {query} of the split queries every {answer} of the split; {first.queries:,} queries, "
        f"{first.gallery:,} {answer}s in the gallery. All figures are in percent."
    ]
    rows: dict[str, dict[str, float | None]] = {"before": dict(before)} if before and to_image else {}
    rows |= {result.name: dict(result.metrics) for result in results}
    if to_image and oracle is not None:
        rows["oracle"] = {"rank1": oracle}
    # The published figures are those of the whole test split in this direction.
    published = published_rows(first.published) if to_image and first.split == "test" else {}
    if published and first.differs:
        paragraphs.append(
            f"This is not the published {first.dataset}, so the published figures cannot be compared with the others: "
            + "; ".join(first.differs)
            + "."
        )
    return "\n\n".join([*paragraphs, format_table(rows | published)])


def _name_data(result: Result) -> str:
    """Names a data set; a folder or a data set of the Hub has no other place than its name."""
    folder = result.data_dir if Path(result.data_dir).name != result.dataset else ""
    return plain_markdown(result.dataset) + (f" in {plain_markdown(folder)}" if folder else "")


def make_model_index(results: Sequence[Result]) -> str:
    """Makes the `model-index` block of a model card's metadata as YAML, with one entry for each model."""
    blocks: list[dict[str, Any]] = []
    for model in dict.fromkeys(result.model for result in results):
        entries = to_eval_results([result for result in results if result.model == model])
        blocks += eval_results_to_model_index(printable(Path(model).name or model), entries)
    return yaml.safe_dump({"model-index": blocks}, sort_keys=False, allow_unicode=True)


def shorten_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the last part of each path, or as many parts as tell it from the others."""
    parts = {name: Path(name).parts or (name,) for name in names}
    short = {}
    for name, own in parts.items():
        count = 1
        while count < len(own) and any(each[-count:] == own[-count:] for other, each in parts.items() if other != name):
            count += 1
        short[name] = "/".join(own[-count:])
    return short


def hide_paths(results: Sequence[Result]) -> list[Result]:
    """Returns results that can be given away: of a path, only the last part stays, with a number if it is not alone.

    Names of the Hub stay as they are.
    """
    models, folders = _hide(each.model for each in results), _hide(each.data_dir for each in results)
    return [replace(each, model=models[each.model], data_dir=folders[each.data_dir]) for each in results]


def _hide(names: Iterable[str]) -> dict[str, str]:
    hidden: dict[str, str] = {}
    for name in dict.fromkeys(names):
        short = (Path(name).name or name) if os.path.exists(name) else name
        same = sum(each == short or each.startswith(f"{short} (") for each in hidden.values())
        hidden[name] = f"{short} ({same + 1})" if same else short
    return hidden


def write_report(
    folder: Path,
    results: Sequence[Result],
    summary: Mapping[str, Any],
    before: Mapping[str, float] | None = None,
    oracle: float | None = None,
) -> None:
    """Writes `results.json` (the summary and every result) and `results.md` (the report and the model index).

    Args:
        folder: the folder; it is made if it is missing.
        results: the results, see [`hide_paths`].
        summary: entries of `results.json`.
        before, oracle: see [`make_report`].
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**summary, "results": [asdict(result) for result in results]}
    with complete_file(folder / "results.json") as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    digests = {f"{plain_markdown(each.model)}: {each.weights_sha256}": None for each in results if each.weights_sha256}
    sections = [
        make_report(results, dict(before) if before else None, oracle),
        "\n".join(["SHA-256 of the weights:", "", *(f"- {line}" for line in digests)]),
        f"This block can be copied into the metadata of a model card:\n\n```yaml\n{make_model_index(results)}```\n",
    ]
    with complete_file(folder / "results.md") as unfinished:
        unfinished.write_text("\n\n".join(sections), "utf-8", "backslashreplace")


__all__ = ["hide_paths", "make_model_index", "make_report", "published_rows", "shorten_names", "write_report"]
