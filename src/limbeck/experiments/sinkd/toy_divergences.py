"""SinKD's motivation on a line: a Gaussian student fits a mixture of two under KL, reverse KL, JS and Sinkhorn.

Teacher and student are distributions over a grid on [-10, 10]; the student is one discretised Gaussian, or a mixture of
two. Every arm starts from the same random means, all starts of an arm in one batch. `sinkhorn` is the sample-wise
distance on the cost |x - x'| / 20, with the envelope gradient.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck import seeding
from limbeck.experiments.runs import Cell, Coordinate, Result, Workspace, result
from limbeck.losses import divergence, transport
from limbeck.params import flat, one_of, positive
from limbeck.training import supervised

DIVERGENCES = {
    "kl": divergence.forward_kl_per_token,
    "rkl": divergence.reverse_kl_per_token,
    "js": divergence.jensen_shannon_per_token,
}
ARMS = (*DIVERGENCES, "sinkhorn")
HALF_WIDTH = 10.0
MODES = (-3.0, 3.0)
MODE_DEVIATION = 0.8


@dataclass(frozen=True)
class Line:
    """A grid, and what is measured between distributions on it."""

    bins: int
    arms: tuple[str, ...]
    epsilons: tuple[float, ...]
    iterations: int

    def __post_init__(self) -> None:
        for arm in self.arms:
            one_of("arm", arm, ARMS)
        for epsilon in self.epsilons:
            positive(epsilon=epsilon)
        positive(bins=self.bins, iterations=self.iterations)

    def coordinates(self) -> list[dict[str, Coordinate]]:
        """Every arm; `sinkhorn` once for each epsilon, and the others, which have none, at 0."""
        epsilons = {"sinkhorn": self.epsilons}
        return [{"arm": arm, "epsilon": epsilon} for arm in self.arms for epsilon in epsilons.get(arm, (0.0,))]

    def grid(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The middles of the bins, from -10 to 10."""
        return torch.linspace(-HALF_WIDTH, HALF_WIDTH, self.bins, dtype=dtype)

    def divergence(self, student: Tensor, teacher: Tensor, coordinates: Mapping[str, Coordinate]) -> Tensor:
        """The cell's divergence of every student [..., bins] from the teacher [bins], from log-probabilities."""
        arm, teachers = coordinates["arm"], teacher.expand_as(student)
        if arm in DIVERGENCES:
            return DIVERGENCES[arm](student, teachers)
        return transport.sample_index_cost_per_row(
            student.exp(),
            teacher.exp().expand_as(student),
            epsilon=coordinates["epsilon"],
            iterations=self.iterations,
            scale=1 / (len(teacher) - 1),
            gradient="envelope",
        )


def log_mixture(grid: Tensor, log_weights: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """Log-probabilities over the grid, [..., bins], of mixtures whose components lie on the last axis of the rest."""
    z = (grid[:, None] - means[..., None, :]) / deviations[..., None, :]
    parts = -z.square() / 2 - deviations.log()[..., None, :] + log_weights[..., None, :]
    return parts.logsumexp(-1).log_softmax(-1)


@dataclass(frozen=True)
class Params:
    """The section of params/sinkd.yaml; sources stand there."""

    line: Line
    minor_weights: tuple[float, ...]
    components: tuple[int, ...]
    starts: int
    steps: int
    learning_rate: float
    smallest_deviation: float
    save_every: int
    seed: int

    def __post_init__(self) -> None:
        positive(starts=self.starts, steps=self.steps)


def cells(section: Params, _seeds: Sequence[int]) -> list[Cell]:
    """Arm by teacher by student; the replicates are the starts within a cell, so the seeds are not used."""
    varied = ("arms", "epsilons", "minor_weights", "components")
    inputs = {name: value for name, value in flat(section).items() if name not in varied}
    return [
        Cell({**arm, "minor_weight": weight, "components": components}, inputs)
        for arm in section.line.coordinates()
        for weight in section.minor_weights
        for components in section.components
    ]


def run(cell: Cell, section: Params, workspace: Workspace) -> Generator[dict[str, float], None, Result]:
    """Fit the student from every start; yields once a step."""
    grid, minor = section.line.grid(), cell.coordinates["minor_weight"]
    log_weights, deviations = torch.tensor([1 - minor, minor]).log(), torch.full((2,), MODE_DEVIATION)
    teacher = log_mixture(grid, log_weights, torch.tensor(MODES), deviations)
    parameters = _starts(section, cell.coordinates["components"])

    def student() -> Tensor:
        deviation = section.smallest_deviation + nn.functional.softplus(parameters["deviation"])
        return log_mixture(grid, parameters["weight"].log_softmax(-1), parameters["mean"], deviation)

    def loss(_: Tensor) -> dict[str, Tensor]:
        return {"loss/total": section.line.divergence(student(), teacher, cell.coordinates).sum()}

    curve = yield from supervised.fit(
        parameters,
        loss,
        [torch.empty(0)] * section.steps,
        learning_rate=section.learning_rate,
        clip_norm=math.inf,
        state=workspace.state,
        save_every=section.save_every,
    )
    with torch.no_grad():
        fitted = student()
        losses = section.line.divergence(fitted, teacher, cell.coordinates)
        metrics = _measure(fitted.exp(), teacher.exp(), grid) | {"loss/final": losses}
    drawn = {"grid": grid, "teacher": teacher.exp()} | _drawn(fitted.exp(), losses, metrics["fit/on_minor_mode"])
    pictures = {name: values.tolist() for name, values in drawn.items()}
    return result({name: value.tolist() for name, value in metrics.items()}, curve | pictures, weights=parameters)


def _starts(section: Params, components: int) -> dict[str, nn.Parameter]:
    """Means uniform on [-8, 8], deviations around 2, equal weights; the same for every arm and teacher."""
    source = seeding.generator(section.seed, "starts", components)
    shape = (section.starts, components)
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
