"""The completions of a training step, and what is known of them before any gradient."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from limbeck.sampling import Tokens


class Problem(NamedTuple):
    """A prompt, and the name of its stream of random numbers."""

    prompt: Tokens
    name: str | int


class Verdict(NamedTuple):
    """What a verifier says of one completion; the reward of one that it could not judge is NaN."""

    reward: float
    correct: bool


Metrics = dict[str, float]


def batches(count: int, *, size: int, steps: int, source: torch.Generator) -> list[list[int]]:
    """The rows of each step, epoch after epoch in a drawn order; what fills no step at an epoch's end is left out.

    So no row comes twice in a step, where its samples would be the same. Raises ValueError for more than there are.
    """
    if not 1 <= size <= count:
        raise ValueError(f"received {size} rows a step, expected 1 to {count}, of which none comes twice in a step")
    rows_by_step: list[list[int]] = []
    while len(rows_by_step) < steps:
        order = torch.randperm(count, generator=source).tolist()
        rows_by_step += [order[start : start + size] for start in range(0, count - size + 1, size)]
    return rows_by_step[:steps]


@dataclass(frozen=True)
class Rollout:
    """The completions of a step, one row each, and what is known of them before any gradient."""

    prompts: list[Tokens]
    completions: list[Tokens]
    mask: Bool[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch time"]
    ended: Bool[Tensor, " batch"]
    rewards: Float[Tensor, "prompt group"]
    correct: Bool[Tensor, "prompt group"]
    teacher_logprobs: Float[Tensor, "batch time"] | None = None

    @property
    def metrics(self) -> Metrics:
        """Means over the step, of rewards over what was judged."""
        judged = self.rewards.isfinite()
        low, high = (self.rewards.masked_fill(~judged, end).aminmax(dim=1) for end in (torch.inf, -torch.inf))
        lengths = self.mask.sum(1).double()
        return {
            "rollout/reward": self.rewards[judged].double().mean().item(),
            "rollout/accuracy": self.correct[judged].double().mean().item(),
            "rollout/unjudged": (~judged).double().mean().item(),
            "rollout/equal_groups": (low.min >= high.max).double().mean().item(),
            "rollout/length": lengths.mean().item(),
            "rollout/ended": self.ended.double().mean().item(),
            "rollout/tokens": lengths.sum().item(),
        }

    def to(self, device: torch.device) -> "Rollout":
        """The same with its tensors on a device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def merged(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of all rows, in their order, padded to the longest."""
    longest = max(part.mask.shape[1] for part in parts)

    def wide(name: str) -> Tensor:
        return torch.cat([nn.functional.pad(x, (0, longest - x.shape[1])) for x in (getattr(p, name) for p in parts)])

    return Rollout(
        [prompt for part in parts for prompt in part.prompts],
        [completion for part in parts for completion in part.completions],
        wide("mask"),
        wide("old_logprobs"),
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("ended", "rewards", "correct")),
        None if parts[0].teacher_logprobs is None else wide("teacher_logprobs"),
    )


def micro_batches(rollout: Rollout, rows: Sequence[int], tokens: int) -> list[Int[Tensor, " row"]]:
    """Some rows, in batches of like length of at most so many tokens with padding, or of one row."""
    lengths = {row: len(rollout.prompts[row]) + len(rollout.completions[row]) for row in rows}
    batches: list[list[int]] = [[]]
    for row in sorted(rows, key=lengths.__getitem__):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[row] > tokens:
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]
