"""NOLA's sums written out: every basis from the integers of its words, in float64, one at a time."""

import math
from statistics import NormalDist

import numpy as np
import torch

from limbeck.seeding import bits


def value(word, position, distribution):
    """The number at `position` of a 64-bit word, by Python's integers."""
    if distribution == "rademacher":
        return (2 * (word >> position & 1) - 1) / math.sqrt(3)
    number = word >> 16 * position & 0xFFFF
    if distribution == "normal":
        return NormalDist().inv_cdf((number + 0.5) / 65536) / math.sqrt(3)
    return (2 * number + 1 - 65536) / 65536


def bases(seed, key, factor, shape, number, distribution="uniform"):
    """[number, rows, cols], float64 of what float32 holds: each basis begins at a whole counter of four words."""
    size, each = math.prod(shape), {"uniform": 4, "normal": 4, "rademacher": 64}[distribution]
    words = math.ceil(size / (4 * each)) * 4
    stream = bits(seed, "nola", key, factor, n=number * words).tolist()
    rows = []
    for i in range(number):
        own = stream[i * words : (i + 1) * words]
        rows.append([value(word, position, distribution) for word in own for position in range(each)][:size])
    return torch.tensor(np.array(rows), dtype=torch.float32).double().reshape(number, *shape)


def factor(coefficients, drawn, fixed=None):
    """fixed + sum_i c_i basis_i / sqrt(k), one basis after another."""
    total = torch.zeros_like(drawn[0]) if fixed is None else fixed.clone()
    for c, basis in zip(coefficients, drawn, strict=True):
        total = total + c * basis / math.sqrt(len(drawn))
    return total


def update(config, keys, shape, alpha, beta):
    """s A B [in, out] of one matrix; `keys` are those of A and B."""
    (rows, cols), r = shape, config.r
    (k, el), (key_a, key_b) = config.numbers, keys
    distribution = config.basis_distribution
    fixed = None
    if config.init == "noop":
        fixed = bases(config.basis_seed, key_a, "A0", (rows, r), 1)[0] / math.sqrt(rows)
    a = factor(alpha, bases(config.basis_seed, key_a, "A", (rows, r), k, distribution), fixed)
    b = factor(beta, bases(config.basis_seed, key_b, "B", (r, cols), el, distribution))
    return config.nola_alpha / r * a @ b


def shared_keys(config, shape):
    """The keys of bases that matrices of one shape share."""
    return f"{shape[0]}x{config.r}", f"{config.r}x{shape[1]}"
