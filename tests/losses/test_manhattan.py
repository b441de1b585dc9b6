import sys

import pytest
import torch

from limbeck.losses import manhattan, transport

SHAPES = [(7, 5, 11), (8, 8, 512), (1, 3, 1), (5, 6, 1100), (2, 9, 513)]  # students, teachers, classes


@pytest.fixture(params=["kernels", "torch"])
def way(request, monkeypatch):
    """Both ways to sum, the kernels at any size, torch's in many small blocks."""
    monkeypatch.setattr(manhattan, "WORTH", 0)
    monkeypatch.setattr(manhattan, "WIDTH", 4)
    monkeypatch.setattr(manhattan, "BLOCK", 50)
    if request.param == "torch":
        monkeypatch.setattr(manhattan, "_kernels", lambda: None)
    return request.param


def points(students, teachers, classes, *, dtype=torch.float32):
    """Probabilities; the last student is the second teacher, so that every class is a tie there."""
    generator = torch.Generator().manual_seed(students * classes)
    student, teacher = (torch.randn(n, classes, generator=generator).softmax(1) for n in (students, teachers))
    student[-1] = teacher[1]
    weights = torch.randn(students, teachers, generator=generator)
    return student.to(dtype).requires_grad_(), teacher.to(dtype).requires_grad_(), weights.to(dtype)


def distances_and_gradients(distances, student, teacher, weights):
    cost = distances(student, teacher)
    return cost, *torch.autograd.grad((weights * cost).sum(), (student, teacher))


def plainly(student, teacher):
    return (student[:, None] - teacher).abs().sum(2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_distances_and_both_gradients_are_cdists_and_those_of_a_float64_twin(way, shape, dtype, tolerance):
    inputs = points(*shape, dtype=dtype)
    ours = distances_and_gradients(manhattan.Manhattan.apply, *inputs)
    theirs = distances_and_gradients(lambda x, y: torch.cdist(x, y, p=1.0), *inputs)
    twins = distances_and_gradients(plainly, *(x.detach().double().requires_grad_() for x in inputs))
    for found, cdist, twin in zip(ours, theirs, twins, strict=True):
        torch.testing.assert_close(found, cdist, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.double(), twin, rtol=tolerance, atol=tolerance)


def test_ties_have_distance_and_gradient_exactly_zero(way):
    student, _, _ = points(6, 6, 600)
    diagonal = manhattan.Manhattan.apply(student, student.detach()).diagonal()
    (found,) = torch.autograd.grad(diagonal.sum(), student)
    assert not diagonal.any()
    assert not found.any()


def test_layout_does_not_change_a_bit(way):
    student, teacher, weights = points(7, 5, 600)
    expected = distances_and_gradients(manhattan.Manhattan.apply, student, teacher, weights)
    turned = [x.detach().t().contiguous().t().requires_grad_() for x in (student, teacher, weights)]
    assert not any(x.is_contiguous() for x in turned)
    for found, plain in zip(distances_and_gradients(manhattan.Manhattan.apply, *turned), expected, strict=True):
        assert torch.equal(found, plain)


def test_kernels_give_the_same_bits_again_and_on_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(manhattan, "WORTH", 0)
    monkeypatch.setattr(manhattan, "SHARE", 1)
    inputs = points(7, 5, 1100)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 1, 2, 9):
            torch.set_num_threads(count)
            found.append(distances_and_gradients(manhattan.Manhattan.apply, *inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("debias", [False, True])
def test_a_large_sinkhorn_distance_is_the_same_with_and_without_numba(monkeypatch, debias):
    student, teacher, _ = points(70, 70, 1800)
    used = []
    kernels = manhattan._kernels()
    monkeypatch.setattr(manhattan, "_kernels", lambda: used.append(kernels) or kernels)
    results = []
    for _ in range(2):
        loss = transport.sinkhorn_distance(student, teacher, debias=debias)
        results.append((loss, *torch.autograd.grad(loss, student)))
        monkeypatch.setattr(manhattan, "_kernels", lambda: None)
    assert used
    (value, gradient), (other, expected) = results
    assert value.item() == pytest.approx(other.item(), rel=1e-5)
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-5


def test_small_problems_and_other_dtypes_do_not_load_numba(monkeypatch):
    monkeypatch.setattr(manhattan, "_kernels", lambda: pytest.fail("loaded"))
    manhattan.Manhattan.apply(*points(3, 4, 5)[:2])
    monkeypatch.setattr(manhattan, "WORTH", 0)
    manhattan.Manhattan.apply(*points(3, 4, 5, dtype=torch.float64)[:2])


def test_there_are_no_kernels_without_numba(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert manhattan._kernels.__wrapped__() is None


def test_what_is_not_a_number_stays_so(way):
    student, teacher, _ = points(4, 5, 600)
    broken = student.detach().clone()
    broken[1, 2] = float("nan")
    assert manhattan.Manhattan.apply(broken, teacher.detach()).isnan().any(1).tolist() == [False, True, False, False]


def compiled_wrong(kernel, wrong):
    def njit(**_):
        return lambda plain: wrong if plain is kernel else plain

    return njit


def off(out, *inputs):
    manhattan._distances(out, *inputs)
    out[1, 2] += 0.25


def sign_of_ties(out, grad, x, y):
    manhattan._signs(out, grad, x, y)
    out += (x == y[0]) * grad[:, :1]


@pytest.mark.parametrize(
    ("kernel", "wrong", "name"), [("_distances", off, "distances"), ("_signs", sign_of_ties, "signs")]
)
def test_a_kernel_that_numba_compiled_wrong_is_refused_by_name(kernel, wrong, name, monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(numba, "njit", compiled_wrong(getattr(manhattan, f"_{name}"), wrong))
    with pytest.raises(ValueError, match=rf"received {name} off by .* that numba compiled, expected torch's"):
        manhattan._kernels.__wrapped__()


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float16,) * 2]
)
def test_unequal_and_low_dtypes_meet_in_float32_or_wider(dtypes):
    source = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(n, 9, generator=source).to(d) for n, d in zip((3, 4), dtypes, strict=True))
    student.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = manhattan.Manhattan.apply(student, teacher)
    assert found.dtype == torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    exact = (student.detach().double()[:, None] - teacher.double()).abs().sum(-1)
    torch.testing.assert_close(found.detach().double(), exact, atol=1e-5, rtol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient.dtype == student.dtype
    assert torch.equal(gradient.double(), (student.detach().double()[:, None] - teacher.double()).sign().sum(1))
