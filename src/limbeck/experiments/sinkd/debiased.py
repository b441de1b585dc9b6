"""Beyond the paper: the entropic bias of the Sinkhorn distance over epsilon, and what debiasing repairs.

Two kinds of cell. `collapse`, without training: random teacher logits, the student's are c times them; the c at which
the loss is smallest is 1 if the loss has no bias, and small where every student is pulled to the batch's median. The
other cells are those of `sweep` on its axis epsilon, with `sinkhorn` and `debiased` as the one added term.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from limbeck import seeding
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.experiments.sinkd import distillation, sweep
from limbeck.losses import transport

COLLAPSE = "collapse"


@dataclass(frozen=True)
class Params(sweep.Params):
    """The section of params/sinkd.yaml; sources stand there."""

    collapse_epsilons: tuple[float, ...]
    collapse_scales: tuple[float, ...]
    collapse_batch: int
    collapse_classes: int
    collapse_deviation: float
    collapse_draws: int


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The minimisers by epsilon, then the cells of the sweep."""
    names = ("scales", "batch", "classes", "deviation", "draws")
    inputs = {name: getattr(params, f"collapse_{name}") for name in names}
    inputs |= {"temperature": params.temperature, "iterations": params.iterations}
    minimisers = [
        Cell({"axis": COLLAPSE, "value": epsilon, "arm": arm}, inputs)
        for epsilon in params.collapse_epsilons
        for arm in ("sinkhorn", "debiased")
    ]
    return minimisers + sweep.cells(params, seeds)


def run(cell: Cell, params: Params, place: Workspace) -> distillation.Steps:
    """One cell; yields once a step, or once a draw."""
    if cell.coordinates["axis"] != COLLAPSE:
        return (yield from sweep.run(cell, params, place))
    shape, found = (params.collapse_batch, params.collapse_classes), []
    for draw in range(params.collapse_draws):
        source = seeding.generator(draw, "collapse")
        logits = torch.randn(shape, generator=source, dtype=torch.float64) * params.collapse_deviation
        found.append(_minimiser(logits / params.temperature, cell, params))
        yield {"step": draw + 1, "steps": params.collapse_draws}
    return Result({"collapse/minimiser": found}, {}, 0, "float64")


def _minimiser(logits: torch.Tensor, cell: Cell, params: Params) -> float:
    """The scale of the student's logits at which the distance to the teacher's is smallest."""
    options = {"epsilon": cell.coordinates["value"], "iterations": params.iterations}
    teacher, debias = logits.softmax(-1), cell.coordinates["arm"] == "debiased"
    values = [
        transport.sinkhorn_distance((scale * logits).softmax(-1), teacher, debias=debias, **options).item()
        for scale in params.collapse_scales
    ]
    return params.collapse_scales[values.index(min(values))]
