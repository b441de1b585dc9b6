import jaxtyping
import pytest
import torch

from limbeck.losses.masking import logsumexp, masked_mean, require_finite, wide


def test_mean_over_selected_values_only():
    values = torch.tensor([[1.0, 2.0], [3.0, 10.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(values, mask).item() == pytest.approx(14 / 3)
    assert masked_mean(values, None).item() == 4.0


def test_tokens_weigh_the_same_whatever_the_length_of_their_sequence():
    values, mask = torch.tensor([[6.0, 0.0], [0.0, 0.0]]), torch.tensor([[True, False], [True, True]])
    assert masked_mean(values, mask).item() == 2.0  # the mean of sequence means would be 3


@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_unselected_junk_reaches_neither_value_nor_gradient(junk):
    values = torch.tensor([1.0, junk, 3.0], requires_grad=True)
    loss = masked_mean(values, torch.tensor([True, False, True]))
    loss.backward()
    assert loss.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_empty_selection_is_an_error():
    with pytest.raises(ValueError, match="no selected row"):
        masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no selected row"):
        masked_mean(torch.ones(0), None)


def test_mask_of_another_shape_is_an_error_that_shows_both(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotation would catch it first
    with pytest.raises(ValueError, match=r"\(1, 3\), expected \(2, 3\)"):
        masked_mean(torch.ones(2, 3), torch.ones(1, 3, dtype=torch.bool))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_is_an_error(value):
    with pytest.raises(ValueError, match="expected a finite loss"):
        require_finite(torch.tensor(value))
    assert require_finite(torch.tensor(1.0)).item() == 1.0


def test_what_is_no_real_number_of_16_bits_is_refused():
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"received {dtype}, expected real numbers of at least 16 bits"):
            wide(torch.ones(2).to(dtype))
    assert [x.dtype for x in wide(torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64))] == [
        torch.float64
    ] * 2


def test_a_mean_of_half_precision_is_taken_in_float32():
    values = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    values[0] = 2.0
    found = masked_mean(values, None)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1 + 1 / 4096, rel=1e-7)


def test_a_mask_that_selects_indices_is_taken_as_a_mask():
    """Indexed by these integers, values 0 and 1 would be gathered in turn."""
    assert masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1, 0, 1])).item() == 5.0


def test_the_logarithm_of_a_sum_of_nothing_has_no_gradient():
    logits = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    found = logsumexp(logits)
    assert found.tolist() == [-torch.inf, 0.0]
    assert torch.autograd.grad(found, logits, torch.tensor([0.0, 1.0]))[0].tolist() == [[0.0, 0.0], [1.0, 0.0]]
