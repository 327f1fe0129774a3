"""The objectives of text-to-image person retrieval as pure functions of tensors.

Throughout, `image_features` and `text_features` are `(batch, dim)`, unnormalised, row i of both belonging to one pair,
and `person_ids` `(batch,)` says whose they are. `s_ij` is the cosine of text i and image j. Every loss is computed in
float32 whatever the dtype of the features, and returned as a float32 scalar.
"""

import torch
from torch import nn


def cosine_similarity_matrix(text_features: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
    """`s_ij = cos(text i, image j)`, in float32: `(texts, dim), (images, dim) -> (texts, images)`."""
    with torch.autocast(text_features.device.type, enabled=False):
        return unit_rows(text_features) @ unit_rows(image_features).T


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Rows scaled to length 1, in float32."""
    return nn.functional.normalize(features.float(), dim=-1)


def _check_batch(image_features: torch.Tensor, text_features: torch.Tensor, labels: torch.Tensor | None) -> None:
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features are {tuple(image_features.shape)} and text_features {tuple(text_features.shape)}: "
            "a pair has a row in each, so the shapes must be equal"
        )
    if labels is not None and len(labels) != len(image_features):
        raise ValueError(f"there are {len(labels)} ids for {len(image_features)} pairs: one id a pair is needed")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}, it must be positive")


def triplet_alignment_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    person_ids: torch.Tensor,
    temperature: float = 0.02,
    margin: float = 0.2,
) -> torch.Tensor:
    """TAL: a triplet loss whose hardest negative is a log-sum-exp over all of them (RDE, CVPR 2024, section 3.4).

    For each text i, with `P_i` the images of its person:
    `[margin - sum_{j in P_i} a_ij s_ij + t log sum_{j not in P_i} exp(s_ij / t)]_+`, `a_ij` being the softmax of
    `s_ij / t` over `P_i`, held constant; likewise for each image over the texts. A row without negatives counts 0.

    Args:
        image_features, text_features: `(batch, dim)`.
        person_ids: `(batch,)`.
        temperature: `t`, positive.
        margin: at least 0.

    Returns:
        The sum over the batch and both directions.

    Raises:
        ValueError: shapes that do not agree, a temperature that is not positive.
    """
    _check_batch(image_features, text_features, person_ids)
    _check_positive("temperature", temperature)
    similarities = cosine_similarity_matrix(text_features, image_features)
    positive = person_ids[:, None] == person_ids[None, :]
    has_negative = ~positive.all(dim=1)

    def one_direction(rows: torch.Tensor) -> torch.Tensor:
        scaled = rows / temperature
        weights = scaled.detach().masked_fill(~positive, -torch.inf).softmax(dim=1)
        positives = (weights * rows).sum(dim=1)
        # Rows without negatives get a finite stand-in, so that no NaN arises that the mask would have to stop.
        masked = scaled.masked_fill(positive & has_negative[:, None], -torch.inf)
        hardest = temperature * masked.logsumexp(dim=1)
        return torch.where(has_negative, (margin - positives + hardest).clamp(min=0), 0.0).sum()

    return one_direction(similarities) + one_direction(similarities.T)


def image_text_contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: float | torch.Tensor = 50.0
) -> torch.Tensor:
    """InfoNCE: each text has one right image in the batch, its own, and the reverse (CLIP, ICML 2021, figure 3).

    Args:
        image_features, text_features: `(batch, dim)`.
        logit_scale: factor on the cosines; a number, or a scalar tensor to be learned.

    Returns:
        The mean over the batch, halved over the two directions.
    """
    _check_batch(image_features, text_features, None)
    logits = cosine_similarity_matrix(text_features, image_features) * logit_scale
    labels = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


def attribute_classification_loss(logits: torch.Tensor, labels: torch.Tensor, num_values: list[int]) -> torch.Tensor:
    """Cross entropy of several attributes at once, for pre-training on data whose attributes are known.

    Args:
        logits: `(batch, sum(num_values))`: the values of the first attribute, then of the second, ...
        labels: `(batch, attributes)`: the value of each, -100 where it is not to be predicted.
        num_values: how many values each attribute has.

    Returns:
        The mean over all labels that are not -100; 0 where there are none.

    Raises:
        ValueError: `logits` or `labels` do not have the width that `num_values` says.
    """
    if logits.shape[1] != sum(num_values) or labels.shape[1] != len(num_values):
        raise ValueError(
            f"logits are {logits.shape[1]} and labels {labels.shape[1]} wide, {len(num_values)} attributes with "
            f"{sum(num_values)} values need {sum(num_values)} and {len(num_values)}"
        )
    parts = zip(logits.float().split(num_values, dim=1), labels.unbind(dim=1), strict=True)
    total = sum(nn.functional.cross_entropy(part, label, ignore_index=-100, reduction="sum") for part, label in parts)
    return total / (labels != -100).sum().clamp(min=1)
