"""A policy in training with those around it: who samples, who judges, who teaches; and what is known of a step.

A step's completions are a `Rollout`, all that is known of them before any gradient. Where there are several processes,
as accelerate or torchrun start them, each samples and judges its own prompts, and all know the whole rollout.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed, nn

from limbeck import models, sampling
from limbeck.losses.masking import Mask, require_mask
from limbeck.sampling import Decoder, Sampler, Tokens

T = TypeVar("T")


def process_count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def chunk(items: Sequence[T]) -> Sequence[T]:
    """This process's part of the items; all parts in the order of the processes are the items.

    Raises ValueError where there are fewer items than processes.
    """
    if len(items) < process_count():
        raise ValueError(f"received {len(items)} items for {process_count()} processes, expected at least one each")
    return items[len(items) * process_rank() // process_count() : len(items) * (process_rank() + 1) // process_count()]


def gathered(part: T) -> list[T]:
    """What each process gives, in their order, on all of them."""
    parts: list[T] = [part] * process_count()
    if process_count() > 1:
        distributed.all_gather_object(parts, part)
    return parts


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if process_count() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)


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
    mask: Mask[Tensor, "batch time"]
    old_logprobs: Float[Tensor, "batch time"]
    ended: Mask[Tensor, " batch"]
    rewards: Float[Tensor, "prompt group"]
    correct: Mask[Tensor, "prompt group"]
    teacher_logprobs: Float[Tensor, "batch time"] | None = None
    teacher_mask: Mask[Tensor, "batch time"] | None = None

    @property
    def taught(self) -> Mask[Tensor, "batch time"]:
        """The mask of the tokens in which a teacher has a say."""
        return self.mask if self.teacher_mask is None else self.teacher_mask

    def __post_init__(self) -> None:
        """What selects becomes boolean. Raises ValueError for a value that is neither 0 nor 1."""
        for name in ("mask", "ended", "correct"):
            values = getattr(self, name)
            object.__setattr__(self, name, require_mask(values, values.shape, f"mask `{name}`"))

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
        *(None if getattr(parts[0], name) is None else wide(name) for name in ("teacher_logprobs", "teacher_mask")),
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


@dataclass(frozen=True)
class Scores:
    """What the policy says, with gradient, of some rows of a rollout; and the teacher, at the same tokens, if asked."""

    rows: Int[Tensor, " row"]
    mask: Mask[Tensor, "row time"]
    logprobs: Float[Tensor, "row time"]
    logits: Float[Tensor, "token vocab"]
    teacher_logits: Callable[[], Float[Tensor, "token vocab"]]

    def __post_init__(self) -> None:
        """The mask becomes boolean. Raises ValueError for a value that is neither 0 nor 1."""
        object.__setattr__(self, "mask", require_mask(self.mask, self.logprobs.shape))

    def restored(self, values: Float[Tensor, " token"]) -> Float[Tensor, "row time"]:
        """Values of the tokens at their places, 0 elsewhere."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


@dataclass(frozen=True)
class Settings:
    """How a run samples and steps; with `updates` above 1, all but the first are off-policy."""

    group_size: int
    longest: int
    seed: int
    learning_rate: float
    clip_norm: float
    save_every: int
    micro_tokens: int
    updates: int = 1
    split_every: int = 10

    def __post_init__(self) -> None:
        """Raise ValueError for a group of one and for what must be above 0."""
        if self.group_size < 2:
            raise ValueError(f"received group_size {self.group_size}, expected at least two completions a prompt")
        for name, value in dataclasses.asdict(self).items():
            if name != "seed" and not value > 0:
                raise ValueError(f"received {name} {value}, expected {name} > 0")


