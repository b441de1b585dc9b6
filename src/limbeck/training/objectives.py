"""What an arm minimises at a step: GRPO, distillation on the policy's own completions, both, or the teacher's texts.

An arm is wiring of `losses`, of `kdrl_loss` but for SFT; KDRL's variants differ in a field each. Whoever writes the
completions is the run's sampler: the policy, or for SFT the teacher. `arm` and `objective` are the way in.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from limbeck.losses import divergence, estimates, kdrl, policy
from limbeck.losses.masking import require_choice, wide
from limbeck.training.grpo import Objective, Terms
from limbeck.training.rollouts import Metrics, Rollout, Scores

_TOP_K = re.compile(r"(raw|renormalised|tail)_(student|teacher)_([1-9]\d*)")
_ANNEALED = {"initial": 2.5, "floor": 0.5, "reached": 80 / 280}  # of the best constant, and of the steps; the paper's


@dataclass(frozen=True)
class Arm:
    """One method: whose texts it learns from (own, or all or the right ones of the teacher), and from what.

    `kd` is an estimator as a loss (k2, k3, exact, or a top-K form such as raw_student_4), or a placement in the reward
    (pre, mean, post); `level` says which completions learn from the teacher.
    """

    texts: str = "own"
    reward: bool = True
    kd: str | None = None
    schedule: str = "constant"
    level: str = "none"
    denominator: str = "all"

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher scores the policy's completions."""
        return self.kd is not None

    @property
    def weighs_teacher(self) -> bool:
        """Whether it weighs the teacher against the reward at a constant or annealed weight."""
        return self.reward and self.asks_teacher and self.schedule != "switch"


ARMS = {
    "sft": Arm(texts="all", reward=False),
    "rejection": Arm(texts="right", reward=False),
    "grpo": Arm(),
    "kd": Arm(reward=False, kd="k2"),
    "kdrl": Arm(kd="k2"),
    "annealed": Arm(kd="k2", schedule="annealed"),
    "kd_then_rl": Arm(kd="k2", schedule="switch"),
    "k3": Arm(kd="k3"),
    "exact": Arm(kd="exact"),
    "pre": Arm(kd="pre"),
    "mean": Arm(kd="mean"),
    "post": Arm(kd="post"),
    "response": Arm(kd="k2", level="response"),
    "group": Arm(kd="k2", level="group"),
    "response_kept": Arm(kd="k2", level="response", denominator="kept"),
    "response_annealed": Arm(kd="k2", level="response", schedule="annealed"),
    "group_annealed": Arm(kd="k2", level="group", schedule="annealed"),
}


def arm(name: str) -> Arm:
    """An arm by its name; those of a top-K estimator are named by it. Raises ValueError for another."""
    if _TOP_K.fullmatch(name):
        return Arm(kd=name)
    require_choice("arm", name, tuple(ARMS))
    return ARMS[name]


def objective(
    method: Arm, *, kd_coef: float, steps: int, switch: int | None = None, measure_every: int = 10
) -> Objective:
    """The objective of an arm for a run of `steps` steps.

    `kd_coef` is the weight of the teacher: the constant one, from which the annealed one follows by the paper's ratios
    (from 2.5 times to half of it, reached at 80 / 280 of the steps). A `switch` arm is distillation alone before that
    step and GRPO alone from it on. Every `measure_every` steps the exact reverse KL to the teacher, where the run has
    one, is measured too.
    Raises ValueError for a switch arm without its step, or the reverse, for a weight or number out of range, and at a
    step whose arm asks a teacher that the rollout lacks.
    """
    if (method.schedule == "switch") != (switch is not None):
        raise ValueError(f"received switch={switch} with schedule={method.schedule!r}, expected it with 'switch' alone")
    if not 0 <= kd_coef < math.inf or steps < 1 or measure_every < 1:
        received = f"kd_coef={kd_coef}, steps={steps}, measure_every={measure_every}"
        raise ValueError(f"received {received}, expected a finite kd_coef >= 0 and the others at least 1")

    def at_step(step: int, rollout: Rollout) -> tuple[Callable[[Scores], Terms], Metrics]:
        current = method
        if switch is not None:
            current = ARMS["kd"] if step < switch else ARMS["grpo"]
        if current.asks_teacher and rollout.teacher_logprobs is None:
            raise ValueError(f"received a rollout without teacher_logprobs, expected them for kd={current.kd!r}")
        coef = _coefficient(current, kd_coef, step, steps)
        return _step_objective(current, coef, rollout, measured=step % measure_every == 0)

    return at_step


def _coefficient(method: Arm, kd_coef: float, step: int, steps: int) -> float:
    """The teacher's weight at a step: 1 where it is alone, since Adam divides a common factor out, unless clipped."""
    if method.kd is None:
        return 0.0
    if not method.reward:
        return 1.0
    if method.schedule != "annealed":
        return kd_coef
    initial, floor = _ANNEALED["initial"] * kd_coef, _ANNEALED["floor"] * kd_coef
    decay = (initial - floor) / (_ANNEALED["reached"] * steps)
    return kdrl.kd_schedule(step, initial=initial, decay=decay, floor=floor)


