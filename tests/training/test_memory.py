import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eccl.training.memory import CrossModalMemory


def unit(vector):
    return vector / vector.norm()


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.integers(0, 4), max_size=20), momentum=st.floats(0, 1), seed=st.integers(0, 1000))
def test_update_equals_a_loop_over_items(rows, momentum, seed):
    generator = torch.Generator().manual_seed(seed)
    start_image, start_text = torch.randn(2, 5, 6, generator=generator)
    image, text = torch.randn(2, len(rows), 6, generator=generator)
    memory = CrossModalMemory(start_image, start_text, torch.arange(5), 0.1, momentum)
    expected_image, expected_text = ([unit(row) for row in start] for start in (start_image, start_text))
    for item, row in enumerate(rows):
        for expected, features in ((expected_image, image), (expected_text, text)):
            expected[row] = unit(momentum * expected[row] + (1 - momentum) * unit(features[item]))
    memory.update(image, text, torch.tensor(rows, dtype=torch.long))
    torch.testing.assert_close(memory.image_rows, torch.stack(expected_image), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(memory.text_rows, torch.stack(expected_text), rtol=1e-4, atol=1e-5)


def losses_from_the_equation(memory, image, text, person_ids):
    """The correspondence losses in float64, written as in the docstring, for autograd."""
    for features, rows in ((image, memory.text_rows), (text, memory.image_rows)):
        logits = unit_rows_in_double(features) @ rows.double().T / memory.temperature
        same = person_ids[:, None] == memory.row_person_ids[None, :]
        log_mass = logits.masked_fill(~same, -torch.inf).logsumexp(dim=1) - logits.logsumexp(dim=1)
        yield -((log_mass.exp() + memory.eps).log() if memory.eps else log_mass).mean()


def unit_rows_in_double(features):
    return features.double() / features.double().norm(dim=1, keepdim=True)


# At temperature 0.005 the probabilities of far rows, and of some persons, are below the range of float32.
@pytest.mark.parametrize("temperature", [0.005, 0.03, 1.0])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("rows_per_person", [1, 3])
def test_losses_and_gradients_are_those_of_the_equation(temperature, eps, rows_per_person):
    generator = torch.Generator().manual_seed(0)
    row_person_ids = torch.arange(40).repeat(rows_per_person)
    start = torch.randn(2, len(row_person_ids), 16, generator=generator)
    memory = CrossModalMemory(*start, row_person_ids, temperature, 0.1, eps)
    person_ids = torch.tensor([3, 39, 0, 3, 17])
    inputs = torch.randn(2, 5, 16, generator=generator).requires_grad_()
    weights = torch.tensor([0.3, 2.0])
    with torch.autocast("cpu", torch.bfloat16):
        losses = torch.stack(memory(*inputs, person_ids))
    expected = torch.stack(tuple(losses_from_the_equation(memory, *inputs, person_ids)))
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(losses @ weights, inputs)
    (expected_gradient,) = torch.autograd.grad(expected @ weights.double(), inputs)
    assert (gradient - expected_gradient).abs().max() < 1e-4 * expected_gradient.abs().max() + 1e-12


def test_fill_is_the_normalised_mean_of_unnormalised_features():
    image, text = torch.randn(2, 5, 4)
    memory = CrossModalMemory(torch.zeros(2, 4), torch.zeros(2, 4), torch.arange(2), 0.1, 0.1)
    memory.fill(image, text, torch.tensor([1, 0, 1, 1, 0]))
    torch.testing.assert_close(memory.image_rows[1], unit((image[0] + image[2] + image[3]) / 3))
    torch.testing.assert_close(memory.text_rows[0], unit((text[1] + text[4]) / 2))
    with pytest.raises(ValueError, match=r"row 1 .* no item"):
        memory.fill(image, text, torch.zeros(5, dtype=torch.long))


def test_rows_take_part_in_the_state_and_get_no_gradient():
    memory = CrossModalMemory(torch.randn(3, 4), torch.randn(3, 4), torch.arange(3), 0.1, 0.1)
    assert set(memory.state_dict()) == {"image_rows", "text_rows", "row_person_ids"}
    assert not list(memory.parameters())
    query = torch.randn(2, 4, requires_grad=True)
    sum(memory(query, query, torch.tensor([0, 2]))).backward()
    assert memory.image_rows.grad is None and query.grad.abs().sum() > 0


def test_bad_settings_are_named():
    rows = torch.ones(3, 4)
    with pytest.raises(ValueError, match="temperature is 0"):
        CrossModalMemory(rows, rows, torch.arange(3), 0, 0.1)
    with pytest.raises(ValueError, match="momentum is 2"):
        CrossModalMemory(rows, rows, torch.arange(3), 0.1, 2)
    with pytest.raises(ValueError, match="2 row_person_ids"):
        CrossModalMemory(rows, rows, torch.arange(2), 0.1, 0.1)


def test_what_has_no_row_is_named():
    memory = CrossModalMemory(torch.randn(3, 4), torch.randn(3, 4), torch.arange(3), 0.1, 0.1, eps=1e-8)
    with pytest.raises(ValueError, match="person 5 has no row"):
        memory(torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="rows range from 0 to 3, the memory has 3"):
        memory.fill(torch.randn(2, 4), torch.randn(2, 4), torch.tensor([0, 3]))
