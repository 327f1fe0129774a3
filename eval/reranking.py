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
    """Yields similarities of texts and images that are raised if the text's best images are the image's neighbours.

    The new similarity is `s_ij + weight * |T_i & N_j| / |T_i | N_j|`. `T_i` holds the `num_neighbours` images that are
    most similar to text i, `N_j` those that are most similar to image j, itself included. The fraction is the Jaccard
    index of both sets. (RVN, re-ranking by visual neighbours, in NAFS, arXiv 2101.03036, 2021.)

    No matrix of queries x gallery or gallery x gallery is kept: memory grows with `block_size` x gallery.

    Args:
        text_embeds: `(texts, dim)`, unit rows.
        image_embeds: `(images, dim)`, unit rows.
        num_neighbours: at least 1; if there are fewer images, all are used.
        weight: factor on the Jaccard index; 0 leaves the similarities unchanged.
        block_size: number of rows that are compared at a time.

    Yields:
        `(up to block_size, images)`, all texts in order.

    Raises:
        ValueError: `num_neighbours` is less than 1.
    """
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours is {num_neighbours}, it must be at least 1")
    count = min(num_neighbours, len(image_embeds))
    neighbours = torch.cat([(rows @ image_embeds.T).topk(count).indices for rows in image_embeds.split(block_size)])
    for rows in text_embeds.split(block_size):
        similarities = rows @ image_embeds.T
        is_best = torch.zeros_like(similarities).scatter_(1, similarities.topk(count).indices, 1.0)
        num_common = torch.zeros_like(similarities)
        for place in range(count):
            num_common += is_best[:, neighbours[:, place]]
        yield similarities + weight * num_common / (2 * count - num_common)


__all__ = ["rerank_blocks"]
