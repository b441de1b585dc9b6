"""SinKD's total loss: cross-entropy, KL at a temperature, and the batch-wise Sinkhorn distance; and its sequence forms.

    ce_coef L_CE + kl_coef KL(teacher || student) + sinkhorn_coef sum_ij P_ij D_ij

Released code, encoder-only: ce_coef = 1 - alpha, kl_coef = alpha, sinkhorn_coef = 0.001 beta, Sinkhorn temperature 2.
Its KL is the soft cross-entropy (the same gradient, not 0 at equality). For sequences the paper's choice is not known,
and the released T0 code takes the softmax over positions; here it is always over the vocabulary, the form is named.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from limbeck.losses.divergence import forward_kl
from limbeck.losses.masking import (
    Mask,
    Number,
    masked_mean,
    require_axes,
    require_finite,
    require_labels,
    require_mask,
    require_temperature,
    wide,
)
from limbeck.losses.transport import sinkhorn_distance

FORMS = ("position", "sequence", "tokens", "answer")


def sinkd_loss(
    student_logits: Number[Tensor, "batch classes"],
    teacher_logits: Number[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    ce_coef: float,
    kl_coef: float,
    sinkhorn_coef: float,
    kl_temperature: float = 1.0,
    sinkhorn_temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Float[Tensor, ""]:
    """SinKD's loss of one batch of classifications.

    ce_coef CE(labels, student) + kl_coef KL(teacher || student) at kl_temperature + sinkhorn_coef sum_ij P_ij D_ij at
    sinkhorn_temperature (SinKD, section on the batch-wise form; coefficients as in the released encoder-only code).
    A term of coefficient 0 is not computed.

    The first two terms are means over the batch and the last is a sum: doubling the batch doubles its share.
    Units: nats for the first two; the last as `batch_sinkhorn`. Gradient: to the student only, unrolled.
    Raises ValueError for unequal shapes, a label that is no class, a temperature or epsilon <= 0, or a loss that is not
    finite.
    """
    labels = require_labels(labels, student_logits)
    for temperature in (kl_temperature, sinkhorn_temperature):
        require_temperature(temperature)
    _require_equal(student_logits, teacher_logits)
    terms = []  # computed in this order and summed in another: both decide the gradient's last bits
    if kl_coef:
        terms.append(kl_coef * forward_kl(student_logits, teacher_logits, temperature=kl_temperature))
    if sinkhorn_coef:
        schedule = {"temperature": sinkhorn_temperature, "epsilon": epsilon, "iterations": iterations}
        terms.append(sinkhorn_coef * batch_sinkhorn(student_logits, teacher_logits, **schedule))
    (student,) = wide(student_logits)
    if ce_coef:
        terms.insert(0, ce_coef * F.cross_entropy(student, labels))
    return require_finite(sum(terms, student[:0].sum()))


def batch_sinkhorn(
    student_logits: Number[Tensor, "batch classes"],
    teacher_logits: Number[Tensor, "batch classes"],
    *,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
    p: int = 1,
    debias: bool = False,
    group: int | None = None,
) -> Float[Tensor, ""]:
    """The batch-wise Sinkhorn distance of classifiers' outputs: `sinkhorn_distance` at the temperature.

    With `group`, the batch is cut into groups of so many samples (the last may be short), each a problem of its own:
    what data parallelism does to SinKD, and at a group of 1 the L1 norm. A sum over all samples all the same.
    Units: as `sinkhorn_distance`. Gradient: to the student only, unrolled.
    Raises ValueError for unequal shapes, temperature, epsilon or group <= 0, or a loss that is not finite.
    """
    if group is not None and group < 1:
        raise ValueError(f"received group {group}, expected group >= 1")
    _require_equal(student_logits, teacher_logits)
    parts = (_probs(logits, temperature).split(group or len(logits)) for logits in (student_logits, teacher_logits))
    return sum(
        sinkhorn_distance(student, teacher, epsilon=epsilon, iterations=iterations, p=p, debias=debias)
        for student, teacher in zip(*parts, strict=True)
    )


def sequence_sinkhorn(
    student_logits: Number[Tensor, "batch time vocab"],
    teacher_logits: Number[Tensor, "batch time vocab"],
    *,
    mask: Mask[Tensor, "batch time"],
    form: str,
    temperature: float = 2.0,
    epsilon: float = 0.1,
    iterations: int = 20,
) -> Float[Tensor, ""]:
    """The batch-wise Sinkhorn distance of language models' outputs; `form` says what a batch is.

    position: the samples that are valid at a position, mean over positions. sequence: the tokens of a sample, mean over
    samples. tokens: all valid tokens at once. answer: the first valid token of each sample, as for label words.

    Padding is removed before any cost is built: a padded row would be an atom. The softmax is over the vocabulary.
    Units: as `sinkhorn_distance` with mass "batch" within each batch. Gradient: to the student only, unrolled.
    Raises ValueError for an unknown form, unequal shapes, an empty mask, temperature or epsilon <= 0, or a loss that is
    not finite.
    """
    if form not in FORMS:
        raise ValueError(f"received form {form!r}, expected one of {FORMS}")
    if student_logits.shape != teacher_logits.shape or mask.shape != student_logits.shape[:2]:
        shapes = tuple(student_logits.shape), tuple(teacher_logits.shape), tuple(mask.shape)
        raise ValueError(f"received logits {shapes[0]} and {shapes[1]} and mask {shapes[2]}, expected them to agree")
    require_axes("student logits", student_logits, "batch time vocab")
    mask = require_mask(mask, student_logits.shape[:2])
    if form == "answer":
        mask = mask & (mask.cumsum(1) == 1)
    student, teacher = (_probs(x[mask], temperature) for x in (student_logits, teacher_logits))
    rows, columns = mask.nonzero(as_tuple=True)
    group = {"position": columns, "sequence": rows}.get(form, torch.zeros_like(rows))
    values = [
        sinkhorn_distance(student[group == g], teacher[group == g], epsilon=epsilon, iterations=iterations)
        for g in group.unique().tolist()
    ]
    return masked_mean(torch.stack(values) if values else student.new_zeros(0), None)


def annealed_temperature(initial: float, *, epoch: int, epochs: int) -> float:
    """The KL temperature of an epoch: `initial` in the first, 1 in the last, linear between.

    T(e) = initial + (1 - initial) e / (epochs - 1) (released code). A single epoch stays at `initial`.
    Raises ValueError unless 0 <= epoch < epochs.
    """
    require_temperature(initial)
    if not 0 <= epoch < epochs:
        raise ValueError(f"received epoch {epoch}, expected 0 to {epochs - 1}")
    return initial + (1 - initial) * epoch / max(epochs - 1, 1)


def _require_equal(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape or student_logits.ndim != 2:
        received = f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}"
        raise ValueError(f"received {received}, expected equal shapes, a batch of classes")


def _probs(logits: Tensor, temperature: float) -> Tensor:
    require_temperature(temperature)
    return (wide(logits)[0] / temperature).softmax(-1)
