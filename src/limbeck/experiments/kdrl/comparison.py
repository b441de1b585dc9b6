"""A comparison of arms on chain_sum, by seed: all on the same prompts, with the same random numbers for each sample.

Each method that mixes the teacher with the reward, and has no weight of its own, takes the one of `kd_coefs` with the
best validation accuracy after a run of `selection_seed` (`annealed` ones take their constant form's, by the paper's
ratios). `kd_then_rl` switches where `kd`, of the same seed, stopped rising on validation, and keeps Adam's moments.
Test splits are read after the last step and choose nothing.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limbeck.experiments import runs
from limbeck.experiments.kdrl import arms, starting_models
from limbeck.experiments.kdrl.arms import START, TEACHER, Loop, Steps, WrittenArm
from limbeck.experiments.kdrl.problems import Chains
from limbeck.experiments.runs import Cell, Workspace
from limbeck.params import flat, one_of
from limbeck.training import objectives


@dataclass(frozen=True)
class Params:
    """What is compared, on which models, by which loop; arms are written as `arms` says."""

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
        return tuple(map(arms.read, self.arms))


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
        return (yield from arms.only_score(model, problems, seed=coordinates["seed"], workspace=workspace))
    kd_coef = coefficient(coordinates, workspace.records)
    objective = functools.partial(objectives.objective, kd_coef=kd_coef)
    result = yield from arms.train(
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
