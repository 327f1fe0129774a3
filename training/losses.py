"""The losses of text-to-image person retrieval, as pure functions of tensors.

`objective.py` makes the named losses of a run of them; to add a loss, start there.

In all of them, `image_features` and `text_features` are `(batch, dim)` and unnormalised; row i of both belongs to pair
i, and `person_ids` `(batch,)` gives the person of each pair. `s_ij` is the cosine of text i and image j. Every loss is
computed in float32, for features of any dtype, and returned as a float32 scalar.
"""

import torch
from torch import nn

# In SDM and CMPM: keeps the logarithm finite if a true probability is 0.
_MATCHING_EPS = 1e-8


def cosine_similarity_matrix(text_features: torch.Tensor, image_features: torch.Tensor) -> torch.Tensor:
    """Computes `s_ij = cos(text i, image j)` in float32: `(texts, dim), (images, dim) -> (texts, images)`."""
    with torch.autocast(text_features.device.type, enabled=False):
        return unit_rows(text_features) @ unit_rows(image_features).T


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    """Scales each row to length 1, in float32."""
    return nn.functional.normalize(features.float(), dim=-1)


def _check_batch(image_features: torch.Tensor, text_features: torch.Tensor, labels: torch.Tensor | None) -> None:
    if image_features.shape != text_features.shape:
        raise ValueError(
            f"image_features are {tuple(image_features.shape)} and text_features {tuple(text_features.shape)}: "
            "each pair has one row in both, so the shapes must be equal"
        )
    if labels is not None and labels.shape != (len(image_features),):
        raise ValueError(
            f"the ids have the shape {tuple(labels.shape)} for {len(image_features)} pairs: each pair needs one id"
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
    """TAL: a triplet loss with a log-sum-exp over all negatives instead of the hardest (RDE, CVPR 2024, section 3.4).

    `P_i` are the images of the person of text i. For each text i the loss is
    `[margin - sum_{j in P_i} a_ij s_ij + t log sum_{j not in P_i} exp(s_ij / t)]_+`. `a_ij` is the softmax of
    `s_ij / t` over `P_i`, held constant. The same is computed for each image over the texts. A row without negatives
    gives 0.

    Args:
        image_features, text_features: `(batch, dim)`.
        person_ids: `(batch,)`.
        temperature: `t`, positive.
        margin: at least 0.

    Returns:
        The sum over the batch and both directions.

    Raises:
        ValueError: the shapes do not agree, the temperature is not positive, or the margin is negative.
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
        # Rows without negatives keep finite values here: a NaN would pass through the mask below in the backward pass.
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
    """SDM: the divergence between the predicted and the true distribution of matches (IRRA, CVPR 2023, section 3.3).

    For each text, `KL(p || q) = sum_j p_j (log p_j - log(q_j + 1e-8))`. `p` is the softmax of `logit_scale * s_ij` over
    the images; `q` is uniform over the images of the same person and 0 elsewhere. The same is computed for each image
    over the texts.

    Args:
        image_features, text_features: `(batch, dim)`.
        person_ids: `(batch,)`.
        logit_scale: factor on the cosines; a number, or a scalar tensor that is trained.
        image_ids: `(batch,)`: if given, another image of the same person has the weight `image_id_factor` instead of 1.
            `q` then divides each entry by the sum of its column, as the published code does.
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
        # torch.lerp would round a small factor to 0.
        weights = weights * image_id_factor + (image_ids[:, None] == image_ids[None, :]) * (1 - image_id_factor)
    logits = cosine_similarity_matrix(text_features, image_features) * logit_scale
    true = weights / weights.sum(dim=1)
    return _divergence(logits, true) + _divergence(logits.T, true)


def cross_modal_projection_matching_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, person_ids: torch.Tensor
) -> torch.Tensor:
    """CMPM: like SDM, on the projections of each feature onto the unit features of the other modality (ECCV 2018, 3.2).

    `sum_j p_j (log p_j - log(q_j + 1e-8))`; `p` is the softmax of the scalar projections `x_i . y_j / |y_j|`. The
    published code divides the matches by their Euclidean norm. So `q` sums to more than 1 if a person occurs more than
    once, and the loss can be negative.

    Args:
        image_features, text_features: `(batch, dim)`, unnormalised: longer features make `p` sharper.
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
    """Computes the mean over rows of `sum p (log p - log(true + eps))`; `p` is the softmax of the row."""
    log_predicted = logits.log_softmax(dim=1)
    return (log_predicted.exp() * (log_predicted - (true + _MATCHING_EPS).log())).sum(dim=1).mean()


def identity_classification_loss(
    image_logits: torch.Tensor, text_logits: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Cross entropy of one classifier of persons on the features of both modalities (the ID loss of IRRA, CVPR 2023).

    Args:
        image_logits, text_logits: `(batch, persons)`.
        labels: `(batch,)`, `0 .. persons - 1`.

    Returns:
        The mean over the batch and the two modalities.

    Raises:
        ValueError: the shapes do not agree.
    """
    if image_logits.shape != text_logits.shape or labels.shape != (len(image_logits),):
        raise ValueError(
            f"image_logits are {tuple(image_logits.shape)}, text_logits {tuple(text_logits.shape)} and there are "
            f"labels of shape {tuple(labels.shape)}: each pair needs one row in both and one label"
        )
    image_loss = nn.functional.cross_entropy(image_logits.float(), labels)
    return (image_loss + nn.functional.cross_entropy(text_logits.float(), labels)) / 2


