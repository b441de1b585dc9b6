import math

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import divergence
from reference import divergence as reference

NAMES = ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"]
every_loss = pytest.mark.parametrize("name", NAMES)
logit_rows = st.lists(st.lists(st.floats(-8, 8), min_size=5, max_size=5), min_size=2, max_size=2)


def pair(*shape, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def value_and_gradient(name, student, teacher, **kwargs):
    student = student.detach().clone().requires_grad_()
    loss = getattr(divergence, name)(student, teacher, **kwargs)
    loss.backward()
    return loss.detach(), student.grad


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_is_the_sum_over_five_tokens(name, temperature, dtype, tolerance):
    student, teacher = pair(3, 4, 5, dtype=dtype)
    rows = [
        getattr(reference, name)(reference.softmax(s, temperature), reference.softmax(t, temperature))
        for s, t in zip(student.reshape(-1, 5).tolist(), teacher.reshape(-1, 5).tolist(), strict=True)
    ]
    per_token = getattr(divergence, f"{name}_per_token")(student, teacher, temperature=temperature)
    loss = getattr(divergence, name)(student, teacher, temperature=temperature)
    assert per_token.shape == (3, 4)
    torch.testing.assert_close(per_token.flatten().tolist(), rows, rtol=tolerance, atol=tolerance)
    assert loss.item() == pytest.approx(sum(rows) / 12, rel=tolerance)


@every_loss
def test_gradient_agrees_with_finite_differences(name):
    student, teacher = pair(4, 5)
    mask = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(
        lambda s: getattr(divergence, name)(s, teacher, mask=mask, temperature=1.7), student
    )


@every_loss
def test_teacher_receives_no_gradient(name):
    student, teacher = pair(4, 5)
    teacher.requires_grad_()
    getattr(divergence, name)(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_forward_kl_is_infinite_where_the_student_has_no_mass_and_reverse_kl_is_not():
    teacher = torch.zeros(1, 3)
    student = torch.tensor([[0.0, 0.0, -math.inf]])
    with pytest.raises(ValueError, match="inf"):
        divergence.forward_kl(student, teacher)
    assert divergence.reverse_kl(student, teacher).item() == pytest.approx(math.log(1.5), rel=1e-5)


def test_forward_kl_has_the_gradient_of_the_soft_cross_entropy_and_not_the_teachers_entropy():
    student, teacher = pair(6, 5)
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    kl, kl_gradient = value_and_gradient("forward_kl", student, teacher)
    cross = torch.nn.functional.cross_entropy(student, teacher.softmax(-1))
    (cross_gradient,) = torch.autograd.grad(cross, student)
    torch.testing.assert_close(cross.detach(), kl + entropy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cross_gradient, kl_gradient, rtol=1e-10, atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(logit_rows)
def test_divergences_are_bounded_and_ordered_as_theory_says(rows):
    student, teacher = torch.tensor(rows, dtype=torch.float64).split(1)
    value = {name: getattr(divergence, name)(student, teacher).item() for name in NAMES}
    assert value["forward_kl"] >= -1e-12
    assert value["reverse_kl"] >= -1e-12
    assert -1e-12 <= value["jensen_shannon"] <= math.log(2) + 1e-12
    assert 0 <= value["total_variation"] <= 1 + 1e-12
    # Pinsker's inequality, both ways round; and JS <= log 2 * TV (Lin 1991).
    assert value["total_variation"] ** 2 <= min(value["forward_kl"], value["reverse_kl"]) / 2 + 1e-12
    assert value["jensen_shannon"] <= math.log(2) * value["total_variation"] + 1e-12


@settings(max_examples=25, deadline=None)
@given(logit_rows, st.floats(-50, 50))
def test_shift_of_logits_is_inert(rows, shift):
    student, teacher = torch.tensor(rows, dtype=torch.float64).split(1)
    for name in NAMES:
        before = getattr(divergence, name)(student, teacher)
        after = getattr(divergence, name)(student + shift, teacher - shift)
        torch.testing.assert_close(before, after, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(logit_rows)
def test_swapping_the_arguments_swaps_the_two_kls_and_leaves_js_and_tv(rows):
    a, b = torch.tensor(rows, dtype=torch.float64).split(1)
    swapped = {"forward_kl": "reverse_kl", "jensen_shannon": "jensen_shannon", "total_variation": "total_variation"}
    for name, other in swapped.items():
        torch.testing.assert_close(
            getattr(divergence, name)(a, b), getattr(divergence, other)(b, a), rtol=1e-10, atol=1e-10
        )


@every_loss
def test_equal_logits_give_zero(name):
    logits, _ = pair(4, 5)
    loss, gradient = value_and_gradient(name, logits, logits.detach())
    assert abs(loss.item()) < 1e-12
    assert gradient.abs().max() < 1e-12


@every_loss
@pytest.mark.parametrize("junk", [0.0, 1e30, math.inf, -math.inf, math.nan])
def test_padding_is_inert_whatever_it_holds(name, junk):
    student, teacher = pair(6, 5)
    mask = torch.tensor([True, True, False, True, False, True])
    expected, expected_gradient = value_and_gradient(name, student[mask], teacher[mask])
    padded_student, padded_teacher = student.detach().clone(), teacher.clone()
    padded_student[~mask], padded_teacher[~mask] = junk, junk
    loss, gradient = value_and_gradient(name, padded_student, padded_teacher, mask=mask)
    assert loss == expected
    assert torch.equal(gradient[mask], expected_gradient)
    assert not gradient[~mask].any()
    per_token = getattr(divergence, f"{name}_per_token")(padded_student, padded_teacher, mask=mask)
    assert not per_token[~mask].any()


@every_loss
def test_very_peaked_logits_give_finite_values_and_gradients(name):
    student, teacher = torch.tensor([[400.0, 0.0, -400.0]]), torch.tensor([[-400.0, 0.0, 400.0]])
    loss, gradient = value_and_gradient(name, student, teacher)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


@every_loss
def test_a_class_forbidden_to_both_is_inert(name):
    student, teacher = pair(3, 5)
    expected, expected_gradient = value_and_gradient(name, student, teacher)
    forbidden = torch.full((3, 1), -math.inf, dtype=torch.float64)
    loss, gradient = value_and_gradient(name, torch.cat([student, forbidden], 1), torch.cat([teacher, forbidden], 1))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient[:, :5], expected_gradient, rtol=1e-10, atol=1e-10)
    assert not gradient[:, 5].any()


@every_loss
def test_low_precision_is_computed_in_float32(name):
    student, teacher = pair(4, 5, dtype=torch.bfloat16)
    loss = getattr(divergence, name)(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == getattr(divergence, name)(student.float(), teacher.float()).item()


@every_loss
def test_repeat_is_exact_and_the_global_generator_untouched(name):
    student, teacher = pair(4, 5, dtype=torch.float32)
    first = value_and_gradient(name, student, teacher)
    torch.rand(7)
    state = torch.get_rng_state()
    second = value_and_gradient(name, student, teacher)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_loss
def test_wrong_inputs_are_errors_that_show_what_was_received(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would catch shapes first
    loss, rows = getattr(divergence, name), torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"\(2, 5\).*\(2, 6\)"):
        loss(rows, torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\), expected \(2,\)"):
        loss(rows, rows, mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no selected row"):
        loss(rows, rows, mask=torch.zeros(2, dtype=torch.bool))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="expected temperature > 0"):
            loss(rows, rows, temperature=temperature)
    with pytest.raises(ValueError, match="expected a finite loss"):
        loss(torch.full((2, 5), math.nan), rows)
