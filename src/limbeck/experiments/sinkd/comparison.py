"""A comparison of arms: tasks x students x arms x seeds, with every added term's weight chosen alike.

The weight of an added term is a multiple of the one that matches its gradient norm to that of CE on the untrained
student. The multiple is chosen from one grid by the mean validation score over the tasks, one choice per arm and
student; the terms of an arm are chosen in their order, each with those before it held at their choice. So every term
costs the same search. The test split is read after the last step; it chooses nothing.

`takd` learns KL from an assistant of more layers, which learned `ce+kl` from the teacher. With `watch`, a student is
also scored at every saved step, to tell what choosing the best evaluation on the validation split would have reported.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from limbeck import assets
from limbeck.experiments.runs import Cell, Workspace, best, spelled
from limbeck.experiments.sinkd import arms, distillation
from limbeck.experiments.sinkd.arms import ASSISTED
from limbeck.params import flat
from limbeck.training import resume

_NOT_INPUTS = ("tasks", "students", "arms", "multiples")


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    setup: distillation.Setup
    tasks: tuple[str, ...]
    students: tuple[str, ...]
    arms: tuple[str, ...]
    multiples: tuple[float, ...]
    selection_texts: int
    selection_seed: int
    assistant: str
    watch: bool

    def __post_init__(self) -> None:
        for student in (*self.students, self.assistant):
            distillation.layers_of(student)
        for arm in self.arms:
            arms.added(arm)
            if arm.split("+")[0] != "ce":
                raise ValueError(f"an arm of a comparison starts with ce, got {arm!r}")


def searched_arms(final_arms: Iterable[str]) -> list[str]:
    """Every arm and, before it, what it adds a term to; without `ce`, which has nothing to choose."""
    chains = [arm.split("+") for arm in final_arms]
    prefixes = ["+".join(chain[:depth]) for chain in chains for depth in range(2, len(chain) + 1)]
    assisted = any(ASSISTED in chain for chain in chains)
    return list(dict.fromkeys([*(["ce+kl"] if assisted else []), *prefixes]))


def cells(section: Params, seeds: Sequence[int]) -> list[Cell]:
    """Teachers, selection of each term's multiple, the assistants, then every arm by seed."""
    shared = {name: value for name, value in flat(section).items() if name not in _NOT_INPUTS}
    every: list[Cell] = []
    for task in section.tasks:
        inputs = shared | {"task": task, "assets": assets.checksums(section.setup.model, task)}
        every += _cells_of_task(section, spelled(task), inputs, seeds)
    return sorted(every, key=lambda cell: cell.wave)


def _cells_of_task(section: Params, task: str, inputs: dict[str, Any], seeds: Sequence[int]) -> list[Cell]:
    checksums = assets.checksums(section.setup.model, *section.tasks)
    chosen_from = inputs | {"multiples": section.multiples, "chosen over": section.tasks, "assets": checksums}
    searched = searched_arms(section.arms)
    assisting = 1 + max((len(arms.added(arm)) for arm in searched), default=0)  # the wave of the assistant
    teacher = {"phase": "teacher", "task": task, "student": "teacher", "arm": "teacher"}
    teacher["seed"] = section.setup.loop.teacher_seed
    task_cells = [Cell(teacher, inputs, (distillation.outputs_file(task),))]
    for student in section.students:
        pair = {"task": task, "student": student}
        for arm in searched:
            wave = len(arms.added(arm)) + (assisting if ASSISTED in arm else 0)
            for multiple in section.multiples:
                selection = {"phase": "selection", **pair, "arm": arm, "multiple": multiple}
                selection["seed"] = section.selection_seed
                task_cells.append(Cell(selection, inputs if wave == 1 else chosen_from, wave=wave))
        for seed in seeds:
            for arm in section.arms:
                final = {"phase": "final", **pair, "arm": arm, "seed": seed}
                task_cells.append(Cell(final, chosen_from, wave=2 * assisting))
    if any(ASSISTED in arm for arm in section.arms):
        assistant = teacher | {"phase": "assistant", "student": section.assistant, "arm": "ce+kl"}
        file = distillation.outputs_file(task, "assistant")
        task_cells.append(Cell(assistant, chosen_from | {"chosen by": section.students[0]}, (file,), assisting))
    return task_cells


def run(cell: Cell, section: Params, workspace: Workspace) -> distillation.Steps:
    """Train and score one cell; yields once a step."""
    coordinates, task = cell.coordinates, cell.inputs["task"]
    phase, arm = coordinates["phase"], coordinates["arm"]
    if phase == "teacher":
        return (yield from distillation.train_teacher(section.setup, task, workspace))
    texts = section.selection_texts if phase == "selection" else None
    name, seed = coordinates["student"], coordinates["seed"]
    student = distillation.start(section.setup, task, workspace, seed=seed, student=name, texts=texts)
    teacher = distillation.read_outputs(workspace, task)
    if ASSISTED in arm:
        teacher |= distillation.read_outputs(workspace, task, "assistant")
    chooser = section.students[0] if phase == "assistant" else name
    weights = _weights(coordinates, chooser, student, teacher)

    def watch() -> dict[str, float]:
        return {f"{split}/score": student.score(split, student.logits(split)) for split in ("validation", "test")}

    loss = distillation.distillation_loss(student, arm, weights, teacher)
    watched = section.watch and phase == "final"
    curve = yield from student.fit(loss, section.setup.loop.learning_rate, watch if watched else None)
    metrics = student.scores("validation" if phase == "selection" else "test", teacher)
    metrics["loss/weight"] = weights[-1] if weights else 0.0
    if phase == "assistant":
        file = workspace.checkpoints / distillation.outputs_file(task, "assistant")
        resume.write_tensors(file, {"assistant": student.logits("train")})
    return student.result(metrics | (_optimism(curve) if watched else {}), curve)


def _weights(
    coordinates: Mapping[str, Any], chooser: str, student: distillation.EncoderRun, teacher: dict[str, Tensor]
) -> list[float]:
    """The weight of every added term, in the arm's order, at the multiples that are best for the student `chooser`."""
    phase, records = coordinates["phase"], student.workspace.records
    names, weights = arms.added(coordinates["arm"]), []
    for depth, name in enumerate(names, 1):
        selection = {"phase": "selection", "arm": "+".join(["ce", *names[:depth]]), "student": chooser}
        tuning = phase == "selection" and depth == len(names)
        if tuning:
            multiple = coordinates["multiple"]
        else:
            multiple = best(records, selection, "multiple", ["validation/score"], highest=[True])
        if tuning or phase == "assistant":  # its own gradients, at the students' multiple
            weights.append(multiple * distillation.gradient_matched_weight(student, name, teacher))
        else:
            selection |= {"task": coordinates["task"], "multiple": multiple}
            [record] = [record for record in records if selection.items() <= record["cell"].items()]
            weights.append(record["metrics"]["loss/weight"])
    return weights


def _optimism(curve: dict[str, list[float]]) -> dict[str, float]:
    """What reporting the best evaluation on the validation split would add to the test score of the same step."""
    validation, test = curve["validation/score"], curve["test/score"]
    best_step = max(range(len(validation)), key=lambda step: (validation[step], step))
    return {
        "validation/best": validation[best_step],
        "validation/last": validation[-1],
        "test/at_best": test[best_step],
        "validation/optimism": validation[best_step] - test[best_step],
    }
