"""A comparison of arms on chain_sum: students x teachers x arms x seeds, all with the same start and prompts.

A seed fixes every step's prompts and every sample's random numbers, for every arm. Each arm that mixes the teacher with
the reward has its weight chosen from `kd_coefs`, where there are several, by validation accuracy after a run of
`selection_seed` (`annealed` arms take their constant form's, by the paper's ratios); with `sweep`, the whole grid is
run instead. `kd_then_rl` switches where `kd`, of the same seed, stopped rising on validation, and keeps Adam's moments.
Test splits are read after the last step and choose nothing.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.experiments.cells import Cell, Place, Result
from limbeck.experiments.kdrl import curves, objective, table_starts
from limbeck.experiments.kdrl.chains import FAMILIES, Chains
from limbeck.experiments.kdrl.objective import Arm
from limbeck.params import one_of, positive
from limbeck.sampling import Sampled
from limbeck.training import grpo, learner, rollouts
from limbeck.training.rollouts import Problem

Steps = Generator[dict[str, float], None, Result]
_START, _TEACHER = "start", "teacher"  # arms that are not trained
_NOT_INPUTS = ("students", "teachers", "arms")


@dataclass(frozen=True)
class Params(table_starts.Section):
    """The section of params/kdrl.yaml; sources stand there."""

    students: tuple[str, ...]
    teachers: tuple[str, ...]
    arms: tuple[str, ...]
    kd_coefs: tuple[float, ...]
    sweep: bool
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
        for name in (*self.students, *self.teachers):
            one_of("model", name, self.names)
        for arm in set(self.arms) - {_START, _TEACHER}:
            objective.arm(arm)
        if "kd_then_rl" in self.arms and "kd" not in self.arms:
            raise ValueError(f"received arms {self.arms}, expected kd among them: kd_then_rl switches where it stops")
        positive(steps=self.steps, prompts=self.prompts, validation_samples=self.validation_samples)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The choice of the teacher's weight, then every arm by seed, then the arm that waits for another."""
    inputs = {name: value for name, value in asdict(params).items() if name not in _NOT_INPUTS}
    found = []
    for student in params.students:
        for teacher in params.teachers:
            pair = {"student": student, "teacher": teacher}
            found += _selection(params, pair, inputs) if len(params.kd_coefs) > 1 and not params.sweep else []
            found += [cell for seed in seeds for cell in _final(params, pair, inputs, seed)]
    return sorted(found, key=lambda cell: cell.turn)


def _selection(params: Params, pair: dict[str, Any], inputs: dict[str, Any]) -> list[Cell]:
    choosers = dict.fromkeys(_chooser(arm) for arm in params.arms if _mixed(arm))
    at = {"phase": "selection", **pair}
    return [
        Cell({**at, "arm": arm, "kd_coef": coef, "seed": params.selection_seed}, inputs)
        for arm in choosers
        for coef in params.kd_coefs
    ]


def _final(params: Params, pair: dict[str, Any], inputs: dict[str, Any], seed: int) -> list[Cell]:
    found = []
    for arm in params.arms:
        turn = 2 if arm == "kd_then_rl" else 1
        coefs = params.kd_coefs if params.sweep and _mixed(arm) else (None,)
        for coef in coefs:
            swept = {} if coef is None else {"kd_coef": coef}
            found.append(Cell({"phase": "final", **pair, "arm": arm, **swept, "seed": seed}, inputs, turn=turn))
    return found


def _mixed(arm: str) -> bool:
    """Whether an arm weighs the teacher against the reward at a constant or annealed weight."""
    if arm in (_START, _TEACHER):
        return False
    method = objective.arm(arm)
    return method.reward and method.taught and method.schedule != "switch"


def _chooser(arm: str) -> str:
    """The arm whose choice an arm takes: an annealed one that of its constant form."""
    if objective.arm(arm).schedule != "annealed":
        return arm
    return "kdrl" if arm == "annealed" else arm.removesuffix("_annealed")


def run(cell: Cell, params: Params, place: Place) -> Steps:
    """Train and score one cell; yields once a step."""
    at, data = cell.coordinates, Chains(params)
    folder = place.checkpoints.parent / "table_starts"
    student, teacher = (
        table_starts.model_of(params, data, folder, at[name]).to(place.device) for name in ("student", "teacher")
    )
    dtype = models.precision(place.precision, width=student.config.hidden_size, where=place.device)
    if at["arm"] in (_START, _TEACHER):
        yield {"step": 1, "steps": 1}
        model = student if at["arm"] == _START else teacher
        return Result(data.test_scores(model, seed=at["seed"], dtype=dtype), dtype=_spelled(dtype))
    method = objective.arm(at["arm"])
    coef = _coefficient(at, params, place) if _mixed(at["arm"]) else float(method.taught)
    switch = _switch(at, params, place) if method.schedule == "switch" else None
    aim = objective.of(method, kd_coef=coef, steps=params.steps, switch=switch, measure_every=params.measure_every)
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
    scorer = teacher if method.taught else None
    return learner.Run(student, Sampled(writer, data.end, dtype=dtype), verify, scorer, settings, dtype)


def _problems(data: Chains, params: Params, seed: int) -> list[list[Problem]]:
    """The prompts of every step."""
    pool, source = data.train[FAMILIES[0]], seeding.generator(seed, "prompts")
    drawn = rollouts.batches(len(pool), size=params.prompts, steps=params.steps, source=source)
    return [[data.problem(pool[row]) for row in rows] for rows in drawn]


def _coefficient(at: dict[str, Any], params: Params, place: Place) -> float:
    """The teacher's weight in a cell: its own where it is swept or tried, else the chosen one."""
    if "kd_coef" in at:
        return at["kd_coef"]
    if len(params.kd_coefs) == 1:
        return params.kd_coefs[0]
    wanted = {"phase": "selection", "student": at["student"], "teacher": at["teacher"], "arm": _chooser(at["arm"])}
    tried = [record for record in place.records if wanted.items() <= record["cell"].items()]
    best = max(tried, key=lambda record: (record["metrics"]["validation/accuracy"], -record["cell"]["kd_coef"]))
    return best["cell"]["kd_coef"]


def _switch(at: dict[str, Any], params: Params, place: Place) -> int:
    """The step at which `kd`, of the same seed, stopped rising on the validation split."""
    (record,) = (record for record in place.records if record["cell"] == {**at, "arm": "kd"})
    return curves.ends(params.steps, params.save_every)[curves.stopped(record["curve"]["validation/accuracy"])]
