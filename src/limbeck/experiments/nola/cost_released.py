"""The sum of bases as the first official release computes it, to time ours beside: what differs is the drawing alone.

In forward and again in backward, a generator is reseeded and all bases of a factor drawn from the uniform distribution
with Kaiming's bound for the whole stack, 1 / sqrt(rows cols). The release reseeds the global generator, and so disturbs
whatever draws from it next; here it is one of its own. The matrix products are ours, at least as fast as its sums.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.adapters.layer import NolaLayer


class _Regenerate(torch.autograd.Function):
    """sum_i c_i basis_i of each matrix; the backward draws the same bases a second time."""

    @staticmethod
    def forward(ctx, coefficients: Tensor, sums: "ReleasedSums") -> Tensor:
        ctx.sums = sums
        rows = [row @ sums.bases(seed) for row, seed in zip(coefficients, sums.seeds, strict=True)]
        return torch.stack(rows).view(-1, *sums.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        sums = ctx.sums
        rows = [sums.bases(seed) @ row for row, seed in zip(grad.flatten(1), sums.seeds, strict=True)]
        return torch.stack(rows), None


class ReleasedSums:
    """One factor of the matrices of a layer, in the place of a `Factor` of ours: each matrix has a seed of its own."""

    def __init__(self, seeds: tuple[int, ...], shape: tuple[int, int], number: int):
        self.seeds, self.shape, self.number = seeds, shape, number

    def __call__(self, coefficients: Float[Tensor, "matrix basis"]) -> Float[Tensor, "matrix rows cols"]:
        """The factors. Gradient: to the coefficients."""
        return _Regenerate.apply(coefficients, self)

    def bases(self, seed: int) -> Float[Tensor, "basis size"]:
        """All bases of one matrix, drawn from the beginning."""
        bound = (self.shape[0] * self.shape[1]) ** -0.5
        source = torch.Generator(device="cpu").manual_seed(seed)
        return torch.empty(self.number, self.shape[0] * self.shape[1]).uniform_(-bound, bound, generator=source)


def draw_as_released(layers: list[NolaLayer], adapter_name: str = "default") -> None:
    """Let these layers draw their bases as the release does; all else of them stays."""
    seeds = iter(range(2**31))
    for layer in layers:
        factors = layer.nola_factors[adapter_name]
        layer.nola_factors[adapter_name] = tuple(
            ReleasedSums(tuple(next(seeds) for _ in f.streams), f.streams[0].shape, f.number) for f in factors
        )