@dataclass(frozen=True)
class Run:
    """A policy in training, who samples for it, who judges, and who teaches.

    `teacher_ends` are the tokens with which the teacher ends a text (`language.end_tokens`), where they may be others
    than the policy's: it has no say in an end that is none of its own, and would else teach never to end.
    """

    policy: Decoder
    sampler: Sampler
    verify: Callable[[Problem, Tokens], Verdict]
    teacher: Decoder | None
    settings: Settings
    dtype: torch.dtype = torch.float32
    teacher_ends: Tokens | None = None

    def score(self, rollout: Rollout, rows: Tensor) -> Scores:
        """What policy and teacher say of some rows, at the sampling temperature."""
        prompts, completions = (
            [parts[row] for row in rows.tolist()] for parts in (rollout.prompts, rollout.completions)
        )

        def logits_of(model: Decoder) -> tuple[Tensor, Tensor]:
            with models.autocast(model.device, self.dtype):
                return sampling.completion_logits(model, prompts, completions, temperature=self.sampler.temperature)

        @torch.no_grad()
        def teacher_logits() -> Tensor:
            if self.teacher is None:
                raise ValueError("received no teacher, expected one: a term reads its logits")
            with models.evaluating(self.teacher):
                return logits_of(self.teacher)[0]

        logits, mask = logits_of(self.policy)
        wider = (0, rollout.mask.shape[1] - mask.shape[1])
        logprobs = nn.functional.pad(sampling.completion_logprobs(logits, mask, completions), wider)
        return Scores(rows, nn.functional.pad(mask, wider), logprobs, logits, teacher_logits)

    def roll(self, problems: Sequence[Problem], step: int) -> Rollout:
        """Sample, judge and let the teacher score. Raises ValueError for a reward that is not finite, or no verdict."""
        device = self.policy.device
        parts = gathered(self._roll(chunk(problems), step).to(torch.device("cpu")))
        rollout = merged(parts).to(device)
        if not rollout.rewards.isfinite().any():
            raise ValueError(f"received no verdict on {len(rollout.completions)} completions, expected one that works")
        return rollout

    def _roll(self, problems: Sequence[Problem], step: int) -> Rollout:
        """The part of a rollout that belongs to some problems."""
        size, prompts = self.settings.group_size, [problem.prompt for problem in problems]
        names = [f"{step}/{problem.name}" for problem in problems]
        longest, seed = self.settings.longest, self.settings.seed
        sampled = self.sampler(prompts, names, group_size=size, longest=longest, seed=seed)
        rows = sampled.rows()
        verdicts = [_judged(self.verify, problems[row // size], tokens) for row, tokens in enumerate(rows)]
        rewards, correct = (torch.tensor(x).unflatten(0, (-1, size)) for x in zip(*verdicts, strict=True))
        repeated = [prompt for prompt in prompts for _ in range(size)]
        rollout = Rollout(repeated, rows, sampled.mask, sampled.logprobs, sampled.ended, rewards.float(), correct)
        if self.teacher is None:
            return rollout
        rollout = dataclasses.replace(rollout, teacher_logprobs=self._teacher_logprobs(rollout))
        if self.teacher_ends is None:
            return rollout
        mask = rollout.mask.clone()
        for row, tokens in enumerate(rows):
            mask[row, len(tokens) - 1] &= not rollout.ended[row] or tokens[-1] in self.teacher_ends
        logprobs = torch.where(mask, rollout.teacher_logprobs, rollout.old_logprobs)
        return dataclasses.replace(rollout, teacher_logprobs=logprobs, teacher_mask=mask)

    @torch.no_grad()
    def _teacher_logprobs(self, rollout: Rollout) -> Tensor:
        """The teacher's log-probability of every token."""
        scorer, logprobs = dataclasses.replace(self, policy=self.teacher), torch.zeros_like(rollout.old_logprobs)
        with models.evaluating(self.teacher):
            for rows in micro_batches(rollout, range(len(rollout.completions)), self.settings.micro_tokens):
                logprobs[rows] = scorer.score(rollout, rows).logprobs
        return logprobs


def _judged(verify: Callable[[Problem, Tokens], Verdict], problem: Problem, tokens: Tokens) -> Verdict:
    try:
        verdict = verify(problem, tokens)
    except Exception:  # whatever it is: counted, and reported as rollout/unjudged
        return Verdict(float("nan"), correct=False)
    if not math.isfinite(verdict.reward):
        raise ValueError(f"received the reward {verdict.reward} for problem {problem.name!r}, expected a finite one")
    return verdict
