import subprocess
import sys
import tracemalloc

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eccl.eval.person_retrieval import person_retrieval
from eccl.eval.person_retrieval.person_retrieval import retrieval_metrics
from helpers import PATIENCE, ROOT


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    cache = tmp_path_factory.mktemp("metrics")
    return evaluate.load(str(ROOT / "eval" / "person_retrieval"), cache_dir=str(cache))


def brute_force(similarities, query_ids, gallery_ids, ks):
    """Computes the metrics by their definitions from sorted rows; the lower index comes first in a tie."""
    hits, precisions, penalties = {k: 0 for k in ks}, [], []
    for row, person in zip(similarities, query_ids, strict=True):
        order = sorted(range(len(row)), key=lambda index: (-row[index], index))
        ranks = [rank for rank, index in enumerate(order, start=1) if gallery_ids[index] == person]
        for k in ks:
            hits[k] += ranks[0] <= k
        precisions.append(sum(position / rank for position, rank in enumerate(ranks, start=1)) / len(ranks))
        penalties.append(len(ranks) / ranks[-1])
    count = len(query_ids)
    figures = {f"rank{k}": 100 * hits[k] / count for k in ks}
    return figures | {"mAP": 100 * sum(precisions) / count, "mINP": 100 * sum(penalties) / count}


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_metrics_equal_those_of_sorted_rows_with_ties(data):
    gallery_ids = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    query_ids = data.draw(st.lists(st.sampled_from(gallery_ids), min_size=1, max_size=6))
    # There are only five values, so most rows have ties.
    row = st.lists(st.integers(-2, 2), min_size=len(gallery_ids), max_size=len(gallery_ids))
    rows = np.array(data.draw(st.lists(row, min_size=len(query_ids), max_size=len(query_ids))), dtype=np.float32)
    cut = data.draw(st.integers(0, len(query_ids)))
    ours = retrieval_metrics([rows[:cut], rows[cut:]], query_ids, gallery_ids, ks=(1, 2, 5))
    assert ours == pytest.approx(brute_force(rows.tolist(), query_ids, gallery_ids, ks=(1, 2, 5)))


@pytest.mark.parametrize("gallery_size", [1, 40, 2039, 2040, 2041, 5000])
def test_ranks_are_right_for_many_relevant_images_and_long_rows(gallery_size):
    """Has more relevant images than are compared at a time, and row lengths around the size of a group of words."""
    generator = np.random.default_rng(gallery_size)
    gallery_ids = generator.integers(0, 4, gallery_size)
    gallery_ids[: min(4, gallery_size)] = np.arange(min(4, gallery_size))
    query_ids = generator.choice(gallery_ids, 9)
    for rows in (
        generator.standard_normal((9, gallery_size)).astype(np.float32),
        generator.integers(0, 3, (9, gallery_size)).astype(np.float32),
        np.zeros((9, gallery_size), dtype=np.float32),
    ):
        ours = retrieval_metrics([rows[:4], rows[4:]], query_ids, gallery_ids, ks=(1, 7))
        assert ours == pytest.approx(brute_force(rows.tolist(), query_ids, gallery_ids, ks=(1, 7)))


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_are_right_where_only_the_first_images_are_compared(ties, monkeypatch):
    """Rows whose relevant images rank first, in groups with rows of fewer relevant images."""
    generator = np.random.default_rng(0)
    gallery_ids = np.arange(3000) % 100
    gallery_ids[gallery_ids < 2] = 0
    query_ids = np.repeat([0, 50, 99, 51], 3)
    rows = generator.standard_normal((12, 3000)).astype(np.float32)
    rows[gallery_ids == query_ids[:, None]] += 4
    # A good ranking of person 0, who has 60 images, has more candidates.
    rows[:3] -= 8 * (gallery_ids != 0)
    rows = rows.round() if ties else rows
    filtered = []
    rank = person_retrieval._ranks_among
    monkeypatch.setattr(person_retrieval, "_ranks_among", lambda *args: filtered.append(1) or rank(*args))
    for order in (np.arange(12), generator.permutation(12)):
        ours = retrieval_metrics([rows[order]], query_ids[order], gallery_ids)
        assert ours == pytest.approx(brute_force(rows[order].tolist(), query_ids[order], gallery_ids, (1, 5, 10)))
    # Rounded scores are so often equal that too many images rank before the last relevant one.
    assert bool(filtered) != ties


