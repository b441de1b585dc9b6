"""What SinKD's batch-wise loss cannot see: which student row belongs to which teacher row.

Students learn from a teacher without labels: by KL, by the L1 norm (`tvd`), by the Sinkhorn distance, each alone, each
once with the teacher's rows as they are and once with the rows moved on by one place within every batch. Each term has
the weight that matches its gradient norm to that of CE on the untrained student, so all start with equally long steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from limbeck import assets
from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import arms, distillation
from limbeck.params import flat, one_of

ROWS = {"own": 0, "moved": 1}


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    setup: distillation.Setup
    task: str
    student: str
    arms: tuple[str, ...]

    def __post_init__(self) -> None:
        distillation.layers_of(self.student)
        for arm in self.arms:
            one_of("arm", arm, arms.NAMES)


def cells(section: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then every arm with its rows as they are and moved, by seed."""
    inputs = {name: value for name, value in flat(section).items() if name != "arms"}
    inputs |= {"assets": assets.checksums(section.setup.model, section.task)}
    teacher = {"arm": "teacher", "rows": "own", "seed": section.setup.loop.teacher_seed}
    return [Cell(teacher, inputs, (distillation.outputs_file(section.task),))] + [
        Cell({"arm": arm, "rows": rows, "seed": seed}, inputs, wave=1)
        for seed in seeds
        for arm in section.arms
        for rows in ROWS
    ]


def run(cell: Cell, section: Params, workspace: Workspace) -> distillation.Steps:
    """Train and score one cell; yields once a step."""
    arm, rows, seed = (cell.coordinates[name] for name in ("arm", "rows", "seed"))
    if arm == "teacher":
        return (yield from distillation.train_teacher(section.setup, section.task, workspace))
    student = distillation.start(section.setup, section.task, workspace, seed=seed, student=section.student)
    teacher = distillation.read_outputs(workspace, section.task)
    weight = distillation.gradient_matched_weight(student, arm, teacher)
    loss = distillation.distillation_loss(student, arm, [weight], teacher, moved=ROWS[rows])
    curve = yield from student.fit(loss, section.setup.loop.learning_rate)
    return student.result(student.scores("test", teacher), curve)
