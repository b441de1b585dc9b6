"""PRANC on one update: a plain sum of full random matrices."""

import copy

import materialised
import pytest
import torch
from torch import nn

from limbeck.adapters import attach_pranc


def layer():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(5, 4).double()


def test_the_weight_is_the_old_one_and_the_sum_written_out():
    module = layer()
    weight = module.weight.detach().clone()
    coefficients = attach_pranc(module, num_basis=6, seed=3, key="here", scale=2.0)
    assert torch.equal(module.weight, weight)
    coefficients.data.normal_(generator=torch.Generator().manual_seed(0))
    drawn = materialised.bases(3, "here", "C", (5, 4), 6)
    update = 2.0 * sum(c * basis for c, basis in zip(coefficients[0], drawn, strict=True)) / 6**0.5
    torch.testing.assert_close(module.weight, weight + update.t(), atol=1e-12, rtol=0)
    assert update.abs().max() > 0.1


def test_a_convolution_is_the_matrix_from_a_patch_to_the_channels():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Conv2d(3, 4, (3, 2), stride=2, padding=1).double()
    x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before = module(x)
    coefficients = attach_pranc(module, num_basis=5, seed=3, key="here")
    coefficients.data.normal_(generator=torch.Generator().manual_seed(0))
    drawn = materialised.bases(3, "here", "C", (18, 4), 5)
    update = sum(c * basis for c, basis in zip(coefficients[0], drawn, strict=True)) / 5**0.5
    patches = nn.functional.unfold(x, (3, 2), padding=1, stride=2)  # [batch, c_in h w, place]
    moved = (update.t() @ patches).reshape(before.shape)
    torch.testing.assert_close(module(x), before + moved, atol=1e-12, rtol=0)


def test_only_the_coefficients_train_and_the_start_is_not_dead():
    module, x = layer(), torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coefficients = attach_pranc(module, num_basis=6, seed=0)
    assert [p.numel() for p in module.parameters() if p.requires_grad] == [6]
    optimiser, losses = torch.optim.Adam([coefficients], lr=0.1), []
    for _ in range(30):
        loss = (module(x) - 1).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert coefficients.grad.abs().min() > 0
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_layers_have_other_bases_where_their_keys_differ():
    deltas = []
    for key in ("a", "a", "b"):
        module = copy.deepcopy(layer())
        attach_pranc(module, num_basis=6, seed=0, key=key).data.fill_(1)
        deltas.append(module.weight.detach())
    assert torch.equal(deltas[0], deltas[1])
    assert not torch.equal(deltas[0], deltas[2])


def test_no_basis_is_refused():
    with pytest.raises(ValueError, match="num_basis 0, expected at least 1"):
        attach_pranc(layer(), num_basis=0, seed=0)
