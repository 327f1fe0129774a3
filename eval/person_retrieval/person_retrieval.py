"""Rank-k, mAP and mINP of text-to-image person retrieval, for `evaluate.load`."""

import collections.abc
import concurrent.futures
import os
import typing

import datasets
import evaluate
import numpy

_DESCRIPTION = """
Text-to-image person retrieval: each query ranks the whole gallery by cosine similarity. An image is relevant if it
shows the person of the query. Rank-k is the percentage of queries with a relevant image among the first k. AP is the
mean over the query's relevant images of (rank among the relevant images / rank among all images), and mAP is its mean
over the queries. INP is (number of relevant images / rank of the last one), and mINP is its mean over the queries. All
figures are percentages. If two similarities are equal, the image with the lower gallery index ranks first.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: query embeddings (queries, dim); or, without `gallery_embeds`, similarities (queries, gallery).
        Arrays, lists, or tensors on any device.
    references: the person id of each query, a whole number; each person must have an image in the gallery.
    gallery_embeds: image embeddings (gallery, dim); they need not be normalised.
    gallery_person_ids: the person id of each gallery image.
    ks: the values of k of Rank-k; (1, 5, 10) by default.
    return_per_query: also return the figures of each query.
    block_size: number of queries that are compared with the gallery at a time; by default as many as give 128 MiB of
        similarities.
Returns:
    rank1, rank5, rank10 (one for each k), mAP and mINP, in percent. With return_per_query also `per_query`: the arrays
    `first_rank` (rank of the first relevant image, counted from 1), `AP` and `INP` (percent), each (queries,).
Examples:
    >>> metric = evaluate.load("eval/person_retrieval")
    >>> metric.compute(predictions=[[1.0, 0.0], [0.0, 1.0]], references=[7, 8],
    ...                gallery_embeds=[[0.9, 0.1], [0.2, 0.8]], gallery_person_ids=[7, 8])
    {'rank1': 100.0, 'rank5': 100.0, 'rank10': 100.0, 'mAP': 100.0, 'mINP': 100.0}
"""

# Bytes of similarities in memory at a time. Blocks are large, because the threads of the linear algebra keep a
# processor busy for a while after each product.
_BLOCK_BYTES = 128 * 2**20
# How many relevant images of a row are compared at a time, and the bytes of memory for the comparison of several rows:
# small enough for the caches of a processor, large enough to keep several threads busy.
_SCORES_AT_A_TIME = 32
_SCRATCH_BYTES = 4 * 2**20
# The bytes to count are 0 or 1. Eight of them are added at once, as one 64-bit number; after 255 additions a byte could
# overflow.
_WORDS = 255
_WORD_BYTES = 8
# If a row has as many relevant images, and at most this part of the images can rank before the last of them, it is
# faster to find these images first. With more relevant images, the comparisons would take much memory.
_FEWEST_TO_FILTER, _MOST_TO_FILTER, _CANDIDATES_TO_FILTER = 8, 64, 1 / 32


def _as_array(name, values):
    if hasattr(values, "detach"):  # a tensor: it may be on a GPU, or of a type that numpy lacks, such as bfloat16
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
    # The sum of a row is infinite or NaN if one of its values is. This needs no second matrix of truth values.
    with numpy.errstate(over="ignore", invalid="ignore"):
        suspect = numpy.flatnonzero(~numpy.isfinite(matrix.sum(axis=1)))
    for row in suspect:
        if not numpy.isfinite(matrix[row]).all():
            raise ValueError(f"row {row} of {name} contains NaN or infinity, all values must be finite")
    return matrix


def _as_ids(name, values):
    ids = _as_array(name, values)
    if ids.ndim != 1:
        raise ValueError(f"{name} has shape {ids.shape}, it must be a list of numbers")
    whole = ids.dtype.kind in "iu" or (ids.dtype.kind == "f" and (ids == numpy.floor(ids)).all())
    if ids.size and not whole:
        raise ValueError(f"{name} contains {ids.dtype} values, it must contain whole numbers")
    return ids.astype(numpy.int64)


def _unit_rows(name, matrix):
    with numpy.errstate(over="ignore"):
        lengths = numpy.linalg.norm(matrix, axis=1, keepdims=True)
    bad = numpy.flatnonzero((lengths[:, 0] == 0) | ~numpy.isfinite(lengths[:, 0]))
    if bad.size:
        reason = "is zero, so it has no direction" if not lengths[bad[0], 0] else "is too long for float32"
        raise ValueError(f"row {bad[0]} of {name} {reason}")
    return matrix / lengths


