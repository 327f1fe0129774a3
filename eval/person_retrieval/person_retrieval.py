"""Rank-k, mAP and mINP of text-to-image person retrieval, for `evaluate.load`."""

import concurrent.futures
import os

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
        Arrays, lists, or tensors on any device.
    references: the person id of each query, a whole number; each must have an image in the gallery.
    gallery_embeds: image embeddings (gallery, dim); need not be normalised.
    gallery_person_ids: the person id of each gallery image.
    ks: the k of Rank-k; (1, 5, 10) by default.
    return_per_query: also give what the means are of, an entry a query.
    block_size: queries compared with the gallery at a time; by default what 128 MiB of similarities hold.
Returns:
    rank1, rank5, rank10 (one a k), mAP, mINP: percent; with return_per_query also `per_query`, arrays of `first_rank`
    (of the first right image, from 1), `AP` and `INP` (percent).
Examples:
    >>> metric = evaluate.load("eval/person_retrieval")
    >>> metric.compute(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[7, 8],
    ...                gallery_embeds=[[0.9, 0.1], [0.2, 0.8]], gallery_person_ids=[7, 8])
    {'rank1': 100.0, 'rank5': 100.0, 'rank10': 100.0, 'mAP': 100.0, 'mINP': 100.0}
"""

# Similarities held at a time. Large blocks: after each product the linear algebra's threads wait busily for a while.
_BLOCK_BYTES = 128 * 2**20
# Relevant images of a row that are looked at together, and the bytes that comparing several rows may take: small enough
# for a processor's caches, large enough for threads to work side by side.
_SCORES_AT_A_TIME = 32
_SCRATCH_BYTES = 4 * 2**20
# Bytes of 0 and 1 are added eight at a time, as one number of 64 bits: 255 of them before a byte could overflow.
_WORDS = 255
_WORD_BYTES = 8


def _as_array(name, values):
    if hasattr(values, "detach"):  # a tensor: of any device, and of types that numpy does not have
        values = values.detach().cpu()
        values = values.float().numpy() if values.is_floating_point() else values.numpy()
    try:
        return numpy.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name} is ragged, its rows must be equally long: {error}") from error


def _as_matrix(name, values):
    matrix = _as_array(name, values).astype(numpy.float32, copy=False)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{name} has shape {matrix.shape}, it must be a matrix with at least one row and one column")
    # A sum is infinite or NaN if anything in it is, and needs no matrix of truths beside it.
    with numpy.errstate(over="ignore", invalid="ignore"):
        suspect = numpy.flatnonzero(~numpy.isfinite(matrix.sum(axis=1)))
    for row in suspect:
        if not numpy.isfinite(matrix[row]).all():
            raise ValueError(f"row {row} of {name} holds NaN or infinity")
    return matrix


def _as_ids(name, values):
    ids = _as_array(name, values)
    if ids.ndim != 1:
        raise ValueError(f"{name} has shape {ids.shape}, it must be a list of person ids")
    whole = ids.dtype.kind in "iu" or (ids.dtype.kind == "f" and (ids == numpy.floor(ids)).all())
    if ids.size and not whole:
        raise ValueError(f"{name} holds {ids.dtype} values, person ids must be whole numbers")
    return ids.astype(numpy.int64)


def _unit_rows(name, matrix):
    with numpy.errstate(over="ignore"):
        lengths = numpy.linalg.norm(matrix, axis=1, keepdims=True)
    bad = numpy.flatnonzero((lengths[:, 0] == 0) | ~numpy.isfinite(lengths[:, 0]))
    if bad.size:
        what = "is zero and has no direction" if not lengths[bad[0], 0] else "is too long for float32"
        raise ValueError(f"row {bad[0]} of {name} {what}")
    return matrix / lengths


def _check_sizes(num_queries, query_person_ids, gallery_size, gallery_person_ids):
    if len(query_person_ids) != num_queries:
        raise ValueError(f"there are {num_queries} predictions and {len(query_person_ids)} references")
    if len(gallery_person_ids) != gallery_size:
        raise ValueError(f"the gallery has {gallery_size} images and {len(gallery_person_ids)} gallery_person_ids")


def _rows_per_block(gallery_size, asked_for):
    if asked_for is not None:
        if asked_for < 1:
            raise ValueError(f"block_size is {asked_for}, it must be at least 1")
        return asked_for
    return max(1, _BLOCK_BYTES // (4 * gallery_size))


def _count_true(truths):
    """How many along the last axis are true; it is padded to whole groups of words with false."""
    words = truths.view(numpy.uint64).reshape(*truths.shape[:-1], -1, _WORDS)
    by_byte = numpy.add.reduce(words, axis=-1).view(numpy.uint8)
    return by_byte.sum(axis=-1, dtype=numpy.int64)


def _ranks_of_relevant(rows, relevant_of_rows):
    """The ranks (from 1) of each row's relevant images, ascending, of one row after the other.

    A rank is one more than the number of images before it. Those are counted: sorting a row to find the places of a
    few would cost far more.

    Args:
        rows: (rows, gallery) similarities, finite.
        relevant_of_rows: the indices of each row's relevant images.
    """
    group = _WORDS * _WORD_BYTES
    padded_size = -(-rows.shape[1] // group) * group
    found, start = [], 0
    while start < len(rows):
        width = min(_SCORES_AT_A_TIME, len(relevant_of_rows[start]))
        stop = start + max(1, _SCRATCH_BYTES // (width * padded_size))
        found.append(_ranks_of_few(rows[start:stop], relevant_of_rows[start:stop], padded_size))
        start = stop
    return numpy.concatenate(found)


def _ranks_of_few(rows, relevant_of_rows, padded_size):
    lengths = numpy.array([len(relevant) for relevant in relevant_of_rows])
    exists = numpy.arange(lengths.max()) < lengths[:, None]
    # Places that a row does not need look at image 0 with a score that nothing reaches.
    relevant = numpy.zeros(exists.shape, dtype=numpy.int64)
    relevant[exists] = numpy.concatenate(relevant_of_rows)
    scores = numpy.where(exists, numpy.take_along_axis(rows, relevant, axis=1), numpy.inf).astype(rows.dtype)
    ranks = numpy.empty(exists.shape, dtype=numpy.int64)
    padded = numpy.zeros((len(rows), min(_SCORES_AT_A_TIME, exists.shape[1]), padded_size), dtype=bool)
    for start in range(0, exists.shape[1], _SCORES_AT_A_TIME):
        own = slice(start, start + _SCORES_AT_A_TIME)
        truths = padded[:, : scores[:, own].shape[1]]
        compared = truths[..., : rows.shape[1]]
        numpy.greater(rows[:, None, :], scores[:, own, None], out=compared)
        ranks[:, own] = 1 + _count_true(truths)
        numpy.equal(rows[:, None, :], scores[:, own, None], out=compared)
        if numpy.count_nonzero(compared) > exists[:, own].sum():
            # Something equals a score beside the image itself: those with a lower index come first.
            for row, place in numpy.argwhere(exists[:, own]):
                ranks[row, start + place] += numpy.count_nonzero(compared[row, place, : relevant[row, start + place]])
    ranks[~exists] = numpy.iinfo(ranks.dtype).max
    ranks.sort(axis=1)
    return ranks[exists]


def retrieval_metrics(similarity_blocks, query_person_ids, gallery_person_ids, ks=(1, 5, 10), return_per_query=False):
    """Scores blocks of similarity rows.

    Args:
        similarity_blocks: an iterable of (rows, gallery) arrays that together hold every query once, in order; finite.
        query_person_ids: the person of each query.
        gallery_person_ids: the person of each gallery image.
        ks: the k of Rank-k, positive.
        return_per_query: also give `per_query`, see the metric.

    Returns:
        A dict of rank{k}, mAP and mINP, in percent.

    Raises:
        ValueError: no queries, no gallery, a k below 1, or a query whose person is not in the gallery; it is named.
    """
    query_person_ids = _as_ids("references", query_person_ids)
    gallery_person_ids = _as_ids("gallery_person_ids", gallery_person_ids)
    for name, ids in (("references", query_person_ids), ("gallery_person_ids", gallery_person_ids)):
        if not ids.size:
            raise ValueError(f"{name} is empty")
    ks = _as_ids("ks", numpy.atleast_1d(ks)).tolist()
    if any(k < 1 for k in ks):
        raise ValueError(f"ks is {tuple(ks)}, each k must be at least 1")
    by_person = numpy.argsort(gallery_person_ids, kind="stable")
    persons, starts = numpy.unique(gallery_person_ids[by_person], return_index=True)
    images_of = dict(zip(persons.tolist(), numpy.split(by_person, starts[1:]), strict=True))
    for query, person in enumerate(query_person_ids.tolist()):
        if person not in images_of:
            raise ValueError(f"query {query} asks for person {person}, of whom the gallery has no image")
    relevant = [images_of[person] for person in query_person_ids.tolist()]
    ranks, scored, num_workers = [], 0, os.cpu_count() or 1
    # numpy compares and counts outside the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        for block in similarity_blocks:
            if scored + len(block) > len(relevant):
                raise ValueError(f"there are more rows of similarities than the {len(relevant)} references")
            own = relevant[scored : scored + len(block)]
            step = max(1, -(-len(block) // num_workers))
            starts = range(0, len(block), step)
            ranks += pool.map(
                _ranks_of_relevant, [block[i : i + step] for i in starts], [own[i : i + step] for i in starts]
            )
            scored += len(block)
    if scored < len(relevant):
        raise ValueError(f"there are {scored} rows of similarities and {len(relevant)} references")
    counts = numpy.array([len(images) for images in relevant])
    ends, ranks = counts.cumsum(), numpy.concatenate(ranks)
    first_rank, last_rank = ranks[ends - counts], ranks[ends - 1]
    among_relevant = numpy.arange(1, len(ranks) + 1) - (ends - counts).repeat(counts)
    precision = 100 * numpy.add.reduceat(among_relevant / ranks, ends - counts) / counts
    inverse_penalty = 100 * counts / last_rank
    metrics = {f"rank{k}": float(100 * (first_rank <= k).mean()) for k in ks}
    metrics |= {"mAP": float(precision.mean()), "mINP": float(inverse_penalty.mean())}
    if return_per_query:
        metrics["per_query"] = {"first_rank": first_rank, "AP": precision, "INP": inverse_penalty}
    return metrics


def score_embeddings(
    query_embeds,
    query_person_ids,
    gallery_embeds,
    gallery_person_ids,
    ks=(1, 5, 10),
    block_size=None,
    return_per_query=False,
):
    """Scores (queries, dim) against (gallery, dim) embeddings by cosine; the rest as in `retrieval_metrics`."""
    queries, gallery = _as_matrix("predictions", query_embeds), _as_matrix("gallery_embeds", gallery_embeds)
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(
            f"predictions have {queries.shape[1]} dimensions, gallery_embeds {gallery.shape[1]}: they must agree"
        )
    _check_sizes(len(queries), query_person_ids, len(gallery), gallery_person_ids)
    queries, gallery = _unit_rows("predictions", queries), _unit_rows("gallery_embeds", gallery)
    block_size = _rows_per_block(len(gallery), block_size)
    # One block's memory serves all of them.
    similarities = numpy.empty((min(block_size, len(queries)), len(gallery)), dtype=numpy.float32)
    starts = range(0, len(queries), block_size)
    parts = (queries[start : start + block_size] for start in starts)
    blocks = (numpy.matmul(part, gallery.T, out=similarities[: len(part)]) for part in parts)
    return retrieval_metrics(blocks, query_person_ids, gallery_person_ids, ks, return_per_query)


class PersonRetrieval(evaluate.Metric):
    """Rank-k, mAP and mINP; see the module's docstring for the definitions."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._batches = []

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    # The library writes what it is given to a file and reads it back, so that several processes can add to one metric.
    # For embeddings that takes longer than the figures do: a single process keeps its arrays.

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Keeps a batch of queries for `compute`."""
        if self.num_process > 1 or kwargs:
            return super().add_batch(predictions=predictions, references=references, **kwargs)
        self._batches.append(_checked_batch(predictions, references))

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Keeps one query for `compute`."""
        if self.num_process > 1 or kwargs:
            return super().add(prediction=prediction, reference=reference, **kwargs)
        self._batches.append(_checked_batch([prediction], [reference]))

    def compute(self, *, predictions=None, references=None, **kwargs):
        """The figures of what was added and what is given; what was added stays until there are figures of it."""
        if self.num_process > 1:
            return super().compute(predictions=predictions, references=references, **kwargs)
        batches = list(self._batches)
        if predictions is not None or references is not None:
            batches.append(_checked_batch(predictions, references))
        if not batches:
            raise ValueError("there are no predictions and references: give them, or add them before")
        if len({matrix.shape[1] for matrix, _ in batches}) > 1:
            widths = ", ".join(str(matrix.shape[1]) for matrix, _ in batches)
            raise ValueError(f"the batches that were added are {widths} wide, they must agree")
        predictions, references = (
            parts[0] if len(parts) == 1 else numpy.concatenate(parts) for parts in zip(*batches, strict=True)
        )
        metrics = self._compute(predictions, references, **kwargs)
        self._batches = []
        return metrics

    def _compute(
        self,
        predictions,
        references,
        gallery_person_ids,
        gallery_embeds=None,
        ks=(1, 5, 10),
        block_size=None,
        return_per_query=False,
    ):
        gallery_person_ids = _as_ids("gallery_person_ids", gallery_person_ids)
        if gallery_embeds is not None:
            return score_embeddings(
                predictions, references, gallery_embeds, gallery_person_ids, ks, block_size, return_per_query
            )
        similarities = _as_matrix("predictions", predictions)
        _check_sizes(len(similarities), references, similarities.shape[1], gallery_person_ids)
        block_size = _rows_per_block(similarities.shape[1], block_size)
        blocks = (similarities[start : start + block_size] for start in range(0, len(similarities), block_size))
        return retrieval_metrics(blocks, references, gallery_person_ids, ks, return_per_query)


def _checked_batch(predictions, references):
    for name, values in (("predictions", predictions), ("references", references)):
        if values is None:
            raise ValueError(f"{name} is missing")
    predictions, references = _as_matrix("predictions", predictions), _as_ids("references", references)
    if len(predictions) != len(references):
        raise ValueError(f"there are {len(predictions)} predictions and {len(references)} references")
    return predictions, references
