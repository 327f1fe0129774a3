"""What an evaluation says: tables with the published figures beside, JSON, and the block for a model card."""

import json
from dataclasses import asdict
from pathlib import Path

import yaml
from huggingface_hub.repocard_data import eval_results_to_model_index

from ..hub.model_card import DIRECTIONS, METRICS, Result, format_table, to_eval_results

_PUBLISHED = Path(__file__).parent / "published_results.json"


def published_rows(dataset: str) -> dict[str, dict[str, float | None]]:
    """What each method's authors printed for a benchmark, marked as theirs; nothing for the synthetic one."""
    rows = json.loads(_PUBLISHED.read_text(encoding="utf-8")).get(dataset, [])
    return {f"{row['method']} (published)": {metric: row[metric] for metric in METRICS} for row in rows}


def make_report(results: list[Result], before: dict[str, float] | None = None, oracle: float | None = None) -> str:
    """A section for each data set, split and direction: the protocol in words, then a table.

    Args:
        results: in the order that they are to stand in.
        before: figures of an earlier evaluation, for the tables of text to image.
        oracle: Rank-1 of a reader who knows all that captions mention, likewise.
    """
    groups: dict[tuple[str, str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.dataset, result.data_dir, result.split, result.direction), []).append(result)
    sections = []
    for (dataset, data_dir, split, direction), own in groups.items():
        to_image = direction == "text_to_image"
        protocol = (
            f"every caption of {split} queries every image of it"
            if to_image
            else f"every image of {split} queries every caption of it"
        )
        lines = [
            f"{dataset} in {data_dir}, split {split}, {DIRECTIONS[direction]}: {protocol}; {own[0].queries:,} queries, "
            f"{own[0].gallery:,} in the gallery; percent."
        ]
        rows: dict[str, dict[str, float | None]] = {"before": dict(before)} if before and to_image else {}
        rows |= {result.name: dict(result.metrics) for result in own}
        if to_image:
            rows |= {"oracle": {"rank1": oracle}} if oracle is not None else {}
            # The published figures are of the test split, by this protocol.
            theirs = published_rows(dataset) if split == "test" else {}
            rows |= theirs
            if theirs and own[0].differs:
                lines.append(
                    f"This is not the published {dataset}, so the published figures do not compare: "
                    + "; ".join(own[0].differs)
                    + "."
                )
        sections.append("\n\n".join([*lines, format_table(rows)]))
    return "\n\n".join(sections)


def make_model_index(results: list[Result]) -> str:
    """The `model-index` block of a model card's metadata, one entry for each model, as YAML."""
    blocks: list[dict] = []
    for model in dict.fromkeys(result.model for result in results):
        entries = to_eval_results([result for result in results if result.model == model])
        blocks += eval_results_to_model_index(Path(model).name or model, entries)
    return yaml.safe_dump({"model-index": blocks}, sort_keys=False, allow_unicode=True)


def write_report(folder: Path, results: list[Result], report: str, summary: dict) -> None:
    """Writes `results.json` (the summary, and every result), `results.md` (the report, and the model index)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = summary | {"results": [asdict(result) for result in results]}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    index = f"For a model card's metadata:\n\n```yaml\n{make_model_index(results)}```\n"
    (folder / "results.md").write_text(f"{report}\n\n{index}", encoding="utf-8")
