"""The weighted sum of bases: the same as the sum written out, however it is cut, and its gradient too."""

import functools
import tracemalloc
import weakref
from dataclasses import replace

import materialised
import pytest
import torch

from limbeck.adapters import basis
from limbeck.adapters.basis import Bank, Stream
from limbeck.adapters.factor import Factor

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
def test_a_compiled_sum_computes_and_learns_as_it_does_uncompiled_from_its_first_call(budget):
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