def test_equal_scores_among_the_first_images_rank_by_their_index(monkeypatch):
    generator = np.random.default_rng(0)
    gallery_ids, query_ids = np.arange(3000) % 100, np.array([50, 51])
    rows = generator.standard_normal((2, 3000)).astype(np.float32)
    rows[:, generator.integers(0, 3000, 40)] = 10
    rows[gallery_ids == query_ids[:, None]] = 10
    filtered = []
    rank = person_retrieval._ranks_among
    monkeypatch.setattr(person_retrieval, "_ranks_among", lambda *args: filtered.append(1) or rank(*args))
    ours = retrieval_metrics([rows], query_ids, gallery_ids)
    assert filtered and ours == pytest.approx(brute_force(rows.tolist(), query_ids, gallery_ids, (1, 5, 10)))


def test_many_relevant_images_are_compared_in_little_memory():
    generator = np.random.default_rng(0)
    gallery_ids = np.arange(100_000) // 2_500
    rows = generator.standard_normal((1, 100_000)).astype(np.float32)
    rows[0, :2_500] += 20
    tracemalloc.start()
    assert retrieval_metrics([rows], [0], gallery_ids)["mAP"] == 100
    assert tracemalloc.get_traced_memory()[1] < 30 * 2**20
    tracemalloc.stop()


