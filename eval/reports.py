"""The report of an evaluation: tables with the published figures, JSON, and the metadata block for a model card."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..hub.model_card import DIRECTIONS, METRICS, Result, format_table, to_eval_results

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
        f"{first.dataset} in {first.data_dir}, split {first.split}, {DIRECTIONS[first.direction]}: every {query} of "
        f"the split queries every {answer} of the split; {first.queries:,} queries, {first.gallery:,} {answer}s in "
        "the gallery. All figures are in percent."
    ]
    rows: dict[str, dict[str, float | None]] = {"before": dict(before)} if before and to_image else {}
    rows |= {result.name: dict(result.metrics) for result in results}
    if to_image and oracle is not None:
        rows["oracle"] = {"rank1": oracle}
    # The published figures are those of the whole test split in this direction.
    published = published_rows(first.dataset) if to_image and first.split == "test" else {}
    if published and first.differs:
        paragraphs.append(
            f"This is not the published {first.dataset}, so the published figures cannot be compared with the others: "
            + "; ".join(first.differs)
            + "."
        )
    return "\n\n".join([*paragraphs, format_table(rows | published)])


def make_model_index(results: Sequence[Result]) -> str:
    """Makes the `model-index` block of a model card's metadata as YAML, with one entry for each model."""
    blocks: list[dict[str, Any]] = []
    for model in dict.fromkeys(result.model for result in results):
        entries = to_eval_results([result for result in results if result.model == model])
        blocks += eval_results_to_model_index(Path(model).name or model, entries)
    return yaml.safe_dump({"model-index": blocks}, sort_keys=False, allow_unicode=True)


def write_report(folder: Path, results: Sequence[Result], report: str, summary: dict[str, Any]) -> None:
    """Writes `results.json` (the summary and every result) and `results.md` (the report and the model index)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = summary | {"results": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    index = f"This block can be copied into the metadata of a model card:\n\n```yaml\n{make_model_index(results)}```\n"
    (folder / "results.md").write_text(f"{report}\n\n{index}", "utf-8", "backslashreplace")


__all__ = ["make_model_index", "make_report", "published_rows", "write_report"]
