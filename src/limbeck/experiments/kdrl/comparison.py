"""A comparison of arms on chain_sum, by seed: all on the same prompts, with the same random numbers for each sample.

Each method that mixes the teacher with the reward, and has no weight of its own, takes the one of `kd_coefs` with the
best validation accuracy after a run of `selection_seed` (`annealed` ones take their constant form's, by the paper's
ratios). `kd_then_rl` switches where `kd`, of the same seed, stopped rising on validation, and keeps Adam's moments.
Test splits are read after the last step and choose nothing.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.experiments.kdrl import arms, curves, starting_models
from limbeck.experiments.kdrl.arms import START, TEACHER, WrittenArm
from limbeck.experiments.kdrl.chains import FAMILIES, Chains
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.params import one_of, positive
from limbeck.sampling import Sampled
from limbeck.training import grpo, learner, objectives, rollouts
from limbeck.training.objectives import Arm
from limbeck.training.rollouts import Problem

Steps = Generator[dict[str, float], None, Result]


@dataclass(frozen=True)
class Params(starting_models.Section):
    """The section of params/kdrl.yaml; sources stand there. Arms are written as `arms` says."""

    arms: tuple[str, ...]
    kd_coefs: tuple[float, ...]
    selection_seed: int
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
        """Check what no type can."""
        super().__post_init__()
        for written, line in zip(self.arms, self.lines, strict=True):
            for name in line.pair.values():
                one_of(f"models of {written}", name, self.names)
            if line.mixed and line.kd_coef is None and not self.kd_coefs:
                raise ValueError(f"received {written} without kd_coefs, expected its weight, or some to choose from")
            if line.method == "kd_then_rl" and line._replace(method="kd") not in self.lines:
                raise ValueError(f"received {written} among {self.arms}, expected kd too: it switches where kd stops")
        positive(steps=self.steps, prompts=self.prompts, validation_samples=self.validation_samples)

    @property
    def lines(self) -> tuple[WrittenArm, ...]:
        """The arms, read."""
        return tuple(map(arms.read, self.arms))


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The choices of the teacher's weight, then every arm by seed, then those that wait for another."""
    inputs = {name: value for name, value in asdict(params).items() if name != "arms"}
    chosen = [line for line in params.lines if line.mixed and line.kd_coef is None]
    choosers = dict.fromkeys(line._replace(method=_chooser(line.method)) for line in chosen)
    found = [
        Cell(
            {"phase": "selection", **line.pair, "arm": line.method, "kd_coef": coef, "seed": params.selection_seed},
            inputs,
        )
        for line in choosers
        for coef in params.kd_coefs
    ]
    for seed in seeds:
        for line in params.lines:
            weighed = {} if line.kd_coef is None else {"kd_coef": line.kd_coef}
            at = {"phase": "final", **line.pair, "arm": line.method, **weighed, "seed": seed}
            found.append(Cell(at, inputs, wave=2 if line.method == "kd_then_rl" else 1))
    return sorted(found, key=lambda cell: cell.wave)


def _chooser(method: str) -> str:
    """The method whose choice a method takes: an annealed one that of its constant form."""
    if objectives.arm(method).schedule != "annealed":
        return method
    return "kdrl" if method == "annealed" else method.removesuffix("_annealed")


def run(cell: Cell, params: Params, place: Workspace) -> Steps:
    """Train and score one cell; yields once a step."""
    at, data = cell.coordinates, Chains(params)
    folder = place.checkpoints.parent / "table_starts"
    pair = {name: at[name] for name in ("student", "teacher")}
    student, teacher = (starting_models.model_of(params, data, folder, name).to(place.device) for name in pair.values())
    dtype = models.precision(place.precision, width=student.config.hidden_size, where=place.device)
    if at["arm"] in (START, TEACHER):
        yield {"step": 1, "steps": 1}
        model = student if at["arm"] == START else teacher
        return Result(data.test_scores(model, seed=at["seed"], dtype=dtype), dtype=_spelled(dtype))
    method = objectives.arm(at["arm"])
    coef = (
        _coefficient(at, place)
        if WrittenArm(**pair, method=at["arm"], kd_coef=None).mixed
        else float(method.asks_teacher)
    )
    switch = _switch(at, params, place) if method.schedule == "switch" else None
    aim = objectives.objective(
        method, kd_coef=coef, steps=params.steps, switch=switch, measure_every=params.measure_every
    )
    runner = _runner(method, student, teacher, data, params, seed=at["seed"], dtype=dtype)
    weights = models.trainable(student)

    def measure() -> dict[str, float]:
        scores = data.measure(student, data.validation, samples=params.validation_samples, seed=0, dtype=dtype)
        return {f"validation/{name}": value for name, value in scores.items()}

    curve = yield from grpo.fit(
        runner, weights, _problems(data, params, at["seed"]), aim, state=place.state, measure=measure
    )
    metrics = curves.summary(curve, steps=params.steps, window=params.save_every, target=params.target)
    metrics |= {"kd/coefficient": coef} | ({} if switch is None else {"kd/switch": float(switch)})
    if at["phase"] == "final":
        metrics |= data.test_scores(student, seed=at["seed"], dtype=dtype)
    return Result(metrics, curve, sum(weight.numel() for weight in weights.values()), _spelled(dtype))


def _spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _runner(
    method: Arm,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Chains,
    params: Params,
    *,
    seed: int,
    dtype: torch.dtype,
) -> learner.Run:
    """The loop's view of a cell. For SFT the teacher is the sampler, and nothing is scored by it."""
    writer = student if method.texts == "own" else teacher
    settings = learner.Settings(
        group_size=params.group_size,
        longest=params.longest,
        seed=seed,
        learning_rate=params.learning_rate,
        clip_norm=params.clip_norm,
        save_every=params.save_every,
        micro_tokens=params.micro_tokens,
        split_every=params.measure_every,
    )
    verify = data.verifier(data.train[FAMILIES[0]])
    scorer = teacher if method.asks_teacher else None
    return learner.Run(student, Sampled(writer, data.end, dtype=dtype), verify, scorer, settings, dtype)


def _problems(data: Chains, params: Params, seed: int) -> list[list[Problem]]:
    """The prompts of every step."""
    pool, source = data.train[FAMILIES[0]], seeding.generator(seed, "prompts")
    drawn = rollouts.batches(len(pool), size=params.prompts, steps=params.steps, source=source)
    return [[data.problem(pool[row]) for row in rows] for rows in drawn]


def _coefficient(at: dict[str, Any], place: Workspace) -> float:
    """The teacher's weight in a cell: its own, or the chosen one, of equals the smallest."""
    if "kd_coef" in at:
        return at["kd_coef"]
    wanted = {"phase": "selection", "student": at["student"], "teacher": at["teacher"], "arm": _chooser(at["arm"])}
    tried = [record for record in place.records if wanted.items() <= record["cell"].items()]
    best = max(tried, key=lambda record: (record["metrics"]["validation/accuracy"], -record["cell"]["kd_coef"]))
    return best["cell"]["kd_coef"]


def _switch(at: dict[str, Any], params: Params, place: Workspace) -> int:
    """The step at which `kd`, of the same seed, stopped rising on the validation split."""
    (record,) = (record for record in place.records if record["cell"] == {**at, "arm": "kd"})
    return curves.ends(params.steps, params.save_every)[curves.stopped(record["curve"]["validation/accuracy"])]
