"""Which updates of a d x d matrix a method reaches with p = k + l numbers, by sampling in float64 (NOLA, Sec. 3.5).

Two ranks: of the linear span of all its updates, from many samples; and of the Jacobian at one point, its local
dimension. NOLA without A0 and B0 spans min(min(k, d r) min(l, d r), d^2) dimensions, PRANC p; locally NOLA has
min(k + l - 1, r (2 d - r)), one less than its numbers, as (t alpha, beta / t) is the same update.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from limbeck.adapters.basis import Stream
from limbeck.seeding import generator

METHODS = ("nola", "pranc", "lora")
_SPARE = 8  # samples beyond d^2


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
    if method not in METHODS:
        raise ValueError(f"received method {method!r}, expected one of {', '.join(METHODS)}")
    if min(d, *num_basis, r) < 1:
        raise ValueError(f"received d {d}, num_basis {num_basis} and r {r}, expected at least 1 each")
    numbers, update = _update(method, d=d, num_basis=num_basis, r=r, seed=seed)
    source = generator(seed, "reach", method)
    draws = torch.randn(d * d + _SPARE, numbers, generator=source, dtype=torch.float64)
    samples = torch.stack([update(p).flatten() for p in draws])
    jacobian = torch.func.jacrev(lambda p: update(p).flatten())(draws[0])
    return Reach(numbers, int(torch.linalg.matrix_rank(samples)), int(torch.linalg.matrix_rank(jacobian)))
