"""One hyperparameter of SinKD at a time around a centre: one task, one student, every setting by seed.

Nothing is chosen: each term has the weight that matches its gradient norm to CE's on the untrained student, at its
setting, times a fixed multiple. So an axis shows the shape of the term, and the axis `strength` how much of it.
`group` is the number of samples an OT problem holds, cut from the same training batch: the batch size of SinKD without
that of the optimiser.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from limbeck import assets
from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import arms, distillation, encoder
from limbeck.params import one_of, positive

AXES = ("epsilon", "iterations", "temperature", "group", "p", "strength")
CENTRE = "centre"
_NOT_INPUTS = ("arms", *(f"{axis}_values" for axis in AXES))


@dataclass(frozen=True)
class Params(encoder.Section):
    """The section of params/sinkd.yaml; sources stand there."""

    task: str
    student: str
    arms: tuple[str, ...]
    kl_strength: float
    strength: float
    epsilon_values: tuple[float, ...]
    iterations_values: tuple[int, ...]
    temperature_values: tuple[float, ...]
    group_values: tuple[int, ...]
    p_values: tuple[int, ...]
    strength_values: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        encoder.layers_of(self.student)
        for arm in self.arms:
            arms.added(arm)
        for axis in AXES:
            for value in getattr(self, f"{axis}_values"):
                positive(**{axis: value})
        for p in self.p_values:
            one_of("p", p, (1, 2))


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then every setting by seed; arms without transport are run at the centre alone."""
    names = {field.name for field in dataclasses.fields(Params)} - set(_NOT_INPUTS)
    inputs = {name: getattr(params, name) for name in sorted(names)}
    inputs |= {"assets": assets.checksums(params.model, params.task)}
    teacher = {"axis": "teacher", "value": 0, "arm": "teacher", "seed": params.teacher_seed}
    found = [Cell(teacher, inputs, (distillation.outputs_file(params.task),))]
    for seed in seeds:
        for arm in params.arms:
            found.append(Cell({"axis": CENTRE, "value": 0, "arm": arm, "seed": seed}, inputs, wave=1))
            if set(arms.added(arm)) & set(arms.BATCH_WISE):
                found += [
                    Cell({"axis": axis, "value": value, "arm": arm, "seed": seed}, inputs, wave=1)
                    for axis in AXES
                    for value in getattr(params, f"{axis}_values")
                    if value != getattr(params, axis)
                ]
    return found


def run(cell: Cell, params: Params, place: Workspace) -> distillation.Steps:
    """Train and score one setting; yields once a step."""
    at: dict[str, Any] = cell.coordinates
    if at["axis"] == "teacher":
        return (yield from distillation.train_teacher(params, params.task, place))
    section = params if at["axis"] == CENTRE else dataclasses.replace(params, **{at["axis"]: at["value"]})
    student = distillation.start(section, params.task, place, seed=at["seed"], student=params.student)
    outputs = distillation.load_outputs(place, distillation.outputs_file(params.task))
    weights = [
        distillation.matched(student, name, outputs) * (section.kl_strength if name == "kl" else section.strength)
        for name in arms.added(at["arm"])
    ]
    curve = yield from student.fit(distillation.taught(student, at["arm"], weights, outputs), section.learning_rate)
    metrics = student.scores("test", outputs) | {"loss/weight": weights[-1] if weights else 0.0}
    return student.result(metrics, curve)
