"""Entropic optimal transport between class probabilities: SinKD's batch-wise loss, and the sample-wise forms before it.

Batch-wise: the atoms are the samples of a mini-batch, points in the space of class probabilities. Sample-wise: one
problem per sample, whose atoms are the classes. Everything runs in the log domain, in float32 or wider, so that a small
epsilon underflows to a zero of the plan and not to 0/0. The value is always the linear cost <P, D>: the entropy shapes
the plan and is not added to the loss.

Left out: the weight 0.001 and the fixed temperature 2 of the released code, which belong to the sum of the terms.
Longer than 200 lines because both families share one validation and one cost.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.manhattan import Manhattan
from limbeck.losses.masking import Number, require_axes, require_finite, wide

DEEPEST = -600.0  # exp of it is still a normal float64


def _require_schedule(epsilon: float, iterations: int) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"received epsilon {epsilon}, expected a finite epsilon > 0")
    if iterations < 1:
        raise ValueError(f"received iterations {iterations}, expected iterations >= 1")


def _require_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"received {name} {value!r}, expected one of {choices}")


def _pair(student_probs: Tensor, teacher_probs: Tensor, first_equal: int) -> tuple[Tensor, Tensor]:
    """Both in one dtype, float32 or wider, the teacher's detached; their axes agree from `first_equal` on."""
    shapes = tuple(student_probs.shape), tuple(teacher_probs.shape)
    require_axes("student probabilities", student_probs, "batch classes")
    if shapes[0][first_equal:] != shapes[1][first_equal:] or 0 in shapes[0] + shapes[1]:
        expected = "equal shapes" if first_equal == 0 else "equal numbers of classes"
        raise ValueError(
            f"received student {shapes[0]} and teacher {shapes[1]}, expected {expected}, none of them empty"
        )
    return tuple(wide(student_probs, teacher_probs.detach()))


def _cost(student: Tensor, teacher: Tensor, p: int) -> Tensor:
    """D_ij = ||student_i - teacher_j||_p; at p = 2 rounded off at 0, where the norm has no derivative."""
    if p == 1:
        return Manhattan.apply(student, teacher)
    distance = torch.cdist(student, teacher, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square() + 1e-12).sqrt()


def _plan(cost: Tensor, epsilon: float, iterations: int, total: float) -> Tensor:
    """The plan of total mass `total`: K = exp(-D / epsilon), every row divided by its sum, then every column."""
    log_plan = -cost / epsilon
    for _ in range(iterations):
        log_plan = log_plan.log_softmax(1).log_softmax(0)
    return log_plan.exp() * (total / cost.shape[1])


def sinkhorn_plan(
    cost: Number[Tensor, "students teachers"], *, epsilon: float = 0.1, iterations: int = 20, mass: str = "batch"
) -> Float[Tensor, "students teachers"]:
    """The entropic transport plan of a cost, with uniform marginals.

    argmin_P <P, D> - epsilon H(P) by K = exp(-D / epsilon), then rows and columns normalised in turn (SinKD).

    Columns come last: column sums are exact, row sums only at convergence. POT ends on rows, so its plan is this one of
    the transposed cost. mass="batch" gives every student row mass 1 (all marginals one for a square cost) and every
    column students / teachers; mass="unit" divides by the number of rows, POT's scale.
    Units: mass. Gradient: to the cost, through the unrolled iterations, which are all kept in memory.
    Raises ValueError if epsilon <= 0, iterations < 1, for an unknown mass, an empty cost, or a plan that is not finite.
    """
    _require_schedule(epsilon, iterations)
    _require_choice("mass", mass, ("batch", "unit"))
    require_axes("a cost", cost, "students teachers")
    if cost.numel() == 0:
        raise ValueError(f"received a cost of shape {tuple(cost.shape)}, expected at least one student and one teacher")
    (cost,) = wide(cost)
    plan = _plan(cost, epsilon, iterations, float(len(cost)) if mass == "batch" else 1.0)
    require_finite(plan.detach().sum())
    return plan


