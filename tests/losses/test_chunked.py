import pytest
import torch

from limbeck.losses import chunked, divergence


def parts(rows=(3, 4), width=5, teacher_width=6, vocab=7, dtype=torch.float64, seed=0):
    source = torch.Generator().manual_seed(seed)
    shapes = ((*rows, width), (vocab, width), (*rows, teacher_width), (vocab, teacher_width))
    hidden, head, teacher, teacher_head = (
        torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head


def dense(hidden, head, teacher, teacher_head, mask=None):
    return divergence.reverse_kl(hidden @ head.T, teacher @ teacher_head.T, mask=mask)


@pytest.mark.parametrize("chunk", [1, 5, 12, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_value_and_gradients_are_those_of_the_dense_form(chunk, masked, dtype, tolerance):
    inputs = parts(dtype=dtype)
    mask = torch.arange(12).reshape(3, 4) % 3 > 0 if masked else None
    found, expected = chunked.chunked_reverse_kl(*inputs, mask=mask, chunk=chunk), dense(*inputs, mask)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    pairs = zip(*(torch.autograd.grad(3 * loss, inputs[:2]) for loss in (found, expected)), strict=True)
    for gradient, other in pairs:
        torch.testing.assert_close(gradient, other, atol=tolerance, rtol=tolerance)


def test_the_gradient_agrees_with_finite_differences():
    *student, teacher, teacher_head = parts()
    assert torch.autograd.gradcheck(
        lambda x, y: chunked.chunked_reverse_kl(x, y, teacher, teacher_head, chunk=5), student
    )


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, head, teacher, teacher_head = parts()
    teacher.requires_grad_(), teacher_head.requires_grad_()
    loss = chunked.chunked_reverse_kl(hidden, head.detach(), teacher, teacher_head)
    assert torch.autograd.grad(loss, (teacher, teacher_head), allow_unused=True, retain_graph=True) == (None, None)
    (gradient,) = torch.autograd.grad(loss, hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense(hidden, head, teacher, teacher_head), hidden)[0])
    assert not chunked.chunked_reverse_kl(hidden.detach(), head.detach(), teacher, teacher_head).requires_grad


def test_padding_is_inert_whatever_it_holds():
    inputs = parts()
    mask = torch.arange(12).reshape(3, 4) % 3 > 0
    expected = chunked.chunked_reverse_kl(*inputs, mask=mask)
    broken = [x.detach().clone() for x in inputs]
    broken[0][~mask], broken[2][~mask] = torch.nan, torch.inf
    broken[0].requires_grad_()
    found = chunked.chunked_reverse_kl(*broken, mask=mask)
    assert found == expected
    found.backward()
    assert not broken[0].grad[~mask].any()


def test_low_precision_sums_in_float32():
    inputs = parts(dtype=torch.bfloat16)
    found = chunked.chunked_reverse_kl(*inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, dense(*inputs), atol=0.02, rtol=0.02)
    assert torch.autograd.grad(found, inputs[0])[0].dtype == torch.bfloat16


def test_wrong_inputs_are_refused():
    hidden, head, teacher, teacher_head = parts()
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(2, 4, 6\).*expected the same rows"):
        chunked.chunked_reverse_kl.__wrapped__(hidden, head, teacher[:2], teacher_head)
    with pytest.raises(ValueError, match=r"\(6, 6\).*the same vocabulary"):
        chunked.chunked_reverse_kl.__wrapped__(hidden, head, teacher, teacher_head[:6])
    with pytest.raises(ValueError, match="chunk 0, expected at least 1"):
        chunked.chunked_reverse_kl(*parts(), chunk=0)
    with pytest.raises(ValueError, match=r"mask of shape \(4,\), expected \(3, 4\)"):
        chunked.chunked_reverse_kl.__wrapped__(*parts(), mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="no selected row"):
        chunked.chunked_reverse_kl(*parts(), mask=torch.zeros(3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected a finite loss"):
        chunked.chunked_reverse_kl(hidden, head, teacher + torch.inf, teacher_head)


LOW = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)]


@pytest.mark.parametrize("dtypes", [*LOW, (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64)])
def test_under_autocast_it_is_the_dense_form_under_autocast(dtypes):
    """Gradients to a head add up chunks of bfloat16 products, so they may differ by their rounding, 2^-8."""
    hidden, head, taught, teachers_head = parts()
    hidden, taught = (x.detach().to(dtypes[0]).requires_grad_(x.requires_grad) for x in (hidden, taught))
    head, teachers_head = (x.detach().to(dtypes[1]).requires_grad_(x.requires_grad) for x in (head, teachers_head))
    with torch.autocast("cpu", torch.bfloat16):
        found = chunked.chunked_reverse_kl(hidden, head, taught, teachers_head, chunk=5)
        expected = dense(hidden, head, taught, teachers_head)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, head)) for loss in (found, expected)), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=4e-3, rtol=2**-7)


def test_without_autocast_unequal_dtypes_meet_in_the_wider_one():
    inputs = parts(dtype=torch.float32)
    hidden = inputs[0].detach().bfloat16().requires_grad_()
    found = chunked.chunked_reverse_kl(hidden, *inputs[1:])
    expected = chunked.chunked_reverse_kl(hidden.float(), *inputs[1:])
    assert found.item() == expected.item()
    assert torch.autograd.grad(found, hidden)[0].dtype == torch.bfloat16


def test_chunks_of_half_precision_add_up_in_float32():
    """4,096 rows in chunks of one: a bfloat16 sum would stop growing after some hundred."""
    hidden, head, taught, teachers_head = parts(rows=(1, 1), dtype=torch.bfloat16)
    many = [x.detach().expand(1, 4096, -1) for x in (hidden, taught)]
    found = chunked.chunked_reverse_kl(many[0], head, many[1], teachers_head, chunk=1)
    wide_head = head.detach().double().requires_grad_()
    expected = dense(hidden.double(), wide_head, taught.double(), teachers_head.double())
    (gradient,), (wanted,) = torch.autograd.grad(found, head), torch.autograd.grad(expected, wide_head)
    torch.testing.assert_close(gradient.double(), wanted, atol=2e-2, rtol=3e-2)


def test_a_class_that_both_leave_out_counts_for_nothing():
    hidden, head, taught, teachers_head = parts(dtype=torch.float32)
    rows = [torch.cat([x.detach(), torch.ones(3, 4, 1)], -1) for x in (hidden, taught)]
    out = torch.tensor([0.0] * 6 + [-torch.inf])[:, None]
    heads = [torch.cat([x.detach() * (out == 0), out], -1) for x in (head, teachers_head)]
    found = chunked.chunked_reverse_kl(rows[0], heads[0], rows[1], heads[1])
    expected = dense(hidden, head[:6], taught, teachers_head[:6])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
