import jaxtyping
import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limbeck.losses import divergence, transport
from reference import transport as reference


def index_cost(student, teacher, **options):
    return transport.sample_index_cost_per_row(student, teacher, **options).mean()


SAMPLE_FORMS = [transport.sample_value_cost, transport.sample_zero_one, index_cost]
every_sample_form = pytest.mark.parametrize("form", SAMPLE_FORMS)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of tiny softmaxes: on a busy machine a second thread costs milliseconds each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(students, classes, teachers=None, *, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((students, classes), (teachers or students, classes))
    student, teacher = (
        (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(1).to(dtype) for shape in shapes
    )
    return student.requires_grad_(), teacher


def gradient(loss, *inputs):
    return torch.autograd.grad(loss, inputs)[0]


def along(direction, value, point, step=1e-5):
    """Central difference of a float function along a direction."""
    return (value(point + step * direction) - value(point - step * direction)) / (2 * step)


# The plan.


@pytest.mark.parametrize("students", [6, 9])
def test_plan_is_the_normalised_kernel_of_the_book(students):
    cost = torch.rand(students, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for iterations in (1, 2, 20):
        plan = transport.sinkhorn_plan(cost, iterations=iterations)
        expected = torch.from_numpy(reference.plan(cost.numpy(), 0.1, iterations))
        torch.testing.assert_close(plan, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("students", "teachers"), [(8, 8), (5, 9)])
def test_unit_plan_is_pots_plan_of_the_transposed_cost(students, teachers):
    cost = torch.rand(students, teachers, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for iterations in (1, 3, 20):
        theirs = ot.sinkhorn([], [], cost.t().numpy(), 0.1, numItermax=iterations, stopThr=0, warn=False)
        ours = transport.sinkhorn_plan(cost, iterations=iterations, mass="unit")
        torch.testing.assert_close(ours, torch.from_numpy(theirs).t(), rtol=1e-10, atol=1e-10)


def test_plan_is_pots_log_domain_plan_at_convergence():
    cost = torch.rand(5, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs = ot.bregman.sinkhorn_log([], [], cost.numpy(), 0.05, numItermax=500, stopThr=0, warn=False)
    ours = transport.sinkhorn_plan(cost, epsilon=0.05, iterations=500, mass="unit")
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-6, atol=1e-6)  # 500 iterations


def test_plan_has_exact_columns_and_uniform_rows_at_convergence():
    cost = 2 * torch.rand(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    early = transport.sinkhorn_plan(cost, iterations=2)
    torch.testing.assert_close(early.sum(0), torch.full((4,), 1.5, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert (early.sum(1) - 1).abs().max() > 1e-4
    late = transport.sinkhorn_plan(cost, iterations=1000)
    torch.testing.assert_close(late.sum(1), torch.ones(6, dtype=torch.float64), rtol=1e-6, atol=1e-6)  # 1000 iterations
    assert transport.sinkhorn_plan(cost, mass="unit").sum().item() == pytest.approx(1, abs=1e-10)


def test_small_epsilon_gives_the_optimal_assignment_in_float32():
    cost = torch.rand(7, 7, generator=torch.Generator().manual_seed(4))
    exact = ot.emd([], [], cost.double().numpy())
    plan = transport.sinkhorn_plan(cost, epsilon=0.002, iterations=500, mass="unit")
    assert plan.argmax(1).tolist() == exact.argmax(1).tolist()
    # 500 iterations; the linear cost exceeds the optimum by at most epsilon times the plan's entropy.
    assert (plan * cost).sum().item() == pytest.approx((exact * cost.numpy()).sum(), abs=0.002 * np.log(7))


# The batch-wise distance.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 9), (3, 5000)])
def test_distance_is_that_of_the_book(shape, p, dtype, tolerance):
    student, teacher = batches(*shape, dtype=dtype)
    ours = transport.sinkhorn_distance(student, teacher, p=p)
    expected = reference.distance(student.detach().double().numpy(), teacher.double().numpy(), p=p)
    assert ours.item() == pytest.approx(expected, rel=tolerance)


def test_distance_is_the_batch_size_times_pots_value():
    student, teacher = (x.detach() for x in batches(16, 3))
    pot = ot.sinkhorn2(
        [], [], torch.cdist(student, teacher, p=1.0).numpy(), 0.1, numItermax=2000, stopThr=0, warn=False
    )
    for mass, multiple in (("batch", 16), ("unit", 1)):
        ours = transport.sinkhorn_distance(student, teacher, iterations=2000, mass=mass)
        assert ours.item() == pytest.approx(multiple * pot, rel=1e-6)  # 2000 iterations


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("mode", ["unrolled", "envelope"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 9), (3, 5000)])
def test_gradient_is_that_of_plain_autograd(shape, p, mode, dtype, tolerance):
    student, teacher = batches(*shape, dtype=dtype)
    ours = gradient(transport.sinkhorn_distance(student, teacher, p=p, gradient=mode), student)
    twin = student.detach().double().requires_grad_()
    plain = reference.unrolled_distance(twin, teacher.double(), p=p, envelope=mode == "envelope")
    expected = gradient(plain, twin)
    assert ((ours - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize("debias", [False, True])
@pytest.mark.parametrize("p", [1, 2])
def test_unrolled_gradient_agrees_with_finite_differences(p, debias):
    student, teacher = batches(4, 3)
    assert torch.autograd.gradcheck(
        lambda x: transport.sinkhorn_distance(x.softmax(1), teacher, p=p, debias=debias), student
    )


def test_envelope_gradient_is_the_plan_times_the_sign():
    student, teacher = batches(5, 3)
    plan = transport.sinkhorn_plan(torch.cdist(student, teacher, p=1.0).detach())
    expected = (plan[:, :, None] * (student[:, None] - teacher).sign()).sum(1)
    envelope = gradient(transport.sinkhorn_distance(student, teacher, gradient="envelope"), student)
    unrolled = gradient(transport.sinkhorn_distance(student, teacher), student)
    torch.testing.assert_close(envelope, expected, rtol=1e-10, atol=1e-10)
    assert (unrolled - envelope).norm() > 1e-2 * envelope.norm()


def test_teacher_receives_no_gradient():
    for loss in (transport.sinkhorn_distance, transport.sample_l1, *SAMPLE_FORMS):
        student, teacher = batches(4, 3)
        teacher.requires_grad_()
        loss(student, teacher).backward()
        assert teacher.grad is None
        assert student.grad.abs().sum() > 0


def test_distance_cannot_see_the_order_of_the_samples():
    _, teacher = batches(16, 2, seed=6)
    student, order = teacher.clone(), torch.randperm(16, generator=torch.Generator().manual_seed(7))
    same, permuted = (transport.sinkhorn_distance(x, teacher, iterations=20).item() for x in (student, student[order]))
    assert permuted == pytest.approx(same, rel=1e-10)
    assert transport.sample_l1(student[order], teacher).item() > 10 * transport.sample_l1(student, teacher).item() + 0.1


def test_a_batch_of_one_is_plain_l1():
    student, teacher = batches(1, 6)
    l1 = transport.sample_l1(student, teacher)
    distance = transport.sinkhorn_distance(student, teacher)
    assert distance.item() == pytest.approx(l1.item(), rel=1e-10)
    torch.testing.assert_close(gradient(distance, student), gradient(l1, student), rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=8, max_size=8))
def test_two_classes_at_small_epsilon_match_sorted_probabilities(ticks):
    first = torch.tensor(ticks, dtype=torch.float64).reshape(2, 4, 1) / 20
    student, teacher = torch.cat([first, 1 - first], 2)
    expected = 2 * (first[0].sort(0).values - first[1].sort(0).values).abs().sum().item()
    distance = transport.sinkhorn_distance(student, teacher, epsilon=0.02, iterations=1000)
    # 1000 iterations; the linear cost is off by at most epsilon times the entropy of the plan, 4 log 4.
    assert distance.item() == pytest.approx(expected, abs=0.02 * 4 * np.log(4))


@pytest.mark.parametrize("mass", ["batch", "unit"])
def test_equal_batches_cost_more_than_zero_until_debiased(mass):
    _, teacher = batches(16, 3)
    assert transport.sinkhorn_distance(teacher, teacher, mass=mass).item() > 0.01
    assert abs(transport.sinkhorn_distance(teacher, teacher, mass=mass, debias=True).item()) < 1e-10


def test_debiased_distance_vanishes_for_the_same_points_in_unequal_numbers():
    _, teacher = batches(4, 3)
    repeated = teacher.repeat_interleave(3, 0)
    distance = transport.sinkhorn_distance(repeated, teacher, iterations=500, debias=True)
    assert abs(distance.item()) < 1e-6  # 500 iterations


@pytest.mark.parametrize(
    ("epsilon", "collapses"), [(0.01, False), (0.1, False), (0.3, False), (1.0, True), (10.0, True)]
)
def test_large_epsilon_collapses_the_student_unless_debiased(epsilon, collapses):
    # Seed 1. At epsilon 1 how far it collapses depends on the seed; at 10 and below 0.3 it does not.
    logits = torch.randn(16, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scales = torch.cat([torch.arange(1, 20) / 20, torch.arange(10, 21) / 10])

    def best(debias):
        def value(scale):
            return transport.sinkhorn_distance(
                (scale * logits).softmax(1), logits.softmax(1), epsilon=epsilon, debias=debias
            )

        return min(scales.tolist(), key=value)

    assert best(debias=True) == 1.0
    assert best(debias=False) < 0.2 if collapses else best(debias=False) == 1.0


def test_bfloat16_is_computed_in_float32():
    student, teacher = batches(4, 3, dtype=torch.bfloat16)
    loss = transport.sinkhorn_distance(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == transport.sinkhorn_distance(student.float(), teacher.float()).item()
    assert transport.sinkhorn_plan(torch.zeros(2, 2, dtype=torch.bfloat16)).dtype == torch.float32


# The sample-wise forms.


def costs(form, student, teacher):
    place = np.arange(len(student))
    return {
        transport.sample_value_cost: np.abs(teacher[:, None] - student[None, :]),
        transport.sample_zero_one: (place[:, None] != place[None, :]).astype(float),
        index_cost: np.abs(place[:, None] - place[None, :]).astype(float),
    }[form]


@every_sample_form
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_sample_form_is_that_of_the_book_and_both_gradients_share_its_value(form, dtype, tolerance):
    student, teacher = batches(4, 5, dtype=dtype)
    expected = []
    for s, t in zip(student.detach().double().numpy(), teacher.double().numpy(), strict=True):
        cost = costs(form, s, t)
        expected.append((reference.marginal_plan(cost, t, s, 0.3, 20) * cost).sum())
    for mode in ("unrolled", "envelope"):
        value = form(student, teacher, epsilon=0.3, iterations=20, gradient=mode).item()
        assert value == pytest.approx(np.mean(expected), rel=tolerance)


@every_sample_form
def test_sample_form_at_small_epsilon_is_exact_transport(form):
    student, teacher = (x.detach() for x in batches(3, 5))
    pairs = list(zip(student.numpy(), teacher.numpy(), strict=True))
    exact = np.mean([ot.emd2(t / t.sum(), s / s.sum(), costs(form, s, t)) for s, t in pairs])
    value = form(student, teacher, epsilon=0.01, iterations=1000).item()
    # 1000 iterations; <P, D> exceeds the optimum by at most epsilon times the entropy of a 5 x 5 plan.
    assert exact - 1e-5 <= value <= exact + 0.01 * np.log(25) + 1e-5


def test_zero_one_transport_tends_to_total_variation():
    student, teacher = (x.detach() for x in batches(6, 5))
    variation = divergence.total_variation(student.log(), teacher.log()).item()
    transported = transport.sample_zero_one(student, teacher, epsilon=0.02, iterations=500)
    assert transported.item() == pytest.approx(variation, rel=1e-6)  # 500 iterations
    assert transport.sample_l1(student, teacher).item() == pytest.approx(2 * variation, rel=1e-10)


@every_sample_form
def test_unrolled_sample_gradient_agrees_with_finite_differences(form):
    student, teacher = batches(3, 4)
    assert torch.autograd.gradcheck(lambda x: form(x.softmax(1), teacher, epsilon=0.3, iterations=5), student)


@every_sample_form
def test_envelope_gradient_is_the_derivative_of_the_regularised_optimum(form):
    student, teacher = batches(1, 5)
    ours = gradient(form(student, teacher, epsilon=0.3, iterations=300, gradient="envelope"), student)[0]
    s, t = student.detach()[0].numpy(), teacher[0].numpy()
    direction = np.random.default_rng(0).normal(size=5)
    direction -= direction.mean()  # along the simplex: the potential has a free constant
    expected = along(direction, lambda x: reference.dual_value(costs(form, x, t), t, x, 0.3, 300), s)
    assert float(ours.numpy() @ direction) == pytest.approx(expected, rel=1e-6)  # 300 iterations


@every_sample_form
@pytest.mark.parametrize("mode", ["unrolled", "envelope"])
def test_zero_probabilities_are_safe_at_the_smallest_epsilon(form, mode):
    student = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]], requires_grad=True)
    teacher = torch.tensor([[0, 0, 0, 1.0], [0, 0, 0.5, 0.5]])
    value = form(student, teacher, epsilon=0.002, iterations=100, gradient=mode)
    value.backward()
    assert torch.isfinite(student.grad).all()
    if form is index_cost:
        assert value.item() == pytest.approx(2.5, rel=1e-5)  # 3 places for the first row, 2 for the second


def test_index_cost_per_row_is_unreduced_and_scales():
    student, teacher = batches(4, 5)
    rows = transport.sample_index_cost_per_row(student, teacher, epsilon=0.2)
    assert rows.shape == (4,)
    alone = [index_cost(student[[row]], teacher[[row]], epsilon=0.2).item() for row in range(4)]
    assert rows.tolist() == pytest.approx(alone)
    halved = transport.sample_index_cost_per_row(student, teacher, epsilon=0.1, scale=0.5)
    torch.testing.assert_close(halved, rows / 2, rtol=1e-10, atol=1e-10)


def test_jensen_shannon_gradient_vanishes_with_the_overlap_and_transports_does_not():
    grid = torch.arange(101, dtype=torch.float64)
    teacher = (-((grid - 20) ** 2) / 8)[None]

    def slope(loss, shift):
        centre = torch.tensor(20.0 + shift, dtype=torch.float64, requires_grad=True)
        return abs(gradient(loss((-((grid - centre) ** 2) / 8)[None]), centre).item())

    def moved(logits):
        return index_cost(
            logits.softmax(1), teacher.softmax(1), epsilon=0.05, iterations=100, scale=1 / 20, gradient="envelope"
        )

    shannon = [slope(lambda x: divergence.jensen_shannon(x, teacher), shift) for shift in (20.0, 40.0, 60.0)]
    transported = [slope(moved, shift) for shift in (20.0, 40.0, 60.0)]
    assert shannon[0] > shannon[1] > shannon[2]
    assert shannon[2] < 1e-8
    assert transported == pytest.approx([1 / 20] * 3, rel=0.02)  # |shift| / 20, less what epsilon blurs


# Edges.


def test_repeat_is_exact_and_the_global_generator_untouched():
    for loss in (transport.sinkhorn_distance, transport.sample_l1, *SAMPLE_FORMS):
        student, teacher = batches(4, 3, dtype=torch.float32)
        first = gradient(loss(student, teacher), student)
        torch.rand(7)
        state = torch.get_rng_state()
        second = gradient(loss(student, teacher), student)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon 0\.0, expected a finite epsilon > 0"),
        ({"epsilon": float("nan")}, "expected a finite epsilon > 0"),
        ({"iterations": 0}, "iterations 0, expected iterations >= 1"),
        ({"p": 3}, r"p 3, expected one of \(1, 2\)"),
        ({"mass": "half"}, "mass 'half', expected one of"),
        ({"gradient": "dual"}, "gradient 'dual', expected one of"),
    ],
)
def test_wrong_options_are_errors_that_show_what_was_received(wrong, message):
    student, teacher = batches(4, 3)
    for loss in (transport.sinkhorn_distance, *SAMPLE_FORMS):
        if loss is transport.sinkhorn_distance or set(wrong) & {"epsilon", "iterations", "gradient"}:
            with pytest.raises(ValueError, match=message):
                loss(student, teacher, **wrong)
    if set(wrong) & {"epsilon", "iterations", "mass"}:
        with pytest.raises(ValueError, match=message):
            transport.sinkhorn_plan(torch.zeros(2, 2), **wrong)


def test_wrong_shapes_are_errors_that_show_both(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would catch them first
    for loss in (transport.sinkhorn_distance, transport.sample_l1, *SAMPLE_FORMS):
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
            loss(torch.full((2, 3), 1 / 3), torch.full((2, 4), 1 / 4))
        with pytest.raises(ValueError, match="none of them empty"):
            loss(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ValueError, match="at least one student"):
        transport.sinkhorn_plan(torch.zeros(0, 3))


def test_what_is_not_finite_is_an_error():
    student, teacher = batches(3, 4)
    broken = student.detach().clone()
    broken[1, 2] = float("nan")
    scalars = transport.sample_value_cost, transport.sample_zero_one  # an unreduced loss is its caller's to check
    for loss in (transport.sinkhorn_distance, transport.sample_l1, *scalars):
        with pytest.raises(ValueError, match="expected a finite loss"):
            loss(broken, teacher)
    with pytest.raises(ValueError, match="finite"):
        transport.sinkhorn_plan(torch.full((2, 2), float("nan")))


@pytest.mark.parametrize("gradient", ["unrolled", "envelope"])
@pytest.mark.parametrize("epsilon", [0.002, 0.05])
def test_the_matrix_products_of_a_shared_cost_equal_the_sums_of_exponentials(monkeypatch, epsilon, gradient):
    student = torch.randn(4, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    teacher = torch.randn(4, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(1)
    found = []
    for deepest in (transport.DEEPEST, float("inf")):
        monkeypatch.setattr(transport, "DEEPEST", deepest)
        logits = student.clone().requires_grad_()
        options = {"epsilon": epsilon, "iterations": 50, "scale": 1 / 29, "gradient": gradient}
        values = transport.sample_index_cost_per_row(logits.softmax(1), teacher, **options)
        found.append((values, *torch.autograd.grad(values.sum(), logits)))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-10, rtol=1e-9)
