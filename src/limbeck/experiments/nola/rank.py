"""How many directions of a d x d matrix each method's updates span, and how many it has at one point (NOLA, Sec. 3.5).

With p = k + l numbers, by sampling in float64, beside what algebra says; nothing is trained. Two ranks: of the linear
span of all updates, from many samples; and of the Jacobian at one point, the local dimension. NOLA stands here without
A0 and B0, as the paper writes it; PRANC does not depend on a rank, so its coordinate is 0, and LoRA has the numbers
that its rank gives it.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.adapters.basis import Stream
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.params import one_of, positive
from limbeck.seeding import generator

METHODS = ("nola", "pranc", "lora")
_SPARE = 8  # samples beyond d^2


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


@dataclass(frozen=True)
class Reach:
    """How many numbers a method has, and the two ranks."""

    numbers: int
    span: int
    jacobian: int


def _update(
    method: str, *, d: int, num_basis: tuple[int, int], r: int, seed: int
) -> tuple[int, Callable[[Float[Tensor, " p"]], Float[Tensor, "d d"]]]:
    """How many numbers the method has, and Delta W as a function of them."""

    def bases(factor: str, shape: tuple[int, int], number: int) -> Tensor:
        return Stream(seed, "reach", factor, shape).draw(0, number).double()

    k, budget = num_basis[0], sum(num_basis)
    if method == "pranc":
        c = bases("C", (d, d), budget)
        return budget, lambda p: (p @ c).view(d, d)
    if method == "lora":
        return 2 * d * r, lambda p: p[: d * r].view(d, r) @ p[d * r :].view(r, d)
    a, b = bases("A", (d, r), k), bases("B", (r, d), num_basis[1])
    return budget, lambda p: (p[:k] @ a).view(d, r) @ (p[k:] @ b).view(r, d)


def reach(method: str, *, d: int, num_basis: tuple[int, int], r: int, seed: int = 0) -> Reach:
    """Both ranks of "nola", of "pranc" with k + l bases, or of "lora" with rank r, where num_basis is (k, l).

    Raises ValueError for an unknown method or a size below 1.
    """
    one_of("method", method, METHODS)
    positive(d=d, k=num_basis[0], l=num_basis[1], r=r)
    numbers, update = _update(method, d=d, num_basis=num_basis, r=r, seed=seed)
    source = generator(seed, "reach", method)
    draws = torch.randn(d * d + _SPARE, numbers, generator=source, dtype=torch.float64)
    samples = torch.stack([update(p).flatten() for p in draws])
    jacobian = torch.func.jacrev(lambda p: update(p).flatten())(draws[0])
    return Reach(numbers, int(torch.linalg.matrix_rank(samples)), int(torch.linalg.matrix_rank(jacobian)))