def test_metrics_are_the_means_of_the_per_query_results(metric):
    generator = np.random.default_rng(1)
    queries, gallery = generator.normal(size=(20, 4)), generator.normal(size=(30, 4))
    query_ids, gallery_ids = generator.integers(0, 5, 20), np.arange(30) % 5
    arguments = {"predictions": queries, "references": query_ids, "gallery_embeds": gallery}
    figures = metric.compute(**arguments, gallery_person_ids=gallery_ids, return_per_query=True)
    per_query = figures.pop("per_query")
    assert figures == metric.compute(**arguments, gallery_person_ids=gallery_ids)
    assert figures["rank5"] == pytest.approx(100 * (per_query["first_rank"] <= 5).mean())
    assert figures["mAP"] == pytest.approx(per_query["AP"].mean())
    assert figures["mINP"] == pytest.approx(per_query["INP"].mean())
    similarities = queries @ (gallery / np.linalg.norm(gallery, axis=1, keepdims=True)).T
    for query in range(20):
        alone = brute_force(similarities[query : query + 1].tolist(), query_ids[query : query + 1], gallery_ids, (1,))
        assert per_query["AP"][query] == pytest.approx(alone["mAP"])
        assert per_query["INP"][query] == pytest.approx(alone["mINP"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_lists_arrays_and_tensors_give_the_same_metrics(metric, dtype):
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(size, 6, generator=generator).to(dtype) for size in (9, 12))
    query_ids, gallery_ids = torch.arange(9) % 4, torch.arange(12) % 4
    figures = [
        metric.compute(predictions=q, references=r, gallery_embeds=g, gallery_person_ids=i)
        for q, r, g, i in (
            (queries.requires_grad_(), query_ids, gallery, gallery_ids),
            (queries.tolist(), query_ids.tolist(), gallery.tolist(), gallery_ids.tolist()),
            (queries.detach().float().numpy(), query_ids.numpy(), gallery.float().numpy(), gallery_ids.numpy()),
        )
    ]
    assert figures[0] == figures[1] == figures[2]


def test_queries_can_be_added_in_batches(metric):
    generator = np.random.default_rng(2)
    queries, query_ids = generator.normal(size=(10, 4)), generator.integers(0, 3, 10)
    gallery = {"gallery_embeds": generator.normal(size=(6, 4)), "gallery_person_ids": np.arange(6) % 3}
    whole = metric.compute(predictions=queries, references=query_ids, **gallery)
    metric.add_batch(predictions=queries[:4], references=query_ids[:4])
    metric.add(prediction=queries[4], reference=query_ids[4])
    # After an error, the added queries are still there.
    with pytest.raises(ValueError, match="query 0 asks for person"):
        metric.compute(gallery_embeds=[[1.0] * 4], gallery_person_ids=[77])
    assert metric.compute(predictions=queries[5:], references=query_ids[5:], **gallery) == whole
    with pytest.raises(ValueError, match="there are no predictions"):
        metric.compute(**gallery)
    with pytest.raises(ValueError, match="4 predictions and 3 references"):
        metric.add_batch(predictions=queries[:4], references=query_ids[:3])


# evaluate documents each of these ways to add queries.
WAYS_TO_ADD = {
    "one query, singular names": lambda metric, queries, ids: [
        metric.add(prediction=query, reference=person) for query, person in zip(queries, ids, strict=True)
    ],
    "one query, plural names": lambda metric, queries, ids: [
        metric.add(predictions=query, references=person) for query, person in zip(queries, ids, strict=True)
    ],
    "tensors": lambda metric, queries, ids: [
        metric.add(predictions=torch.tensor(query), references=torch.tensor(person))
        for query, person in zip(queries, ids, strict=True)
    ],
    "lists to add": lambda metric, queries, ids: metric.add(references=ids.tolist(), predictions=queries.tolist()),
    "batches": lambda metric, queries, ids: [
        metric.add_batch(references=ids[part], predictions=queries[part]) for part in (slice(3), slice(3, None))
    ],
}


@pytest.mark.parametrize("way", WAYS_TO_ADD)
def test_every_documented_way_to_add_gives_the_same_figures(metric, way):
    generator = np.random.default_rng(5)
    queries, ids = generator.normal(size=(7, 4)).astype(np.float32), generator.integers(0, 3, 7)
    gallery = {"gallery_embeds": generator.normal(size=(6, 4)), "gallery_person_ids": np.arange(6) % 3}
    expected = metric.compute(predictions=queries, references=ids, **gallery)
    WAYS_TO_ADD[way](metric, queries, ids)
    assert metric.compute(**gallery) == expected


def test_unknown_and_doubled_names_are_refused(metric):
    query, gallery = {"predictions": [[1.0, 0.0]], "references": [7]}, {"gallery_person_ids": [7]}
    for method, known in (("add", "prediction, reference"), ("add_batch", "predictions"), ("compute", "gallery")):
        with pytest.raises(ValueError, match=rf"{method} of this metric has no argument 'refs', it has {known}"):
            getattr(metric, method)(**query, refs=[7])
    with pytest.raises(ValueError, match="prediction and predictions are both given to add"):
        metric.add(prediction=[1.0], predictions=[1.0], reference=7)
    with pytest.raises(ValueError, match="gallery_person_ids is missing"):
        metric.compute(**query)
    # Nothing of these calls was kept.
    with pytest.raises(ValueError, match="there are no predictions"):
        metric.compute(**gallery)


def test_swapped_arguments_score_image_to_text(metric):
    generator = np.random.default_rng(3)
    texts, images = generator.normal(size=(8, 5)), generator.normal(size=(6, 5))
    text_ids, image_ids = np.arange(8) % 3, np.arange(6) % 3
    swapped = metric.compute(
        predictions=images, references=image_ids, gallery_embeds=texts, gallery_person_ids=text_ids
    )
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    assert swapped == pytest.approx(brute_force((unit[0] @ unit[1].T).tolist(), image_ids, text_ids, (1, 5, 10)))


@pytest.mark.slow
def test_several_processes_add_to_one_metric(tmp_path):
    """Uses the way of the `evaluate` library: each process writes a file, and the first process computes."""
    program = (
        "import sys, evaluate\n"
        "rank = int(sys.argv[1])\n"
        "queries = [[1.0, 0.0], [0.9, 0.1]] if rank == 0 else [[0.0, 1.0]]\n"
        "ids = [7, 7] if rank == 0 else [8]\n"
        "for way in ('batch', 'lists', 'plural', 'singular'):\n"
        "    where = {'num_process': 2, 'process_id': rank, 'experiment_id': way, 'cache_dir': 'cache'}\n"
        "    metric = evaluate.load(sys.argv[2], **where)\n"
        "    if way in ('batch', 'lists'):\n"
        "        (metric.add_batch if way == 'batch' else metric.add)(predictions=queries, references=ids)\n"
        "    for query, person in zip(queries, ids):\n"
        "        if way == 'plural':\n"
        "            metric.add(predictions=query, references=person)\n"
        "        elif way == 'singular':\n"
        "            metric.add(prediction=query, reference=person)\n"
        "    figures = metric.compute(gallery_embeds=[[1.0, 0.2], [0.1, 1.0]], gallery_person_ids=[8, 7])\n"
        "    print(figures and figures['mAP'])\n"
    )
    command = [sys.executable, "-c", program]
    where = {"cwd": tmp_path, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    processes = [
        subprocess.Popen([*command, str(rank), str(ROOT / "eval/person_retrieval")], **where) for rank in (0, 1)
    ]
    # Each query finds its image second.
    printed = [process.communicate(timeout=PATIENCE)[0].split() for process in processes]
    assert printed == [["50.0"] * 4, ["None"] * 4]


def test_similarities_are_scored_without_a_gallery(metric):
    figures = metric.compute(
        predictions=[[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]], references=[4, 4], gallery_person_ids=[4, 5, 4], ks=(1, 2)
    )
    # Ranks 2 and 3, then 1 and 3: AP (1/2 + 2/3) / 2 and (1 + 2/3) / 2; INP 2/3 twice.
    assert figures == pytest.approx({"rank1": 50, "rank2": 100, "mAP": 100 * (7 / 12 + 5 / 6) / 2, "mINP": 200 / 3})


def test_the_length_of_an_embedding_does_not_matter(metric):
    generator = np.random.default_rng(0)
    queries, gallery = generator.normal(size=(6, 4)), generator.normal(size=(8, 4))
    arguments = {"references": [0, 1, 2, 3, 0, 1], "gallery_person_ids": [0, 1, 2, 3, 0, 1, 2, 3]}
    plain = metric.compute(predictions=queries, gallery_embeds=gallery, **arguments)
    scaled = metric.compute(
        predictions=queries * 7, gallery_embeds=gallery * generator.uniform(1, 9, (8, 1)), block_size=2, **arguments
    )
    assert scaled == pytest.approx(plain)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"references": [0, 9]}, "query 1 asks for person 9"),
        ({"gallery_person_ids": [0]}, "2 images and 1 gallery_person_ids"),
        ({"gallery_embeds": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]}, "2 dimensions, gallery_embeds 3"),
        ({"gallery_embeds": [[1.0, 0.0], [0.0, 0.0]]}, "row 1 of gallery_embeds is zero, so it has no direction"),
        ({"predictions": [[1.0, float("nan")], [0.0, 1.0]]}, "row 0 of predictions contains NaN"),
        ({"gallery_embeds": [[1.0, 0.0], [0.0, float("inf")]]}, "row 1 of gallery_embeds contains NaN or infinity"),
        ({"gallery_embeds": [[3e38, 3e38], [0.0, 1.0]]}, "row 0 of gallery_embeds is too long"),
        ({"predictions": [[1.0, 0.0], [1.0]]}, "predictions is ragged"),
        ({"predictions": [], "references": []}, r"predictions has shape \(0,\)"),
        ({"predictions": [1.0, 2.0]}, r"predictions has shape \(2,\), it must be a matrix"),
        ({"references": [0]}, "2 predictions and 1 references"),
        ({"references": [0.5, 1]}, "references contains float64 values, it must contain whole numbers"),
        ({"references": ["0", "1"]}, "references contains <U1 values, it must contain whole numbers"),
        ({"references": None}, "references is missing"),
        ({"gallery_embeds": [], "gallery_person_ids": []}, r"gallery_embeds has shape \(0,\)"),
        ({"block_size": 0}, "block_size is 0, it must be at least 1"),
        ({"ks": (1.5,)}, "ks contains float64 values"),
        ({"ks": (0,)}, r"ks is \(0,\), each k must be at least 1"),
    ],
)
def test_the_error_names_the_bad_input(metric, changes, message):
    arguments = {
        "predictions": [[1.0, 0.0], [0.0, 1.0]],
        "references": [0, 1],
        "gallery_embeds": [[1.0, 0.0], [0.0, 1.0]],
        "gallery_person_ids": [0, 1],
    } | changes
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments)


def test_one_k_is_enough_and_each_query_needs_one_row(metric):
    rows = np.eye(3, dtype=np.float32)
    assert set(retrieval_metrics([rows], [1, 2, 3], [1, 2, 3], ks=5)) == {"rank5", "mAP", "mINP"}
    with pytest.raises(ValueError, match="2 rows of similarities and 3 references"):
        retrieval_metrics([rows[:2]], [1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="more rows of similarities than the 3 references"):
        retrieval_metrics([rows, rows], [1, 2, 3], [1, 2, 3])
