"""The card (README.md) of a checkpoint: base model, training, measured figures, intended use and limits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from ..utils.text import code_span, plain_markdown

METRICS = {"rank1": "Rank-1", "rank5": "Rank-5", "rank10": "Rank-10", "mAP": "mAP", "mINP": "mINP"}
DIRECTIONS = {"text_to_image": "text to image", "image_to_text": "image to text"}
_CELL_WIDTH = len("100.00")
_TASK = "text-to-image-person-retrieval"
_LIMITS = """Finding people by a description is surveillance technology. This model is for research, and for searching
collections of images if the people in them have agreed to it. It must not be used to identify, track or profile anyone,
or to make decisions about anyone. It must not be used for policing, for border control, or to watch workplaces or
public places.

The model ranks images by the appearance of a person in one picture: clothes, bags, hair. It makes many errors, and more
of them for some groups of people than for others. It repeats the biases of its training data and of CLIP. A high rank
does not identify anyone."""
_USE = """```python
from transformers import pipeline

search = pipeline("text-to-person-retrieval", model={name}, trust_remote_code=True)
search.index("photos/")
search("a woman in a red coat with a black backpack", top_k=5)
```

The model computes in float32, because `config.json` has `"dtype": "float32"`; the stored weights may have half the
precision. On a GPU half precision is faster: give `dtype=torch.float16` to `pipeline` or `from_pretrained`."""
_USE_ADAPTER = """This is an adapter: LoRA matrices, and prompts if the model has any, without the model that they
belong to. The package `eccl` adds them to their base, {base}, after it has compared the base's weights with those of
the training:

```python
from eccl import load_model

model, processor = load_model({name})
```

To give the base yourself, pass `base=FOLDER_OR_HUB_ID`."""
_LICENCE = (
    "The terms of the base model and of the training data apply to the weights. The licence of the code in this "
    "repository is Apache-2.0."
)
_CITATION = (
    "The method is ECCL, Efficient Cross-modal Semantic Correspondence Learning: <https://github.com/hhh10/ECCL>."
)


@dataclass
class Result:
    """The figures of a model on a split.

    Args:
        model: the name of the model, as the user gave it.
        dataset, data_dir, split: the evaluated split.
        direction: `text_to_image` or `image_to_text`.
        reranked: whether the ranking was refined with visual neighbours.
        queries, gallery: number of queries, and number of items in the gallery.
        metrics: the figures in percent, by the names in `METRICS`.
        differs: how the split differs from the published one; empty if it does not, or if no sizes were published.
        label: a name for tables that replaces `model`.
        weights_sha256: digest of the model's weights, as they were scored.
        data_sha256: digest of the split, see `digest_split` in fingerprint.py.
        benchmark: the benchmark whose published figures belong next to these; empty if there is none, and `None` means
            that `dataset` is its name.
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
    weights_sha256: str | None = None
    data_sha256: str | None = None
    benchmark: str | None = None

    @property
    def published(self) -> str:
        """The name of the benchmark whose published figures belong next to these; empty if there is none."""
        return self.dataset if self.benchmark is None else self.benchmark

    @property
    def name(self) -> str:
        """The name in tables."""
        name = self.label or self.model
        return f"{name} (re-ranked)" if self.reranked else name


