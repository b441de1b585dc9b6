"""GRPO and KDRL as sums over completions and tokens in plain Python floats, no torch operation."""

import math
import statistics


def advantages(rewards, scale):
    """Of one group."""
    if len(set(rewards)) == 1:
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    spread = statistics.stdev(rewards) + 1e-6 if scale == "std" else 1.0
    return [(r - mean) / spread for r in rewards]


def joint_loss(completions, *, kd_coef, clip_eps=None, normalise="token", longest=None, denominator="all"):
    """`completions` hold tokens (logprob, old, teacher's), an advantage, and whether the teacher is listened to."""
    tokens = sum(len(c["tokens"]) for c in completions)
    kept = [c for c in completions if c["keep"]]
    policy = kd = 0.0
    for c in completions:
        for now, old, teacher in c["tokens"]:
            rho = math.exp(now - old)
            gain = rho * c["advantage"]
            if clip_eps is not None:
                gain = min(gain, max(min(rho, 1 + clip_eps), 1 - clip_eps) * c["advantage"])
            size = {"token": tokens, "sequence": len(completions) * len(c["tokens"])}
            policy -= gain / (size[normalise] if normalise in size else len(completions) * longest)
            if c["keep"]:
                others = kept if denominator == "kept" else completions
                size = {"token": sum(len(o["tokens"]) for o in others), "sequence": len(others) * len(c["tokens"])}
                total = size[normalise] if normalise in size else len(others) * longest
                kd += rho * (teacher - now) ** 2 / 2 / total
    return policy + kd_coef * kd
