"""A factor of NOLA's update from its coefficients: A = A0 + sum_i alpha_i A_i / sqrt(k), likewise B (NOLA, Sec. 3).

The sum is linear, so its backward needs no coefficient and no basis from the forward: dalpha_i = <dA, A_i> / sqrt(k),
with the bases drawn again or from memory. Between the two nothing of the size of the bases stays.

Coefficients may be of a few bits: symmetric, a scale for each vector; bases are drawn, so their precision is free.
L = 2^(b-1) - 1, m = max|c|, n_i = round(c_i L / m), c^_i = (n_i / L) m (NOLA's first release, whose table of L is
missing: 127 for 8 and 7 for 4 bits are in the second). As m itself is a level, quantising again changes nothing.
"""

import functools
import itertools
import weakref
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from limbeck.adapters.basis import Bank, Stream

BITS = (2, 3, 4, 8)
_numbers, _factors = itertools.count(), weakref.WeakValueDictionary()  # every factor by its number


def wide(dtype: torch.dtype) -> torch.dtype:
    """Float32 or wider: what coefficients are rounded and summed in, whatever they are kept in."""
    return torch.promote_types(dtype, torch.float32)


def require_bits(bits: object) -> None:
    """Raise ValueError unless `bits` is one of BITS."""
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"received {bits!r} bits a coefficient, expected one of {', '.join(map(str, BITS))}")


def levels(values: Float[Tensor, "vector n"], bits: int) -> tuple[Int8[Tensor, "vector n"], Float[Tensor, " vector"]]:
    """The numbers n of each vector, and its scale m in float32."""
    top = 2 ** (bits - 1) - 1
    values = values.to(wide(values.dtype))
    scales = values.abs().amax(1).float()
    steps = values * (top / torch.where(scales > 0, scales, 1))[:, None]
    return steps.round().clamp(-top, top).to(torch.int8), scales


def dequantised(
    numbers: Int8[Tensor, "vector n"], scales: Float[Tensor, " vector"], bits: int, dtype: torch.dtype
) -> Float[Tensor, "vector n"]:
    """(n / L) m, computed in `dtype`."""
    return (numbers.to(dtype) / (2 ** (bits - 1) - 1)) * scales[:, None].to(dtype)


def quantised(values: Float[Tensor, "vector n"], bits: int | None) -> Float[Tensor, "vector n"]:
    """Each vector at its nearest levels, in float32 or wider; with None, itself."""
    return values if bits is None else dequantised(*levels(values, bits), bits, wide(values.dtype))


def packed(numbers: Int8[Tensor, "vector n"], bits: int) -> UInt8[Tensor, "vector bytes"]:
    """n + L in `bits` bits each, the highest first, one after another."""
    offset = (numbers.to(torch.int16) + 2 ** (bits - 1) - 1).to(torch.uint8).cpu().numpy()
    digits = np.unpackbits(offset[:, :, None], axis=2)[:, :, 8 - bits :]
    return torch.from_numpy(np.packbits(digits.reshape(len(offset), -1), axis=1))


def unpacked(data: UInt8[Tensor, "vector bytes"], bits: int, number: int) -> Int8[Tensor, "vector n"]:
    """What `packed` was given."""
    digits = np.unpackbits(data.cpu().numpy(), axis=1)[:, : number * bits].reshape(len(data), number, bits)
    offset = np.packbits(np.pad(digits, ((0, 0), (0, 0), (8 - bits, 0))), axis=2)[:, :, 0]
    return torch.from_numpy(offset.astype(np.int16) - (2 ** (bits - 1) - 1)).to(torch.int8)


def to_rows(pair: tuple[Tensor, Tensor], bits: int) -> UInt8[Tensor, "matrix bytes"]:
    """Each matrix's alpha and beta packed, then the scale of each in four bytes."""
    numbers, scales = zip(*(levels(part.detach(), bits) for part in pair), strict=True)
    packs = [packed(part, bits) for part in numbers]
    return torch.cat([*packs, torch.stack(scales, 1).cpu().view(torch.uint8)], 1)


