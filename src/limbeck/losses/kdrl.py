"""KDRL: reinforcement from a verifier and reverse KL to a teacher in one loss, on the student's own completions.

The joint loss, its schedule and its masks, and reward shaping, which the paper rejects. With R = log p - log q of the
sampled token, p teacher, q student, the joint loss with k2 moves each token by A_i + kd_coef R: on-policy, adding R to
the advantage after the group's normalisation is the same.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from limbeck.losses import estimates, policy
from limbeck.losses.masking import Mask, Number, require_axes, require_choice, require_finite, require_mask, wide

LEVELS = ("none", "response", "group")
DENOMINATORS = ("all", "kept")
PLACEMENTS = ("pre", "mean", "post")


def kd_mask(correct: Mask[Tensor, "prompt group"], level: str) -> Bool[Tensor, "prompt group"]:
    """Which completions learn from the teacher: all, the wrong ones, or those of prompts that no completion solves.

    "none" masks nothing. At "group" level, if the reward says no more than the verifier, the two signals act on
    disjoint prompts: where the teacher acts, all advantages are 0. What was not judged counts as wrong.
    Raises ValueError for an unknown level.
    """
    require_choice("level", level, LEVELS)
    require_axes("what is correct", correct, "prompt group")
    correct = require_mask(correct, correct.shape, "mask `correct`")
    if level == "none":
        return torch.ones_like(correct)
    return ~correct if level == "response" else ~correct.any(1, keepdim=True).expand_as(correct)


def kd_schedule(step: int, *, initial: float, decay: float, floor: float) -> float:
    """The weight of the teacher at a step, counted from 0: max(initial - decay * step, floor).

    The paper: initial 5e-3, decay 5e-5, floor 1e-3, reached at step 80 of 280. A constant has decay 0.
    Raises ValueError unless step >= 0, decay >= 0 and initial >= floor >= 0, all finite.
    """
    if not (0 <= step < math.inf and 0 <= decay < math.inf and math.inf > initial >= floor >= 0):
        received = f"step={step}, initial={initial}, decay={decay}, floor={floor}"
        raise ValueError(f"received {received}, expected step >= 0, decay >= 0 and initial >= floor >= 0")
    return max(initial - decay * step, floor)


def kd_per_token(
    kind: str,
    logprobs: Number[Tensor, "batch time"],
    old_logprobs: Number[Tensor, "batch time"],
    teacher_logprobs: Number[Tensor, "batch time"],
    *,
    mask: Mask[Tensor, "batch time"],
    diagnostic: bool = False,
) -> Float[Tensor, "batch time"]:
    """The teacher's term of each token, unreduced; 0 outside the mask.

    sg[rho] kl_estimate(kind), rho = pi / pi_old: 1 on-policy; off-policy it keeps k2's gradient that of reverse KL.

    k2 minimises reverse KL, k3 forward KL, at every visited prefix; neither sees that a token changes later prefixes.
    A token that the policy no longer samples has rho 0: 0 in k2, but in k3 not (rho exp(R) stays), so infinite.
    Units: nats a token. Gradient: to logprobs; the ratio and the others are detached.
    Raises ValueError for k1, whose gradient is noise of mean 0, unless `diagnostic`.
    """
    if kind == "k1" and not diagnostic:
        raise ValueError("received kind 'k1', whose expected gradient as a loss is 0; expected k2 or k3")
    mask = require_mask(mask, logprobs.shape)
    if kind == "k2":
        mask = mask & (logprobs != -torch.inf)
    student, old, teacher = (policy.masked(x, mask) for x in (logprobs, old_logprobs, teacher_logprobs))
    ratio, estimate = (student - old).exp().detach(), estimates.kl_estimate(kind, student, teacher)
    return ratio.masked_fill(ratio.isinf() & (estimate == 0), 0) * estimate


def kd_weights(
    mask: Mask[Tensor, "batch time"],
    keep: Mask[Tensor, " batch"] | None = None,
    *,
    denominator: str = "all",
    normalise: str = "token",
    longest: int | None = None,
) -> Float[Tensor, "batch time"]:
    """`policy.token_weights` of the teacher's term when only the completions in `keep` learn from it.

    denominator="all" divides as without a mask, so a mask only takes terms away and the weight keeps its meaning;
    "kept" divides by what is kept, so the fewer are kept, the more each counts. The paper does not say.
    All 0 where nothing is kept. Raises ValueError for an unknown denominator, and as `token_weights`.
    """
    require_choice("denominator", denominator, DENOMINATORS)
    require_axes("a mask", mask, "batch time")
    mask = require_mask(mask, mask.shape)
    keep = None if keep is None else require_mask(keep, mask.shape[:1], "mask `keep`")
    kept = mask if keep is None else mask & keep[:, None]
    if denominator == "kept" and keep is not None and kept.any():
        weights = policy.token_weights(kept[keep], normalise=normalise, longest=longest)
        return torch.zeros(mask.shape, dtype=weights.dtype, device=mask.device).index_put((keep,), weights)
    return policy.token_weights(mask, normalise=normalise, longest=longest) * kept


def kdrl_loss(
    logprobs: Number[Tensor, "batch time"],
    old_logprobs: Number[Tensor, "batch time"],
    advantages: Number[Tensor, " batch"] | Number[Tensor, "batch time"] | None,
    kd: Number[Tensor, "batch time"] | None,
    *,
    mask: Mask[Tensor, "batch time"],
    kd_coef: float,
    weights: Number[Tensor, "batch time"] | None = None,
    teacher_weights: Number[Tensor, "batch time"] | None = None,
    clip_eps: float | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """The joint loss as its two terms, whose sum it is: `policy`, GRPO's, and `kd`, kd_coef times the teacher's.

    -sum_it w_it rho_it A_i + kd_coef sum_it v_it kd_it (KDRL, equation 8, and its masks).

    `kd` is any per-token divergence: `kd_per_token` (k2 in the paper), `divergence.reverse_kl_per_token`, a top-K one.
    The weights are 1 / N if they are not given; `kd_weights` gives masks. Of a micro-batch they are its rows of the
    whole batch's, and terms are added up. Without advantages, or without `kd` or at kd_coef = 0, that term is missing:
    distillation alone, or GRPO to the bit. Groups of equal rewards, whose advantages are 0, learn from the teacher.
    Units: kd_coef is advantage per nat. Gradient: to logprobs and through kd.
    Raises ValueError for kd_coef < 0, nothing to learn from, wrong options, or a term that is not finite.
    """
    if not kd_coef >= 0:
        raise ValueError(f"received kd_coef {kd_coef}, expected kd_coef >= 0")
    terms = {}
    weights = policy.token_weights(mask) if weights is None else weights
    if advantages is not None:
        gain = policy.surrogate_per_token(logprobs, old_logprobs, advantages, mask=mask, clip_eps=clip_eps)
        terms["policy"] = policy.weighted_sum(gain, weights)
    if kd is not None and kd_coef:
        shares = weights if teacher_weights is None else teacher_weights
        terms["kd"] = require_finite(kd_coef * policy.weighted_sum(policy.masked(kd, mask), shares))
    if not terms:
        raise ValueError(f"received no advantages and kd_coef {kd_coef}, expected advantages, or a teacher's term")
    return terms


def shaped_advantages(
    rewards: Number[Tensor, "prompt group"],
    log_ratios: Number[Tensor, "prompt group time"],
    *,
    mask: Mask[Tensor, "prompt group time"],
    kd_coef: float,
    placement: str,
    scale: str = "std",
    counted: Mask[Tensor, "prompt group"] | None = None,
) -> Float[Tensor, "prompt group time"]:
    """The teacher in the reward instead of the loss: an advantage a token, for `policy.grpo_loss`.

    With R the log-ratio: "pre" normalises r_i + kd_coef sum_t R_it over the group, "mean" r_i + kd_coef mean_t R_it,
    "post" is the advantage of r_i plus kd_coef R_it.

    The paper's formula was not recovered. "post" is the joint loss with k2 in other words. "pre" is what can collapse:
    a sum grows with the length, one number a completion loses the token, and in a group of equal rewards the whole
    advantage is the teacher's.
    Units: as `policy.group_advantages`. Gradient: none.
    Raises ValueError for an unknown placement, and as `policy.group_advantages`.
    """
    require_choice("placement", placement, PLACEMENTS)
    require_axes("log-ratios", log_ratios, "prompt group time")
    if rewards.shape != log_ratios.shape[:2]:
        shapes = f"rewards {tuple(rewards.shape)} and log-ratios {tuple(log_ratios.shape)}"
        raise ValueError(f"received {shapes}, expected equal prompts and groups")
    mask = require_mask(mask, log_ratios.shape)
    rewards, log_ratios = wide(rewards.detach(), log_ratios.detach())
    log_ratios = log_ratios.masked_fill(~mask if kd_coef else torch.ones_like(mask), 0)
    if placement == "post":
        advantages = policy.group_advantages(rewards, scale=scale, counted=counted)
        return advantages[..., None] * mask + kd_coef * log_ratios
    teacher_rewards = log_ratios.sum(-1)
    if placement == "mean":
        teacher_rewards = teacher_rewards / mask.sum(-1).clamp_min(1)
    shaped = rewards + kd_coef * teacher_rewards
    return policy.group_advantages(shaped, scale=scale, counted=counted)[..., None] * mask
