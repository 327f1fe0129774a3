"""Re-ranking of text-to-image results by visual neighbours."""

from collections.abc import Iterator

import torch


def rerank_blocks(
    text_embeds: torch.Tensor,
    image_embeds: torch.Tensor,
    num_neighbours: int = 6,
    weight: float = 0.5,
    block_size: int = 256,
) -> Iterator[torch.Tensor]:
    """Similarities of texts and images, raised where a text's best images are an image's own neighbours.

    `s_ij + weight * |T_i & N_j| / |T_i | N_j|`, `T_i` being the `num_neighbours` images most similar to text i, and
    `N_j` those most similar to image j, itself included: their Jaccard index (re-ranking by visual neighbours, RVN, of
    NAFS, arXiv 2101.03036, 2021). No matrix of queries x gallery or gallery x gallery is kept: memory grows with
    `block_size` x gallery.

    Args:
        text_embeds: `(texts, dim)`, unit rows.
        image_embeds: `(images, dim)`, unit rows.
        num_neighbours: at least 1; more than there are images means all of them.
        weight: of the Jaccard index; 0 leaves the similarities as they are.
        block_size: rows compared at a time.

    Yields:
        `(up to block_size, images)`, all texts in order.
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours is {num_neighbours}, it must be at least 1")
    count = min(num_neighbours, len(image_embeds))
    neighbours = torch.cat([(rows @ image_embeds.T).topk(count).indices for rows in image_embeds.split(block_size)])
    for rows in text_embeds.split(block_size):
        similarities = rows @ image_embeds.T
        is_best = torch.zeros_like(similarities).scatter_(1, similarities.topk(count).indices, 1.0)
        shared = torch.zeros_like(similarities)
        for place in range(count):
            shared += is_best[:, neighbours[:, place]]
        yield similarities + weight * shared / (2 * count - shared)
