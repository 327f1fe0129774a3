"""Rank-k, mAP and mINP of text-to-image person retrieval, for `evaluate.load`."""

import datasets
import evaluate
import numpy

_DESCRIPTION = """
Text-to-image person retrieval: each query ranks the whole gallery by cosine similarity. Rank-k is the share of queries
with an image of the right person among the first k; AP the mean, over the query's relevant images, of rank among the
relevant / rank among all; INP the number of relevant images / rank of the last one. All in percent. Ties go to the
lower gallery index.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: query embeddings (queries, dim), or, without `gallery_embeds`, rows of similarities (queries, gallery).
    references: the person id of each query.
    gallery_embeds: image embeddings (gallery, dim); need not be normalised.
    gallery_person_ids: the person id of each gallery image.
    ks: the k of Rank-k; (1, 5, 10) by default.
    block_size: queries compared with the gallery at a time; memory grows with block_size x gallery.
Returns:
    rank1, rank5, rank10 (one a k), mAP, mINP: percent.
Examples:
    >>> metric = evaluate.load("eval/person_retrieval")
    >>> metric.compute(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[7, 8],
    ...                gallery_embeds=[[0.9, 0.1], [0.2, 0.8]], gallery_person_ids=[7, 8])
    {'rank1': 100.0, 'rank5': 100.0, 'rank10': 100.0, 'mAP': 100.0, 'mINP': 100.0}
"""

# The rank of a relevant image is one more than the number of images before it, counted block by block.
_BLOCK_SIZE = 256


def _as_matrix(name, values):
    matrix = numpy.asarray(values, dtype=numpy.float32)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} has shape {matrix.shape}, it must be a matrix with at least one row")
    if not numpy.isfinite(matrix).all():
        row = int(numpy.flatnonzero(~numpy.isfinite(matrix).all(axis=1))[0])
        raise ValueError(f"row {row} of {name} holds NaN or infinity")
    return matrix


def _unit_rows(name, matrix):
    lengths = numpy.linalg.norm(matrix, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(f"row {int(numpy.flatnonzero(lengths[:, 0] == 0)[0])} of {name} is zero and has no direction")
    return matrix / lengths


def _check_gallery(size, gallery_person_ids):
    if len(gallery_person_ids) != size:
        raise ValueError(f"the gallery has {size} images and {len(gallery_person_ids)} gallery_person_ids")


def _relevant_ranks(similarities, relevant):
    """The ascending ranks (from 1) of the relevant images of one query: those before it, counted, not sorted."""
    scores = similarities[relevant]
    before = (similarities[None, :] > scores[:, None]).sum(axis=1)
    # Among equals, those with a lower index come first.
    for position, (index, score) in enumerate(zip(relevant, scores, strict=True)):
        before[position] += (similarities[:index] == score).sum()
    return numpy.sort(before + 1)


def retrieval_metrics(similarity_blocks, query_person_ids, gallery_person_ids, ks=(1, 5, 10)):
    """Scores blocks of similarity rows.

    Args:
        similarity_blocks: an iterable of (rows, gallery) arrays that together hold every query once, in order.
        query_person_ids: the person of each query.
        gallery_person_ids: the person of each gallery image.
        ks: the k of Rank-k.

    Returns:
        A dict of rank{k}, mAP and mINP, in percent.

    Raises:
        ValueError: a query whose person is not in the gallery; it is named.
    """
    query_person_ids, gallery_person_ids = numpy.asarray(query_person_ids), numpy.asarray(gallery_person_ids)
    images_of = {}
    for index, person in enumerate(gallery_person_ids.tolist()):
        images_of.setdefault(person, []).append(index)
    images_of = {person: numpy.asarray(indices) for person, indices in images_of.items()}
    for query, person in enumerate(query_person_ids.tolist()):
        if person not in images_of:
            raise ValueError(f"query {query} asks for person {person}, of whom the gallery has no image")
    first_ranks, average_precisions, inverse_penalties = [], [], []
    for block in similarity_blocks:
        for similarities in block:
            relevant = images_of[int(query_person_ids[len(first_ranks)])]
            ranks = _relevant_ranks(similarities, relevant)
            first_ranks.append(ranks[0])
            average_precisions.append((numpy.arange(1, len(ranks) + 1) / ranks).mean())
            inverse_penalties.append(len(ranks) / ranks[-1])
    first_ranks = numpy.asarray(first_ranks)
    metrics = {f"rank{k}": float(100 * (first_ranks <= k).mean()) for k in ks}
    metrics["mAP"] = float(100 * numpy.mean(average_precisions))
    metrics["mINP"] = float(100 * numpy.mean(inverse_penalties))
    return metrics


def score_embeddings(
    query_embeds, query_person_ids, gallery_embeds, gallery_person_ids, ks=(1, 5, 10), block_size=_BLOCK_SIZE
):
    """Scores (queries, dim) against (gallery, dim) embeddings by cosine; the rest as in `retrieval_metrics`."""
    queries, gallery = _as_matrix("predictions", query_embeds), _as_matrix("gallery_embeds", gallery_embeds)
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(
            f"predictions have {queries.shape[1]} dimensions, gallery_embeds {gallery.shape[1]}: they must agree"
        )
    _check_gallery(len(gallery), gallery_person_ids)
    queries, gallery = _unit_rows("predictions", queries), _unit_rows("gallery_embeds", gallery)
    blocks = (queries[start : start + block_size] @ gallery.T for start in range(0, len(queries), block_size))
    return retrieval_metrics(blocks, query_person_ids, gallery_person_ids, ks)


class PersonRetrieval(evaluate.Metric):
    """Rank-k, mAP and mINP; see the module's docstring for the definitions."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self, predictions, references, gallery_person_ids, gallery_embeds=None, ks=(1, 5, 10), block_size=_BLOCK_SIZE
    ):
        if gallery_embeds is not None:
            return score_embeddings(predictions, references, gallery_embeds, gallery_person_ids, ks, block_size)
        similarities = _as_matrix("predictions", predictions)
        _check_gallery(similarities.shape[1], gallery_person_ids)
        blocks = (similarities[start : start + block_size] for start in range(0, len(similarities), block_size))
        return retrieval_metrics(blocks, references, gallery_person_ids, ks)
