"""KDRL's choice of estimator, without sampling: which gradient each KL estimator has in each place, by enumeration.

A student, a teacher and, off-policy, an older student that sampled, are distributions over a few outcomes. An arm is an
estimator and its place: `k2_loss` differentiates it; `k2_held` does so at the weight rho = student / sampler without a
gradient, `k2_free` with one; `k2_reward` is the score function times the estimate, as a detached reward. Expectations
are sums over all outcomes in float64, so what is left of an error is rounding. Nothing is trained.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from limbeck import seeding
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.losses import divergence, estimates, kdrl
from limbeck.params import one_of, positive

SAMPLINGS = ("on-policy", "off-policy")
PLACES = ("loss", "held", "free", "reward")
ARMS = tuple(f"{kind}_{place}" for kind in estimates.KINDS for place in PLACES)


@dataclass(frozen=True)
class Params:
    """The arms, and how student, teacher and sampler are drawn; a gap is that of the teacher's logits."""

    arms: tuple[str, ...]
    outcomes: int
    deviation: float
    staleness: float
    gaps: tuple[float, ...]
    draws: int

    def __post_init__(self) -> None:
        for arm in self.arms:
            one_of("arm", arm, ARMS)
        for gap in self.gaps:
            positive(gap=gap)
        positive(outcomes=self.outcomes, deviation=self.deviation, staleness=self.staleness, draws=self.draws)


def cells(params: Params, _seeds: Sequence[int]) -> list[Cell]:
    """One cell per arm, way of sampling and gap, over all draws, which are the replicates."""
    inputs = {name: value for name, value in asdict(params).items() if name not in ("arms", "gaps")}
    return [
        Cell({"arm": arm, "sampling": sampling, "gap": gap}, inputs)
        for arm in params.arms
        for sampling in SAMPLINGS
        for gap in params.gaps
    ]


def run(cell: Cell, params: Params, _workspace: Workspace) -> Generator[dict[str, float], None, Result]:
    """Every draw of student, teacher and sampler; yields once per draw."""
    metrics: dict[str, list[float]] = {}
    for draw in range(params.draws):
        student, teacher, older = _drawn(params, cell.coordinates["gap"], draw)
        sampler = older if cell.coordinates["sampling"] == "off-policy" else student
        for name, value in compared(cell.coordinates["arm"], student, teacher, sampler).items():
            metrics.setdefault(name, []).append(value)
        yield {"step": draw + 1, "steps": params.draws}
    return Result(metrics, {}, 0, "float64")


def _drawn(params: Params, gap: float, draw: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the student, of a teacher whose logits are a `gap` from them, and of an older student."""
    source = seeding.generator(draw, "logits")
    normal = torch.randn(3, params.outcomes, generator=source, dtype=torch.float64)
    student = params.deviation * normal[0]
    return student, student + gap * normal[1], student + params.staleness * normal[2]


def compared(arm: str, student: Tensor, teacher: Tensor, sampler: Tensor) -> dict[str, float]:
    """An arm's expected gradient beside those of both KLs, and its spread, in lengths of reverse KL's gradient."""
    logits = student.clone().requires_grad_()
    each = torch.autograd.functional.jacobian(lambda x: values(arm, x, teacher, sampler), logits)
    probs = sampler.softmax(0)
    expected = probs @ each
    reverse, forward = (
        torch.autograd.grad(kl(logits[None], teacher[None]), logits)[0]
        for kl in (divergence.reverse_kl, divergence.forward_kl)
    )
    size = reverse.norm()
    spread = (probs @ (each - expected).square().sum(1)).sqrt()
    lengths = {"size": expected, "to_reverse": expected - reverse, "to_forward": expected - forward}
    return {f"gradient/{name}": (x.norm() / size).item() for name, x in lengths.items()} | {
        "gradient/spread": (spread / size).item()
    }


def values(arm: str, student: Tensor, teacher: Tensor, sampler: Tensor) -> Tensor:
    """What is differentiated for each outcome, if it is sampled."""
    kind, place = arm.split("_")
    now, old, aim = (x.log_softmax(0)[None] for x in (student, sampler, teacher))
    if place == "held":
        mask = torch.ones_like(now, dtype=torch.bool)
        return kdrl.kd_per_token(kind, now, old, aim, mask=mask, diagnostic=True)[0]
    estimate, ratio = estimates.kl_estimate(kind, now, aim), (now - old).exp()
    return {"loss": estimate, "free": ratio * estimate, "reward": ratio * estimate.detach()}[place][0]
