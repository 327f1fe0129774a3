"""Pictures of an evaluation: ranked results, and how many queries are answered by which rank."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..utils.sheets import draw_ranked_images

_RANKS = 10
# Lines are drawn at twice the size and reduced, for smooth edges.
_SCALE = 2
_COLOURS = ((31, 97, 181), (214, 88, 24), (34, 139, 84), (148, 64, 160), (176, 40, 60), (90, 90, 90))


def choose_queries(average_precisions: np.ndarray, each: int = 2, seed: int = 0) -> dict[str, list[int]]:
    """The best, the worst and some random queries by their average precision; none is in two of them.

    Args:
        average_precisions: `(queries,)`.
        each: of each kind; fewer where there are not enough queries.
        seed: of the random ones.
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
    gallery_files: Sequence[str],
    gallery_person_ids: torch.Tensor,
) -> Image.Image:
    """The top ten images of chosen queries with their scores, right ones framed green, wrong ones red.

    Args:
        queries: as [`choose_queries`] gives them.
        captions, query_person_ids: of all queries.
        similarities: `(chosen queries, gallery)`, in the order of `queries`.
        gallery_files, gallery_person_ids: of the gallery.
    """
    pictured, scores = [], []
    named = [(kind, query) for kind, own in queries.items() for query in own]
    for (kind, query), row in zip(named, similarities, strict=True):
        best = row.argsort(descending=True, stable=True)[:_RANKS].tolist()
        right = [bool(gallery_person_ids[image] == query_person_ids[query]) for image in best]
        found = [(Path(gallery_files[image]), hit) for image, hit in zip(best, right, strict=True)]
        pictured.append((f"[{kind}] {captions[query]}", found))
        scores.append(row[best].tolist())
    return draw_ranked_images(pictured, scores=scores)


def draw_matching_curves(first_ranks: dict[str, np.ndarray], max_rank: int = 50) -> Image.Image:
    """Cumulative matching curves: the share of queries with a right image among the first k, for k up to `max_rank`.

    Args:
        first_ranks: for each curve the rank (from 1) of each query's first right image.
        max_rank: at the right end.
    """
    width, height, left, right, top, bottom = (_SCALE * size for size in (720, 440, 60, 20, 20, 50))
    line_height = 22 * _SCALE
    full_height = height + len(first_ranks) * line_height
    image = Image.new("RGB", (width, full_height), "white")
    draw = ImageDraw.Draw(image)
    shares = {
        name: [100 * float((ranks <= k).mean()) for k in range(1, max_rank + 1)] for name, ranks in first_ranks.items()
    }
    lowest = 10 * int(min(curve[0] for curve in shares.values()) // 10)

    def place(k: int, share: float) -> tuple[float, float]:
        x = left + (k - 1) / (max_rank - 1) * (width - left - right)
        return x, top + (100 - share) / (100 - lowest) * (height - top - bottom) if lowest < 100 else top

    font = 13 * _SCALE
    for share in range(lowest, 101, 10 if lowest < 90 else 2):
        y = place(1, share)[1]
        draw.line((left, y, width - right, y), fill=(222, 222, 222), width=_SCALE)
        draw.text((left - 8 * _SCALE, y), f"{share}%", "black", font_size=font, anchor="rm")
    for k in (1, 5, *range(10, max_rank + 1, 10)):
        x = place(k, lowest)[0]
        draw.text((x, height - bottom + 8 * _SCALE), str(k), "black", font_size=font, anchor="mt")
    draw.text(((left + width - right) / 2, height - 6 * _SCALE), "rank", "black", font_size=font, anchor="mb")
    for index, (name, curve) in enumerate(shares.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [place(k, share) for k, share in enumerate(curve, start=1)]
        draw.line(points, fill=colour, width=3 * _SCALE, joint="curve")
        y = height + index * line_height + line_height // 4
        draw.line((left, y, left + 24 * _SCALE, y), fill=colour, width=3 * _SCALE)
        draw.text((left + 32 * _SCALE, y), name, "black", font_size=font, anchor="lm")
    return image.resize((width // _SCALE, full_height // _SCALE), Image.Resampling.LANCZOS)
