"""SinKD's motivation on a line: a Gaussian student fits a mixture of two under KL, reverse KL, JS and Sinkhorn.

Teacher and student are distributions over a grid on [-10, 10]; the student is one discretised Gaussian, or a mixture of
two. Every arm starts from the same random places, all starts of an arm in one batch. `sinkhorn` is the
sample-wise distance on the cost |x - x'| / 20, with the envelope gradient.
"""

import functools
import math
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from limbeck import seeding
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.experiments.sinkd import line
from limbeck.params import one_of, positive
from limbeck.training import supervised

MODES = (-3.0, 3.0)
MODE_DEVIATION = 0.8


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    bins: int
    minor_weights: tuple[float, ...]
    components: tuple[int, ...]
    arms: tuple[str, ...]
    epsilons: tuple[float, ...]
    iterations: int
    starts: int
    steps: int
    learning_rate: float
    smallest_deviation: float
    save_every: int
    seed: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        for arm in self.arms:
            one_of("arm", arm, line.ARMS)
        for epsilon in self.epsilons:
            positive(epsilon=epsilon)
        positive(bins=self.bins, iterations=self.iterations, starts=self.starts, steps=self.steps)


def cells(params: Params, _seeds: Sequence[int]) -> list[Cell]:
    """Arm by teacher by student; the replicates are the starts within a cell, so the seeds are not used."""
    inputs = {k: v for k, v in asdict(params).items() if k not in ("arms", "epsilons", "minor_weights", "components")}
    arms = [
        ({"arm": arm, "epsilon": e}) for arm in params.arms for e in (params.epsilons if arm == "sinkhorn" else [0.0])
    ]
    return [
        Cell({**arm, "minor_weight": weight, "components": components}, inputs)
        for arm in arms
        for weight in params.minor_weights
        for components in params.components
    ]


def run(cell: Cell, params: Params, place: Workspace) -> Generator[dict[str, float], None, Result]:
    """Fit the student from every start; yields once a step."""
    where = cell.coordinates
    grid = line.grid(params.bins)
    minor = where["minor_weight"]
    teacher = line.log_mixture(
        grid, torch.tensor([1 - minor, minor]).log(), torch.tensor(MODES), torch.full((2,), MODE_DEVIATION)
    )
    measured = functools.partial(
        line.divergences, teacher=teacher, arm=where["arm"], epsilon=where["epsilon"], iterations=params.iterations
    )
    parameters = _starts(params, where["components"])

    def student() -> Tensor:
        deviation = params.smallest_deviation + nn.functional.softplus(parameters["deviation"])
        return line.log_mixture(grid, parameters["weight"].log_softmax(-1), parameters["mean"], deviation)

    def loss(_: Tensor) -> dict[str, Tensor]:
        return {"loss/total": measured(student()).sum()}

    curve = yield from supervised.fit(
        parameters,
        loss,
        [torch.empty(0)] * params.steps,
        learning_rate=params.learning_rate,
        clip_norm=math.inf,
        state=place.state,
        save_every=params.save_every,
    )
    with torch.no_grad():
        found = student()
        losses = measured(found)
        metrics = _measure(found.exp(), teacher.exp(), grid) | {"loss/final": losses}
    drawn = {"grid": grid, "teacher": teacher.exp()} | _drawn(found.exp(), losses, metrics["fit/on_minor_mode"])
    count = sum(parameter.numel() for parameter in parameters.values())
    return Result(
        {name: value.tolist() for name, value in metrics.items()},
        curve | {name: values.tolist() for name, values in drawn.items()},
        count,
    )


def _starts(params: Params, components: int) -> dict[str, nn.Parameter]:
    """Means uniform on [-8, 8], deviations around 2, equal weights; the same for every arm and teacher."""
    source = seeding.generator(params.seed, "starts", components)
    shape = (params.starts, components)
    return {
        "mean": nn.Parameter(torch.rand(shape, generator=source) * 16 - 8),
        "deviation": nn.Parameter(1.5 + 0.5 * torch.randn(shape, generator=source)),
        "weight": nn.Parameter(torch.zeros(shape)),
    }


def _drawn(student: Tensor, losses: Tensor, side: Tensor) -> dict[str, Tensor]:
    """The best start, and the best of those that ended at the other mode, if any did."""
    best = losses.argmin()
    other = losses.masked_fill(side == side[best], math.inf)
    return {"student": student[best]} | ({"other": student[other.argmin()]} if other.isfinite().any() else {})


def _measure(student: Tensor, teacher: Tensor, grid: Tensor) -> dict[str, Tensor]:
    """Each start's numbers: moments, and mass in the valley and at the modes, as shares of the teacher's."""
    mean = student @ grid
    deviation = (student @ grid.square() - mean.square()).clamp_min(0).sqrt()
    valley = grid.abs() < 1
    major, minor = ((grid - mode).abs() <= 2 * MODE_DEVIATION for mode in MODES)
    spacing = grid[1] - grid[0]
    masses = torch.stack([student[:, mode].sum(-1) for mode in (major, minor)])
    return {
        "fit/mean": mean,
        "fit/deviation": deviation,
        "fit/distance_to_mode": torch.stack([(mean - mode).abs() for mode in MODES]).amin(0),
        "fit/valley_ratio": student[:, valley].sum(-1) / teacher[valley].sum(),
        "fit/minor_ratio": masses[1] / teacher[minor].sum(),
        "fit/smaller_mode_mass": masses.amin(0),
        "fit/on_minor_mode": (masses[1] > masses[0]).float(),
        "fit/wasserstein": (student.cumsum(-1) - teacher.cumsum(-1)).abs().sum(-1) * spacing,
    }
