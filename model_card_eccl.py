"""The card of a checkpoint, made from facts: what it was made of, what was measured, what it is not for."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCardData

from .eval.reports import Result, format_table, published_rows, to_eval_results

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


def make_model_card(facts: Facts) -> str:
    """The card as it stands in README.md: metadata with what was measured as `model-index`, then sections.

    Nothing that is not known is in it: a section without facts is left out.
    """
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
        theirs = published_rows(result.dataset) if result.split == "test" else {}
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


__all__ = ["Facts", "make_model_card"]