def format_table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """Makes a Markdown table with one row for each method; `-` replaces a missing figure.

    Args:
        rows: for each method its figures, by the names in `METRICS`.
    """
    rows = {plain_markdown(name): figures for name, figures in rows.items()}
    width = max(len("method"), *map(len, rows))
    widths = [max(_CELL_WIDTH, len(title)) for title in METRICS.values()]
    titles = [title.ljust(size) for title, size in zip(METRICS.values(), widths, strict=True)]
    lines = [
        f"| {'method'.ljust(width)} | {' | '.join(titles)} |",
        f"|{'-' * (width + 2)}|{'|'.join('-' * (size + 1) + ':' for size in widths)}|",
    ]
    for name, figures in rows.items():
        cells = []
        for metric, size in zip(METRICS, widths, strict=True):
            value = figures.get(metric)
            cells.append(("-" if value is None else f"{value:.2f}").rjust(size))
        lines.append(f"| {name.ljust(width)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def to_eval_results(results: Sequence[Result]) -> list[EvalResult]:
    """Makes the entries of a model card's `model-index`, one for each result and metric."""
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
    """The facts about a checkpoint that its card reports.

    Args:
        name: the name of the checkpoint.
        base: Hub id or folder of the model that the training started from; `None` if the weights started randomly.
        method: a paragraph in Markdown that says how the checkpoint was made.
        dataset: the training set and its sizes; `None` if the checkpoint was not trained by this program.
        settings: settings of the training, by their names.
        duration: duration of the training in seconds.
        hardware: hardware and software of the training.
        results: figures that this program measured for the checkpoint.
        selection: how the checkpoint was selected among the epochs.
        is_adapter: whether the checkpoint is an adapter, which is loaded in another way than a model.
        base_digest: SHA-256 of the base's weights in float16, see `digest_weights` in adapter.py.
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
    is_adapter: bool = False
    base_digest: str | None = None


def make_model_card(
    facts: Facts, published: Mapping[str, Mapping[str, Mapping[str, float | None]]] | None = None
) -> str:
    """Makes the text of a checkpoint's README.md: metadata, with the measured figures as `model-index`, and sections.

    A section without facts is omitted.

    Args:
        facts: the facts about the checkpoint.
        published: for each benchmark, the figures that the authors of other methods published, by the name of the row.
    """
    base, base_on_hub = facts.base, facts.base
    if facts.base is not None and Path(facts.base).exists():
        # The Hub makes a link from this field, and a local folder cannot be linked.
        base, base_on_hub = Path(facts.base).resolve().name, None
    data = ModelCardData(
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag="zero-shot-image-classification",
        language="en",
        # The terms of the base model and of the training data apply to the weights.
        license="other",
        license_name="terms-of-base-model-and-data",
        base_model=base_on_hub,
        tags=["eccl", "person-retrieval", "text-to-image-retrieval"],
        model_name=facts.name if facts.results else None,
        eval_results=to_eval_results(facts.results) or None,
    )
    use = _USE_ADAPTER if facts.is_adapter else _USE
    sections = [f"---\n{data.to_yaml()}\n---", f"# {plain_markdown(facts.name)}", facts.method]
    # A JSON string is also one of Python.
    sections += ["## Use", use.format(name=json.dumps(facts.name), base=code_span(base))]
    if facts.dataset:
        sections += ["## Training", _describe_training(facts, base)]
    for result in facts.results:
        figures = (published or {}).get(result.published, {}) if result.split == "test" else {}
        sections += ["## Results", _describe_result(result, f"{facts.name}, measured", figures)]
    sections += ["## Intended use and limits", _LIMITS]
    sections += ["## Licence", _LICENCE, "## Citation", _CITATION]
    return "\n\n".join(sections) + "\n"


def _describe_training(facts: Facts, base: str | None) -> str:
    """Makes the list of the training's facts; `base` is the name of the model that it started from."""
    started = "random weights" if base is None else plain_markdown(base)
    if facts.base_digest:
        started += f" (SHA-256 of its weights in half precision: {facts.base_digest})"
    lines = [f"- Data: {facts.dataset}", f"- Started from: {started}"]
    if facts.selection:
        lines.append(f"- Chosen: {facts.selection}")
    if facts.duration is not None:
        lines.append(f"- Duration: {facts.duration / 60:.1f} minutes")
    if facts.hardware:
        lines.append(f"- Hardware and software: {plain_markdown(facts.hardware)}")
    lines += [f"- {name}: {plain_markdown(value)}" for name, value in facts.settings.items()]
    return "\n".join(lines)


def _describe_result(result: Result, name: str, published: Mapping[str, Mapping[str, float | None]]) -> str:
    """Makes a paragraph about the measurement, and the table with the measured and the published figures."""
    sentences = [
        f"On {plain_markdown(result.dataset)}, split {result.split}: {result.queries:,} queries, "
        f"{result.gallery:,} in the gallery. All figures are in percent."
    ]
    if published:
        sentences.append(
            "The figures in rows marked (published) are from the authors of the methods; they were not measured here."
        )
    if published and result.differs:
        differences = "; ".join(result.differs)
        sentences.append(
            "This is not the published data set, so these figures cannot be compared with the published ones: "
            f"{differences}."
        )
    return " ".join(sentences) + "\n\n" + format_table({name: result.metrics, **published})


__all__ = ["DIRECTIONS", "METRICS", "Facts", "Result", "format_table", "make_model_card", "to_eval_results"]
