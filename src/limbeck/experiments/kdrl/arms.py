"""The arms of KDRL's comparisons: how they are written in params, the loop that trains one, and what its curve says.

`kdrl 0.3 from weak by terse` is the method, the teacher's weight, the student and the teacher. All but the method may
be left out: the weight where it is chosen or there is none, the models where they are called student and teacher.
"""

import re
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.experiments import runs
from limbeck.experiments.kdrl.problems import Problems
from limbeck.experiments.runs import Result, Workspace
from limbeck.params import positive
from limbeck.training import grpo, objectives, rollouts
from limbeck.training.grpo import Curve, Objective
from limbeck.training.rollouts import Problem

START, TEACHER = "start", "teacher"  # methods that are not trained
_WRITTEN = re.compile(r"(?P<method>\w+)( (?P<kd_coef>[\d.e-]+))?( from (?P<student>\w+))?( by (?P<teacher>\w+))?")
_EARLY = 0.25  # of the steps
Steps = Generator[dict[str, float], None, Result]


class WrittenArm(NamedTuple):
    """One arm of a comparison; a weight of None is chosen, or there is none."""

    student: str
    teacher: str
    method: str
    kd_coef: float | None

    @property
    def weighs_teacher(self) -> bool:
        """Whether a weight of the teacher belongs to it, written or chosen."""
        return self.method not in (START, TEACHER) and objectives.arm(self.method).weighs_teacher

    @property
    def pair(self) -> dict[str, str]:
        """The coordinates of its models."""
        return {"student": self.student, "teacher": self.teacher}


def read(written: str) -> WrittenArm:
    """One arm. Raises ValueError for one that is not written so, an unknown method, or a weight where none counts."""
    parts = _WRITTEN.fullmatch(written)
    if parts is None:
        raise ValueError(f"received arm {written!r}, expected `method`, `method 0.3`, `... from student by teacher`")
    if parts["method"] not in (START, TEACHER):
        objectives.arm(parts["method"])
    kd_coef = None if parts["kd_coef"] is None else float(parts["kd_coef"])
    arm = WrittenArm(parts["student"] or "student", parts["teacher"] or "teacher", parts["method"], kd_coef)
    if kd_coef is not None and not arm.weighs_teacher:
        raise ValueError(f"received arm {written!r}, expected no weight: nothing is weighed in it")
    return arm


@dataclass(frozen=True)
class Loop:
    """How an arm is trained and watched; a curve's windows have `save_every` steps, `target` is of their scores."""

    steps: int
    prompts: int
    group_size: int
    learning_rate: float
    clip_norm: float
    micro_tokens: int
    save_every: int
    measure_every: int
    validation_samples: int
    target: float

    def __post_init__(self) -> None:
        positive(steps=self.steps, prompts=self.prompts, validation_samples=self.validation_samples)

    @property
    def window_ends(self) -> list[int]:
        """The last step of each window of a curve, counted from 1."""
        return [min(start + self.save_every, self.steps) for start in range(0, self.steps, self.save_every)]

    def settings(self, *, longest: int, seed: int) -> rollouts.Settings:
        """Those of the loop for one seed."""
        return rollouts.Settings(
            group_size=self.group_size,
            longest=longest,
            seed=seed,
            learning_rate=self.learning_rate,
            clip_norm=self.clip_norm,
            save_every=self.save_every,
            micro_tokens=self.micro_tokens,
            split_every=self.measure_every,
        )


