import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eccl.eval.person_retrieval.person_retrieval import retrieval_metrics
from helpers import ROOT


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    cache = tmp_path_factory.mktemp("metrics")
    return evaluate.load(str(ROOT / "eval" / "person_retrieval"), cache_dir=str(cache))


def brute_force(similarities, query_ids, gallery_ids, ks):
    """Sorts each row, ties to the lower index, and reads the definitions off the sorted list."""
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
def test_figures_equal_sorting_every_row_ties_included(data):
    gallery_ids = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    query_ids = data.draw(st.lists(st.sampled_from(gallery_ids), min_size=1, max_size=6))
    # Few values: ties are the rule.
    row = st.lists(st.integers(-2, 2), min_size=len(gallery_ids), max_size=len(gallery_ids))
    rows = np.array(data.draw(st.lists(row, min_size=len(query_ids), max_size=len(query_ids))), dtype=np.float32)
    cut = data.draw(st.integers(0, len(query_ids)))
    ours = retrieval_metrics([rows[:cut], rows[cut:]], query_ids, gallery_ids, ks=(1, 2, 5))
    assert ours == pytest.approx(brute_force(rows.tolist(), query_ids, gallery_ids, ks=(1, 2, 5)))


def test_similarity_rows_are_taken_as_they_are(metric):
    figures = metric.compute(
        predictions=[[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]], references=[4, 4], gallery_person_ids=[4, 5, 4], ks=(1, 2)
    )
    # Ranks 2 and 3, then 1 and 3: AP (1/2 + 2/3) / 2 and (1 + 2/3) / 2; INP 2/3 twice.
    assert figures == pytest.approx({"rank1": 50, "rank2": 100, "mAP": 100 * (7 / 12 + 5 / 6) / 2, "mINP": 200 / 3})


def test_lengths_of_embeddings_do_not_matter(metric):
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
        ({"gallery_embeds": [[1.0, 0.0], [0.0, 0.0]]}, "row 1 of gallery_embeds is zero"),
        ({"predictions": [[1.0, float("nan")], [0.0, 1.0]]}, "row 0 of predictions holds NaN"),
    ],
)
def test_bad_input_is_named(metric, changes, message):
    arguments = {
        "predictions": [[1.0, 0.0], [0.0, 1.0]],
        "references": [0, 1],
        "gallery_embeds": [[1.0, 0.0], [0.0, 1.0]],
        "gallery_person_ids": [0, 1],
    } | changes
    with pytest.raises(ValueError, match=message):
        metric.compute(**arguments)
