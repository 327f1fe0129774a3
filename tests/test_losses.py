import math

import pytest
import torch

from eccl.losses_eccl import attribute_classification_loss, image_text_contrastive_loss, triplet_alignment_loss

CASES = {
    "tal": lambda image, text, ids: triplet_alignment_loss(image, text, ids),
    "tal_tau05": lambda image, text, ids: triplet_alignment_loss(image, text, ids, temperature=0.05, margin=0.1),
    "itc": lambda image, text, ids: image_text_contrastive_loss(image, text),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_values_and_gradients_equal_the_published_code(loss_goldens, name, case):
    image, text = (loss_goldens[f"{case}.{kind}_features"].clone().requires_grad_() for kind in ("image", "text"))
    loss = CASES[name](image, text, loss_goldens[f"{case}.pids"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), loss_goldens[f"{case}.{name}.loss"][0].float(), rtol=1e-5, atol=1e-5)
    for features, kind in ((image, "image"), (text, "text")):
        reference = loss_goldens[f"{case}.{name}.grad_{kind}"]
        if reference.isnan().any():  # one person in the batch: the published gradient is NaN, ours is 0
            reference = torch.zeros_like(reference)
        scale = max(reference.abs().max().item(), 1e-12)
        assert (features.grad - reference).abs().max() / scale < 1e-4


def test_triplet_alignment_loss_by_hand():
    # Two persons, orthogonal features, every text equal to its image: s is the identity matrix.
    features = torch.eye(2)
    loss = triplet_alignment_loss(features, features, torch.tensor([0, 1]), temperature=0.02, margin=1.5)
    # Each of the 4 rows: 1.5 - 1 + 0.02 * log(exp(0 / 0.02)) = 0.5.
    assert loss.item() == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_temperatures_do_not_overflow(dtype):
    features = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    loss = triplet_alignment_loss(features, features.detach(), torch.tensor([0, 0, 1, 1, 2, 2]), temperature=0.005)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and features.grad.isfinite().all()


def test_losses_are_float32_under_autocast():
    features = torch.randn(4, 8)
    plain = image_text_contrastive_loss(features, features.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(image_text_contrastive_loss(features, features.flip(0)), plain)


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
        ((torch.ones(2, 4), torch.ones(2, 4), torch.zeros(3)), "3 ids for 2 pairs"),
        ((torch.ones(2, 4), torch.ones(2, 4), torch.zeros(2), 0.0), "temperature is 0.0"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        triplet_alignment_loss(*arguments)