def projection_classification_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """CMPC: classifies the person from each feature's projection onto the other modality (ECCV 2018, 3.3).

    The image feature x of a pair is projected onto the direction of its text feature y, `z = (x . u) u` with
    `u = y / |y|`, and each text feature onto the direction of its image feature. The logits of the persons are
    `z . w / |w|` for each column w of the weight ("Deep Cross-Modal Projection Learning for Image-Text Matching").

    Args:
        image_features, text_features: `(batch, dim)`, unnormalised.
        weight: `(dim, persons)`; its columns are normalised here.
        labels: `(batch,)`, `0 .. persons - 1`.

    Returns:
        The mean over the batch, summed over both directions.

    Raises:
        ValueError: the shapes do not agree.
    """
    _check_batch(image_features, text_features, labels)
    if weight.ndim != 2 or len(weight) != image_features.shape[1]:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, it must be (dim, persons) with the dim {image_features.shape[1]} of "
            "the features"
        )
    with torch.autocast(text_features.device.type, enabled=False):
        unit_images, unit_texts = unit_rows(image_features), unit_rows(text_features)
        # The product of x . u and the logits of u: the same as the logits of z, with one small factor per row.
        lengths_on_texts = (image_features.float() * unit_texts).sum(dim=1, keepdim=True)
        lengths_on_images = (text_features.float() * unit_images).sum(dim=1, keepdim=True)
        unit_columns = nn.functional.normalize(weight.float(), dim=0)
        image_logits = lengths_on_texts * (unit_texts @ unit_columns)
        text_logits = lengths_on_images * (unit_images @ unit_columns)
    return nn.functional.cross_entropy(image_logits, labels) + nn.functional.cross_entropy(text_logits, labels)


def image_text_contrastive_loss(
    image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: float | torch.Tensor = 50.0
) -> torch.Tensor:
    """InfoNCE: each text matches only the image of its pair, and each image only its text (CLIP, ICML 2021, figure 3).

    Args:
        image_features, text_features: `(batch, dim)`.
        logit_scale: factor on the cosines; a number, or a scalar tensor that is trained.

    Returns:
        The mean over the batch and the two directions.
    """
    _check_batch(image_features, text_features, None)
    logits = cosine_similarity_matrix(text_features, image_features) * logit_scale
    labels = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2


def attribute_classification_loss(logits: torch.Tensor, labels: torch.Tensor, num_values: list[int]) -> torch.Tensor:
    """Cross entropy of several attributes at once, for pre-training on data with known attributes.

    Args:
        logits: `(batch, sum(num_values))`: the values of the first attribute, then of the second, ...
        labels: `(batch, attributes)`: the value of each attribute; -100 if it is not to be predicted.
        num_values: number of values of each attribute.

    Returns:
        The mean over all labels other than -100; 0 if there are none.

    Raises:
        ValueError: the width of `logits` or `labels` does not agree with `num_values`.
    """
    if logits.shape[1] != sum(num_values) or labels.shape[1] != len(num_values):
        raise ValueError(
            f"logits are {logits.shape[1]} and labels {labels.shape[1]} wide, {len(num_values)} attributes with "
            f"{sum(num_values)} values need {sum(num_values)} and {len(num_values)}"
        )
    parts = zip(logits.float().split(num_values, dim=1), labels.unbind(dim=1), strict=True)
    sums = [nn.functional.cross_entropy(part, label, ignore_index=-100, reduction="sum") for part, label in parts]
    return torch.stack(sums).sum() / (labels != -100).sum().clamp(min=1)
