"""What is read off a run's curve, which holds a mean, or a validation score, a window of steps."""

import statistics

from limbeck.training.grpo import Curve

_EARLY = 0.25  # of the steps


def ends(steps: int, window: int) -> list[int]:
    """The last step of each window, counted from 1."""
    return [min(start + window, steps) for start in range(0, steps, window)]


def stopped(scores: list[float]) -> int:
    """The first window whose score is not above the best before it; the last one if every window rose."""
    falls = (at for at in range(1, len(scores)) if scores[at] <= max(scores[:at]))
    return next(falls, len(scores) - 1)


def summary(curve: Curve, *, steps: int, window: int, target: float) -> dict[str, float]:
    """How a run went: where it ended, how fast, how steadily. A target that is not reached counts as all steps.

    Rewards, tokens and lengths are those of the texts that the run learns from: for SFT, the teacher's. `norm_peak` is
    the largest gradient norm after the first window, over the median of the windows' means.
    """
    scores, rewards = curve["validation/accuracy"], curve["rollout/reward"]
    norms, peaks = curve["optimiser/gradient_norm"], curve["optimiser/gradient_norm_max"]
    kept = curve.get("kd/kept", [0.0])
    last = ends(steps, window)
    sizes = [end - start for start, end in zip([0, *last], last, strict=False)]
    tokens = [mean * size for mean, size in zip(curve["rollout/tokens"], sizes, strict=True)]
    reached = next((at for at, score in enumerate(scores) if score >= target), len(scores) - 1)
    early = [score for score, end in zip(scores, last, strict=True) if end <= _EARLY * steps] or scores[:1]
    return {
        "validation/accuracy": scores[-1],
        "validation/early": statistics.fmean(early),
        "validation/best": max(scores),
        "train/tokens": sum(tokens),
        "train/steps_to_target": float(last[reached]),
        "train/tokens_to_target": sum(tokens[: reached + 1]),
        "train/reward_drop": max(rewards) - rewards[-1],
        "train/norm_peak": max(peaks[1:] or peaks) / (statistics.median(norms) or 1.0),
        "kd/kept_change": kept[-1] - kept[0],
    }
