"""The card of a checkpoint, made from facts: what it was made of, what was measured, what it is not for."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

METRICS = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}
DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
_CELL = len("100.00")
_TASK = "text-to-image-person-retrieval"
_LIMITS = """Finding people by description is surveillance technology. This is for research, and for searching
collections whose people consented to it. It must not be used to identify, track, profile or make decisions about
anyone, nor for policing, border control or the surveillance of workplaces and public places. It ranks by appearance in
one picture: clothes, bags, hair. It errs often, for some groups of people more than for others, and repeats the biases
of its data and of CLIP. A rank is not an identification."""
_USE = """```python
from transformers import pipeline

search = pipeline("text-to-person-retrieval", model="{name}", trust_remote_code=True)
search.index("photos/")
search("a woman in a red coat with a black backpack", top_k=5)
```"""
_LICENCE = (
    "The weights are under the terms of the base model and of the training data; the code beside them is Apache-2.0."
)
_CITATION = (
    "The method is ECCL, Efficient Cross-modal Semantic Correspondence Learning: <https://github.com/hhh10/ECCL>."
)


@dataclass
class Result:
    """The figures of a model on a split.

    Args:
        model: as it was named.
        dataset, data_dir, split: what it was scored on.
        direction: `text_to_image` or `image_to_text`.
        reranked: whether by visual neighbours.
        queries, gallery: how many of each.
        metrics: `rank1` and so on, in percent.
        differs: how the split differs from the published one; empty where it does not, or nothing was published.
        label: what stands in tables in place of the model.
    """

    model: str
    dataset: str
    data_dir: str
    split: str
    direction: str
    reranked: bool
    queries: int
    gallery: int
    metrics: dict[str, float]
    differs: list[str] = field(default_factory=list)
    label: str | None = None

    @property
    def name(self) -> str:
        name = self.label or self.model
        return f"{name} (re-ranked)" if self.reranked else name


def format_table(rows: dict[str, dict[str, float | None]]) -> str:
    """A Markdown table, a row a method, `-` for figures that are not there."""
    width = max(len("method"), *map(len, rows))
    widths = [max(_CELL, len(title)) for title in METRICS.values()]
    titles = [title.ljust(size) for title, size in zip(METRICS.values(), widths, strict=True)]
    lines = [
        f"| {'method'.ljust(width)} | {' | '.join(titles)} |",
        f"|{'-' * (width + 2)}|{'|'.join('-' * (size + 1) + ':' for size in widths)}|",
    ]
    for name, figures in rows.items():
        cells = []
        for metric, title in METRICS.items():
            value = figures.get(metric)
            cells.append(("-" if value is None else f"{value:.2f}").rjust(max(_CELL, len(title))))
        lines.append(f"| {name.ljust(width)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_eval_results(results: list[Result]) -> list[EvalResult]:
    """The entries of a model card for what was measured, a metric each."""
    return [
        EvalResult(
            task_type=_TASK,
            task_name=f"Person retrieval, {DIRECTIONS[result.direction]}",
            dataset_type=result.dataset,
            dataset_name=result.dataset,
            dataset_split=result.split,
            metric_type=metric,
            metric_name=title + (" (re-ranked)" if result.reranked else ""),
            metric_value=round(result.metrics[metric], 4),
        )
        for result in results
        for metric, title in METRICS.items()
    ]


@dataclass
class Facts:
    """What is known of a checkpoint.

    Args:
        name: its own.
        base: what it was made from.
        method: a sentence.
        dataset: what it was trained on, and how much of it; `None` where it was not trained here.
        settings: of the training, by the names of the arguments.
        duration: of the training, in seconds.
        hardware: what it ran on, in words.
        results: what was measured on it, with this code.
        selection: how the checkpoint was chosen among the epochs, in a sentence.
    """

    name: str
    base: str | None
    method: str
    dataset: str | None = None
    settings: dict[str, object] = field(default_factory=dict)
    duration: float | None = None
    hardware: str | None = None
    results: list[Result] = field(default_factory=list)
    selection: str | None = None


def make_model_card(facts: Facts, published: dict[str, dict[str, dict[str, float | None]]] | None = None) -> str:
    """Makes the text of a checkpoint's README.md: metadata with the measured figures as `model-index`, then sections.

    A section for which there are no facts is left out.

    Args:
        facts: of the checkpoint.
        published: for each benchmark the figures that the authors of other methods printed, by name of the table row.
    """
    published = published or {}
    local = facts.base is not None and Path(facts.base).exists()
    base = Path(facts.base).resolve().name if local else facts.base
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        language="en",
        # The weights are under the terms of what they were made from.
        license="other",
        license_name="terms-of-base-model-and-data",
        # The Hub links it: a folder of someone's disk is no name there.
        base_model=None if local else base,
        tags=["eccl", "person-retrieval", "text-to-image-retrieval"],
        model_name=facts.name if facts.results else None,
        eval_results=to_eval_results(facts.results) or None,
    )
    sections = [f"---\n{data.to_yaml()}\n---", f"# {facts.name}", facts.method, "## Use", _USE.format(name=facts.name)]
    if facts.dataset:
        lines = [f"- Data: {facts.dataset}", f"- Started from: {base or 'random weights'}"]
        lines += [f"- Chosen: {facts.selection}"] if facts.selection else []
        lines += [f"- Took: {facts.duration / 60:.1f} minutes"] if facts.duration is not None else []
        lines += [f"- On: {facts.hardware}"] if facts.hardware else []
        lines += [f"- {name}: {value}" for name, value in facts.settings.items()]
        sections += ["## Training", "\n".join(lines)]
    for result in facts.results:
        rows = {f"{facts.name}, measured": dict(result.metrics)}
        theirs = published.get(result.dataset, {}) if result.split == "test" else {}
        counts = f"{result.queries:,} queries, {result.gallery:,} in the gallery; percent."
        text = [f"On {result.dataset}, split {result.split}: {counts}"]
        if theirs:
            text.append("Rows marked so are figures that the methods' authors published, not measured here.")
        if theirs and result.differs:
            differences = "; ".join(result.differs)
            text.append(f"This is not the published data set, so they do not compare: {differences}.")
        sections += ["## Results", " ".join(text), format_table(rows | theirs)]
    sections += ["## What it is for, and what not", _LIMITS]
    sections += ["## Licence", _LICENCE, "## Citation", _CITATION]
    return "\n\n".join(sections) + "\n"


__all__ = ["DIRECTIONS", "METRICS", "Facts", "Result", "format_table", "make_model_card", "to_eval_results"]
