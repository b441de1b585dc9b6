"""How many directions of a d x d matrix each method's updates span, and how many it has at one point (NOLA, Sec. 3.5).

Measured by sampling in float64 (`adapters.reach`) and compared with what algebra says. Nothing is trained. NOLA stands
here without A0 and B0, as the paper writes it; PRANC does not depend on a rank, so its coordinate is 0, and LoRA has
the numbers that its rank gives it.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

from limbeck.adapters import reach
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.params import positive


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there."""

    d: int
    ranks: tuple[int, ...]
    budgets: tuple[int, ...]
    draws: int

    def __post_init__(self) -> None:
        positive(d=self.d, draws=self.draws)
        for rank in self.ranks:
            positive(rank=rank)
        if any(budget < 2 or budget % 2 for budget in self.budgets):
            raise ValueError(f"received budgets {self.budgets}, expected even ones: k = l = p / 2")


def cells(params: Params, _seeds: Sequence[int]) -> list[Cell]:
    """One cell per method, rank and budget, over all draws of the bases, which are the replicates."""
    inputs = {name: value for name, value in asdict(params).items() if name in ("d", "draws")}
    planned = [{"arm": "nola", "rank": rank, "budget": p} for rank in params.ranks for p in params.budgets]
    planned += [{"arm": "pranc", "rank": 0, "budget": p} for p in params.budgets]
    planned += [{"arm": "lora", "rank": rank, "budget": 2 * params.d * rank} for rank in params.ranks]
    return [Cell(coordinates, inputs) for coordinates in planned]


def expected(arm: str, *, d: int, rank: int, budget: int) -> tuple[int, int]:
    """(span, Jacobian rank) by algebra.

    NOLA of k = l: min(k l, d^2) and min(k + l - 1, r (2 d - r)); PRANC: min(p, d^2) twice; LoRA: d^2, as matrices of
    rank 1 span all, and r (2 d - r), the dimension of the matrices of rank r.
    """
    if arm == "pranc":
        return min(budget, d * d), min(budget, d * d)
    manifold = rank * (2 * d - rank)
    if arm == "lora":
        return d * d, manifold
    return min((budget // 2) ** 2, d * d), min(budget - 1, manifold)


def run(cell: Cell, params: Params, _workspace: Workspace) -> Generator[dict[str, float], None, Result]:
    """Every draw of the bases; yields once per draw."""
    coordinates = cell.coordinates
    span, jacobian = expected(coordinates["arm"], d=params.d, rank=coordinates["rank"], budget=coordinates["budget"])
    half = coordinates["budget"] // 2
    metrics: dict[str, list[float]] = {}
    for draw in range(params.draws):
        reached = reach(
            coordinates["arm"], d=params.d, num_basis=(half, half), r=max(1, coordinates["rank"]), seed=draw
        )
        values = {"span": reached.span, "span_excess": reached.span - span, "share": reached.span / params.d**2}
        values |= {"jacobian": reached.jacobian, "jacobian_excess": reached.jacobian - jacobian}
        for name, value in values.items():
            metrics.setdefault(f"rank/{name}", []).append(float(value))
        yield {"step": draw + 1, "steps": params.draws}
    return Result(metrics, {}, reached.numbers, "float64")
