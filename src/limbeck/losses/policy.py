"""Policy gradients on groups of completions: GRPO as KDRL uses it.

Two parts that papers mix differently, each on its own here: what a token contributes (`surrogate_per_token`), and how
much it weighs (`token_weights`). The weights are a function of the whole batch's mask, so a loop that works through
micro-batches cuts rows out of them and sums: no split changes the gradient.

Left out: the KL to a reference policy, which KDRL's objective does not have.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.losses.masking import Mask, Number, require_axes, require_choice, require_finite, require_mask, wide

SCALES = ("std", "none")
NORMALISERS = ("token", "sequence", "constant")
_TINY = 1e-6  # of the reward, added to the standard deviation


def group_advantages(
    rewards: Number[Tensor, "prompt group"],
    *,
    scale: str = "std",
    counted: Mask[Tensor, "prompt group"] | None = None,
) -> Float[Tensor, "prompt group"]:
    """Rewards relative to their group: what GRPO reinforces.

    (r_i - mean r) / (std r + 1e-6), or with scale="none" the difference alone (Dr. GRPO).

    The standard deviation is the sample's (divided by group - 1), as in TRL; KDRL's paper does not say whether it
    divides at all. Exactly 0 in a group of equal rewards, where rounding would otherwise be scaled up. A completion
    that is not counted (its verifier failed) has 0, and no part in the mean or the deviation.
    Units: standard deviations, or rewards. Gradient: none.
    Raises ValueError for a group of one, a reward that is not finite or too large to square, or an unknown scale.
    """
    require_choice("scale", scale, SCALES)
    require_axes("rewards", rewards, "prompt group")
    if rewards.shape[1] < 2:
        raise ValueError(f"received groups of {rewards.shape[1]}, expected at least two completions a prompt")
    (rewards,) = wide(rewards.detach())
    counted = torch.ones_like(rewards) if counted is None else counted
    counted = require_mask(counted, rewards.shape, "mask `counted`")
    if not (known := rewards[counted]).isfinite().all():
        raise ValueError(f"received the reward {known[~known.isfinite()][0].item()}, expected finite rewards")
    rewards, number = rewards.masked_fill(~counted, 0), counted.sum(1, keepdim=True)
    gaps = (rewards - rewards.sum(1, keepdim=True) / number.clamp_min(1)).masked_fill(~counted, 0)
    low, high = (rewards.masked_fill(~counted, end).aminmax(dim=1, keepdim=True) for end in (torch.inf, -torch.inf))
    deviation = (gaps.square().sum(1, keepdim=True) / (number - 1).clamp_min(1)).sqrt()
    if not deviation.isfinite().all():
        largest = known.abs().max().item()
        raise ValueError(f"received rewards of up to {largest}, expected {rewards.dtype} to hold their squares")
    if scale == "std":
        gaps = gaps / (deviation + _TINY)
    return gaps.masked_fill(low.min >= high.max, 0)


def token_weights(
    mask: Mask[Tensor, "batch time"], *, normalise: str = "token", longest: int | None = None
) -> Float[Tensor, "batch time"]:
    """How much each token weighs in a loss: a sum of values times these weights is the loss.

    "token": 1 / N, N the number of tokens in the batch (KDRL, DAPO), so that long completions weigh more. "sequence":
    1 / (batch |o_i|), the mean of the completions' means (first GRPO). "constant": 1 / (batch longest), with `longest`
    the tokens that a completion may have (Dr. GRPO).

    In float64, 0 outside the mask, in every row without a token too. Units: 1 / token. Gradient: none.
    Raises ValueError for an empty mask, an unknown normaliser, or a `longest` that is missing, idle or too short.
    """
    require_choice("normalise", normalise, NORMALISERS)
    require_axes("a mask", mask, "batch time")
    mask = require_mask(mask, mask.shape)
    counts = mask.sum(1, keepdim=True)
    if not counts.any():
        raise ValueError("received a mask that keeps no token, expected at least one")
    if (longest is not None) != (normalise == "constant"):
        raise ValueError(f"received longest={longest} with normalise={normalise!r}, expected it with 'constant' alone")
    if longest is not None and longest < counts.max():
        raise ValueError(f"received a completion of {counts.max()} tokens, expected at most longest={longest}")
    weights = mask.double()
    if normalise == "token":
        return weights / counts.sum()
    if normalise == "sequence":
        return weights / (len(mask) * counts.clamp_min(1))
    return weights / (len(mask) * longest)


def weighted_sum(values: Number[Tensor, "batch time"], weights: Number[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """sum_it w_it x_it, in the values' dtype; at weight 0 a value counts for nothing, whatever it is.

    Raises ValueError for unequal shapes, or a sum that is not finite.
    """
    if values.shape != weights.shape:
        raise ValueError(f"received weights of shape {tuple(weights.shape)}, expected {tuple(values.shape)}")
    (values,), weights = wide(values), weights.detach()
    return require_finite((values.masked_fill(weights == 0, 0) * weights.to(values.dtype)).sum())


def masked(values: Number[Tensor, "batch time"], mask: Mask[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """The values in float32 or wider, 0 outside the mask: what padding holds reaches neither value nor gradient.

    Raises ValueError for a mask of another shape.
    """
    return wide(values)[0].masked_fill(~require_mask(mask, values.shape), 0)


def surrogate_per_token(
    logprobs: Number[Tensor, "batch time"],
    old_logprobs: Number[Tensor, "batch time"],
    advantages: Number[Tensor, " batch"] | Number[Tensor, "batch time"],
    *,
    mask: Mask[Tensor, "batch time"],
    clip_eps: float | None = None,
) -> Float[Tensor, "batch time"]:
    """What each token contributes to the policy's loss, unreduced; 0 outside the mask.

    -rho A, rho = pi / pi_old; with clip_eps, PPO's -min(rho A, clip(rho, 1 - clip_eps, 1 + clip_eps) A).

    An advantage is one number a completion, or one a token. On-policy rho is 1 and only carries the gradient, so KDRL
    does not clip. Where A is 0, or rho is clipped, no gradient comes from rho, even where it overflows.
    Units: those of the advantage. Gradient: to logprobs; old_logprobs and advantages are detached.
    Raises ValueError if clip_eps is not in (0, 1), or for unequal shapes.
    """
    if clip_eps is not None and not 0 < clip_eps < 1:
        raise ValueError(f"received clip_eps {clip_eps}, expected one between 0 and 1, or None")
    if advantages.shape not in (mask.shape, mask.shape[:1]):
        expected = f"{tuple(mask.shape[:1])} or {tuple(mask.shape)}"
        raise ValueError(f"received advantages of shape {tuple(advantages.shape)}, expected {expected}")
    gaps = masked(logprobs, mask) - masked(old_logprobs, mask).detach()
    advantages = wide(advantages.detach())[0].to(gaps.dtype)
    advantages = masked((advantages if advantages.ndim == 2 else advantages[:, None]).expand_as(gaps), mask)
    gaps = gaps.masked_fill(advantages == 0, 0)
    ratio = gaps.exp()
    if clip_eps is not None:
        free = ratio.detach()
        bound = free.clamp(1 - clip_eps, 1 + clip_eps)
        clipped = bound * advantages < free * advantages
        ratio = torch.where(clipped, bound, gaps.masked_fill(clipped, 0).exp())
    return -(ratio * advantages)


def grpo_loss(
    logprobs: Number[Tensor, "batch time"],
    old_logprobs: Number[Tensor, "batch time"],
    advantages: Number[Tensor, " batch"] | Number[Tensor, "batch time"],
    *,
    mask: Mask[Tensor, "batch time"],
    clip_eps: float | None = None,
    normalise: str = "token",
    longest: int | None = None,
) -> Float[Tensor, ""]:
    """GRPO's loss on completions: `surrogate_per_token` summed at `token_weights`.

    -(1 / N) sum_it rho_it A_i, with the defaults (KDRL, J_GRPO).

    Its value says little: on-policy, with advantages that sum to 0 over rows of one length, it is 0. Its gradient is
    what trains.
    Units: those of the advantage. Gradient: to logprobs only.
    Raises ValueError for wrong options (see both parts) or a loss that is not finite.
    """
    weights = token_weights(mask, normalise=normalise, longest=longest)
    return weighted_sum(surrogate_per_token(logprobs, old_logprobs, advantages, mask=mask, clip_eps=clip_eps), weights)
