"""The objectives of text-to-image person retrieval as pure functions of tensors.

Throughout, `image_features` and `text_features` are `(batch, dim)`, unnormalised, row i of both belonging to one pair,
and `person_ids` `(batch,)` says whose they are. `s_ij` is the cosine of text i and image j. Every loss is computed in
float32 whatever the dtype of the features, and returned as a float32 scalar.
"""

import torch
from torch import nn

# Keeps the logarithm of a true probability of 0 finite, in SDM and CMPM.
_MATCHING_EPS = 1e-8


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
    if labels is not None and labels.shape != (len(image_features),):
        raise ValueError(
            f"the ids have the shape {tuple(labels.shape)} for {len(image_features)} pairs: one id a pair is needed"
        )


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
        ValueError: shapes that do not agree, a temperature that is not positive, a negative margin.
    """
    _check_batch(image_features, text_features, person_ids)
    _check_positive("temperature", temperature)
    if margin < 0:
        raise ValueError(f"margin is {margin}, it must not be negative")
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


def similarity_distribution_matching_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    person_ids: torch.Tensor,
    logit_scale: float | torch.Tensor = 50.0,
    image_ids: torch.Tensor | None = None,
    image_id_factor: float = 0.3,
) -> torch.Tensor:
    """SDM: the divergence of predicted from true matching (IRRA, CVPR 2023, section 3.3).

    For each text, `KL(p || q) = sum_j p_j (log p_j - log(q_j + 1e-8))`, `p` being the softmax of `logit_scale * s_ij`
    over the images and `q` the share of each image among those of the same person; the same for each image over the
    texts.

    Args:
        image_features, text_features: `(batch, dim)`.
        person_ids: `(batch,)`.
        logit_scale: factor on the cosines; a number, or a scalar tensor to be learned.
        image_ids: `(batch,)`: with them, another image of the same person counts `image_id_factor` in place of 1. `q`
            then divides each entry by the weights of its column, as the published code does.
        image_id_factor: 0 to 1.

    Returns:
        The mean over the batch, summed over both directions.
    """
    _check_batch(image_features, text_features, person_ids)
    if not 0 <= image_id_factor <= 1:
        raise ValueError(f"image_id_factor is {image_id_factor}, it must be between 0 and 1")
    weights = (person_ids[:, None] == person_ids[None, :]).float()
    if image_ids is not None:
        _check_batch(image_features, text_features, image_ids)
        # Not lerp, which rounds a small factor away.
        weights = weights * image_id_factor + (image_ids[:, None] == image_ids[None, :]) * (1 - image_id_factor)
    logits = cosine_similarity_matrix(text_features, image_features) * logit_scale
    true = weights / weights.sum(dim=1)
    return _divergence(logits, true) + _divergence(logits.T, true)


def cross_modal_projection_matching_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, person_ids: torch.Tensor
) -> torch.Tensor:
    """CMPM: as SDM, on the projection of each feature on the unit features of the other modality (ECCV 2018, sec. 3.2).

    `sum_j p_j (log p_j - log(q_j + 1e-8))`, `p` being the softmax of the scalar projections `x_i . y_j / |y_j|`. The
    published code divides the matches by their Euclidean norm, so that `q` adds up to more than 1 where a person
    occurs more than once, and the loss can be negative.

    Args:
        image_features, text_features: `(batch, dim)`, unnormalised: their length is the sharpness of `p`.
        person_ids: `(batch,)`.

    Returns:
        The mean over the batch, summed over both directions.
    """
    _check_batch(image_features, text_features, person_ids)
    same = (person_ids[:, None] == person_ids[None, :]).float()
    true = same / same.norm(dim=1)
    with torch.autocast(text_features.device.type, enabled=False):
        image_on_text = image_features.float() @ unit_rows(text_features).T
        text_on_image = text_features.float() @ unit_rows(image_features).T
    return _divergence(image_on_text, true) + _divergence(text_on_image, true)


def _divergence(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """The mean over rows of `sum p (log p - log(true + eps))`, `p` the softmax of the row."""
    log_predicted = logits.log_softmax(dim=1)
    return (log_predicted.exp() * (log_predicted - (true + _MATCHING_EPS).log())).sum(dim=1).mean()


def identity_classification_loss(
    image_logits: torch.Tensor, text_logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of both modalities' features under one classifier of persons (the ID loss of IRRA, CVPR 2023).

    Args:
        image_logits, text_logits: `(batch, persons)`.
        labels: `(batch,)`, `0 .. persons - 1`.

    Returns:
        The mean over the batch, halved over the two modalities.

    Raises:
        ValueError: shapes that do not agree.
    """
    if image_logits.shape != text_logits.shape or labels.shape != (len(image_logits),):
        raise ValueError(
            f"image_logits are {tuple(image_logits.shape)}, text_logits {tuple(text_logits.shape)} and there are "
            f"labels of shape {tuple(labels.shape)}: each pair needs a row in both and one label"
        )
    return sum(nn.functional.cross_entropy(logits.float(), labels) for logits in (image_logits, text_logits)) / 2


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