def sinkhorn_distance(
    student_probs: Number[Tensor, "batch classes"],
    teacher_probs: Number[Tensor, "teachers classes"],
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    p: int = 1,
    mass: str = "batch",
    gradient: str = "unrolled",
    debias: bool = False,
) -> Float[Tensor, ""]:
    """Entropic transport cost between two batches of class probabilities.

    sum_ij P_ij D_ij, where D_ij = ||student_i - teacher_j||_p and P is `sinkhorn_plan` of D (SinKD, batch-wise form).

    Rows are samples: the plan matches samples, not classes, and cannot see their order. Not 0 at equality, and a large
    epsilon pulls every student to the batch's median; debias=True subtracts OT(s, s)/2 + OT(t, t)/2, each of the same
    mass, which repairs both (Genevay et al. 2018, here with <P, D> in all three terms; not in SinKD).
    Units: cost times mass; at p = 1 a sample costs at most 2, and mass="batch" is a sum over the batch, not a mean.
    Gradient: to the student only; "unrolled" through D and P as the released code does, "envelope" through D alone.
    Raises ValueError for a wrong option, unequal classes, an empty batch, or a loss that is not finite.
    """
    _require_schedule(epsilon, iterations)
    _require_choice("p", p, (1, 2))
    _require_choice("mass", mass, ("batch", "unit"))
    _require_choice("gradient", gradient, ("unrolled", "envelope"))
    student, teacher = _pair(student_probs, teacher_probs, first_equal=1)
    total = float(len(student)) if mass == "batch" else 1.0

    def transport(x: Tensor, y: Tensor) -> Tensor:
        cost = _cost(x, y, p)
        plan = _plan(cost if gradient == "unrolled" else cost.detach(), epsilon, iterations, total)
        return (plan * cost).sum()

    loss = transport(student, teacher)
    if debias:
        loss = loss - (transport(student, student) + transport(teacher, teacher)) / 2
    return require_finite(loss)


