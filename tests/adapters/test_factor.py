"""The weighted sum of bases: the same as the sum written out, however it is cut, and its gradient too."""

import functools
import tracemalloc
import weakref
from dataclasses import replace

import jaxtyping
import materialised
import pytest
import tiny_hosts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model_state_dict

from limbeck.adapters import basis, quantise
from limbeck.adapters.basis import Bank, Stream
from limbeck.adapters.factor import BITS, Factor, dequantised, levels, packed, quantised, unpacked

K, SHAPE = 10, (6, 5)
CHUNKS = {"1 chunk": 10, "2 chunks": 5, "3 chunks, the last smaller": 4, "k chunks": 1}


def streams(*keys, shape=SHAPE):
    return tuple(Stream(3, key, "A", shape) for key in keys)


def fixed(*keys, shape=SHAPE):
    return tuple(Stream(3, key, "A0", shape) for key in keys)


def numbers(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def draws(monkeypatch):
    """A list that grows by (start, count, size) with each draw of more than one basis."""
    seen, draw = [], Stream.draw

    def watched(stream, start, count):
        if stream.factor != "A0":
            seen.append((start, count, stream.size))
        return draw(stream, start, count)

    monkeypatch.setattr(Stream, "draw", watched)
    return seen


@pytest.mark.parametrize("chunk_size", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("budget", [0, 10**6])
@pytest.mark.parametrize("keys", [("x", "x"), ("x", "y"), ("x", "y", "x")])
def test_value_and_gradient_are_those_of_the_sum_written_out(chunk_size, budget, keys):
    coefficients, weights = numbers(len(keys), K), numbers(len(keys), *SHAPE).detach()
    factor = Factor(Bank(), streams(*keys), K, fixed=fixed(*keys), chunk_size=chunk_size, budget=budget)
    value = factor(coefficients)
    (value * weights).sum().backward()
    grad, coefficients.grad = coefficients.grad, None
    expected = torch.stack(
        [
            materialised.factor(
                row,
                materialised.bases(3, key, "A", SHAPE, K),
                materialised.bases(3, key, "A0", SHAPE, 1)[0] / SHAPE[0] ** 0.5,
            )
            for row, key in zip(coefficients, keys, strict=True)
        ]
    )
    (expected * weights).sum().backward()
    torch.testing.assert_close(value, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad, coefficients.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("budget", [0, 10**6])
def test_the_gradient_agrees_with_finite_differences(budget):
    factor = Factor(Bank(), streams("x", "y"), K, fixed=fixed("x", "y"), chunk_size=3, budget=budget)
    assert torch.autograd.gradcheck(lambda c: factor(c).sin(), numbers(2, K))


@pytest.mark.parametrize("chunk_size", CHUNKS.values(), ids=CHUNKS)
def test_single_precision_differs_by_rounding(chunk_size):
    coefficients = numbers(1, K)
    factor = Factor(Bank(), streams("x"), K, chunk_size=chunk_size)
    torch.testing.assert_close(factor(coefficients.float()).double(), factor(coefficients), atol=1e-5, rtol=1e-5)


def test_half_precision_is_summed_in_single_and_rounded_once():
    coefficients = numbers(1, K, dtype=torch.bfloat16)
    for chunk_size in (1, 10):
        factor = Factor(Bank(), streams("x"), K, fixed=fixed("x"), chunk_size=chunk_size)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = factor(coefficients)
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value, factor.value(coefficients.float()).bfloat16(), atol=0, rtol=2**-8)


def test_autocast_does_not_reach_the_sum():
    coefficients = numbers(1, K, dtype=torch.float32)
    plain, cast = (Factor(Bank(), streams("x"), K) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cast(coefficients), plain(coefficients))
        grad = cast.contract(torch.ones(1, *SHAPE))
    assert torch.equal(grad, plain.contract(torch.ones(1, *SHAPE)))


def test_more_chunks_take_less_memory_and_nothing_as_large_as_the_bases_waits_for_the_backward(monkeypatch):
    k, shape, saved, drawn, peaks, draw = 64, (64, 256), [], [], {}, Stream.draw

    def watched(*args):
        assert not [bases for bases in drawn if bases() is not None], "two chunks at once"
        drawn.append(weakref.ref(bases := draw(*args)))
        return bases

    monkeypatch.setattr(Stream, "draw", watched)
    monkeypatch.setattr(basis, "_PART", 2**10)  # the words that are being drawn are to be few beside a small chunk
    for chunk_size in (64, 16, 4):
        factor = Factor(Bank(), streams("x", shape=shape), k, chunk_size=chunk_size)
        coefficients = numbers(1, k, dtype=torch.float32)
        tracemalloc.start()  # numpy draws the bases, and reports what it allocates
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            loss = factor(coefficients).square().sum()
        assert len(drawn) == k // chunk_size
        assert tracemalloc.get_traced_memory()[0] < 2**15
        loss.backward()
        peaks[chunk_size] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        drawn.clear()
    assert max(saved) <= shape[0] * shape[1]
    assert peaks[16] < 0.3 * peaks[64]
    assert peaks[4] < 0.35 * peaks[16]


def test_a_draw_is_never_more_than_a_chunk_when_nothing_is_kept(draws):
    factor = Factor(Bank(), streams("x"), K, chunk_size=4)
    factor(numbers(1, K)).sum().backward()
    assert draws == [(0, 4, 30), (4, 4, 30), (8, 2, 30)] * 2  # forward and backward


def test_kept_bases_are_drawn_once(draws):
    factor, coefficients = Factor(Bank(), streams("x"), K, chunk_size=4, budget=10**6), numbers(1, K)
    for _ in range(3):
        factor(coefficients).sum().backward()
        with torch.no_grad():
            coefficients += 1
    assert sum(count for _, count, _ in draws) == K


def test_streams_that_are_equal_are_drawn_once_for_all_matrices(draws):
    """Property 10: with L matrices, sharing does 1 / L of the draws."""
    amounts = []
    for keys in (("x",) * 4, ("x", "y", "z", "w")):
        draws.clear()
        Factor(Bank(), streams(*keys), K)(numbers(4, K)).sum().backward()
        amounts.append(sum(count for _, count, _ in draws))
    assert amounts == [2 * K, 4 * 2 * K]


def test_the_sum_is_built_once_until_a_coefficient_changes(draws):
    factor, coefficients = Factor(Bank(), streams("x"), K, chunk_size=K), torch.nn.Parameter(numbers(1, K).detach())

    def builds(change):
        change()
        draws.clear()
        for _ in range(3):
            value = factor(coefficients)
        drawn = len(draws)
        expected = Factor(Bank(), streams("x"), K)(coefficients)
        assert torch.equal(value, expected)
        return drawn

    assert builds(lambda: None) == 1
    assert builds(lambda: None) == 0
    optimiser = torch.optim.SGD([coefficients], lr=0.1)
    assert builds(lambda: (factor(coefficients).sum().backward(), optimiser.step())) == 1
    assert builds(lambda: coefficients.data.add_(1)) == 1  # raises no version
    assert builds(lambda: setattr(coefficients, "data", coefficients.data * 2)) == 1
    assert builds(lambda: torch.nn.utils.vector_to_parameters(torch.ones(K).double(), [coefficients])) == 1
    with torch.no_grad():
        assert builds(lambda: coefficients[0, 3].fill_(7)) == 1
        assert builds(lambda: None) == 0


class Elsewhere(torch.Tensor):
    """Coefficients that say they are on a GPU."""

    device = property(lambda _: torch.device("cuda"))


@pytest.mark.parametrize("trains", [True, False])
def test_a_fused_step_is_seen_on_a_device_too_and_frozen_coefficients_are_not_compared_there(trains, monkeypatch):
    """A fused optimiser raises no version."""
    weight = torch.nn.Parameter(numbers(1, K).detach().float(), requires_grad=trains)
    factor, coefficients, compared = Factor(Bank(), streams("x"), K), weight.as_subclass(Elsewhere), []
    monkeypatch.setattr(factor, "_build", lambda values: values.as_subclass(torch.Tensor).clone()[None])
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: compared.append(pair) or equal(*pair))
    factor.value(coefficients)
    version = coefficients._version
    if trains:
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.1, fused=True).step()
    assert coefficients._version == version
    assert equal(factor.value(coefficients)[0], weight)
    assert len(compared) == trains


