"""Pointwise divergences between a student's and a teacher's distribution over classes or a vocabulary.

The comparisons of SinKD: forward and reverse KL, Jensen-Shannon and total variation. One convention for all: logits in,
the scalar is a mean over the rows that the mask keeps, the gradient goes to the student only. Rows outside the mask are
dropped before anything is computed, whatever they hold.

Left out: the factor temperature^2 of Hinton et al. (2015), and the weights 0.1 of SinKD's released code. Both are the
caller's. Low precision is promoted to float32. Longer than 200 lines because eight public signatures are written out.
"""

import math

from jaxtyping import Float
from torch import Tensor

from limbeck.losses.masking import (
    Mask,
    Number,
    masked_mean,
    probability_times,
    require_finite,
    require_mask,
    require_temperature,
    wide,
)


def _logprobs(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the kept rows at the temperature, in float32 or wider; the teacher's detached."""
    shape = student_logits.shape
    if shape != teacher_logits.shape or not all(shape[-1:]) or not shape:
        received = f"student {tuple(shape)} and teacher {tuple(teacher_logits.shape)}"
        raise ValueError(f"received logits of shapes {received}, expected equal shapes, with at least one class")
    require_temperature(temperature)
    if mask is not None:
        mask = require_mask(mask, shape[:-1])
        student_logits, teacher_logits = student_logits[mask], teacher_logits[mask]
    logits = wide(student_logits, teacher_logits.detach())
    student, teacher = ((x / temperature).log_softmax(-1) for x in logits)
    return student, teacher


def expectation(logprobs: Tensor, values: Tensor) -> Tensor:
    """sum_v p_v x_v, where 0 times infinity is 0 and has gradient 0."""
    return probability_times(logprobs, values).sum(-1)


def _restored(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values of the kept rows at their places, 0 at the dropped ones."""
    return values if mask is None else values.new_zeros(mask.shape).masked_scatter(mask != 0, values)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    return require_finite(masked_mean(values, mask))


def forward_kl_per_token(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """`forward_kl` of each row, unreduced; 0 where the mask is False."""
    student, teacher = _logprobs(student_logits, teacher_logits, mask, temperature)
    return _restored(expectation(teacher, teacher - student), mask)


def forward_kl(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(teacher || student), exact over the classes, mean over the kept rows.

    sum_v p_v (log p_v - log q_v), p teacher, q student (SinKD's J_KL). Mode-covering.

    The gradient is that of the soft cross-entropy which SinKD's released code calls KL; the value is 0 at equality,
    that one's is the teacher's entropy.
    Units: nats a row. Gradient: to the student; the teacher is detached. No factor temperature^2.
    Raises ValueError for unequal shapes, temperature <= 0, an empty mask, or a loss that is not finite.
    """
    values = forward_kl_per_token(student_logits, teacher_logits, mask=mask, temperature=temperature)
    return _mean(values, mask)


def reverse_kl_per_token(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """`reverse_kl` of each row, unreduced; 0 where the mask is False."""
    student, teacher = _logprobs(student_logits, teacher_logits, mask, temperature)
    return _restored(expectation(student, student - teacher), mask)


def reverse_kl(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL(student || teacher), exact over the classes, mean over the kept rows.

    sum_v q_v (log q_v - log p_v), q student, p teacher (SinKD's J_RKL; KDRL's exact form). Mode-seeking.

    The student weighs the sum, so the gradient flows through the weights too.
    Units: nats a row. Gradient: to the student; the teacher is detached. No factor temperature^2.
    Raises ValueError for unequal shapes, temperature <= 0, an empty mask, or a loss that is not finite.
    """
    values = reverse_kl_per_token(student_logits, teacher_logits, mask=mask, temperature=temperature)
    return _mean(values, mask)


def jensen_shannon_per_token(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """`jensen_shannon` of each row, unreduced; 0 where the mask is False."""
    student, teacher = _logprobs(student_logits, teacher_logits, mask, temperature)
    total = student.exp() + teacher.exp()
    # Where both probabilities are 0 both weights are 0: any finite number will do, and log 0 has no gradient.
    middle = total.masked_fill(total == 0, 1).log() - math.log(2)
    return _restored((expectation(teacher, teacher - middle) + expectation(student, student - middle)) / 2, mask)


def jensen_shannon(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Jensen-Shannon divergence, mean over the kept rows.

    1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, p teacher, q student (SinKD's J_JS).

    At most log 2, and flat there: distributions that do not overlap send no gradient.
    Units: nats a row. Gradient: to the student, through m too; the teacher is detached. No factor temperature^2.
    The textbook form; the released code passes probabilities for log-probabilities and halves twice.
    Raises ValueError for unequal shapes, temperature <= 0, an empty mask, or a loss that is not finite.
    """
    values = jensen_shannon_per_token(student_logits, teacher_logits, mask=mask, temperature=temperature)
    return _mean(values, mask)


def total_variation_per_token(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """`total_variation` of each row, unreduced; 0 where the mask is False."""
    student, teacher = _logprobs(student_logits, teacher_logits, mask, temperature)
    return _restored((student.exp() - teacher.exp()).abs().sum(-1) / 2, mask)


def total_variation(
    student_logits: Number[Tensor, "*rows classes"],
    teacher_logits: Number[Tensor, "*rows classes"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Total variation distance, mean over the kept rows.

    1/2 sum_v |q_v - p_v|, p teacher, q student.

    A probability, not nats: in [0, 1] a row. Gradient: to the student, 0 at a tie; the teacher is detached.
    Departure from the released code, which averages over classes: the sum, so the value does not shrink with them.
    Raises ValueError for unequal shapes, temperature <= 0, an empty mask, or a loss that is not finite.
    """
    values = total_variation_per_token(student_logits, teacher_logits, mask=mask, temperature=temperature)
    return _mean(values, mask)
