"""What arms of the ablations change of an adapter once it is attached: its bases, its scale, its bits.

LoRA is rounded as NOLA is, so that bits are compared and not roundings: symmetric, to the levels of
`adapters.quantisation`, with a scale a vector. A vector is alpha or beta of a matrix in NOLA, a row of A [r, in] or a
column of B [out, r] in LoRA. In training the gradient passes the rounding straight.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from limbeck import adapters
from limbeck.adapters.basis import Stream
from limbeck.adapters.factor import Factor
from limbeck.adapters.layer import NolaLayer
from limbeck.adapters.quantisation import quantised

NAME = "default"  # of the adapter
SCALE_BYTES = FLOAT_BYTES = 4


def _nola(model: PeftModel) -> list[NolaLayer]:
    return [module for module in model.modules() if isinstance(module, NolaLayer)]


def _factors(model: PeftModel) -> Iterator[Factor]:
    for layer in _nola(model):
        yield from layer.nola_factors[NAME]


def _lora(model: PeftModel) -> list[tuple[nn.Linear, bool]]:
    """The two halves of every LoRA layer, and whether its vectors are the columns of its weight."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [half for layer in layers for half in ((layer.lora_A[NAME], False), (layer.lora_B[NAME], True))]


def unscale(model: PeftModel) -> float:
    """Train NOLA's coefficients as if A were A0 + sum_i alpha_i A_i, without the 1 / sqrt(k); returns sqrt(k).

    With c = sqrt(k) alpha, the coefficient that the layer holds, dL/dalpha = sqrt(k) dL/dc: a hook gives c that
    gradient, so that clipping and Adam see alpha's; the caller multiplies the learning rate by sqrt(k), as a step of
    alpha is sqrt(k) times as long in c. Exact, Adam's epsilon included, for a start at 0.

    Raises ValueError unless k = l everywhere: one rate serves all coefficients.
    """
    numbers = {factor.number for factor in _factors(model)}
    if len(numbers) != 1:
        raise ValueError(f"received k and l among {sorted(numbers)}, expected one number")
    root = math.sqrt(numbers.pop())
    for layer in _nola(model):
        for coefficients in layer.coefficients(NAME):
            coefficients.register_hook(lambda gradient: gradient * root)
    return root


def orthogonalise(model: PeftModel) -> None:
    """Make the bases of every factor orthogonal to each other, in order, with entries of variance 1/3 as before.

    Raises ValueError where there are more bases than a basis has entries.
    """
    for factor in _factors(model):
        for stream in set(factor.streams) - set(factor.bank.given):
            factor.bank.given[stream] = _orthogonal(stream, factor.number)
        factor.bank.kept.clear()


def _orthogonal(stream: Stream, number: int) -> Float[Tensor, "number size"]:
    if number > stream.size:
        raise ValueError(f"received {number} bases of {stream.size} entries, expected no more bases than entries")
    directions, triangle = torch.linalg.qr(stream.draw(0, number).double().T)
    return (directions * triangle.diagonal().sign() * math.sqrt(stream.size / 3)).T.float().contiguous()


class _Rounded(nn.Module):
    """A weight at its nearest levels; the gradient passes straight."""

    def __init__(self, bits: int, columns: bool):
        super().__init__()
        self.bits, self.columns = bits, columns

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return weight + (_nearest(weight, self.bits, self.columns) - weight).detach()


def _nearest(weight: Tensor, bits: int, columns: bool) -> Tensor:
    return quantised(weight.T, bits).T if columns else quantised(weight, bits)


def round_in_training(model: PeftModel, bits: int) -> None:
    """From now on, use the adapter's numbers at their nearest levels and train what is behind them."""
    for factor in _factors(model):
        factor.bits = bits
    for half, columns in _lora(model):
        parametrize.register_parametrization(half, "weight", _Rounded(bits, columns))


@torch.no_grad()
def round_after(model: PeftModel, bits: int) -> None:
    """Round a trained adapter's numbers in place."""
    if _nola(model):
        adapters.quantise(model, NAME, bits=bits)
    for half, columns in _lora(model):
        half.weight.copy_(_nearest(half.weight, bits, columns))


def size(model: PeftModel, bits: int | None) -> int:
    """Bytes of the adapter's numbers in float32, or packed to `bits` with a float32 scale a vector.

    Without the seed and what a file needs besides, which is the same at any number of bits.
    """
    vectors = [len(v) * [v.shape[1]] for layer in _nola(model) for v in layer.coefficients(NAME)]
    vectors += [
        len(v) * [v.shape[1]] for half, columns in _lora(model) for v in [half.weight.T if columns else half.weight]
    ]
    lengths = [length for group in vectors for length in group]
    if bits is None:
        return FLOAT_BYTES * sum(lengths)
    return sum(math.ceil(length * bits / 8) + SCALE_BYTES for length in lengths)
