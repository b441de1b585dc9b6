"""Beyond the paper: the entropic bias of the Sinkhorn distance over epsilon, and what debiasing repairs.

Two kinds of cell. `collapse`, without training: random teacher logits, the student's are c times them; the c at which
the loss is smallest is 1 if the loss has no bias, and small where every student is pulled to the batch's median. The
other cells are those of `sweep` on its axis epsilon, with `sinkhorn` and `debiased` as the one added term.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from limbeck import seeding
from limbeck.experiments.runs import Cell, Workspace, result
from limbeck.experiments.sinkd import distillation, sweep
from limbeck.losses import transport
from limbeck.params import positive

COLLAPSE = "collapse"


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    sweep: sweep.Params
    collapse_epsilons: tuple[float, ...]
    collapse_scales: tuple[float, ...]
    collapse_batch: int
    collapse_classes: int
    collapse_deviation: float
    collapse_draws: int

    def __post_init__(self) -> None:
        positive(collapse_deviation=self.collapse_deviation, collapse_draws=self.collapse_draws)


def cells(section: Params, seeds: Sequence[int]) -> list[Cell]:
    """The minimisers by epsilon, then the cells of the sweep."""
    names = ("scales", "batch", "classes", "deviation", "draws")
    inputs = {name: getattr(section, f"collapse_{name}") for name in names}
    terms = section.sweep.setup.terms
    inputs |= {"temperature": terms.temperature, "iterations": terms.iterations}
    minimisers = [
        Cell({"axis": COLLAPSE, "value": epsilon, "arm": arm}, inputs)
        for epsilon in section.collapse_epsilons
        for arm in ("sinkhorn", "debiased")
    ]
    return minimisers + sweep.cells(section.sweep, seeds)


def run(cell: Cell, section: Params, workspace: Workspace) -> distillation.Steps:
    """One cell; yields once a step, or once a draw."""
    if cell.coordinates["axis"] != COLLAPSE:
        return (yield from sweep.run(cell, section.sweep, workspace))
    shape, minimisers = (section.collapse_batch, section.collapse_classes), []
    for draw in range(section.collapse_draws):
        source = seeding.generator(draw, "collapse")
        logits = torch.randn(shape, generator=source, dtype=torch.float64) * section.collapse_deviation
        minimisers.append(_minimiser(logits / section.sweep.setup.terms.temperature, cell, section))
        yield {"step": draw + 1, "steps": section.collapse_draws}
    return result({"collapse/minimiser": minimisers}, dtype=torch.float64)


def _minimiser(logits: torch.Tensor, cell: Cell, section: Params) -> float:
    """The scale of the student's logits at which the distance to the teacher's is smallest."""
    epsilon, iterations = cell.coordinates["value"], section.sweep.setup.terms.iterations
    teacher, debias = logits.softmax(-1), cell.coordinates["arm"] == "debiased"
    students = [(scale * logits).softmax(-1) for scale in section.collapse_scales]
    distances = [
        transport.sinkhorn_distance(student, teacher, epsilon=epsilon, iterations=iterations, debias=debias).item()
        for student in students
    ]
    return section.collapse_scales[distances.index(min(distances))]
