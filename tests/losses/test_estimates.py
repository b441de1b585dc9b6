import math

import pytest
import torch

from limbeck.losses import divergence, estimates
from reference import divergence as reference

WEIGHTS = {"none": lambda w: 1, "held": lambda w: w.detach(), "free": lambda w: w}


def distributions(size=8, seed=0):
    """Logits of a student, a teacher and a behaviour policy."""
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(size, generator=source, dtype=torch.float64) for _ in range(3))


def expected_gradient(logits, sampler, value):
    """The gradient of `value(log q)` with each outcome weighed by the sampler's probability, without sampling."""
    logits = logits.clone().requires_grad_()
    (sampler.detach() * value(logits.log_softmax(0))).sum().backward()
    return logits.grad


def gradient_of(loss, logits):
    logits = logits.clone().requires_grad_()
    loss(logits).backward()
    return logits.grad


@pytest.fixture
def exact():
    student, teacher, _ = distributions()
    return {
        "reverse": gradient_of(lambda x: divergence.reverse_kl(x[None], teacher[None]), student),
        "forward": gradient_of(lambda x: divergence.forward_kl(x[None], teacher[None]), student),
        "nothing": torch.zeros(8, dtype=torch.float64),
    }


@pytest.mark.parametrize(
    ("kind", "weight", "on_policy", "off_policy"),
    [
        ("k1", "none", "nothing", None),
        ("k2", "none", "reverse", None),
        ("k2", "held", "reverse", "reverse"),
        ("k2", "free", None, None),
        ("k3", "none", "forward", None),
        ("k3", "held", "forward", "forward"),
        ("k3", "free", "reverse", "reverse"),
    ],
)
def test_what_each_estimator_minimises_as_a_loss(exact, kind, weight, on_policy, off_policy):
    """Every outcome of eight enumerated; None: none of the three."""
    student, teacher, behaviour = distributions()
    for sampler, expected in ((student.softmax(0), on_policy), (behaviour.softmax(0), off_policy)):

        def value(logprobs, sampler=sampler):
            ratio = (logprobs - sampler.log()).exp()
            return WEIGHTS[weight](ratio) * estimates.kl_estimate(kind, logprobs, teacher.log_softmax(0))

        found = expected_gradient(student, sampler, value)
        for name, gradient in exact.items():
            error = (found - gradient).norm() / exact["reverse"].norm()
            assert error < 1e-12 if name == expected else error > 0.1, (name, error)


@pytest.mark.parametrize(("kind", "right"), [("k1", True), ("k2", False), ("k3", False)])
@pytest.mark.parametrize("sampler", ["student", "behaviour"])
def test_as_a_detached_reward_only_k1_has_the_gradient_of_reverse_kl(exact, kind, right, sampler):
    student, teacher, behaviour = distributions()
    sampled = (student if sampler == "student" else behaviour).softmax(0)

    def value(logprobs):
        cost = estimates.kl_estimate(kind, logprobs, teacher.log_softmax(0)).detach()
        return (logprobs - sampled.log()).exp() * cost

    error = (expected_gradient(student, sampled, value) - exact["reverse"]).norm() / exact["reverse"].norm()
    assert error < 1e-12 if right else error > 0.3


def test_k1_and_k3_have_the_mean_of_reverse_kl_and_k2_has_not():
    student, teacher, _ = distributions()
    exact = reference.reverse_kl(student.softmax(0).tolist(), teacher.softmax(0).tolist())
    means = {
        kind: (student.softmax(0) * estimates.kl_estimate(kind, student.log_softmax(0), teacher.log_softmax(0))).sum()
        for kind in estimates.KINDS
    }
    assert means["k1"].item() == pytest.approx(exact, rel=1e-12)
    assert means["k3"].item() == pytest.approx(exact, rel=1e-12)
    assert abs(means["k2"].item() - exact) > 0.05 * exact


def test_many_samples_of_k2_have_the_gradient_of_the_whole_vocabulary(exact):
    """Within 4 standard errors of each of the eight components, over 200,000 samples."""
    student, teacher, _ = distributions()
    source = torch.Generator().manual_seed(1)
    tokens = torch.multinomial(student.softmax(0), 200_000, replacement=True, generator=source)
    log_ratios = (student.log_softmax(0) - teacher.log_softmax(0))[tokens]
    scores = torch.nn.functional.one_hot(tokens, 8) - student.softmax(0)
    each = log_ratios[:, None] * scores
    logits = student.clone().requires_grad_()
    estimates.kl_estimate("k2", logits.log_softmax(0)[tokens], teacher.log_softmax(0)[tokens]).mean().backward()
    torch.testing.assert_close(logits.grad, each.mean(0), atol=1e-12, rtol=0)
    assert ((logits.grad - exact["reverse"]).abs() < 4 * each.std(0) / len(tokens) ** 0.5).all()