@pytest.mark.parametrize("budget", [10**6, 0])
def test_a_compiled_sum_computes_and_learns_as_it_does_uncompiled_from_its_first_call(budget, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    results = []
    for wrap in (functools.partial(torch.compile, backend="eager"), lambda plain: plain):
        factor, weight = Factor(Bank(), streams("x"), K, budget=budget), torch.nn.Parameter(numbers(1, K).detach())
        loss_of = wrap(lambda coefficients, factor=factor: (factor(coefficients) * 2).square().sum())
        for _ in range(2):
            loss = loss_of(weight)
            (grad,) = torch.autograd.grad(loss, weight)
            weight.data -= 0.01 * grad
        results.append((loss.detach(), weight.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_another_tensor_with_the_same_version_is_not_mistaken_for_the_first():
    factor = Factor(Bank(), streams("x"), K)
    one, two = (torch.full((1, K), c) for c in (1.0, 2.0))
    assert one._version == two._version
    torch.testing.assert_close(factor(two), 2 * factor(one))


def test_a_value_that_is_kept_has_no_graph_that_a_backward_could_free():
    factor, coefficients = Factor(Bank(), streams("x"), K), numbers(1, K)
    grads = []
    for _ in range(3):
        coefficients.grad = None
        factor(coefficients).square().sum().backward()
        grads.append(coefficients.grad)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    (factor(coefficients).sum() + factor(coefficients).sum()).backward()


def test_what_inference_mode_built_can_train():
    factor, coefficients = Factor(Bank(), streams("x"), K, budget=10**6), numbers(1, K)
    with torch.inference_mode():
        first = factor(coefficients)
    second = factor(coefficients)
    second.square().sum().backward()
    assert torch.equal(first, second)
    assert coefficients.grad.abs().min() > 0
    with torch.inference_mode():
        factor(numbers(1, K) + 1)  # a tensor that counts no versions


def test_all_zeros_without_a_fixed_factor_would_never_learn():
    """Why no configuration offers it: both gradients are zero, so every later step is too."""
    alpha, beta = (torch.zeros(1, K, requires_grad=True) for _ in range(2))
    a = Factor(Bank(), streams("x"), K)
    b = Factor(Bank(), (replace(streams("x")[0], factor="B", shape=SHAPE[::-1]),), K)
    (a(alpha)[0] @ b(beta)[0]).sum().backward()
    assert not alpha.grad.any()
    assert not beta.grad.any()


def test_neither_pass_touches_a_global_generator(global_generators):
    before = global_generators()
    Factor(Bank(), streams("x"), K, fixed=fixed("x"))(numbers(1, K)).sum().backward()
    assert global_generators() == before


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
    packed_rows = {key: value for key, value in state.items() if ".nola_coefficients." in key}
    assert len(packed_rows) == len(tiny_hosts.nola_layers(model))
    for value in packed_rows.values():
        assert value.dtype == torch.uint8
        assert value.shape[1] == -(-7 * bits // 8) + -(-5 * bits // 8) + 2 * 4
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
