"""SinKD's picture of its method on a real batch: the cost and the plan across samples, beside those inside one sample.

A teacher and a student (cross-entropy alone, so that it has not seen the teacher) answer one batch of test texts,
sorted by class. Batch-wise: the distance of every student row to every teacher row, and the Sinkhorn plan. Sample-wise:
for the one text on which the two differ most, the 0-1 cost between classes and POT's plan from the teacher's
probabilities to the student's.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import ot
import torch
from torch import Tensor

from limbeck import assets, seeding
from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import distillation, encoder
from limbeck.losses import transport


@dataclass(frozen=True)
class Params(encoder.Section):
    """The section of params/sinkd.yaml; sources stand there."""

    task: str
    student: str
    shown: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        encoder.layers_of(self.student)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then a student and a batch by seed."""
    inputs = asdict(params) | {"assets": assets.checksums(params.model, params.task)}
    teacher = Cell({"phase": "teacher", "seed": params.teacher_seed}, inputs, (distillation.outputs_file(params.task),))
    return [teacher, *(Cell({"phase": "plan", "seed": seed}, inputs, wave=1) for seed in seeds)]


def run(cell: Cell, params: Params, place: Workspace) -> distillation.Steps:
    """Train one model, then compare its batch with the teacher's; yields once a step."""
    seed = cell.coordinates["seed"]
    if cell.coordinates["phase"] == "teacher":
        return (yield from distillation.train_teacher(params, params.task, place))
    student = distillation.start(params, params.task, place, seed=seed, student=params.student)
    outputs = distillation.load_outputs(place, distillation.outputs_file(params.task))
    curve = yield from student.fit(distillation.taught(student, "ce", [], outputs), params.learning_rate)
    labels = student.data["test"].labels
    rows = torch.randperm(len(labels), generator=seeding.generator(seed, "batch"))[: params.shown]
    rows = rows[torch.argsort(labels[rows], stable=True)]
    found, teacher = (
        (logits[rows] / params.temperature).softmax(-1) for logits in (student.logits("test"), outputs["test"])
    )
    plan, metrics = _across(found, teacher, labels[rows], params)
    return student.result(metrics, curve | plan | _inside(found, teacher, params))


def _across(
    student: Tensor, teacher: Tensor, labels: Tensor, params: Params
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Cost and plan between samples, row by row, and where the plan's mass lies, as shares of it."""
    cost = torch.cdist(student, teacher, p=float(params.p))
    plan = transport.sinkhorn_plan(cost, epsilon=params.epsilon, iterations=params.iterations, mass="unit")
    same = labels[:, None] == labels
    metrics = {
        "plan/own": plan.trace().item(),
        "plan/class": plan[same].sum().item(),
        "plan/class_gain": (plan[same].sum() - same.double().mean()).item(),
    }
    shown = {"batch/cost": cost, "batch/plan": plan, "batch/label": labels.double()}
    return {name: values.flatten().tolist() for name, values in shown.items()}, metrics


def _inside(student: Tensor, teacher: Tensor, params: Params) -> dict[str, list[float]]:
    """Cost and plan between classes, the student's as rows, of the sample on which the two differ most."""
    row = (student - teacher).abs().sum(1).argmax()
    source, target = (probs[row].double() / probs[row].double().sum() for probs in (teacher, student))
    cost = 1 - torch.eye(len(source), dtype=torch.float64)
    plan = ot.sinkhorn(source, target, cost, params.epsilon, method="sinkhorn_log", numItermax=10_000)
    return {"sample/cost": cost.flatten().tolist(), "sample/plan": plan.T.flatten().tolist()}
