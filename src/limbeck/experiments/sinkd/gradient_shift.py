"""SinKD's motivation in one number: what each divergence, and its gradient, says of how far two humps are apart.

Teacher and student are equal discretised Gaussians on a grid on [-10, 10], the student's moved by a shift. The gradient
is with respect to the shift, by automatic differentiation through the student's probabilities; `sinkhorn` is the
sample-wise distance on the cost |x - x'| / 20, with the envelope gradient. Nothing is random.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

import torch

from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.experiments.sinkd import line
from limbeck.params import one_of, positive


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    bins: int
    deviation: float
    farthest: float
    shifts: int
    arms: tuple[str, ...]
    epsilons: tuple[float, ...]
    iterations: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        for arm in self.arms:
            one_of("arm", arm, line.ARMS)
        for epsilon in self.epsilons:
            positive(epsilon=epsilon)
        positive(bins=self.bins, deviation=self.deviation, farthest=self.farthest, shifts=self.shifts)
        positive(iterations=self.iterations)


def cells(params: Params, _seeds: Sequence[int]) -> list[Cell]:
    """A cell an arm (and epsilon), over all shifts; nothing is random, so the seeds are not used."""
    inputs = {name: value for name, value in asdict(params).items() if name not in ("arms", "epsilons")}
    return [
        Cell({"arm": arm, "epsilon": epsilon}, inputs)
        for arm in params.arms
        for epsilon in (params.epsilons if arm == "sinkhorn" else (0.0,))
    ]


def run(cell: Cell, params: Params, _place: Workspace) -> Generator[dict[str, float], None, Result]:
    """Value and gradient at every shift, in float64; one step."""
    grid = line.grid(params.bins, torch.float64)
    shift = torch.linspace(0, params.farthest, params.shifts, dtype=torch.float64, requires_grad=True)
    zero, deviation = torch.zeros(1, dtype=torch.float64), torch.full((1,), params.deviation, dtype=torch.float64)
    teacher = line.log_mixture(grid, zero, zero - params.farthest / 2, deviation)
    student = line.log_mixture(grid, zero, shift[:, None] - params.farthest / 2, deviation)
    value = line.divergences(student, teacher, cell.coordinates["arm"], cell.coordinates["epsilon"], params.iterations)
    [gradient] = torch.autograd.grad(value.sum(), shift)
    yield {"step": 1, "steps": 1}
    metrics = {"shift/value": value.tolist(), "shift/gradient": gradient.tolist()}
    return Result(metrics, {"shift": shift.tolist()}, 0, "float64")
