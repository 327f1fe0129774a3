"""The methods and variants that are compared, their search spaces, and the drawn benchmarks for the comparison."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...dataset_scripts.synthetic.generator import SyntheticBenchmark

Span = tuple[float, float]
"""The least and the largest value of an option that is tuned; it is searched on a logarithmic scale."""

# The published rates, 1e-3 and 1e-4, are those of a run of 60 epochs; a run of 120 steps needs higher ones.
_PROMPT_RATE: dict[str, Span] = {"learning_rate": (1e-3, 1e-2)}
_LORA_RATE: dict[str, Span] = {"lora_learning_rate": (3e-3, 2e-2)}
_RATES = {**_PROMPT_RATE, **_LORA_RATE}
_FULL_RATE: dict[str, Span] = {"learning_rate": (1e-5, 1e-3)}
_IDENTITY: dict[str, Span] = {"identity_memory_temperature": (0.015, 0.06)}
_INSTANCE: dict[str, Span] = {"instance_memory_temperature": (0.0075, 0.03)}
_TAL: dict[str, Span] = {"tal_temperature": (0.01, 0.04)}
_ECCL = {**_TAL, **_IDENTITY, **_INSTANCE}


@dataclass(frozen=True)
class Method:
    """A method, or a variant of the reference.

    Args:
        title: its name in tables.
        recipe: the recipe that trains it, see [`~eccl.utils.shipped.find_recipe`]; `None` if nothing is trained.
        space: the options that are tuned.
        changes: options of a variant of the reference. A variant is not tuned: it has the options that were chosen for
            the reference, and these.
    """

    title: str
    recipe: str | None
    space: Mapping[str, Span] = field(default_factory=dict)
    changes: Mapping[str, str] = field(default_factory=dict)


REFERENCE = "eccl"
"""The method that the others are compared with."""

METHODS: dict[str, Method] = {
    "zero_shot": Method("zero-shot", None),
    "infonce": Method("InfoNCE", "baselines/infonce", {**_RATES, "contrastive_temperature": (0.015, 0.06)}),
    "cmpm_c": Method("CMPM/C", "baselines/cmpm_c", _RATES),
    "sdm": Method("SDM", "baselines/sdm", {**_RATES, "sdm_temperature": (0.01, 0.04)}),
    "irra": Method("IRRA", "baselines/irra", {**_FULL_RATE, "sdm_temperature": (0.01, 0.04)}),
    "tal": Method("TAL", "baselines/tal", {**_RATES, **_TAL}),
    "memories_only": Method("both memories, no TAL", "baselines/memories_only", {**_RATES, **_IDENTITY, **_INSTANCE}),
    "full_fine_tuning": Method("ECCL's losses, all parameters", "baselines/full_fine_tuning", {**_FULL_RATE, **_ECCL}),
    "lora_only": Method("ECCL, LoRA only", "baselines/lora_only", {**_LORA_RATE, **_ECCL}),
    "prompts_only": Method("ECCL, prompts only", "baselines/prompts_only", {**_PROMPT_RATE, **_ECCL}),
    "without_identity_memory": Method(
        "ECCL without identity memory", "baselines/without_identity_memory", {**_RATES, **_TAL, **_INSTANCE}
    ),
    "without_instance_memory": Method(
        "ECCL without instance memory", "baselines/without_instance_memory", {**_RATES, **_TAL, **_IDENTITY}
    ),
    REFERENCE: Method("ECCL", "baselines/eccl", {**_RATES, **_ECCL}),
}


def _vary(title: str, **changes: object) -> Method:
    return Method(title, METHODS[REFERENCE].recipe, changes={name: str(value) for name, value in changes.items()})


# Each changes one thing of the reference.
ABLATIONS: dict[str, Method] = {
    **{f"rank_{rank}": _vary(f"LoRA of rank {rank}", lora_rank=rank, lora_alpha=rank) for rank in (1, 2, 8, 16)},
    **{f"prompts_{count}": _vary(f"{count} prompt tokens", num_prompt_tokens=count) for count in (1, 2, 8)},
    **{f"depth_{depth}": _vary(f"prompts in {depth} layer{'s' * (depth > 1)}", prompt_depth=depth) for depth in (1, 2)},
    **{
        f"{memory}_temperature_{value:g}": _vary(
            f"{memory} memory, temperature {value:g}", **{f"{memory}_memory_temperature": value}
        )
        for memory, values in (("identity", (0.015, 0.06, 0.12)), ("instance", (0.0075, 0.03, 0.06)))
        for value in values
    },
    **{
        f"{memory}_momentum_{value:g}": _vary(
            f"{memory} memory, momentum {value:g}", **{f"{memory}_memory_momentum": value}
        )
        for memory in ("identity", "instance")
        for value in (0, 0.5, 0.9, 1)
    },
    **{
        f"identity_weight_{weight:g}": _vary(
            f"identity memory, weight {weight:g}", losses=f"tal=1 identity_memory={weight:g} instance_memory=0.1"
        )
        for weight in (0.3, 3, 10)
    },
    **{
        f"instance_weight_{weight:g}": _vary(
            f"instance memory, weight {weight:g}", losses=f"tal=1 identity_memory=1 instance_memory={weight:g}"
        )
        for weight in (0.03, 0.3, 1)
    },
    "identity_batches": _vary("two pairs of each person in a batch", sampler="identity", pairs_per_person=2),
    **{f"drop_{p:g}": _vary(f"words dropped with probability {p:g}", word_drop_probability=p) for p in (0, 0.3)},
    **{f"eps_{eps:g}": _vary(f"Adam's epsilon {eps:g}", adam_epsilon=eps) for eps in (1e-5, 1e-3)},
    "augmented_start": _vary("memories start from augmented pairs", memory_start="augmented"),
    "no_augmentation": _vary("no augmentation", augment=False),
}

ALL_METHODS: dict[str, Method] = {**METHODS, **ABLATIONS}

_USUAL = SyntheticBenchmark("cuhk_pedes", domain="target", train_ids=1000, val_ids=100, test_ids=300)
SETTINGS: dict[str, SyntheticBenchmark] = {
    "usual": _USUAL,
    "look_alike": replace(_USUAL, lookalikes=4),
    "noisy_captions": replace(_USUAL, caption_noise=0.2),
    # Captions of an image that mention different attributes.
    "partial_captions": replace(_USUAL, agreement=0.0),
    # More and fewer persons: how many of them a batch sees.
    "persons_300": replace(_USUAL, train_ids=300),
    "persons_3000": replace(_USUAL, train_ids=3000),
    "persons_11000": replace(_USUAL, train_ids=11_000),
    # The same number of training images, with two or eight of each person instead of four; in val and test, too.
    "images_2": replace(_USUAL, train_ids=2000, images_per_id=2),
    "images_8": replace(_USUAL, train_ids=500, images_per_id=8),
    "captions_4": replace(_USUAL, captions_per_image=4),
    # A few minutes on two cores: it shows that the command works, and nothing about the methods.
    "quick": replace(_USUAL, train_ids=48, val_ids=8, test_ids=12, images_per_id=2),
}


def draw_trials(space: Mapping[str, Span], trials: int, seed: int) -> list[dict[str, float]]:
    """Draws the options of each trial of a search.

    The first trial has no options: it is the recipe as it is. Each span is divided, on a logarithmic scale, into as
    many equal parts as there are other trials; each of these trials gets a value of another part (Latin hypercube
    sampling, McKay et al., Technometrics 1979).

    Args:
        space: the options that are tuned.
        trials: number of trials, at least 1. Without a space there is one.
        seed: seed of the search.

    Returns:
        For each trial its options.
    """
    drawn: list[dict[str, float]] = [{} for _ in range(trials if space else 1)]
    for name, (least, most) in space.items():
        rng = random.Random(f"{seed}/{name}")
        parts = list(range(len(drawn) - 1))
        rng.shuffle(parts)
        for options, part in zip(drawn[1:], parts, strict=True):
            position = (part + rng.random()) / len(parts)
            # Three digits are enough, and a command line shows them.
            options[name] = float(f"{least * (most / least) ** position:.3g}")
    return drawn


__all__ = [
    "ABLATIONS",
    "ALL_METHODS",
    "METHODS",
    "REFERENCE",
    "SETTINGS",
    "Method",
    "Span",
    "draw_trials",
]
