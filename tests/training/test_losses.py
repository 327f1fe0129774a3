import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eccl.training.losses import (
    attribute_classification_loss,
    cross_modal_projection_matching_loss,
    identity_classification_loss,
    image_text_contrastive_loss,
    projection_classification_loss,
    similarity_distribution_matching_loss,
    triplet_alignment_loss,
)


def cosine(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


def softmax(values):
    largest = max(values)
    shifted = [math.exp(value - largest) for value in values]
    return [value / sum(shifted) for value in shifted]


def divergence(rows, true):
    """Computes the mean over rows of `sum p log(p / (q + 1e-8))` in double precision."""
    total = 0.0
    for row, shares in zip(rows, true, strict=True):
        total += sum(p * (math.log(p) - math.log(q + 1e-8)) for p, q in zip(softmax(row), shares, strict=True) if p)
    return total / len(rows)


@st.composite
def batches(draw):
    count = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    image, text = torch.randn(2, count, 4, generator=generator)
    ids = st.lists(st.integers(0, 3), min_size=count, max_size=count)
    return image, text, draw(ids), draw(ids)


@settings(deadline=None, max_examples=60)
@given(batch=batches(), temperature=st.floats(0.02, 1), margin=st.floats(0, 1))
def test_triplet_alignment_loss_equals_a_loop(batch, temperature, margin):
    image, text, persons, _ = batch
    total = 0.0
    for rows, columns in ((text.tolist(), image.tolist()), (image.tolist(), text.tolist())):
        for row, person in zip(rows, persons, strict=True):
            similarities = [cosine(row, column) for column in columns]
            own = [s for s, other in zip(similarities, persons, strict=True) if other == person]
            others = [s for s, other in zip(similarities, persons, strict=True) if other != person]
            if others:
                weights = softmax([s / temperature for s in own])
                positive = sum(a * s for a, s in zip(weights, own, strict=True))
                hardest = temperature * math.log(sum(math.exp(s / temperature) for s in others))
                total += max(0.0, margin - positive + hardest)
    ours = triplet_alignment_loss(image, text, torch.tensor(persons), temperature, margin)
    assert ours.item() == pytest.approx(total, rel=1e-4, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(batch=batches(), scale=st.floats(1, 50), factor=st.floats(0, 1), with_images=st.booleans())
def test_similarity_distribution_matching_equals_a_loop(batch, scale, factor, with_images):
    image, text, persons, images = batch
    count = range(len(persons))
    weights = [[float(persons[i] == persons[j]) for j in count] for i in count]
    if with_images:
        weights = [[weights[i][j] * factor + (1 - factor) * (images[i] == images[j]) for j in count] for i in count]
    sums = [sum(row) for row in weights]
    true = [[weights[i][j] / sums[j] for j in count] for i in count]
    rows = [[scale * cosine(a, b) for b in image.tolist()] for a in text.tolist()]
    expected = divergence(rows, true) + divergence([list(column) for column in zip(*rows, strict=True)], true)
    ours = similarity_distribution_matching_loss(
        image, text, torch.tensor(persons), scale, torch.tensor(images) if with_images else None, factor
    )
    assert ours.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(deadline=None, max_examples=60)
@given(batch=batches())
def test_projection_matching_equals_a_loop(batch):
    image, text, persons, _ = batch
    same = [[float(a == b) for b in persons] for a in persons]
    true = [[value / math.sqrt(sum(row)) for value in row] for row in same]
    expected = 0.0
    for rows, columns in ((image.tolist(), text.tolist()), (text.tolist(), image.tolist())):
        products = [[sum(a * b for a, b in zip(r, c, strict=True)) / math.hypot(*c) for c in columns] for r in rows]
        expected += divergence(products, true)
    ours = cross_modal_projection_matching_loss(image, text, torch.tensor(persons))
    assert ours.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def projection_classification_by_loops(image, text, columns, labels):
    """CMPC from the formula of the paper, in float64: project, multiply with each unit column, take the softmax."""
    total = 0.0
    for ours, theirs in ((image, text), (text, image)):
        for feature, other, label in zip(ours, theirs, labels, strict=True):
            unit = other / other.norm()
            projection = (feature @ unit) * unit
            logits = torch.stack([projection @ (column / column.norm()) for column in columns])
            total = total - (logits[label] - logits.exp().sum().log()) / len(image)
    return total


@settings(deadline=None, max_examples=40)
@given(batch=batches(), seed=st.integers(0, 99))
def test_projection_classification_equals_a_loop_with_its_gradients(batch, seed):
    image, text, persons, _ = batch
    weight = torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
    ours = [value.clone().requires_grad_() for value in (image, text, weight)]
    theirs = [value.double().clone().requires_grad_() for value in (image, text, weight)]
    loss = projection_classification_loss(*ours, torch.tensor(persons))
    expected = projection_classification_by_loops(*theirs[:2], theirs[2].T, persons)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    gradients, references = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs)
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Input .* requires gradient and is not a double precision")
def test_the_gradient_of_projection_classification_is_that_of_differences():
    image, text, weight = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(3)).unbind()
    inputs = [value.clone().requires_grad_() for value in (image, text, weight)]
    labels = torch.tensor([0, 3, 1, 0])
    # The loss is computed in float32, hence the wide steps.
    assert torch.autograd.gradcheck(
        lambda *values: projection_classification_loss(*values, labels), inputs, eps=1e-2, atol=1e-2, rtol=1e-2
    )


