"""SinKD's picture of its method on a real batch: the cost and the plan across samples, beside those inside one sample.

A teacher and a student (cross-entropy alone, so that it has not seen the teacher) answer one batch of test texts,
sorted by class. Batch-wise: the distance of every student row to every teacher row, and the Sinkhorn plan. Sample-wise:
for the one text on which the two differ most, the 0-1 cost between classes and POT's plan from the teacher's
probabilities to the student's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import ot
import torch
from torch import Tensor

from limbeck import assets, seeding
from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import arms, distillation
from limbeck.losses import transport
from limbeck.params import flat


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    setup: distillation.Setup
    task: str
    student: str
    shown: int

    def __post_init__(self) -> None:
        distillation.layers_of(self.student)


def cells(section: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then a student and a batch by seed."""
    inputs = flat(section) | {"assets": assets.checksums(section.setup.model, section.task)}
    teacher = {"phase": "teacher", "seed": section.setup.loop.teacher_seed}
    students = [Cell({"phase": "plan", "seed": seed}, inputs, wave=1) for seed in seeds]
    return [Cell(teacher, inputs, (distillation.outputs_file(section.task),)), *students]


def run(cell: Cell, section: Params, workspace: Workspace) -> distillation.Steps:
    """Train one model, then compare its batch with the teacher's; yields once a step."""
    setup, seed = section.setup, cell.coordinates["seed"]
    if cell.coordinates["phase"] == "teacher":
        return (yield from distillation.train_teacher(setup, section.task, workspace))
    trained = distillation.start(setup, section.task, workspace, seed=seed, student=section.student)
    curve = yield from trained.fit(distillation.distillation_loss(trained, "ce", [], {}), setup.loop.learning_rate)
    labels = trained.data["test"].labels
    rows = torch.randperm(len(labels), generator=seeding.generator(seed, "batch"))[: section.shown]
    rows = rows[torch.argsort(labels[rows], stable=True)]
    logits = trained.logits("test"), distillation.read_outputs(workspace, section.task)["test"]
    student, teacher = ((side[rows] / setup.terms.temperature).softmax(-1) for side in logits)
    plan, metrics = _across(student, teacher, labels[rows], setup.terms)
    return trained.result(metrics, curve | plan | _inside(student, teacher, setup.terms.epsilon))


def _across(
    student: Tensor, teacher: Tensor, labels: Tensor, options: arms.Terms
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Cost and plan between samples, row by row, and where the plan's mass lies, as shares of it."""
    cost = torch.cdist(student, teacher, p=float(options.p))
    plan = transport.sinkhorn_plan(cost, epsilon=options.epsilon, iterations=options.iterations, mass="unit")
    same = labels[:, None] == labels
    metrics = {
        "plan/own": plan.trace().item(),
        "plan/class": plan[same].sum().item(),
        "plan/class_gain": (plan[same].sum() - same.double().mean()).item(),
    }
    matrices = {"batch/cost": cost, "batch/plan": plan, "batch/label": labels.double()}
    return {name: values.flatten().tolist() for name, values in matrices.items()}, metrics


def _inside(student: Tensor, teacher: Tensor, epsilon: float) -> dict[str, list[float]]:
    """Cost and plan between classes, the student's as rows, of the sample on which the two differ most."""
    row = (student - teacher).abs().sum(1).argmax()
    source, target = (probs[row].double() / probs[row].double().sum() for probs in (teacher, student))
    cost = 1 - torch.eye(len(source), dtype=torch.float64)
    plan = ot.sinkhorn(source, target, cost, epsilon, method="sinkhorn_log", numItermax=10_000)
    return {"sample/cost": cost.flatten().tolist(), "sample/plan": plan.T.flatten().tolist()}
