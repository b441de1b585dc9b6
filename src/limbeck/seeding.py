"""Every random number of the project: counter-based, keyed by a seed and labels, drawn on the CPU.

A label path such as (seed, "order", epoch) names a stream; streams of different paths are independent, and any
position of one can be reached without drawing the positions before it. The global generators of torch, numpy and
random are neither read nor set, so a draw never depends on what ran before it.
"""

import hashlib

import numpy as np
import torch

_WORDS_PER_COUNTER = 4


def _key(seed: int, labels: tuple[str | int, ...]) -> np.ndarray:
    """128-bit Philox key: the head of SHA-256 over the seed and labels, each with its type and length."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an int, got {seed!r}")
    digest = hashlib.sha256()
    for part in (seed, *labels):
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return np.frombuffer(digest.digest()[:16], dtype="<u8")


def bits(seed: int, *labels: str | int, start: int = 0, n: int) -> np.ndarray:
    """Words `start` to `start + n` of the stream (seed, *labels), as uint64 [n].

    Philox4x64-10 (Salmon et al. 2011): word i comes from counter i // 4, so a slice equals the same part of the whole.
    Raises ValueError if start or n is negative.
    """
    if start < 0 or n < 0:
        raise ValueError(f"start and n must be at least 0, got start={start}, n={n}")
    counter, skip = divmod(start, _WORDS_PER_COUNTER)
    return np.random.Philox(key=_key(seed, labels), counter=counter).random_raw(skip + n)[skip:]


def generator(seed: int, *labels: str | int) -> torch.Generator:
    """A fresh CPU generator for the stream (seed, *labels); the same call always starts at the same place."""
    return torch.Generator(device="cpu").manual_seed(int(bits(seed, *labels, n=1)[0]))