def _products(log_kernel: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The maps x -> log(K exp(x)) and y -> log(K^T exp(y)), x and y [batch, classes].

    Where all rows share a kernel that float64 holds, these are matrix products, some 20 times faster: the largest
    entry of x contributes at least exp(DEEPEST), so what underflows is below the last bit of the sum.
    """
    if log_kernel.ndim == 2 and log_kernel.amin() > DEEPEST:
        kernel = log_kernel.double().exp()

        def product(x: Tensor, matrix: Tensor) -> Tensor:
            top = x.amax(1, keepdim=True)
            return ((x - top).double().exp() @ matrix).log().to(x.dtype) + top

        return (lambda x: product(x, kernel.T)), (lambda y: product(y, kernel))
    return (lambda x: (log_kernel + x[:, None]).logsumexp(2)), (lambda y: (log_kernel + y[..., None]).logsumexp(1))


def _potentials(log_kernel: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """f, g such that exp(f + g + log_kernel) has density one to the marginals, columns last."""
    times, times_transposed = _products(log_kernel)
    g = -log_columns  # v = 1
    for _ in range(iterations):
        f = -times(g + log_columns)
        g = -times_transposed(f + log_rows)
    return f, g


def _sample_transport(
    student: Tensor, teacher: Tensor, cost: Tensor, epsilon: float, iterations: int, gradient: str
) -> Tensor:
    """<P, D> of each row, P from the teacher's classes (rows of D) to the student's (columns)."""
    _require_schedule(epsilon, iterations)
    _require_choice("gradient", gradient, ("unrolled", "envelope"))
    # A class of probability 0 has log tiny: no mass that a float can see, and no 0/0 in the gradient of the logarithm.
    log_rows, log_columns = (x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in (teacher, student))
    with torch.set_grad_enabled(gradient == "unrolled" and torch.is_grad_enabled()):
        f, g = _potentials(-cost / epsilon, log_rows, log_columns, iterations)
        plan = ((f + log_rows)[:, :, None] + (g + log_columns)[:, None, :] - cost / epsilon).exp()
    value = (plan * cost).sum((1, 2))
    if gradient == "envelope":
        value = value + epsilon * (g * (student - student.detach())).sum(1)
    return value


def sample_value_cost(
    student_probs: Number[Tensor, "batch classes"],
    teacher_probs: Number[Tensor, "batch classes"],
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    gradient: str = "unrolled",
) -> Float[Tensor, ""]:
    """Transport inside each sample, at the difference of the probabilities' values; mean over rows.

    sum_jk P_jk |t_j - s_k|, P with marginals t and s (textbook reading of SinKD's sample-wise form).

    It matches values, not classes: a permutation of the classes costs nothing when epsilon is small.
    Units: probability. Gradient: to the student only; "unrolled" through cost, marginal and iterations, "envelope" as
    `sample_index_cost_per_row` plus the plan times the cost's derivative. Memory: batch * classes^2, so few classes.
    Raises ValueError for unequal shapes, epsilon <= 0, iterations < 1, an unknown gradient, a loss that is not finite.
    """
    student, teacher = _pair(student_probs, teacher_probs, first_equal=0)
    cost = (teacher[:, :, None] - student[:, None, :]).abs()
    return require_finite(_sample_transport(student, teacher, cost, epsilon, iterations, gradient).mean())


def sample_zero_one(
    student_probs: Number[Tensor, "batch classes"],
    teacher_probs: Number[Tensor, "batch classes"],
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    gradient: str = "unrolled",
) -> Float[Tensor, ""]:
    """Transport inside each sample, where every change of class costs 1; mean over rows.

    sum_jk P_jk [j != k], P with marginals t and s. Exact transport (epsilon -> 0) is total variation.

    Units: probability moved. Gradient and memory: as `sample_index_cost_per_row`.
    Raises ValueError for unequal shapes, epsilon <= 0, iterations < 1, an unknown gradient, a loss that is not finite.
    """
    student, teacher = _pair(student_probs, teacher_probs, first_equal=0)
    cost = 1 - torch.eye(student.shape[1], dtype=student.dtype, device=student.device)
    return require_finite(_sample_transport(student, teacher, cost, epsilon, iterations, gradient).mean())


def sample_index_cost_per_row(
    student_probs: Number[Tensor, "batch classes"],
    teacher_probs: Number[Tensor, "batch classes"],
    *,
    epsilon: float = 0.1,
    iterations: int = 20,
    scale: float = 1.0,
    gradient: str = "unrolled",
) -> Float[Tensor, " batch"]:
    """Transport inside each sample along ordered classes; each row's, unreduced.

    sum_jk P_jk scale |j - k|, P with marginals t and s, by u = t / (K v), v = s / (K^T u). Only for classes on a line.

    Units: scale times classes. Gradient: to the student only. "unrolled" differentiates <P, D>. "envelope": the cost is
    constant, so the gradient is the student's dual potential at these iterations, which is that of
    min <P, D> + epsilon KL(P | t s^T): same plan, finite at probability 0, and up to a constant that softmax removes.
    The value stays <P, D>. Memory: batch * classes^2, times the iterations when unrolled.
    Raises ValueError for unequal shapes, epsilon <= 0, iterations < 1 or an unknown gradient.
    """
    student, teacher = _pair(student_probs, teacher_probs, first_equal=0)
    place = scale * torch.arange(student.shape[1], dtype=student.dtype, device=student.device)
    cost = (place[:, None] - place).abs()
    return _sample_transport(student, teacher, cost, epsilon, iterations, gradient)


def sample_l1(
    student_probs: Number[Tensor, "batch classes"], teacher_probs: Number[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """L1 distance between each sample's probabilities, mean over rows.

    sum_k |s_k - t_k|: the released sample-wise loss up to its constant. Its cost matrix is 1 x 1, so nothing is moved.

    Twice the total variation. Units: in [0, 2] a row. Gradient: to the student only, 0 at a tie.
    Raises ValueError for unequal shapes or a loss that is not finite.
    """
    student, teacher = _pair(student_probs, teacher_probs, first_equal=0)
    return require_finite((student - teacher).abs().sum(1).mean())