def train(
    coordinates: dict[str, Any],
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    problems: Problems,
    loop: Loop,
    *,
    objective: Callable[..., Objective],
    workspace: Workspace,
) -> Steps:
    """Train the student by the arm at these coordinates; in a final cell, then score it on the test splits.

    `objective` is `objectives.objective` with all but what the loop knows. For SFT the teacher writes the texts, and
    scores none. A seed fixes the prompts of every step and the random numbers of every sample, for every arm.
    """
    method, seed, dtype = objectives.arm(coordinates["arm"]), coordinates["seed"], workspace.dtype
    switch = switch_step(coordinates, workspace.records, loop) if method.schedule == "switch" else None
    sampler = problems.sampler(student if method.texts == "own" else teacher, dtype)
    scorer = teacher if method.asks_teacher else None
    settings = loop.settings(longest=problems.params.longest, seed=seed)
    run = rollouts.Run(student, sampler, problems.verifier(), scorer, settings, dtype)
    minimised = objective(method, steps=loop.steps, switch=switch, measure_every=loop.measure_every)

    def measure() -> dict[str, float]:
        return problems.validation_scores(student, samples=loop.validation_samples, dtype=dtype)

    weights, prompts = models.trainable(student), step_problems(problems, loop, seed)
    curve = yield from grpo.fit(run, weights, prompts, minimised, state=workspace.state, measure=measure)
    metrics = summary(curve, loop) | ({} if switch is None else {"kd/switch": float(switch)})
    if coordinates["phase"] == "final":
        metrics |= problems.test_scores(student, seed=seed, dtype=dtype)
    return runs.result(metrics, curve, weights=weights, dtype=dtype)


def only_score(model: PreTrainedModel, problems: Problems, *, seed: int, workspace: Workspace) -> Steps:
    """The cell of `start` or `teacher`: one step, in which nothing is trained, then the scores on the test splits."""
    yield {"step": 1, "steps": 1}
    dtype = workspace.dtype
    return runs.result(problems.test_scores(model, seed=seed, dtype=dtype), dtype=dtype)


def step_problems(problems: Problems, loop: Loop, seed: int) -> list[list[Problem]]:
    """The problems of every step."""
    source = seeding.generator(seed, "prompts")
    batches = rollouts.batches(len(problems.train), size=loop.prompts, steps=loop.steps, source=source)
    return [[problems.problem(problems.train[row]) for row in rows] for rows in batches]


def switch_step(coordinates: dict[str, Any], records: Sequence[dict[str, Any]], loop: Loop) -> int:
    """The step at which `kd`, at else the same coordinates, stopped rising on the validation split.

    That is the end of the first window whose score is not above the best before it; of the last if every window rose.
    """
    (record,) = (record for record in records if record["cell"] == coordinates | {"arm": "kd"})
    scores = record["curve"]["validation/accuracy"]
    falls = (window for window in range(1, len(scores)) if scores[window] <= max(scores[:window]))
    return loop.window_ends[next(falls, len(scores) - 1)]


def summary(curve: Curve, loop: Loop) -> dict[str, float]:
    """How a run went: where it ended, how fast, how steadily. A target that is not reached counts as all steps.

    Rewards, tokens and lengths are those of the texts that the run learns from: for SFT, the teacher's. `norm_peak` is
    the largest gradient norm after the first window, over the median of the windows' means.
    """
    scores, rewards = curve["validation/accuracy"], curve["rollout/reward"]
    norms, peaks = curve["optimiser/gradient_norm"], curve["optimiser/gradient_norm_max"]
    kept = curve.get("kd/kept", [0.0])
    ends = loop.window_ends
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    tokens = [mean * size for mean, size in zip(curve["rollout/tokens"], sizes, strict=True)]
    reached = next((index for index, score in enumerate(scores) if score >= loop.target), len(scores) - 1)
    early = [score for score, end in zip(scores, ends, strict=True) if end <= _EARLY * loop.steps] or scores[:1]
    return {
        "validation/accuracy": scores[-1],
        "validation/early": statistics.fmean(early),
        "validation/best": max(scores),
        "train/tokens": sum(tokens),
        "train/steps_to_target": float(ends[reached]),
        "train/tokens_to_target": sum(tokens[: reached + 1]),
        "train/reward_drop": max(rewards) - rewards[-1],
        "train/norm_peak": max(peaks[1:] or peaks) / (statistics.median(norms) or 1.0),
        "kd/kept_change": kept[-1] - kept[0],
    }