def test_per_token_terms_leave_out_what_a_token_does_to_later_prefixes():
    """Two tokens of two: with the later log-ratio added to the first, the gradient is that of the sequence's KL."""
    source = torch.Generator().manual_seed(3)
    first, second, teacher_first, teacher_second = (
        torch.randn(shape, generator=source, dtype=torch.float64) for shape in ((2,), (2, 2), (2,), (2, 2))
    )
    first.requires_grad_()

    def sequence_kl(x):
        q, p = (a.log_softmax(0)[:, None] + b.log_softmax(1) for a, b in ((x, second), (teacher_first, teacher_second)))
        return (q.exp() * (q - p)).sum()

    (exact,) = torch.autograd.grad(sequence_kl(first), first)
    ratio = first.log_softmax(0).detach() - teacher_first.log_softmax(0)
    later = (second.softmax(1) * (second.log_softmax(1) - teacher_second.log_softmax(1))).sum(1)
    probs = first.softmax(0).detach()
    to_go, alone = (
        torch.autograd.grad((probs * cost * first.log_softmax(0)).sum(), first)[0] for cost in (ratio + later, ratio)
    )
    torch.testing.assert_close(to_go, exact, atol=1e-12, rtol=0)
    assert (alone - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("kind", estimates.KINDS)
def test_where_teacher_and_student_agree_the_estimate_is_0_and_only_k1_has_a_gradient(kind):
    logprobs = torch.tensor([-0.3, -2.0, -5.0], dtype=torch.float64, requires_grad=True)
    found = estimates.kl_estimate(kind, logprobs, logprobs.clone())
    found.sum().backward()
    assert not found.any()
    assert logprobs.grad.tolist() == [float(kind == "k1")] * 3


def test_the_teacher_receives_no_gradient():
    student, teacher = (torch.randn(4, 5, requires_grad=True) for _ in range(2))
    for kind in estimates.KINDS:
        assert torch.autograd.grad(estimates.kl_estimate(kind, student, teacher).sum(), teacher, allow_unused=True) == (
            None,
        )
    for form in estimates.FORMS:
        loss = estimates.top_k_reverse_kl(student, teacher, k=2, form=form, support="teacher")
        assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def pair(rows=3, size=6, seed=0):
    source = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, size, generator=source, dtype=torch.float64) for _ in range(2))


def by_hand(student, teacher, k, support, form):
    """One row in plain Python."""
    q, p = reference.softmax(student), reference.softmax(teacher)
    order = sorted(range(len(q)), key=lambda v: -(q if support == "student" else p)[v])
    inside, outside = order[:k], order[k:]
    if form == "renormalised":
        q, p = ([x[v] / sum(x[u] for u in inside) for v in range(len(x))] for x in (q, p))
    total = sum(q[v] * math.log(q[v] / p[v]) for v in inside)
    if form == "tail" and outside:
        left, right = (sum(x[v] for v in outside) for x in (q, p))
        total += left * math.log(left / right)
    return total


@pytest.mark.parametrize("k", [1, 2, 5, 6])
@pytest.mark.parametrize("support", estimates.SUPPORTS)
@pytest.mark.parametrize("form", estimates.FORMS)
def test_top_k_is_the_sum_over_k_tokens(k, support, form):
    student, teacher = pair()
    expected = [by_hand(*rows, k, support, form) for rows in zip(student.tolist(), teacher.tolist(), strict=True)]
    options = {"k": k, "support": support, "form": form}
    found = estimates.top_k_reverse_kl_per_token(student, teacher, **options)
    torch.testing.assert_close(found.tolist(), expected, atol=1e-12, rtol=1e-12)
    mask = torch.tensor([True, False, True])
    kept = estimates.top_k_reverse_kl(student, teacher, mask=mask, **options)
    assert kept.item() == pytest.approx((expected[0] + expected[2]) / 2, rel=1e-12)
    student.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: estimates.top_k_reverse_kl_per_token(x, teacher, **options), student, atol=1e-6
    )