def _step_objective(
    method: Arm, coef: float, rollout: Rollout, *, measured: bool
) -> tuple[Callable[[Scores], Terms], Metrics]:
    """The terms of some rows of this rollout, and what is known before any gradient."""
    weights = policy.token_weights(rollout.mask)
    advantages = _advantages(method, coef, rollout)
    keep = kdrl.kd_mask(rollout.correct, method.level).flatten()
    teacher_weights = _teacher_weights(method, rollout, keep)
    text_weights = _text_weights(method, rollout)
    teaches = bool(coef) and method.kd not in kdrl.PLACEMENTS

    def terms(scores: Scores) -> Terms:
        rows = scores.rows
        entropy = {"policy/entropy": policy.weighted_sum(scores.restored(_entropies(scores.logits)), weights[rows])}
        if text_weights is not None:
            return {"loss/sft": -policy.weighted_sum(scores.logprobs, text_weights[rows])} | entropy
        losses = kdrl.kdrl_loss(
            scores.logprobs,
            rollout.old_logprobs[rows],
            None if advantages is None else advantages[rows],
            _teachers_term(method.kd, rollout, scores, teacher_weights[rows]) if teaches else None,
            mask=scores.mask,
            kd_coef=coef,
            weights=weights[rows],
            teacher_weights=teacher_weights[rows],
        )
        measures = {}
        if rollout.teacher_logprobs is not None and measured:
            exact = scores.restored(divergence.reverse_kl_per_token(scores.logits, scores.teacher_logits()))
            shares = weights[rows] * rollout.taught[rows]
            measures = {"policy/reverse_kl": policy.weighted_sum(exact.detach(), shares)}
        return {f"loss/{name}": term for name, term in losses.items()} | measures | entropy

    return terms, _teacher_metrics(method, coef, rollout, keep, advantages)


def _teacher_weights(method: Arm, rollout: Rollout, keep: Tensor) -> Tensor:
    """How much the teacher's term of each token weighs."""
    weights = kdrl.kd_weights(rollout.mask, keep, denominator=method.denominator)
    return weights if rollout.teacher_mask is None else weights * rollout.teacher_mask


def _text_weights(method: Arm, rollout: Rollout) -> Tensor | None:
    """How much each token of the teacher's texts weighs in SFT's loss; None where the policy wrote them."""
    if method.texts == "own":
        return None
    if method.texts == "all":
        return policy.token_weights(rollout.mask)
    return kdrl.kd_weights(rollout.mask, rollout.correct.flatten(), denominator="kept")


def _advantages(method: Arm, coef: float, rollout: Rollout) -> Tensor | None:
    """One number per completion, or one per token where the teacher stands in the reward; None without a reward."""
    if not method.reward:
        return None
    judged = rollout.rewards.isfinite()
    if method.kd not in kdrl.PLACEMENTS:
        return policy.group_advantages(rollout.rewards, counted=judged).flatten()
    groups = (*rollout.rewards.shape, -1)
    ratios = (rollout.teacher_logprobs - rollout.old_logprobs).reshape(groups)
    mask = rollout.mask.reshape(groups)
    return kdrl.shaped_advantages(
        rollout.rewards, ratios, mask=mask, kd_coef=coef, placement=method.kd, counted=judged
    ).flatten(0, 1)


def _teachers_term(kind: str, rollout: Rollout, scores: Scores, weights: Tensor) -> Tensor:
    """The divergence from the teacher at each token that learns from it; at others 0, whatever the two say there."""
    mask = scores.mask & (weights != 0)
    if kind in estimates.KINDS:
        old, teacher = rollout.old_logprobs[scores.rows], rollout.teacher_logprobs[scores.rows]
        return kdrl.kd_per_token(kind, scores.logprobs, old, teacher, mask=mask)
    learns = mask[scores.mask]
    student, teacher = (x if learns.all() else x[learns] for x in (scores.logits, scores.teacher_logits()))
    if kind == "exact":
        values = divergence.reverse_kl_per_token(student, teacher)
    else:
        form, support, k = _TOP_K.fullmatch(kind).groups()
        values = estimates.top_k_reverse_kl_per_token(student, teacher, k=int(k), support=support, form=form)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _entropies(logits: Tensor) -> Tensor:
    """The entropy of each next token in nats; measured, without gradient."""
    logprobs = wide(logits.detach())[0].log_softmax(-1)
    return -divergence.expectation(logprobs, logprobs)


def _teacher_metrics(method: Arm, coef: float, rollout: Rollout, keep: Tensor, advantages: Tensor | None) -> Metrics:
    """Of the teacher: its weight, whom it teaches, its log-ratio R, and how often, in k2, R turns an advantage.

    Quantiles are numpy's, since torch refuses more than 2^24 values.
    """
    if rollout.teacher_logprobs is None:
        return {}
    mask = rollout.taught
    ratios = (rollout.teacher_logprobs - rollout.old_logprobs)[mask].double()
    if not len(ratios):
        return {"kd/coefficient": coef, "kd/kept": keep.double().mean().item()}
    sizes = ratios.abs()
    with np.errstate(invalid="ignore"):  # between a finite size and an infinite one numpy finds NaN
        high = np.nan_to_num(np.quantile(sizes.cpu().numpy(), (0.95, 0.99)), nan=np.inf, posinf=np.inf)
    metrics = {
        "kd/coefficient": coef,
        "kd/kept": keep.double().mean().item(),
        "kd/k1": -ratios.mean().item(),
        "kd/size": sizes.mean().item(),
        "kd/size_95": float(high[0]),
        "kd/size_99": float(high[1]),
    }
    if method.reward and method.kd == "k2":
        each = advantages[:, None].expand_as(mask)[mask].double()
        teacher_weights = _teacher_weights(method, rollout, keep)[mask]
        pulls = coef * teacher_weights * ratios.masked_fill(teacher_weights == 0, 0)
        together = policy.token_weights(rollout.mask)[mask] * each + pulls
        metrics["kd/flipped"] = (each * together < 0).double().mean().item()
    return metrics
