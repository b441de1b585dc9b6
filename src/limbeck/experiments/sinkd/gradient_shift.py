"""SinKD's motivation in one number: what each divergence, and its gradient, says of how far two humps are apart.

Teacher and student are equal discretised Gaussians on the grid of `toy_divergences`, the student's moved by a shift.
The gradient is with respect to the shift, by automatic differentiation through the student's probabilities. Nothing is
random.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from limbeck.experiments.runs import Cell, Result, Workspace, result
from limbeck.experiments.sinkd.toy_divergences import Line, log_mixture
from limbeck.params import flat, positive


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    line: Line
    deviation: float
    farthest: float
    shifts: int

    def __post_init__(self) -> None:
        positive(deviation=self.deviation, farthest=self.farthest, shifts=self.shifts)


def cells(section: Params, _seeds: Sequence[int]) -> list[Cell]:
    """One cell per arm (and epsilon), over all shifts; nothing is random, so the seeds are not used."""
    inputs = {name: value for name, value in flat(section).items() if name not in ("arms", "epsilons")}
    return [Cell(coordinates, inputs) for coordinates in section.line.coordinates()]


def run(cell: Cell, section: Params, _workspace: Workspace) -> Generator[dict[str, float], None, Result]:
    """Value and gradient at every shift, in float64; one step."""
    grid = section.line.grid(torch.float64)
    shift = torch.linspace(0, section.farthest, section.shifts, dtype=torch.float64, requires_grad=True)
    zero, deviation = torch.zeros(1, dtype=torch.float64), torch.full((1,), section.deviation, dtype=torch.float64)
    teacher = log_mixture(grid, zero, zero - section.farthest / 2, deviation)
    student = log_mixture(grid, zero, shift[:, None] - section.farthest / 2, deviation)
    value = section.line.divergence(student, teacher, cell.coordinates)
    [gradient] = torch.autograd.grad(value.sum(), shift)
    yield {"step": 1, "steps": 1}
    metrics = {"shift/value": value.tolist(), "shift/gradient": gradient.tolist()}
    return result(metrics, {"shift": shift.tolist()}, dtype=torch.float64)