@pytest.mark.parametrize("support", estimates.SUPPORTS)
@pytest.mark.parametrize("form", estimates.FORMS)
def test_top_k_of_the_whole_vocabulary_is_exact_reverse_kl(support, form):
    student, teacher = pair()
    found = estimates.top_k_reverse_kl(student, teacher, k=6, support=support, form=form)
    assert found.item() == pytest.approx(divergence.reverse_kl(student, teacher).item(), rel=1e-12)


def test_raw_can_be_negative_and_moves_where_student_and_teacher_agree_by_draining_its_tokens():
    teacher = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert estimates.top_k_reverse_kl(student, teacher, k=1, support="teacher").item() < 0
    same = teacher.clone().requires_grad_()
    value = estimates.top_k_reverse_kl(same, teacher, k=2)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-15)
    moved = (same - 0.01 * same.grad).softmax(-1)[0, :2].sum()
    assert moved < same.softmax(-1)[0, :2].sum() - 1e-5
    for form in ("renormalised", "tail"):
        same.grad = None
        estimates.top_k_reverse_kl(same, teacher, k=2, form=form).backward()
        assert same.grad.abs().max() < 1e-12


def test_renormalised_is_blind_outside_its_tokens_and_to_one_token():
    student, teacher = pair()
    student.requires_grad_()
    estimates.top_k_reverse_kl(student, teacher, k=3, form="renormalised").backward()
    chosen = student.topk(3).indices
    assert not student.grad.scatter(-1, chosen, 0).any()
    assert student.grad.gather(-1, chosen).all()
    assert estimates.top_k_reverse_kl(student, teacher, k=1, form="renormalised").item() == 0


def test_with_the_tail_it_rises_to_the_exact_value_as_k_does():
    student, teacher = pair()
    values = [estimates.top_k_reverse_kl(student, teacher, k=k, form="tail").item() for k in range(1, 7)]
    assert values == sorted(values)
    assert min(values) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "received k 0, expected 1 to the vocabulary's 6"),
        ({"k": 7}, "received k 7, expected 1 to the vocabulary's 6"),
        ({"k": 2, "support": "both"}, "support 'both', expected one of student, teacher"),
        ({"k": 2, "form": "cut"}, "form 'cut', expected one of raw, renormalised, tail"),
        ({"k": 2, "mask": torch.zeros(3, dtype=torch.bool)}, "no selected row"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        estimates.top_k_reverse_kl(*pair(), **options)
    with pytest.raises(ValueError, match="kind 'k4', expected one of k1, k2, k3"):
        estimates.kl_estimate("k4", *pair())


@pytest.mark.parametrize("support", estimates.SUPPORTS)
@pytest.mark.parametrize("form", estimates.FORMS)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_masked_vocabulary_counts_for_nothing_in_any_top_k_form(k, form, support):
    """As without the masked tokens; where S covers all that are left, the tail is empty."""
    live, taught = torch.tensor([[0.5, 0.1]], dtype=torch.float64), torch.tensor([[0.2, 0.0]], dtype=torch.float64)
    blocked = torch.full((1, 3), -torch.inf, dtype=torch.float64)
    student = torch.cat([live, blocked], 1).requires_grad_()
    found = estimates.top_k_reverse_kl(student, torch.cat([taught, blocked], 1), k=k, support=support, form=form)
    expected = estimates.top_k_reverse_kl(live, taught, k=min(k, 2), support=support, form=form)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert torch.autograd.grad(found, student)[0].isfinite().all()


def test_a_student_that_gives_nothing_to_the_teachers_tokens_pays_for_the_tail_alone():
    student = torch.tensor([[-torch.inf, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    options = {"k": 1, "support": "teacher"}
    tail = estimates.top_k_reverse_kl(student, teacher, form="tail", **options)
    assert tail.item() == pytest.approx(math.log(2), abs=1e-12)
    assert torch.autograd.grad(tail, student)[0].isfinite().all()
    assert estimates.top_k_reverse_kl(student, teacher, form="raw", **options).item() == 0


def test_estimates_of_half_precision_are_those_of_float32():
    student, teacher = torch.tensor([-8.0]).bfloat16(), torch.tensor([-7.96875]).bfloat16()
    for kind in estimates.KINDS:
        found = estimates.kl_estimate(kind, student, teacher)
        assert found.dtype == torch.float32
        assert found.item() == estimates.kl_estimate(kind, student.float(), teacher.float()).item()
    with pytest.raises(ValueError, match=r"log-probabilities of shapes student \(1,\) and teacher \(2,\)"):
        estimates.kl_estimate.__wrapped__("k2", student, torch.zeros(2))
