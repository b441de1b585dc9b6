"""What SinKD's students minimise: an arm is a sum of terms, spelled `ce+kl+sinkhorn`.

The first term is cross-entropy unless it is left out; every other one has a weight. A term that is named twice counts
with the sum of its two weights, so `ce+kl+kl` is the control that gives KL the weight which another arm gives to a
third term. Two terms are one quantity at two temperatures: total variation is half the L1 norm, so `tvd` is the L1
control at the temperature of `sinkhorn`, and `l1` is the released sample-wise term, which leaves temperature out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from limbeck.evaluation.classifier import Outputs
from limbeck.losses import baselines, divergence, sinkd, transport
from limbeck.params import positive

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


@dataclass(frozen=True)
class Terms:
    """The options of every term: `temperature` of all but KL and `l1`, `group` of the batch-wise ones."""

    kl_temperature: float
    temperature: float
    epsilon: float
    iterations: int
    p: int
    group: int
    dkd_target: float
    dkd_rest: float
    rkd_angle: float

    def __post_init__(self) -> None:
        positive(**vars(self))


def added(arm: str) -> tuple[str, ...]:
    """The terms of an arm beside cross-entropy. Raises ValueError for one that is not known."""
    names = tuple(name for name in arm.split("+") if name != "ce")
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"arm must be ce or one of {', '.join(NAMES)}, joined by +; got {unknown[0]!r} in {arm!r}")
    return names


def term(name: str, options: Terms) -> Term:
    """A term as a function of the student's outputs, the teacher's, and the labels.

    A mean over rows, but for `sinkhorn` and `debiased`, which are sums over the batch in groups of `options.group`.
    """
    schedule = {"epsilon": options.epsilon, "iterations": options.iterations}
    if name in DIVERGENCES:
        divergence_of, temperature = DIVERGENCES[name][0], getattr(options, DIVERGENCES[name][1])
        return lambda s, t, _: divergence_of(s.logits, t.logits, temperature=temperature)
    if name == "l1":
        return lambda s, t, _: transport.sample_l1(s.logits.softmax(-1), t.logits.softmax(-1))
    if name in SAMPLE_WISE:
        return lambda s, t, _: SAMPLE_WISE[name](
            (s.logits / options.temperature).softmax(-1), (t.logits / options.temperature).softmax(-1), **schedule
        )
    if name in BATCH_WISE:
        schedule |= {"temperature": options.temperature, "p": options.p, "group": options.group}
        return lambda s, t, _: sinkd.batch_sinkhorn(s.logits, t.logits, debias=name == "debiased", **schedule)
    if name == "dkd":
        coefs = {"target_coef": options.dkd_target, "rest_coef": options.dkd_rest}
        return lambda s, t, y: baselines.dkd(s.logits, t.logits, y, temperature=options.temperature, **coefs)
    return lambda s, t, _: _of_states(name, s.states, t.states, options.rkd_angle)


def _of_states(name: str, student: Tensor, teacher: Tensor, angle: float) -> Tensor:
    """RKD of the last layers, distances and weighted angles; or PKD of all of the student's layers but the last."""
    if name == "rkd":
        return baselines.rkd_distance(student[-1], teacher[-1]) + angle * baselines.rkd_angle(student[-1], teacher[-1])
    return baselines.pkd(student[:-1], teacher[_paired(len(student), len(teacher))])


def _paired(student_layers: int, teacher_layers: int) -> list[int]:
    """PKD-skip: the teacher's layers, evenly spaced, for all of the student's but the last."""
    stride = teacher_layers // student_layers
    return [stride * layer - 1 for layer in range(1, student_layers)]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the batch, in nats."""
    return torch.nn.functional.cross_entropy(logits, labels.to(logits.device))