def _check_sizes(num_queries, query_person_ids, gallery_size, gallery_person_ids):
    if len(query_person_ids) != num_queries:
        raise ValueError(
            f"there are {num_queries} predictions and {len(query_person_ids)} references, each prediction needs one "
            f"reference"
        )
    if len(gallery_person_ids) != gallery_size:
        raise ValueError(
            f"the gallery has {gallery_size} images and {len(gallery_person_ids)} gallery_person_ids, each image needs "
            f"one person id"
        )


def _rows_per_block(gallery_size, block_size):
    if block_size is not None:
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, it must be at least 1")
        return block_size
    return max(1, _BLOCK_BYTES // (4 * gallery_size))


def _count_true(truths):
    """Counts the true values along the last axis, which must be padded with false to whole groups of words."""
    words = truths.view(numpy.uint64).reshape(*truths.shape[:-1], -1, _WORDS)
    by_byte = numpy.add.reduce(words, axis=-1).view(numpy.uint8)
    return by_byte.sum(axis=-1, dtype=numpy.int64)


def _ranks_of_relevant(rows, relevant_of_rows):
    """Finds the ranks (from 1) of each row's relevant images, in ascending order, for one row after the other.

    A rank is the number of better images plus one. The better images are counted: to sort a row only to find the
    places of a few images would cost far more.

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
    """Does the work of `_ranks_of_relevant` for as many rows as fit in the caches."""
    lengths = numpy.array([len(relevant) for relevant in relevant_of_rows])
    exists = numpy.arange(lengths.max()) < lengths[:, None]
    # A row with fewer relevant images has spare places. They refer to image 0, with an infinite score.
    relevant = numpy.zeros(exists.shape, dtype=numpy.int64)
    relevant[exists] = numpy.concatenate(relevant_of_rows)
    scores = numpy.where(exists, numpy.take_along_axis(rows, relevant, axis=1), numpy.inf).astype(rows.dtype)
    ranks = None
    if _FEWEST_TO_FILTER <= exists.shape[1] <= _MOST_TO_FILTER:
        # No image below the last relevant one changes a rank: in a good ranking, these are nearly all.
        candidates = rows >= scores.min(axis=1, keepdims=True)
        if numpy.count_nonzero(candidates) <= _CANDIDATES_TO_FILTER * rows.size:
            ranks = _ranks_among(numpy.flatnonzero(candidates), rows, relevant, scores)
    if ranks is None:
        ranks = _ranks_among_all(rows, relevant, scores, exists, padded_size)
    ranks[~exists] = numpy.iinfo(ranks.dtype).max
    ranks.sort(axis=1)
    return ranks[exists]


def _ranks_among(candidates, rows, relevant, scores):
    """Ranks the relevant images among candidates: indices into the flat `rows`, ascending, at least one in each row."""
    row_of, image_of = numpy.divmod(candidates, rows.shape[1])
    starts = numpy.searchsorted(row_of, numpy.arange(len(rows)))
    values, compared = rows[row_of, image_of][:, None], scores[row_of]
    # Of images with the same score, the one with the lower index ranks first.
    better = (values > compared) | ((values == compared) & (image_of[:, None] < relevant[row_of]))
    return 1 + numpy.add.reduceat(better, starts, axis=0, dtype=numpy.int64)


def _ranks_among_all(rows, relevant, scores, exists, padded_size):
    """Ranks the relevant images among all images."""
    ranks = numpy.empty(exists.shape, dtype=numpy.int64)
    padded = numpy.zeros((len(rows), min(_SCORES_AT_A_TIME, exists.shape[1]), padded_size), dtype=bool)
    for start in range(0, exists.shape[1], _SCORES_AT_A_TIME):
        places = slice(start, start + _SCORES_AT_A_TIME)
        truths = padded[:, : scores[:, places].shape[1]]
        compared = truths[..., : rows.shape[1]]
        numpy.greater(rows[:, None, :], scores[:, places, None], out=compared)
        ranks[:, places] = 1 + _count_true(truths)
        numpy.equal(rows[:, None, :], scores[:, places, None], out=compared)
        if numpy.count_nonzero(compared) > exists[:, places].sum():
            # Another image has the same score as a relevant image. The images with a lower index rank before it.
            for row, place in numpy.argwhere(exists[:, places]):
                ranks[row, start + place] += numpy.count_nonzero(compared[row, place, : relevant[row, start + place]])
    return ranks


def _find_relevant(query_person_ids, gallery_person_ids):
    """Returns the gallery indices of each query's relevant images, in ascending order."""
    by_person = numpy.argsort(gallery_person_ids, kind="stable")
    persons, starts = numpy.unique(gallery_person_ids[by_person], return_index=True)
    images_of = dict(zip(persons.tolist(), numpy.split(by_person, starts[1:]), strict=True))
    for query, person in enumerate(query_person_ids.tolist()):
        if person not in images_of:
            raise ValueError(f"query {query} asks for person {person}, but the gallery has no image of this person")
    return [images_of[person] for person in query_person_ids.tolist()]


def _rank_blocks(similarity_blocks, relevant):
    """Finds the ranks of all queries' relevant images, as `_ranks_of_relevant` does for some rows."""
    ranks, scored, num_workers = [], 0, os.cpu_count() or 1
    # numpy compares and counts without the interpreter's lock, so threads run at the same time.
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        for block in similarity_blocks:
            if scored + len(block) > len(relevant):
                raise ValueError(
                    f"there are more rows of similarities than the {len(relevant)} references, each row needs one "
                    f"reference"
                )
            relevant_of_block = relevant[scored : scored + len(block)]
            step = max(1, -(-len(block) // num_workers))
            starts = range(0, len(block), step)
            ranks += pool.map(
                _ranks_of_relevant,
                [block[start : start + step] for start in starts],
                [relevant_of_block[start : start + step] for start in starts],
            )
            scored += len(block)
    if scored < len(relevant):
        raise ValueError(
            f"there are {scored} rows of similarities and {len(relevant)} references, each reference needs one row"
        )
    return numpy.concatenate(ranks)


def retrieval_metrics(
    similarity_blocks: collections.abc.Iterable[numpy.ndarray],
    query_person_ids: typing.Any,
    gallery_person_ids: typing.Any,
    ks: int | collections.abc.Sequence[int] = (1, 5, 10),
    return_per_query: bool = False,
) -> dict[str, typing.Any]:
    """Computes the metrics from blocks of similarities.

    Args:
        similarity_blocks: (rows, gallery) arrays of finite similarities. Together they have one row for each query, in
            the order of the queries.
        query_person_ids: the person of each query.
        gallery_person_ids: the person of each gallery image.
        ks: the values of k of Rank-k, each at least 1.
        return_per_query: also return `per_query`, see the metric.

    Returns:
        rank{k} for each k, mAP and mINP, in percent.

    Raises:
        ValueError: there are no queries or no gallery images, a k is less than 1, the number of rows is wrong, or the
            gallery has no image of a query's person; the message names the query and the person.
    """
    query_person_ids = _as_ids("references", query_person_ids)
    gallery_person_ids = _as_ids("gallery_person_ids", gallery_person_ids)
    for name, ids in (("references", query_person_ids), ("gallery_person_ids", gallery_person_ids)):
        if not ids.size:
            raise ValueError(f"{name} is empty, it must have at least one entry")
    list_of_ks = _as_ids("ks", numpy.atleast_1d(ks)).tolist()
    if any(k < 1 for k in list_of_ks):
        raise ValueError(f"ks is {tuple(list_of_ks)}, each k must be at least 1")
    relevant = _find_relevant(query_person_ids, gallery_person_ids)
    ranks = _rank_blocks(similarity_blocks, relevant)
    counts = numpy.array([len(images) for images in relevant])
    ends = counts.cumsum()
    first_rank, last_rank = ranks[ends - counts], ranks[ends - 1]
    rank_among_relevant = numpy.arange(1, len(ranks) + 1) - (ends - counts).repeat(counts)
    precision = 100 * numpy.add.reduceat(rank_among_relevant / ranks, ends - counts) / counts
    inverse_penalty = 100 * counts / last_rank
    metrics: dict[str, typing.Any] = {f"rank{k}": float(100 * (first_rank <= k).mean()) for k in list_of_ks}
    metrics |= {"mAP": float(precision.mean()), "mINP": float(inverse_penalty.mean())}
    if return_per_query:
        metrics["per_query"] = {"first_rank": first_rank, "AP": precision, "INP": inverse_penalty}
    return metrics


def score_embeddings(
    query_embeds: typing.Any,
    query_person_ids: typing.Any,
    gallery_embeds: typing.Any,
    gallery_person_ids: typing.Any,
    ks: int | collections.abc.Sequence[int] = (1, 5, 10),
    block_size: int | None = None,
    return_per_query: bool = False,
) -> dict[str, typing.Any]:
    """Computes the metrics from (queries, dim) and (gallery, dim) embeddings, which are compared by cosine similarity.

    The other arguments, the result and the errors are those of `retrieval_metrics` and of the metric.
    """
    queries, gallery = _as_matrix("predictions", query_embeds), _as_matrix("gallery_embeds", gallery_embeds)
    if gallery.shape[1] != queries.shape[1]:
        raise ValueError(
            f"predictions have {queries.shape[1]} dimensions, gallery_embeds {gallery.shape[1]}: they must be equal"
        )
    _check_sizes(len(queries), query_person_ids, len(gallery), gallery_person_ids)
    queries, gallery = _unit_rows("predictions", queries), _unit_rows("gallery_embeds", gallery)
    block_size = _rows_per_block(len(gallery), block_size)
    # All blocks use the same memory, one after the other.
    similarities = numpy.empty((min(block_size, len(queries)), len(gallery)), dtype=numpy.float32)
    starts = range(0, len(queries), block_size)
    parts = (queries[start : start + block_size] for start in starts)
    blocks = (numpy.matmul(part, gallery.T, out=similarities[: len(part)]) for part in parts)
    return retrieval_metrics(blocks, query_person_ids, gallery_person_ids, ks, return_per_query)


class PersonRetrieval(evaluate.Metric):
    """Rank-k, mAP and mINP, as `_DESCRIPTION` defines them."""

    def __init__(self, *args: typing.Any, **kwargs: typing.Any):
        super().__init__(*args, **kwargs)
        self._batches: list[tuple[numpy.ndarray, numpy.ndarray]] = []

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    # The library writes all inputs to a file and reads them back, so that several processes can add to one metric. For
    # embeddings, this takes longer than the metrics themselves. So a single process keeps its arrays in memory.

    def add_batch(self, *, predictions: typing.Any = None, references: typing.Any = None, **kwargs: typing.Any) -> None:
        """Keeps a batch of queries for `compute`."""
        _refuse_unknown("add_batch", kwargs, ("predictions", "references"))
        predictions, references = _check_batch(predictions, references)
        if self.num_process > 1:
            return super().add_batch(predictions=predictions, references=references)
        self._batches.append((predictions, references))

    def add(
        self,
        *,
        prediction: typing.Any = None,
        reference: typing.Any = None,
        predictions: typing.Any = None,
        references: typing.Any = None,
        **kwargs: typing.Any,
    ) -> None:
        """Keeps one query for `compute`.

        evaluate documents both `prediction`, `reference` and `predictions`, `references`. Under the second names it
        also shows lists: they are a batch of queries.
        """
        _refuse_unknown("add", kwargs, ("prediction", "reference", "predictions", "references"))
        for name, one, several in (("prediction", prediction, predictions), ("reference", reference, references)):
            if one is not None and several is not None:
                raise ValueError(f"{name} and {name}s are both given to add: they are two names of the same input")
        predictions = prediction if predictions is None else predictions
        references = reference if references is None else references
        if predictions is not None and references is not None and _as_array("references", references).ndim == 0:
            predictions, references = _as_array("predictions", predictions)[None], [references]
        self.add_batch(predictions=predictions, references=references)

    def compute(
        self, *, predictions: typing.Any = None, references: typing.Any = None, **kwargs: typing.Any
    ) -> dict[str, typing.Any] | None:
        """Computes the metrics of the queries that were added before and of those given here.

        The queries that were added are forgotten afterwards; after an error they are kept.
        """
        _refuse_unknown("compute", kwargs, _COMPUTE_ARGUMENTS)
        if self.process_id == 0 and kwargs.get("gallery_person_ids") is None:
            raise ValueError("gallery_person_ids is missing: compute needs the person id of each gallery image")
        if self.num_process > 1:
            return super().compute(predictions=predictions, references=references, **kwargs)
        batches = list(self._batches)
        if predictions is not None or references is not None:
            batches.append(_check_batch(predictions, references))
        if not batches:
            raise ValueError("there are no predictions and references: give them to compute, or add them before")
        if len({matrix.shape[1] for matrix, _ in batches}) > 1:
            widths = ", ".join(str(matrix.shape[1]) for matrix, _ in batches)
            raise ValueError(f"the predictions that were added have {widths} columns, all must have the same number")
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


# What `compute` takes beside predictions and references.
_COMPUTE_ARGUMENTS = ("gallery_person_ids", "gallery_embeds", "ks", "block_size", "return_per_query")


def _refuse_unknown(method, kwargs, known):
    for name in kwargs:
        if name not in known:
            raise ValueError(f"{method} of this metric has no argument {name!r}, it has {', '.join(known)}")


def _check_batch(predictions, references):
    for name, values in (("predictions", predictions), ("references", references)):
        if values is None:
            raise ValueError(f"{name} is missing: each prediction needs one reference")
    predictions, references = _as_matrix("predictions", predictions), _as_ids("references", references)
    if len(predictions) != len(references):
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(references)} references, each prediction needs one "
            f"reference"
        )
    return predictions, references
