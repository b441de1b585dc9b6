"""What SinKD's students minimise: an arm is a sum of terms, spelled `ce+kl+sinkhorn`.

The first term is cross-entropy unless it is left out; every other one has a weight. A term that is named twice counts
with the sum of its two weights, so `ce+kl+kl` is the control that gives KL the weight which another arm gives to a
third term. Two terms are one quantity at two temperatures: total variation is half the L1 norm, so `tvd` is the L1
control at the temperature of `sinkhorn`, and `l1` is the released sample-wise term, which leaves temperature out.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.evaluation.classifier import Outputs
from limbeck.losses import baselines, divergence, transport
from limbeck.training import supervised

ASSISTED = "takd"  # reads the logits of an assistant instead of the teacher's
DIVERGENCES = {  # with the temperature that each has in the parameters
    "kl": (divergence.forward_kl, "kl_temperature"),
    ASSISTED: (divergence.forward_kl, "kl_temperature"),
    "rkl": (divergence.reverse_kl, "temperature"),
    "js": (divergence.jensen_shannon, "temperature"),
    "tvd": (divergence.total_variation, "temperature"),
}
SAMPLE_WISE = {"value": transport.sample_value_cost, "zero_one": transport.sample_zero_one}
BATCH_WISE = ("sinkhorn", "debiased")
OF_STATES = ("rkd", "pkd")
NAMES = (*DIVERGENCES, "l1", *SAMPLE_WISE, *BATCH_WISE, "dkd", *OF_STATES)
Term = Callable[[Outputs, Outputs, Tensor], Tensor]


def added(arm: str) -> tuple[str, ...]:
    """The terms of an arm beside cross-entropy. Raises ValueError for one that is not known."""
    names = tuple(name for name in arm.split("+") if name != "ce")
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"arm must be ce or one of {', '.join(NAMES)}, joined by +; got {unknown[0]!r} in {arm!r}")
    return names


def term(name: str, section: Any) -> Term:
    """A term as a function of the student's outputs, the teacher's, and the labels; a mean over rows if not transport.

    `sinkhorn` and `debiased` are sums over the batch, cut into groups of `section.group` samples, each a problem of its
    own: what data parallelism does to SinKD, and at a group of 1 the L1 norm.
    """
    if name in DIVERGENCES:
        divergence_of, temperature = DIVERGENCES[name][0], getattr(section, DIVERGENCES[name][1])
        return lambda s, t, _: divergence_of(s.logits, t.logits, temperature=temperature)
    if name == "l1":
        return lambda s, t, _: transport.sample_l1(s.logits.softmax(-1), t.logits.softmax(-1))
    if name == "dkd":
        coefs = {"target_coef": section.dkd_target, "rest_coef": section.dkd_rest}
        return lambda s, t, y: baselines.dkd(s.logits, t.logits, y, temperature=section.temperature, **coefs)
    if name in OF_STATES:
        return lambda s, t, _: _of_states(name, s.states, t.states, section.rkd_angle)
    options = {"epsilon": section.epsilon, "iterations": section.iterations}
    if name in SAMPLE_WISE:
        return lambda s, t, _: SAMPLE_WISE[name](*_probs(s, t, section.temperature), **options)
    options |= {"p": section.p, "debias": name == "debiased"}
    return lambda s, t, _: sum(
        transport.sinkhorn_distance(x, y, **options)
        for x, y in zip(*(z.split(section.group) for z in _probs(s, t, section.temperature)), strict=True)
    )


def _probs(student: Outputs, teacher: Outputs, temperature: float) -> tuple[Tensor, Tensor]:
    return (student.logits / temperature).softmax(-1), (teacher.logits / temperature).softmax(-1)


def _of_states(name: str, student: Tensor, teacher: Tensor, angle: float) -> Tensor:
    """RKD of the last layers, distances and weighted angles; or PKD of all of the student's layers but the last."""
    if name == "rkd":
        return baselines.rkd_distance(student[-1], teacher[-1]) + angle * baselines.rkd_angle(student[-1], teacher[-1])
    return baselines.pkd(student[:-1], teacher[_paired(len(student), len(teacher))])


def _paired(student_layers: int, teacher_layers: int) -> list[int]:
    """PKD-skip: the teacher's layers, evenly spaced, for all of the student's but the last."""
    stride = teacher_layers // student_layers
    return [stride * layer - 1 for layer in range(1, student_layers)]


def matched_weight(
    parameters: dict[str, nn.Parameter],
    pair: Callable[[Tensor], tuple[Tensor, Tensor]],
    batches: Sequence[Tensor],
) -> float:
    """The weight at which a term's gradient is as long as CE's, on average over some batches.

    `pair` gives CE and the term of a batch. Raises ValueError if the term has no gradient at all.
    """
    norms = [[supervised.gradient_norm(parameters, value) for value in pair(rows)] for rows in batches]
    if not (total := sum(other for _, other in norms)):
        raise ValueError("expected a term with a gradient, got one whose gradient is 0 on every batch")
    return sum(ce for ce, _ in norms) / total


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch, in nats."""
    return torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