def test_projection_classification_names_a_weight_that_does_not_fit():
    features, labels = torch.ones(2, 4), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"weight is \(5, 4\), it must be \(dim, persons\) with the dim 4"):
        projection_classification_loss(features, features, torch.ones(5, 4), labels)


def test_identity_loss_of_even_logits_is_the_logarithm_of_the_persons():
    logits = torch.zeros(3, 7)
    labels = torch.tensor([0, 6, 2])
    assert identity_classification_loss(logits, logits, labels).item() == pytest.approx(math.log(7))
    sure = torch.eye(7)[labels] * 50
    assert identity_classification_loss(sure, logits, labels).item() == pytest.approx(math.log(7) / 2)


def test_one_person_in_the_batch_gives_no_loss_and_no_gradient():
    image, text = torch.randn(2, 5, 8).unbind()
    image.requires_grad_(), text.requires_grad_()
    loss = triplet_alignment_loss(image, text, torch.zeros(5))
    loss.backward()
    assert loss.item() == 0 and not image.grad.any() and not text.grad.any()


def test_triplet_alignment_loss_by_hand():
    # Two persons, orthogonal features, every text equal to its image: s is the identity matrix.
    features = torch.eye(2)
    loss = triplet_alignment_loss(features, features, torch.tensor([0, 1]), temperature=0.02, margin=1.5)
    # Each of the 4 rows: 1.5 - 1 + 0.02 * log(exp(0 / 0.02)) = 0.5.
    assert loss.item() == pytest.approx(2.0)


PERSONS = torch.tensor([0, 0, 1, 1, 2, 2])
AT_LOW_TEMPERATURE = {
    "tal": lambda image, text: triplet_alignment_loss(image, text, PERSONS, temperature=0.005),
    "sdm": lambda image, text: similarity_distribution_matching_loss(image, text, PERSONS, logit_scale=200.0),
    "itc": lambda image, text: image_text_contrastive_loss(image, text, logit_scale=200.0),
    "cmpm": lambda image, text: cross_modal_projection_matching_loss(200 * image, 200 * text, PERSONS),
    "cmpc": lambda image, text: projection_classification_loss(
        200 * image, 200 * text, torch.linspace(-1, 1, 24).sin().reshape(8, 3), PERSONS
    ),
}


@pytest.mark.parametrize("name", AT_LOW_TEMPERATURE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_temperatures_do_not_overflow(name, dtype):
    """Opposite features: cosines of -1 and 1 at a temperature of 0.005 are 400 apart, past what exp can hold."""
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    image, text = features.clone().requires_grad_(), (-features).requires_grad_()
    loss = AT_LOW_TEMPERATURE[name](image, text)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert image.grad.isfinite().all() and text.grad.isfinite().all()


@pytest.mark.parametrize("name", AT_LOW_TEMPERATURE)
def test_autocast_changes_nothing(name):
    image, text = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).unbind()
    plain = AT_LOW_TEMPERATURE[name](image, text)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(AT_LOW_TEMPERATURE[name](image, text), plain)


def test_attribute_loss_equals_a_loop_and_passes_over_missing_labels():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 7, generator=generator)
    labels = torch.tensor([[0, 3], [1, -100], [-100, 2]])
    expected, count = 0.0, 0
    for row in range(3):
        for first, size, label in ((0, 3, labels[row, 0]), (3, 4, labels[row, 1])):
            if label != -100:
                probabilities = [math.exp(value) for value in logits[row, first : first + size].tolist()]
                expected -= math.log(probabilities[label] / sum(probabilities))
                count += 1
    assert attribute_classification_loss(logits, labels, [3, 4]).item() == pytest.approx(expected / count, rel=1e-5)
    with pytest.raises(ValueError, match="5 values need 5 and 2"):
        attribute_classification_loss(logits, labels, [3, 2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 4), torch.ones(3, 4), torch.zeros(2)), r"\(2, 4\).*\(3, 4\)"),
        ((torch.ones(2, 4), torch.ones(2, 4), torch.zeros(3)), r"ids have the shape \(3,\) for 2 pairs"),
        ((torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2, 1)), r"ids have the shape \(2, 1\) for 2 pairs"),
        ((torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2), 0.0), "temperature is 0.0"),
        ((torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2), 0.02, -1.0), "margin is -1.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        triplet_alignment_loss(*arguments)


@pytest.mark.parametrize(
    "loss",
    [
        lambda image, text: similarity_distribution_matching_loss(image, text, torch.zeros(2)),
        lambda image, text: cross_modal_projection_matching_loss(image, text, torch.zeros(2)),
        lambda image, text: identity_classification_loss(image, text, torch.zeros(2)),
        lambda image, text: projection_classification_loss(image, text, torch.ones(4, 3), torch.zeros(2)),
        image_text_contrastive_loss,
    ],
)
def test_pairs_that_are_none_are_named(loss):
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 4\)"):
        loss(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"ids have the shape \(3,\) for 2 pairs"):
        similarity_distribution_matching_loss(
            torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2), image_ids=torch.ones(3)
        )
    with pytest.raises(ValueError, match="image_id_factor is 2, it must be between 0 and 1"):
        similarity_distribution_matching_loss(torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2), image_id_factor=2)
