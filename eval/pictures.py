"""Pictures of an evaluation: the ranked images of some queries, and the matching curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..utils.sheets import draw_ranked_images
from ..utils.text import printable

_RANKS = 10
# The curves are drawn at twice the size and reduced, for smooth edges.
_SCALE = 2
_COLOURS = ((31, 97, 181), (214, 88, 24), (34, 139, 84), (148, 64, 160), (176, 40, 60), (90, 90, 90))


def choose_queries(average_precisions: np.ndarray, each: int = 2, seed: int = 0) -> dict[str, list[int]]:
    """Chooses the queries with the best and the worst average precision, and some random ones of the rest.

    Args:
        average_precisions: `(queries,)`.
        each: number of queries of each kind; there are fewer if there are not enough queries.
        seed: seed of the random choice.

    Returns:
        Indices of queries for `best`, `worst` and `random`; none is in two of the lists.
    """
    order = np.argsort(-average_precisions, kind="stable").tolist()
    each = min(each, len(order) // 3) or 1
    best, worst = order[:each], order[each:][-each:][::-1]
    rest = order[each : len(order) - len(worst)]
    chosen = np.random.default_rng(seed).permutation(len(rest))[:each]
    return {"best": best, "worst": worst, "random": sorted(rest[index] for index in chosen)}


def draw_rankings(
    queries: dict[str, list[int]],
    captions: Sequence[str],
    query_person_ids: torch.Tensor,
    similarities: torch.Tensor,
    gallery: Sequence[Mapping[str, Any]],
    gallery_person_ids: torch.Tensor,
) -> Image.Image:
    """Draws the top ten images of chosen queries with their scores: right images in green frames, wrong ones in red.

    Args:
        queries: the result of [`choose_queries`].
        captions: the sentences of all queries.
        query_person_ids: `(queries,)`: the person of each query.
        similarities: `(chosen queries, gallery)`, in the order of `queries`.
        gallery: for each image of the gallery a dict with the image under `"image"`, as `read_image` takes it.
        gallery_person_ids: `(gallery,)`: the person of each image.
    """
    pictured, scores = [], []
    chosen = [(kind, query) for kind, queries_of_kind in queries.items() for query in queries_of_kind]
    for (kind, query), row in zip(chosen, similarities, strict=True):
        best = row.argsort(descending=True, stable=True)[:_RANKS].tolist()
        found = [
            (gallery[image]["image"], bool(gallery_person_ids[image] == query_person_ids[query])) for image in best
        ]
        pictured.append((f"[{kind}] {captions[query]}", found))
        scores.append(row[best].tolist())
    return draw_ranked_images(pictured, scores=scores)


def draw_matching_curves(first_ranks: dict[str, np.ndarray], max_rank: int = 50) -> Image.Image:
    """Draws cumulative matching curves: the percentage of queries with a right answer among the first k.

    Args:
        first_ranks: for each curve, by its label, the rank (from 1) of each query's first right answer.
        max_rank: the largest k, at the right end of the picture.
    """
    width, height, left, right, top, bottom = (_SCALE * size for size in (720, 440, 60, 20, 20, 50))
    line_height = 22 * _SCALE
    full_height = height + len(first_ranks) * line_height
    image = Image.new("RGB", (width, full_height), "white")
    draw = ImageDraw.Draw(image)
    curves = {
        label: [100 * float((ranks <= k).mean()) for k in range(1, max_rank + 1)]
        for label, ranks in first_ranks.items()
    }
    lowest = 10 * int(min(curve[0] for curve in curves.values()) // 10)

    def place(k: int, percent: float) -> tuple[float, float]:
        x = left + (k - 1) / (max_rank - 1) * (width - left - right)
        return x, top + (100 - percent) / (100 - lowest) * (height - top - bottom) if lowest < 100 else top

    font = 13 * _SCALE
    for percent in range(lowest, 101, 10 if lowest < 90 else 2):
        y = place(1, percent)[1]
        draw.line((left, y, width - right, y), fill=(222, 222, 222), width=_SCALE)
        draw.text((left - 8 * _SCALE, y), f"{percent}%", "black", font_size=font, anchor="rm")
    for k in (1, 5, *range(10, max_rank + 1, 10)):
        x = place(k, lowest)[0]
        draw.text((x, height - bottom + 8 * _SCALE), str(k), "black", font_size=font, anchor="mt")
    draw.text(((left + width - right) / 2, height - 6 * _SCALE), "rank", "black", font_size=font, anchor="mb")
    for index, (label, curve) in enumerate(curves.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [place(k, percent) for k, percent in enumerate(curve, start=1)]
        draw.line(points, fill=colour, width=3 * _SCALE, joint="curve")
        y = height + index * line_height + line_height // 4
        draw.line((left, y, left + 24 * _SCALE, y), fill=colour, width=3 * _SCALE)
        draw.text((left + 32 * _SCALE, y), printable(label), "black", font_size=font, anchor="lm")
    return image.resize((width // _SCALE, full_height // _SCALE), Image.Resampling.LANCZOS)


__all__ = ["choose_queries", "draw_matching_curves", "draw_rankings"]
