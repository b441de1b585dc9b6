"""Reverse KL from less than two whole distributions: from one sampled token, or from K tokens of the vocabulary.

`divergence.reverse_kl` is the exact value. Which divergence an estimator minimises depends on where it stands: as a
loss on the student's own samples, k2 has the gradient of reverse KL, k3 that of forward KL, k1 none (KDRL, section on
KL approximations).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses import divergence
from limbeck.losses.masking import (
    Mask,
    Number,
    logsumexp,
    masked_mean,
    probability_times,
    require_choice,
    require_finite,
    require_mask,
    wide,
)

KINDS = ("k1", "k2", "k3")
SUPPORTS = ("student", "teacher")
FORMS = ("raw", "renormalised", "tail")


def kl_estimate(
    kind: str, student_logprobs: Number[Tensor, "*tokens"], teacher_logprobs: Number[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """An estimate of KL(student || teacher) from each token that the student sampled.

    With R = log p(o) - log q(o), p teacher, q student: k1 = -R, k2 = R^2 / 2, k3 = exp(R) - 1 - R (Schulman).

    k1 and k3 have the right mean, k2 has the right gradient. k1 may be negative; k3 grows as exp(R) where the teacher
    likes the token much better.
    Units: nats a token. Gradient: to the student; the teacher is detached.
    Raises ValueError for an unknown kind, or unequal shapes.
    """
    require_choice("kind", kind, KINDS)
    _require_equal("log-probabilities", student_logprobs, teacher_logprobs)
    student, teacher = wide(student_logprobs, teacher_logprobs.detach())
    ratio = teacher - student
    if kind == "k1":
        return -ratio
    return ratio.square() / 2 if kind == "k2" else ratio.expm1() - ratio


def top_k_reverse_kl_per_token(
    student_logits: Number[Tensor, "*rows vocab"],
    teacher_logits: Number[Tensor, "*rows vocab"],
    *,
    k: int,
    support: str = "student",
    form: str = "raw",
) -> Float[Tensor, "*rows"]:
    """`top_k_reverse_kl` of each row, unreduced."""
    _require_equal("logits", student_logits, teacher_logits)
    require_choice("support", support, SUPPORTS)
    require_choice("form", form, FORMS)
    vocabulary = student_logits.shape[-1]
    if not 1 <= k <= vocabulary:
        raise ValueError(f"received k {k}, expected 1 to the vocabulary's {vocabulary}")
    student, teacher = wide(student_logits, teacher_logits.detach())
    chosen = (student if support == "student" else teacher).topk(k, -1).indices
    student_held, teacher_held = student.gather(-1, chosen), teacher.gather(-1, chosen)
    # Where the student gives nothing to S, though something to others, there is no divergence inside S.
    in_s, anywhere = ((x.detach() > -torch.inf).any(-1, keepdim=True) for x in (student_held, student))
    nothing = anywhere & ~in_s
    inside = divergence.reverse_kl_per_token(*(x.masked_fill(nothing, 0) for x in (student_held, teacher_held)))
    if form == "renormalised" or k == vocabulary:
        return inside
    held = _part(student, teacher, lambda x: x.gather(-1, chosen))
    total = probability_times(held[0], inside + held[0] - held[1])
    if form == "tail":
        rest = _part(student, teacher, lambda x: x.scatter(-1, chosen, -torch.inf))
        total = total + probability_times(rest[0], rest[0] - rest[1])
    return total


def _require_equal(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        received = f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        raise ValueError(f"received {name} of shapes {received}, expected equal shapes")


def _part(student: Tensor, teacher: Tensor, part: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The logarithm of the probability that each gives to a part of the vocabulary."""
    return tuple(logsumexp(part(x)) - x.logsumexp(-1) for x in (student, teacher))


def top_k_reverse_kl(
    student_logits: Number[Tensor, "*rows vocab"],
    teacher_logits: Number[Tensor, "*rows vocab"],
    *,
    k: int,
    support: str = "student",
    form: str = "raw",
    mask: Mask[Tensor, "*rows"] | None = None,
) -> Float[Tensor, ""]:
    """KL(student || teacher) cut to the k most probable tokens S of the student or the teacher, mean over kept rows.

    "raw": sum_S q_v (log q_v - log p_v). "renormalised": the same with q and p renormalised on S. "tail": raw, and one
    more term for all tokens outside S together.

    The paper's K, support and form were not recovered. Raw is no divergence: it can be negative, and has a gradient
    where student and teacher agree, which drains S. Renormalised is blind outside S, and 0 for k = 1. With the tail it
    is a divergence, a lower bound of the exact one.
    Units: nats a row. Gradient: to the student; the choice of S and the teacher are detached.
    Raises ValueError for unequal shapes, wrong options, an empty mask, or a loss that is not finite.
    """
    _require_equal("logits", student_logits, teacher_logits)
    if mask is not None:
        mask = require_mask(mask, student_logits.shape[:-1])
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    values = top_k_reverse_kl_per_token(student_logits, teacher_logits, k=k, support=support, form=form)
    return require_finite(masked_mean(values, None))
