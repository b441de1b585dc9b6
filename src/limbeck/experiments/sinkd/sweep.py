"""One hyperparameter of SinKD at a time around a centre: one task, one student, every setting by seed.

Nothing is chosen: each term has the weight that matches its gradient norm to CE's on the untrained student, at its
setting, times a fixed multiple. So an axis shows the shape of the term, and the axis `strength` how much of it.
`group` is the number of samples an OT problem holds, cut from the same training batch: the batch size of SinKD without
that of the optimiser.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from limbeck import assets
from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import arms, distillation
from limbeck.params import flat, one_of, positive

AXES = ("epsilon", "iterations", "temperature", "group", "p", "strength")
CENTRE = "centre"
_NOT_INPUTS = ("arms", *(f"{axis}_values" for axis in AXES))


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    setup: distillation.Setup
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
        distillation.layers_of(self.student)
        for arm in self.arms:
            arms.added(arm)
        positive(kl_strength=self.kl_strength, strength=self.strength)
        for axis in AXES:
            for value in getattr(self, f"{axis}_values"):
                positive(**{axis: value})
        for p in self.p_values:
            one_of("p", p, (1, 2))


def cells(section: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then every setting by seed; arms without transport are run at the centre alone."""
    values = flat(section)
    inputs = {name: value for name, value in values.items() if name not in _NOT_INPUTS}
    inputs |= {"assets": assets.checksums(section.setup.model, section.task)}
    teacher = {"axis": "teacher", "value": 0, "arm": "teacher", "seed": section.setup.loop.teacher_seed}
    settings = [(axis, value) for axis in AXES for value in values[f"{axis}_values"] if value != values[axis]]
    return [Cell(teacher, inputs, (distillation.outputs_file(section.task),))] + [
        Cell({"axis": axis, "value": value, "arm": arm, "seed": seed}, inputs, wave=1)
        for seed in seeds
        for arm in section.arms
        for axis, value in [(CENTRE, 0), *(settings if set(arms.added(arm)) & set(arms.BATCH_WISE) else ())]
    ]


def run(cell: Cell, section: Params, workspace: Workspace) -> distillation.Steps:
    """Train and score one setting; yields once a step."""
    axis, value, arm, seed = (cell.coordinates[name] for name in ("axis", "value", "arm", "seed"))
    setup, strength = section.setup, section.strength
    if axis == "teacher":
        return (yield from distillation.train_teacher(setup, section.task, workspace))
    if axis == "strength":
        strength = value
    elif axis != CENTRE:
        setup = replace(setup, terms=replace(setup.terms, **{axis: value}))
    student = distillation.start(setup, section.task, workspace, seed=seed, student=section.student)
    teacher = distillation.read_outputs(workspace, section.task)
    weights = [
        distillation.gradient_matched_weight(student, name, teacher)
        * (section.kl_strength if name == "kl" else strength)
        for name in arms.added(arm)
    ]
    loss = distillation.distillation_loss(student, arm, weights, teacher)
    curve = yield from student.fit(loss, setup.loop.learning_rate)
    metrics = student.scores("test", teacher) | {"loss/weight": weights[-1] if weights else 0.0}
    return student.result(metrics, curve)
