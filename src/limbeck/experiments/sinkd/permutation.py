"""What SinKD's batch-wise loss cannot see: which student row belongs to which teacher row.

Students learn from a teacher without labels: by KL, by the L1 norm (`tvd`), by the Sinkhorn distance, each alone, each
once with the teacher's rows as they are and once with the rows moved on by one place within every batch. Each term has
the weight that matches its gradient norm to that of CE on the untrained student, so all start with equally long steps.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from limbeck import assets
from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import arms, distillation, encoder
from limbeck.params import one_of

ROWS = {"own": 0, "moved": 1}


@dataclass(frozen=True)
class Params(encoder.Section):
    """The section of params/sinkd.yaml; sources stand there."""

    task: str
    student: str
    arms: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        encoder.layers_of(self.student)
        for arm in self.arms:
            one_of("arm", arm, arms.NAMES)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The teacher, then every arm with its rows as they are and moved, by seed."""
    inputs = {name: value for name, value in asdict(params).items() if name != "arms"}
    inputs |= {"assets": assets.checksums(params.model, params.task)}
    teacher = {"arm": "teacher", "rows": "own", "seed": params.teacher_seed}
    found = [Cell(teacher, inputs, (distillation.outputs_file(params.task),))]
    found += [
        Cell({"arm": arm, "rows": rows, "seed": seed}, inputs, wave=1)
        for seed in seeds
        for arm in params.arms
        for rows in ROWS
    ]
    return found


def run(cell: Cell, params: Params, place: Workspace) -> distillation.Steps:
    """Train and score one cell; yields once a step."""
    at = cell.coordinates
    if at["arm"] == "teacher":
        return (yield from distillation.train_teacher(params, params.task, place))
    student = distillation.start(params, params.task, place, seed=at["seed"], student=params.student)
    outputs = distillation.load_outputs(place, distillation.outputs_file(params.task))
    weight = distillation.matched(student, at["arm"], outputs)
    loss = distillation.taught(student, at["arm"], [weight], outputs, moved=ROWS[at["rows"]])
    curve = yield from student.fit(loss, params.learning_rate)
    return student.result(student.scores("test", outputs), curve)
