"""A comparison of arms on chain_sum, by seed: all on the same prompts, with the same random numbers for each sample.

Each method that mixes the teacher with the reward, and has no weight of its own, takes the one of `kd_coefs` with the
best validation accuracy after a run of `selection_seed` (`annealed` ones take their constant form's, by the paper's
ratios). `kd_then_rl` switches where `kd`, of the same seed, stopped rising on validation, and keeps Adam's moments.
Test splits are read after the last step and choose nothing.

In params, `kdrl 0.3 from weak by terse` is the method, the teacher's weight, the student and the teacher. All but the
method may be left out: the weight where it is chosen or there is none, the models where they are called student and
teacher. `train` and what else an arm takes serve `real_model` too.
"""

import functools
import re
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.experiments import runs
from limbeck.experiments.kdrl import starting_models
from limbeck.experiments.kdrl.problems import Chains, Problems
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.params import flat, one_of, positive
from limbeck.sampling import Tokens
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


def read_arm(written: str) -> WrittenArm:
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
    teacher_ends: Tokens | None = None,
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
    run = rollouts.Run(student, sampler, problems.verifier(), scorer, settings, dtype, teacher_ends)
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


@dataclass(frozen=True)
class Params:
    """What is compared, on which models, by which loop; arms are written as above."""

    starts: starting_models.Params
    loop: Loop
    arms: tuple[str, ...]
    kd_coefs: tuple[float, ...]
    selection_seed: int

    def __post_init__(self) -> None:
        for written, arm in zip(self.arms, self.read_arms, strict=True):
            for name in arm.pair.values():
                one_of(f"models of {written}", name, self.starts.names)
            if arm.weighs_teacher and arm.kd_coef is None and not self.kd_coefs:
                raise ValueError(f"received {written} without kd_coefs, expected its weight, or some to choose from")
            if arm.method == "kd_then_rl" and arm._replace(method="kd") not in self.read_arms:
                raise ValueError(f"received {written} among {self.arms}, expected kd too: it switches where kd stops")

    @property
    def read_arms(self) -> tuple[WrittenArm, ...]:
        """The arms, taken apart."""
        return tuple(map(read_arm, self.arms))


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The choices of the teacher's weight, then every arm by seed, then those that wait for another."""
    inputs = {name: value for name, value in flat(params).items() if name != "arms"}
    without_weight = [arm for arm in params.read_arms if arm.weighs_teacher and arm.kd_coef is None]
    final = []
    for seed in seeds:
        for arm in params.read_arms:
            weight = {} if arm.kd_coef is None else {"kd_coef": arm.kd_coef}
            coordinates = {"phase": "final", **arm.pair, "arm": arm.method, **weight, "seed": seed}
            final.append(Cell(coordinates, inputs, wave=2 if arm.method == "kd_then_rl" else 1))
    selection = []
    for arm in dict.fromkeys(arm._replace(method=_chooser(arm.method)) for arm in without_weight):
        for kd_coef in params.kd_coefs:
            weight = {"kd_coef": kd_coef, "seed": params.selection_seed}
            selection.append(Cell({"phase": "selection", **arm.pair, "arm": arm.method, **weight}, inputs))
    return sorted(selection + final, key=lambda cell: cell.wave)


def run(cell: Cell, params: Params, workspace: Workspace) -> Steps:
    """Train and score one cell; yields once per step."""
    coordinates, problems = cell.coordinates, Chains(params.starts.chains)
    name, folder = coordinates["arm"], workspace.checkpoints.parent / "table_starts"
    student, teacher = (
        starting_models.trained(params.starts, problems, folder, coordinates[role]).to(workspace.device)
        for role in ("student", "teacher")
    )
    if name in (START, TEACHER):
        model = student if name == START else teacher
        return (yield from only_score(model, problems, seed=coordinates["seed"], workspace=workspace))
    kd_coef = coefficient(coordinates, workspace.records)
    objective = functools.partial(objectives.objective, kd_coef=kd_coef)
    result = yield from train(
        coordinates, student, teacher, problems, params.loop, objective=objective, workspace=workspace
    )
    result.metrics["kd/coefficient"] = kd_coef
    return result


def coefficient(coordinates: dict[str, Any], records: Sequence[dict[str, Any]]) -> float:
    """The teacher's weight in a cell: its own, or the chosen one; if nothing is weighed, 1 with a teacher, else 0."""
    method = objectives.arm(coordinates["arm"])
    if not method.weighs_teacher:
        return float(method.asks_teacher)
    if "kd_coef" in coordinates:
        return coordinates["kd_coef"]
    pair = {role: coordinates[role] for role in ("student", "teacher")}
    where = {"phase": "selection", **pair, "arm": _chooser(coordinates["arm"])}
    return runs.best(records, where, "kd_coef", ["validation/accuracy"], highest=[True])


def _chooser(method: str) -> str:
    """The method whose choice a method takes: an annealed one that of its constant form."""
    if objectives.arm(method).schedule != "annealed":
        return method
    return "kdrl" if method == "annealed" else method.removesuffix("_annealed")
