import jaxtyping
import pytest
import torch

from limbeck.losses.masking import masked_mean, require_finite


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