def from_rows(
    rows: UInt8[Tensor, "matrix bytes"], bits: int, shapes: list[torch.Size], dtype: torch.dtype
) -> list[Float[Tensor, "matrix basis"]]:
    """The alpha and beta of these shapes that `to_rows` was given, at their levels.

    Raises ValueError for rows of another shape or dtype.
    """
    widths = [-(-number * bits // 8) for _, number in shapes]
    expected = (shapes[0][0], sum(widths) + 8)
    if tuple(rows.shape) != expected or rows.dtype != torch.uint8:
        raise ValueError(f"received packed coefficients of {rows.dtype} {tuple(rows.shape)}, expected uint8 {expected}")
    *packs, scales = rows.cpu().split([*widths, 8], 1)
    numbers = [unpacked(pack, bits, number) for pack, (_, number) in zip(packs, shapes, strict=True)]
    scales = scales.reshape(-1).clone().view(torch.float32).view(-1, 2).unbind(1)
    return [dequantised(part, scale, bits, dtype) for part, scale in zip(numbers, scales, strict=True)]


@functools.cache
def _read_back(kind: str, width: int, block: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far bitsandbytes' readings and products of rows in four bits are from its own code book, as a part of 1."""
    from bitsandbytes import functional, matmul_4bit  # noqa: PLC0415

    values = torch.arange(5.0 * width)  # of other scales in each block, as a scale is what may be taken from another
    weight = (torch.sin(values * 1.7 + 0.3) * 0.6 ** (values // 32 % 5)).view(5, width).to(device)
    packed, state = functional.quantize_4bit(weight.to(dtype), blocksize=block, quant_type=kind)
    pairs = packed.view(-1)
    numbers = torch.stack([pairs >> 4, pairs & 15], 1).view(-1)[: weight.numel()].long()
    twin = (state.code[numbers] * state.absmax.repeat_interleave(block)[: weight.numel()]).view(5, width).float()
    x = weight.flip(1).to(dtype)
    off = [(twin - weight).abs().max() - 0.2]  # a half of the largest gap between levels is 1/6
    off.append((functional.dequantize_4bit(packed, state).float() - twin).abs().max())
    off += [
        (matmul_4bit(some, packed.t(), state).float() - some.float() @ twin.t()).abs().max() / width
        for some in (x, x[:1])
    ]
    return max(map(float, off))


def require_read_back(layer: nn.Module, key: str) -> None:
    """Raise ValueError for a layer in four bits, named `key`, that bitsandbytes reads back wrong on this processor.

    Its 0.50 does so with AVX-512 where rows are no whole blocks. A small twin is compared once for each kind of layer.
    """
    weight = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is None or weight.dtype == torch.int8 or weight.device.type == "meta":
        return
    off = _read_back(state.quant_type, layer.in_features, state.blocksize, state.dtype, weight.device)
    if off > 0.02:
        raise ValueError(
            f"received {key} of {layer.in_features} inputs in {state.quant_type}, which bitsandbytes reads back off by "
            f"{off:.2g} of its scale on this {weight.device.type}, expected at most 0.02: take rows of a multiple of "
            f"{state.blocksize}, or another version"
        )


class _Combine(torch.autograd.Function):
    """The value that the factor has built, tied to the coefficients; the gradient passes any rounding straight."""

    @staticmethod
    def forward(ctx, coefficients: Tensor, value: Tensor, factor: "Factor") -> Tensor:
        ctx.factor = factor
        return value.detach().to(coefficients.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.factor.contract(grad), None, None


# As operations that a compiler does not look into: numpy draws, and whether to build anew is decided from values. The
# factor's number is a tensor, so that one compiled graph serves all layers of a shape.
@torch.library.custom_op("limbeck::factor", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _compiled(coefficients: Tensor, number: Tensor, rows: int, cols: int) -> Tensor:
    value = _factors[number.item()].value(coefficients)
    return value.to(coefficients.dtype, copy=True)  # the compiler may write into it


@torch.library.custom_op("limbeck::contract", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _compiled_backward(grad: Tensor, number: Tensor, count: int) -> Tensor:
    return _factors[number.item()].contract(grad)


@_compiled.register_fake
def _(coefficients, number, rows, cols):
    return coefficients.new_empty(len(coefficients), rows, cols)


@_compiled_backward.register_fake
def _(grad, number, count):
    return grad.new_empty(len(grad), count)


def _keep(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.count = inputs[0].shape[1]


def _pass_back(ctx, grad: Tensor) -> tuple:
    return _compiled_backward(grad, *ctx.saved_tensors, ctx.count), None, None, None


_compiled.register_autograd(_pass_back, setup_context=_keep)


class Factor:
    """One factor of the matrices of a layer, each from its own row of coefficients and its own stream.

    Streams may be equal: then the matrices share bases, and one product combines them all. `fixed` are the streams of
    A0 (of which the first basis counts, at the bound of Kaiming's uniform, 1 / sqrt(rows)), if there is one.

    The built value is kept without its graph until a coefficient changes. Neither a fused optimiser nor a change
    through `.data` raises a tensor's version, so the coefficients themselves are compared too. On a device that waits
    for it, so of coefficients that do not train there only an assignment to `.data` is noticed.
    """

    def __init__(
        self,
        bank: Bank,
        streams: tuple[Stream, ...],
        number: int,
        *,
        fixed: tuple[Stream, ...] = (),
        bits: int | None = None,
        chunk_size: int = 64,
        budget: int = 0,
    ):
        self.bank, self.streams, self.number, self.fixed, self.bits = bank, streams, number, fixed, bits
        self.chunk_size, self.budget = chunk_size, budget
        self._built: tuple | None = None
        self._enter()

    def _enter(self) -> None:
        self._index = torch.tensor(next(_numbers), device="cpu")
        _factors[self._index.item()] = self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_built": None, "_index": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._enter()

    def __call__(self, coefficients: Float[Tensor, "matrix basis"]) -> Float[Tensor, "matrix rows cols"]:
        """The factors, in the coefficients' dtype. Gradient: to the coefficients."""
        if torch.compiler.is_compiling():
            return _compiled(coefficients, self._index, *self.streams[0].shape)
        return _Combine.apply(coefficients, self.value(coefficients), self)

    def value(self, coefficients: Float[Tensor, "matrix basis"]) -> Float[Tensor, "matrix rows cols"]:
        """The same without gradient, in float32 or wider: built at most once for the same coefficients."""
        version = None if coefficients.is_inference() else coefficients._version
        mark = (version, coefficients.data_ptr(), coefficients.device, coefficients.dtype, self.bits)
        if self._built is not None:
            source, built_mark, snapshot, value = self._built
            frozen = not coefficients.requires_grad and coefficients.device.type != "cpu"
            known = frozen and source is coefficients  # a compiler hands over other objects of the same numbers
            if mark == built_mark and (known or torch.equal(snapshot, coefficients)):
                return value
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(coefficients.device.type, enabled=False):
            snapshot = coefficients.detach().clone()
            value = self._build(snapshot.to(wide(snapshot.dtype)))
        self._built = (coefficients, mark, snapshot, value)
        return value

    def take_from(self, bank: Bank) -> None:
        """Take the bases from another bank."""
        self.bank, self._built = bank, None

    def _bases(self, streams: tuple[Stream, ...], number: int, like: Tensor) -> Iterator[tuple[list[int], int, Tensor]]:
        """(rows, start, bases): for each stream the rows that have it, and its bases in parts.

        Whoever iterates lets go of a part before asking for the next, so that only one is ever there.
        """
        for stream in dict.fromkeys(streams):
            rows = [row for row, other in enumerate(streams) if other == stream]
            chunks = self.bank.chunks(stream, number, like=like, chunk_size=self.chunk_size, budget=self.budget)
            for start, bases in chunks:
                yield rows, start, bases
                del bases

    def _build(self, coefficients: Float[Tensor, "matrix basis"]) -> Float[Tensor, "matrix rows cols"]:
        shape = self.streams[0].shape
        weights = quantised(coefficients, self.bits) * self.number**-0.5
        total = coefficients.new_zeros(len(self.streams), shape[0] * shape[1])
        for rows, _, bases in self._bases(self.fixed, 1, coefficients):
            total[rows] += bases * shape[0] ** -0.5
        for rows, start, bases in self._bases(self.streams, self.number, coefficients):
            total[rows] += weights[rows, start : start + len(bases)] @ bases
            del bases
        return total.view(-1, *shape)

    def contract(self, grad: Float[Tensor, "matrix rows cols"]) -> Float[Tensor, "matrix basis"]:
        """<grad, basis_i> / sqrt(k): what reaches the coefficients."""
        with torch.autocast(grad.device.type, enabled=False):
            flat = grad.flatten(1).to(wide(grad.dtype)) * self.number**-0.5
            contracted = flat.new_empty(len(flat), self.number)
            for rows, start, bases in self._bases(self.streams, self.number, flat):
                contracted[rows, start : start + len(bases)] = flat[rows] @ bases.T
                del bases
        return contracted.to(grad.dtype)
