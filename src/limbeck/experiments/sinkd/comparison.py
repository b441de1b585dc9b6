"""A comparison of arms: tasks x students x arms x seeds, with every added term's weight chosen alike.

The weight of an added term is a multiple of the one that matches its gradient norm to that of CE on the untrained
student. The multiple is chosen from one grid by the mean validation score over the tasks, one choice an arm and
student; the terms of an arm are chosen in their order, each with those before it held at their choice. So every term
costs the same search. The test split is read after the last step; it chooses nothing.

`takd` learns KL from an assistant of more layers, which learned `ce+kl` from the teacher. With `watch`, a student is
also scored at every saved step, to tell what choosing the best evaluation on the validation split would have reported.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from limbeck import assets
from limbeck.experiments.runs import Cell, Workspace
from limbeck.experiments.sinkd import arms, distillation, encoder
from limbeck.experiments.sinkd.arms import ASSISTED
from limbeck.training import resume

_NOT_INPUTS = ("tasks", "students", "arms", "multiples")


@dataclass(frozen=True)
class Params(encoder.Section):
    """The section of params/sinkd.yaml; sources stand there."""

    tasks: tuple[str, ...]
    students: tuple[str, ...]
    arms: tuple[str, ...]
    multiples: tuple[float, ...]
    selection_texts: int
    selection_seed: int
    assistant: str
    watch: bool

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        for student in (*self.students, self.assistant):
            encoder.layers_of(student)
        for arm in self.arms:
            arms.added(arm)
            if arm.split("+")[0] != "ce":
                raise ValueError(f"an arm of a comparison starts with ce, got {arm!r}")


def steps_of(arms: Iterable[str]) -> list[str]:
    """Every arm and, before it, what it adds a term to; without `ce`, which has nothing to choose."""
    chains = [arm.split("+") for arm in arms]
    found = ["+".join(chain[:depth]) for chain in chains for depth in range(2, len(chain) + 1)]
    needs_kl = any(ASSISTED in chain for chain in chains)
    return list(dict.fromkeys([*(["ce+kl"] if needs_kl else []), *found]))


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """Teachers, selection of each term's multiple, the assistants, then every arm by seed."""
    shared = {name: value for name, value in asdict(params).items() if name not in _NOT_INPUTS}
    found = []
    for task in params.tasks:
        inputs = shared | {"task": task, "assets": assets.checksums(params.model, task)}
        found += _of_task(params, encoder.spelled(task), inputs, seeds)
    return sorted(found, key=lambda cell: cell.wave)


def _of_task(params: Params, task: str, inputs: dict[str, Any], seeds: Sequence[int]) -> list[Cell]:
    sums = assets.checksums(params.model, *params.tasks)
    chosen_from = inputs | {"multiples": params.multiples, "chosen over": params.tasks, "assets": sums}
    after = 1 + max((len(arms.added(arm)) for arm in steps_of(params.arms)), default=0)  # a turn for the assistant
    teacher = {"phase": "teacher", "task": task, "student": "teacher", "arm": "teacher", "seed": params.teacher_seed}
    found = [Cell(teacher, inputs, (distillation.outputs_file(task),))]
    for student in params.students:
        place = {"task": task, "student": student}
        for arm in steps_of(params.arms):
            turn = len(arms.added(arm)) + (after if ASSISTED in arm else 0)
            known = inputs if turn == 1 else chosen_from
            found += [
                Cell(
                    {"phase": "selection", **place, "arm": arm, "multiple": m, "seed": params.selection_seed},
                    known,
                    wave=turn,
                )
                for m in params.multiples
            ]
        found += [
            Cell({"phase": "final", **place, "arm": arm, "seed": seed}, chosen_from, wave=2 * after)
            for seed in seeds
            for arm in params.arms
        ]
    if any(ASSISTED in arm for arm in params.arms):
        assistant = teacher | {"phase": "assistant", "student": params.assistant, "arm": "ce+kl"}
        found.append(Cell(assistant, chosen_from | {"chosen by": params.students[0]}, (_assistant_file(task),), after))
    return found


