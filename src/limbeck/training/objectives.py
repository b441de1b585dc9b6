"""What an arm minimises at a step: GRPO, distillation on the policy's own completions, both, or the teacher's texts.

An arm is wiring of `losses`; KDRL's variants differ in a field each. Whoever writes the completions is the run's
sampler: the policy, or for SFT the teacher.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from limbeck.losses import divergence, estimates, kdrl, policy
from limbeck.losses.masking import require_choice
from limbeck.training.grpo import Objective, Terms
from limbeck.training.learner import Scores
from limbeck.training.rollouts import Metrics, Rollout

_TOP_K = re.compile(r"(raw|renormalised|tail)_(student|teacher)_(\d+)")
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
    def taught(self) -> bool:
        """Whether the teacher scores the policy's completions."""
        return self.kd is not None


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


def of(method: Arm, *, kd_coef: float, steps: int, switch: int | None = None, measure_every: int = 10) -> Objective:
    """The objective of an arm for a run of `steps` steps.

    `kd_coef` is the weight of the teacher: the constant one, from which the annealed one follows by the paper's ratios
    (from 2.5 times to half of it, reached at 80 / 280 of the steps). A `switch` arm is distillation alone before that
    step and GRPO alone from it on. Every `measure_every` steps the exact reverse KL to the teacher, where the run has
    one, is measured too.
    Raises ValueError for a switch arm without its step, or the reverse.
    """
    if (method.schedule == "switch") != (switch is not None):
        raise ValueError(f"received switch={switch} with schedule={method.schedule!r}, expected it with 'switch' alone")

    def objective(step: int, rollout: Rollout) -> tuple[Callable[[Scores], Terms], Metrics]:
        now = method
        if switch is not None:
            now = ARMS["kd"] if step < switch else ARMS["grpo"]
        coef = _coefficient(now, kd_coef, step, steps)
        return _at(now, coef, rollout, measured=step % measure_every == 0)

    return objective


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


def _at(method: Arm, coef: float, rollout: Rollout, *, measured: bool) -> tuple[Callable[[Scores], Terms], Metrics]:
    """The terms of some rows of this rollout, and what is known before any gradient."""
    weights = policy.token_weights(rollout.mask)
    advantages = _advantages(method, coef, rollout)
    keep = kdrl.kd_mask(rollout.correct, method.level).flatten()
    shares = kdrl.kd_weights(rollout.mask, keep, denominator=method.denominator)
    right = kdrl.kd_weights(rollout.mask, rollout.correct.flatten(), denominator="kept")

    def terms(scores: Scores) -> Terms:
        rows, mask, found = scores.rows, scores.mask, {}
        if method.texts != "own":
            of_texts = weights if method.texts == "all" else right
            return {"loss/sft": -policy.weighted_sum(scores.logprobs, of_texts[rows]), **_entropy(scores, weights)}
        if advantages is not None:
            gain = policy.surrogate_per_token(scores.logprobs, rollout.old_logprobs[rows], advantages[rows], mask=mask)
            found["loss/policy"] = policy.weighted_sum(gain, weights[rows])
        if coef and method.kd not in kdrl.PLACEMENTS:
            found["loss/kd"] = coef * policy.weighted_sum(_kd(method.kd, rollout, scores), shares[rows])
        if rollout.teacher_logprobs is not None and measured:
            exact = scores.restored(divergence.reverse_kl_per_token(scores.logits, scores.teacher_logits()))
            found["policy/reverse_kl"] = policy.weighted_sum(exact.detach(), weights[rows])
        return found | _entropy(scores, weights)

    return terms, _known(method, coef, rollout, keep, shares)


def _advantages(method: Arm, coef: float, rollout: Rollout) -> Tensor | None:
    """One number a completion, or one a token where the teacher stands in the reward; None without a reward."""
    if not method.reward:
        return None
    judged = rollout.rewards.isfinite()
    if method.kd not in kdrl.PLACEMENTS:
        return policy.group_advantages(rollout.rewards, counted=judged).flatten()
    groups = (*rollout.rewards.shape, -1)
    ratios, mask = (x.reshape(groups) for x in (rollout.teacher_logprobs - rollout.old_logprobs, rollout.mask))
    options = {"kd_coef": coef, "placement": method.kd, "counted": judged}
    return kdrl.shaped_advantages(rollout.rewards, ratios, mask=mask, **options).flatten(0, 1)


def _kd(kind: str, rollout: Rollout, scores: Scores) -> Tensor:
    """The teacher's term of each token."""
    if kind in estimates.KINDS:
        old, teacher = (x[scores.rows] for x in (rollout.old_logprobs, rollout.teacher_logprobs))
        return kdrl.kd_per_token(kind, scores.logprobs, old, teacher, mask=scores.mask)
    if kind == "exact":
        return scores.restored(divergence.reverse_kl_per_token(scores.logits, scores.teacher_logits()))
    form, support, k = _TOP_K.fullmatch(kind).groups()
    options = {"k": int(k), "support": support, "form": form}
    return scores.restored(estimates.top_k_reverse_kl_per_token(scores.logits, scores.teacher_logits(), **options))


def _entropy(scores: Scores, weights: Tensor) -> Terms:
    """The mean entropy of the policy's next token, in nats, on the texts it learns from; measured, without gradient."""
    logprobs = scores.logits.detach().log_softmax(-1)
    return {
        "policy/entropy": policy.weighted_sum(
            scores.restored(-(logprobs.exp() * logprobs).sum(-1)), weights[scores.rows]
        )
    }


def _quantiles(sizes: Tensor) -> Metrics:
    """By numpy, since torch refuses more than 2^24 values."""
    high = np.quantile(sizes.cpu().numpy(), (0.95, 0.99))
    return {"kd/size_95": float(high[0]), "kd/size_99": float(high[1])}


def _known(method: Arm, coef: float, rollout: Rollout, keep: Tensor, shares: Tensor) -> Metrics:
    """Of the teacher: its weight, whom it teaches, its log-ratio R, and how often, in k2, R turns an advantage."""
    if rollout.teacher_logprobs is None:
        return {}
    ratios = (rollout.teacher_logprobs - rollout.old_logprobs)[rollout.mask].double()
    sizes = ratios.abs()
    found = {
        "kd/coefficient": coef,
        "kd/kept": keep.double().mean().item(),
        "kd/k1": -ratios.mean().item(),
        "kd/size": sizes.mean().item(),
        **_quantiles(sizes),
    }
    if method.reward and method.kd == "k2":
        advantages = _advantages(method, coef, rollout)[:, None].expand_as(rollout.mask)[rollout.mask].double()
        together = policy.token_weights(rollout.mask)[rollout.mask] * advantages + coef * shares[rollout.mask] * ratios
        found["kd/flipped"] = (advantages * together < 0).double().mean().item()
    return found
