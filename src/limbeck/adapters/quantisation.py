"""Coefficients of a few bits: symmetric, a scale for each vector. Bases are drawn, so their precision is free.

L = 2^(b-1) - 1, m = max|c|, n_i = round(c_i L / m), c^_i = (n_i / L) m (NOLA's first release, whose table of L is
missing: 127 for 8 and 7 for 4 bits are in the second). As m itself is a level, quantising again changes nothing.
"""

import numpy as np
import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

BITS = (2, 3, 4, 8)


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