def run(cell: Cell, params: Params, place: Workspace) -> distillation.Steps:
    """Train and score one cell; yields once a step."""
    at, task = cell.coordinates, cell.inputs["task"]
    if at["phase"] == "teacher":
        return (yield from distillation.train_teacher(params, task, place))
    texts = params.selection_texts if at["phase"] == "selection" else None
    student = distillation.start(params, task, place, seed=at["seed"], student=at["student"], texts=texts)
    outputs = distillation.load_outputs(place, distillation.outputs_file(task))
    if ASSISTED in at["arm"]:
        outputs |= distillation.load_outputs(place, _assistant_file(task))
    weights = _weights(at, student, outputs, place.records, params)
    loss = distillation.taught(student, at["arm"], weights, outputs)
    measure = _watch(student) if params.watch and at["phase"] == "final" else None
    curve = yield from student.fit(loss, params.learning_rate, measure)
    metrics = student.scores("validation" if at["phase"] == "selection" else "test", outputs)
    metrics["loss/weight"] = weights[-1] if weights else 0.0
    if at["phase"] == "assistant":
        left = {"assistant": student.logits("train")}
        resume.write_tensors(place.checkpoints / _assistant_file(task), left)
    return student.result(metrics | _optimism(curve), curve)


def _assistant_file(task: str) -> str:
    return f"{encoder.spelled(task)}_assistant.safetensors"


def _weights(
    at: dict[str, Any], student: distillation.Run, outputs: dict[str, Tensor], found: list[dict], params: Params
) -> list[float]:
    """The weight of every added term, in the arm's order."""
    names, weights = arms.added(at["arm"]), []
    chooser = params.students[0] if at["phase"] == "assistant" else at["student"]
    for depth, name in enumerate(names, 1):
        arm = "+".join(["ce", *names[:depth]])
        tuning = at["phase"] == "selection" and depth == len(names)
        multiple = at["multiple"] if tuning else choose(found, arm, chooser)
        if tuning or at["phase"] == "assistant":  # its own gradients, at the students' multiple
            weights.append(multiple * distillation.matched(student, name, outputs))
        else:
            weights.append(_of(found, arm, chooser, at["task"], multiple)["metrics"]["loss/weight"])
    return weights


def _tried(found: Sequence[dict[str, Any]], arm: str, student: str) -> list[dict[str, Any]]:
    place = ("selection", arm, student)
    return [r for r in found if (r["cell"]["phase"], r["cell"]["arm"], r["cell"]["student"]) == place]


def choose(found: Sequence[dict[str, Any]], arm: str, student: str) -> float:
    """The multiple with the highest mean validation score over tasks; of equals, the smallest."""
    scores: dict[float, list[float]] = {}
    for record in _tried(found, arm, student):
        scores.setdefault(record["cell"]["multiple"], []).append(record["metrics"]["validation/score"])
    return max(scores, key=lambda multiple: (sum(scores[multiple]) / len(scores[multiple]), -multiple))


def _of(found: Sequence[dict[str, Any]], arm: str, student: str, task: str, multiple: float) -> dict[str, Any]:
    tried = _tried(found, arm, student)
    return next(r for r in tried if (r["cell"]["task"], r["cell"]["multiple"]) == (task, multiple))


def _watch(student: distillation.Run) -> Callable[[], dict[str, float]]:
    return lambda: {f"{split}/score": student.score(split) for split in ("validation", "test")}


def _optimism(curve: dict[str, list[float]]) -> dict[str, float]:
    """What reporting the best evaluation on the validation split would add to the test score of the same step."""
    if "validation/score" not in curve:
        return {}
    validation, test = curve["validation/score"], curve["test/score"]
    best = max(range(len(validation)), key=lambda step: (validation[step], step))
    return {
        "validation/best": validation[best],
        "validation/last": validation[-1],
        "test/at_best": test[best],
        "validation/optimism": validation[best] - test[best],
    }
