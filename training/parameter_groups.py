"""The groups of the optimiser: parameters that share a learning rate and a weight decay."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from .arguments import ECCLTrainingArguments


class ParameterKind(NamedTuple):
    """What the parameters of a group have in common.

    Args:
        is_lora: whether their base rate is `lora_learning_rate`; that of all others is `learning_rate`.
        factor: their learning rate is the base rate times this.
        decays: whether they have weight decay.
    """

    is_lora: bool
    factor: float = 1.0
    decays: bool = True


def group_parameters(
    named: Sequence[tuple[str, nn.Parameter]], args: ECCLTrainingArguments
) -> dict[ParameterKind, list[nn.Parameter]]:
    """Groups the trained parameters: the LoRA matrices first, then all others.

    Within each of the two, the groups are in the order of their first parameter, so that the same run always has the
    same groups, and a checkpoint fits.

    Args:
        named: the trained parameters with their names.
        args: `learning_rate_factors` and `no_weight_decay`.

    Raises:
        ValueError: an entry of these two is part of no name.
    """
    factors = args.rate_factors
    for option, texts in (("learning_rate_factors", factors), ("no_weight_decay", args.no_weight_decay)):
        for text in texts:
            if not any(text in name for name, _ in named):
                raise ValueError(f"{option}: no trained parameter has {text!r} in its name, so it would do nothing")
    groups: dict[ParameterKind, list[nn.Parameter]] = {}
    for is_lora in (True, False):
        for name, parameter in named:
            if ("lora_" in name) == is_lora:
                factor = next((factors[text] for text in reversed(factors) if text in name), 1.0)
                decays = not any(text in name for text in args.no_weight_decay)
                groups.setdefault(ParameterKind(is_lora, factor, decays), []).append(parameter)
    return groups


def describe_groups(
    groups: dict[ParameterKind, list[nn.Parameter]], args: ECCLTrainingArguments
) -> list[dict[str, Any]]:
    """Makes the groups as torch's optimisers take them."""
    described = []
    for kind, parameters in groups.items():
        base_rate = args.lora_learning_rate if kind.is_lora else args.learning_rate
        group: dict[str, Any] = {"params": parameters, "lr": base_rate * kind.factor}
        described.append(group if kind.decays else group | {"weight_decay": 0.0})
    return described


def find_base_rates(kinds: Sequence[ParameterKind], rates: Sequence[float]) -> list[float]:
    """Returns the learning rates without their factors: that of the LoRA matrices, then that of all others.

    Args:
        kinds: those of the groups.
        rates: the present learning rate of each group.

    Returns:
        Two rates, or one if all groups are of one sort. A rate is 0 if all its groups have the factor 0.
    """
    found = []
    for is_lora in (True, False):
        own = [(kind.factor, rate) for kind, rate in zip(kinds, rates, strict=True) if kind.is_lora == is_lora]
        if own:
            # A division by 1 does not round.
            factor, rate = min(own, key=lambda each: (each[0] == 0, each[0] != 1))
            found.append(rate / factor if factor else 0.0)
    return found


__all__ = ["ParameterKind", "describe_groups", "find_base_rates", "group_parameters"]
