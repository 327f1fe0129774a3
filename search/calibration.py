"""Finding the score above which a match is right with a wanted precision."""

from typing import Any

import torch
from torch import nn

from ..encoding_eccl import embed_split
from ..processing_eccl import ECCLProcessor
from .gallery import Calibration

# Queries compared with all pictures at a time.
_BLOCK = 512


def find_threshold(
    model: nn.Module, processor: ECCLProcessor, dataset: Any, precision: float, top_k: int
) -> Calibration:
    """Finds the lowest score from which on the best matches of the captions have a wanted precision.

    Args:
        model, processor: they encode the data set, as in [`embed_split`].
        dataset: a split with `image`, `captions` and `person_id`.
        precision: the wanted precision, above 0 and at most 1.
        top_k: number of best matches of each caption that are counted.

    Raises:
        ValueError: a number is out of range, or no score reaches the precision.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"precision is {precision}, it must be above 0 and at most 1")
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}, it must be at least 1")
    split = embed_split(model, processor, dataset)
    images = nn.functional.normalize(split.image_embeds, dim=-1)
    texts = nn.functional.normalize(split.text_embeds, dim=-1)
    top_k = min(top_k, len(images))
    scores, rights = [], []
    for start in range(0, len(texts), _BLOCK):
        best = (texts[start : start + _BLOCK] @ images.T).topk(top_k)
        scores.append(best.values)
        persons = split.query_person_ids[start : start + _BLOCK, None]
        rights.append(split.gallery_person_ids[best.indices] == persons)
    score, right = torch.cat(scores), torch.cat(rights)
    order = score.flatten().argsort(descending=True)
    ordered = score.flatten()[order]
    precisions = right.flatten()[order].double().cumsum(0) / torch.arange(1, len(order) + 1)
    # Matches with equal scores are above the threshold together.
    is_last = torch.cat([ordered[1:] < ordered[:-1], torch.tensor([True])])
    enough = torch.nonzero(is_last & (precisions >= precision)).flatten()
    if not len(enough):
        raise ValueError(
            f"no score gives a precision of {precision:g}: the best is {float(precisions[is_last].max()):.3f}"
        )
    last = int(enough[-1])
    threshold = float(ordered[last])
    return Calibration(
        threshold=threshold,
        precision=float(precisions[last]),
        answered=float((score[:, 0] >= threshold).double().mean()),
        queries=len(texts),
        pictures=len(images),
        top_k=top_k,
    )


__all__ = ["find_threshold"]
