"""The distillation losses that SinKD is compared with, beyond divergences of the outputs.

RKD (Park et al. 2019) matches distances and angles between samples, PKD (Sun et al. 2019) the direction of hidden
states, DKD (Zhao et al. 2022) splits KL into the target class and the rest. Means over the batch; the teacher is
detached; float32 or wider. Left out: the factor temperature^2 of DKD's code, and every weight, which are the caller's.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from limbeck.losses.masking import (
    Number,
    logsumexp,
    probability_times,
    require_axes,
    require_finite,
    require_labels,
    require_temperature,
    wide,
)

_TINY = 1e-12
_DIRECT = 2**24  # numbers in all differences of pairs: above it their squares come from cdist, which keeps none of them


def rkd_distance(
    student_features: Number[Tensor, "batch student_width"], teacher_features: Number[Tensor, "batch teacher_width"]
) -> Float[Tensor, ""]:
    """Distances between samples, each in units of the batch's mean distance, compared by Huber's loss.

    mean_{i != j} huber(|s_i - s_j| / mean, |t_i - t_j| / mean) (RKD-D). Widths may differ; only shape counts.

    Blind to rotation, shift and scale of either side.
    Units: none. Gradient: to the student, through its mean distance too.
    Raises ValueError for fewer than two samples, unequal batches, or a loss that is not finite.
    """
    student, teacher = _features(student_features, teacher_features)
    with torch.autocast(student.device.type, enabled=False):
        return require_finite(F.huber_loss(_distances(student), _distances(teacher)))


def rkd_angle(
    student_features: Number[Tensor, "batch student_width"], teacher_features: Number[Tensor, "batch teacher_width"]
) -> Float[Tensor, ""]:
    """Angles in the triangles of samples, compared by Huber's loss.

    mean over ordered triples of distinct samples of huber(cos ijk of the student, of the teacher), at vertex j (RKD-A).

    Memory: batch^2 * width. Units: none. Gradient: to the student.
    Raises ValueError for fewer than three samples, unequal batches, or a loss that is not finite.
    """
    student, teacher = _features(student_features, teacher_features, least=3)
    with torch.autocast(student.device.type, enabled=False):
        return require_finite(F.huber_loss(_cosines(student), _cosines(teacher)))


def pkd(
    student_states: Number[Tensor, "layers batch width"], teacher_states: Number[Tensor, "layers batch width"]
) -> Float[Tensor, ""]:
    """Squared distance between the directions of hidden states of paired layers.

    mean over layers and samples of | s / |s| - t / |t| |^2 (PKD's patient loss on the first token).

    Blind to the length of a state. Units: in [0, 4]. Gradient: to the student.
    Raises ValueError for unequal shapes or a loss that is not finite.
    """
    if student_states.shape != teacher_states.shape:
        received = f"student {tuple(student_states.shape)} and teacher {tuple(teacher_states.shape)}"
        raise ValueError(f"received states of shapes {received}, expected equal shapes")
    student, teacher = (_directions(x) for x in wide(student_states, teacher_states.detach()))
    return require_finite((student - teacher).square().sum(-1).mean())


def dkd(
    student_logits: Number[Tensor, "batch classes"],
    teacher_logits: Number[Tensor, "batch classes"],
    labels: Integer[Tensor, " batch"],
    *,
    target_coef: float,
    rest_coef: float,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL split into the label against the rest, and the rest among itself, each with its own weight.

    target_coef KL(b^T || b^S) + rest_coef KL(r^T || r^S), b = (p_label, 1 - p_label), r the other classes renormalised
    (DKD). KL(teacher || student) is this with target_coef 1 and rest_coef 1 - p^T_label, sample by sample.

    Units: nats. Gradient: to the student only.
    Raises ValueError for unequal shapes, fewer than three classes, a label that is no class, temperature <= 0, or a
    loss that is not finite.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.shape[-1] < 3:
        received = f"student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}"
        raise ValueError(f"received logits of shapes {received}, expected equal shapes of at least three classes")
    require_temperature(temperature)
    labels, both = require_labels(labels, student_logits), wide(student_logits, teacher_logits.detach())
    (student_binary, *rests), (teacher_binary, teacher_rest) = (_split(x / temperature, labels) for x in both)
    nothing = teacher_binary[:, 1:] == -torch.inf  # is left to the other classes: they have no KL among themselves
    rests = [x.masked_fill(nothing, 0).log_softmax(1) for x in (*rests, teacher_rest)]
    halves = (target_coef, student_binary, teacher_binary), (rest_coef, *rests)
    terms = [coef * _kl(student, teacher) for coef, student, teacher in halves if coef]
    return require_finite(sum(terms, both[0][:0].sum()))


def _kl(student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
    """KL(teacher || student), mean over the batch."""
    return probability_times(teacher_logprobs, teacher_logprobs - student_logprobs).sum() / len(student_logprobs)


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, not label), and the logits of the other classes."""
    others = torch.ones_like(logits, dtype=torch.bool).scatter_(1, labels[:, None], False)
    rest = logits[others].reshape(len(logits), -1)
    binary = torch.stack([logits.gather(1, labels[:, None])[:, 0], logsumexp(rest)], 1)
    return binary.log_softmax(1), rest


def _features(student: Tensor, teacher: Tensor, least: int = 2) -> tuple[Tensor, Tensor]:
    require_axes("student features", student, "batch width")
    require_axes("teacher features", teacher, "batch width")
    if len(student) != len(teacher) or len(student) < least:
        received = f"{len(student)} student and {len(teacher)} teacher samples"
        raise ValueError(f"received {received}, expected equal numbers of at least {least}")
    return wide(student)[0], wide(teacher.detach())[0]


def _distances(features: Tensor) -> Tensor:
    """Distances of all ordered pairs of distinct samples, in units of their mean."""
    apart = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    if len(features) * features.numel() <= _DIRECT:
        squares = (features[:, None] - features).square().sum(-1)
    else:
        squares = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    distances = (squares[apart] + _TINY).sqrt()
    return distances / distances.mean()


def _cosines(features: Tensor) -> Tensor:
    """Cosines of the angle at j of every ordered triple (i, j, k) of distinct samples."""
    edges = _directions(features[:, None] - features)  # [i, j]: from j to i
    cosines = torch.einsum("ijw,kjw->ijk", edges, edges)
    n = torch.arange(len(features), device=features.device)
    apart = (n[:, None, None] != n[:, None]) & (n[:, None] != n) & (n[:, None, None] != n)
    return cosines[apart]


def _directions(vectors: Tensor) -> Tensor:
    """Each divided by its length. Raises ValueError where a length overflows, which would leave no direction."""
    lengths = vectors.norm(dim=-1, keepdim=True)
    if not lengths.isfinite().all():
        longest = lengths.max().item()
        raise ValueError(f"received vectors of length {longest}, expected lengths that {vectors.dtype} holds")
    return vectors / lengths.clamp_min(_TINY)
