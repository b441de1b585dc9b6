"""Coefficients of few bits: the levels, what a file holds of them, training through the rounding, and its price."""

import pytest
import tiny_hosts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict

from limbeck.adapters import quantise
from limbeck.adapters.quantisation import BITS, dequantised, levels, packed, quantised, unpacked

LEVELS = {2: 1, 3: 3, 4: 7, 8: 127}


def vectors(rows=2, n=50, dtype=torch.float64):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_each_value_goes_to_its_nearest_level_of_its_own_vector(bits, dtype):
    values = vectors(dtype=dtype) * torch.tensor([[1.0], [100.0]], dtype=dtype)
    rounded = quantised(values, bits)
    for row, out in zip(values, rounded, strict=True):
        top = row.abs().max().float().to(dtype)
        grid = torch.arange(-LEVELS[bits], LEVELS[bits] + 1, dtype=dtype) / LEVELS[bits] * top
        nearest = grid[(row[:, None] - grid).abs().argmin(1)]
        torch.testing.assert_close(out, nearest, atol=1e-5 * top.item(), rtol=0)
        assert out.abs().max() == top
        assert len(out.unique()) <= 2 * LEVELS[bits] + 1


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_quantising_again_changes_no_bit(bits, dtype):
    once = quantised(vectors(20, 200, dtype=dtype), bits)
    assert torch.equal(quantised(once, bits), once)
    assert not quantised(torch.zeros(1, 5), bits).any()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(BITS), st.integers(1, 40), st.integers(1, 3), st.data())
def test_packing_is_undone_by_unpacking_and_takes_as_many_bits_as_it_says(bits, n, rows, data):
    top = LEVELS[bits]
    numbers = data.draw(st.lists(st.integers(-top, top), min_size=n * rows, max_size=n * rows))
    numbers = torch.tensor(numbers, dtype=torch.int8).view(rows, n)
    stored = packed(numbers, bits)
    assert stored.shape == (rows, -(-bits * n // 8))
    assert torch.equal(unpacked(stored, bits, n), numbers)


def test_packing_writes_the_bits_one_after_another():
    assert packed(torch.tensor([[-1, 0, 1, 1, 0]], dtype=torch.int8), 2).tolist() == [[0b00011010, 0b01000000]]
    assert packed(torch.tensor([[3, -3, 0]], dtype=torch.int8), 3).tolist() == [[0b11000001, 0b10000000]]


def test_errors_of_gaussian_coefficients_are_those_expected():
    """nola.md 1.8, symmetric at the largest of 1000 values: relative L2 error."""
    values = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits, expected in {8: 0.0076, 4: 0.15, 3: 0.31, 2: 0.82}.items():
        error = ((quantised(values, bits) - values).norm(dim=1) / values.norm(dim=1)).mean().item()
        assert error == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("bits", BITS)
def test_training_uses_rounded_coefficients_and_passes_the_gradient_straight(bits):
    """alpha - stop(alpha) + stop(rounded alpha): the output is that of the rounded, the gradient its gradient."""
    model = tiny_hosts.perturb(tiny_hosts.adapted("mlp", quant_bits=bits, modules_to_save=None))
    plain = tiny_hosts.adapted("mlp", modules_to_save=None)
    pairs = list(zip(model.named_parameters(), plain.named_parameters(), strict=True))
    with torch.no_grad():
        for (name, ours), (_, theirs) in pairs:
            theirs.copy_(quantised(ours, bits) if "nola_" in name else ours)
    output = tiny_hosts.outputs("mlp", model)
    torch.testing.assert_close(output, tiny_hosts.outputs("mlp", plain), atol=1e-6, rtol=1e-6)
    for m in (model, plain):
        tiny_hosts.outputs("mlp", m).square().sum().backward()
    for (name, ours), (_, theirs) in pairs:
        assert "nola_" not in name or ours.grad.abs().min() > 0
        assert ours.grad is None or torch.allclose(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["gpt2", "conv"])
def test_quantising_a_trained_adapter_rounds_it_in_place_and_packs_its_file(bits, name):
    model = tiny_hosts.perturb(tiny_hosts.adapted(name))
    before = {k: p.clone() for k, p in model.named_parameters() if "nola_" in k}
    tiny_hosts.outputs(name, model)
    quantise(model, bits=bits)
    for key, value in before.items():
        assert torch.equal(model.get_parameter(key), quantised(value, bits))
    output = tiny_hosts.outputs(name, model)
    state = get_peft_model_state_dict(model)
    for key, value in state.items():
        if key.endswith("nola_coefficients"):
            assert value.dtype == torch.uint8
            assert value.shape[1] == -(-7 * bits // 8) + -(-5 * bits // 8)
    rows = sum(len(value) for key, value in state.items() if key.endswith("nola_coefficients"))
    assert state["base_model.nola_scales"].shape == (rows, 2)
    fresh = tiny_hosts.perturb(tiny_hosts.adapted(name))
    for key, value in before.items():
        fresh.get_parameter(key).data.copy_(quantised(value, bits))
    torch.testing.assert_close(output, tiny_hosts.outputs(name, fresh), atol=1e-6, rtol=1e-6)


def test_what_the_file_holds_gives_the_levels():
    values = vectors(3, 11)
    numbers, scales = levels(values, 4)
    assert (numbers.dtype, scales.dtype) == (torch.int8, torch.float32)
    assert torch.equal(dequantised(unpacked(packed(numbers, 4), 4, 11), scales, 4, values.dtype), quantised(values, 4))


def test_wrong_bits_and_adapters_are_refused():
    model = tiny_hosts.adapted("mlp")
    with pytest.raises(ValueError, match="received 5 bits a coefficient, expected one of 2, 3, 4, 8"):
        quantise(model, bits=5)
    with pytest.raises(ValueError, match="adapter name 'other', expected one of default"):
        quantise(model, "other", bits=4)
