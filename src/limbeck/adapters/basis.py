"""Random bases that no file holds: basis i of a factor is a fixed slice of a counter-based stream (NOLA, Sec. 3).

The paper's code draws its bases one after another from a device's generator, so they change with the device, the dtype
and the library's version. Here they are words of Philox under the name (seed, "nola", key, factor), whatever was drawn
before and wherever they go: on the CPU, in float32, then moved and cast. As any word can be reached without the others,
parts of one draw are drawn side by side, and no number of threads changes a bit.
"""

import functools
import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import ndtri
from torch import Tensor

from limbeck.seeding import bits

GENERATOR = "philox4x64-10, 16 bits a value, 1"  # its name and version: another version draws other bases
_VALUES_PER_WORD = {"uniform": 4, "normal": 4, "rademacher": 64}
DISTRIBUTIONS = tuple(_VALUES_PER_WORD)
_WORDS_PER_COUNTER = 4
_HEAD = 16  # values of each stream that a checksum covers
_PART = 2**15  # words that a thread draws at once: enough to outweigh the call, few enough for its cache


@functools.cache
def _normal_table() -> np.ndarray:
    """The inverse normal CDF at the middles of 65536 equal parts, over sqrt(3). Raises ValueError if scipy is off."""
    middles = (np.arange(65536) + 0.5) / 65536
    table = ndtri(middles)
    some = np.r_[0:32, 32:65504:1021, 65504:65536]
    off = np.abs(table[some] - [NormalDist().inv_cdf(middle) for middle in middles[some]]).max()
    if not off < 1e-9 or not (np.diff(table) > 0).all():
        raise ValueError(f"received scipy.special.ndtri off by {off}, expected the inverse of the normal distribution")
    return (table / math.sqrt(3)).astype(np.float32)


def _values(words: np.ndarray, distribution: str, out: np.ndarray) -> None:
    """uint64 words -> float32 of mean 0 and variance 1/3 (to 3e-5), symmetric, lowest bits of a word first."""
    words = words.astype("<u8", copy=False)
    if distribution == "rademacher":
        np.multiply(np.unpackbits(words.view("u1"), bitorder="little"), np.float32(2), out=out)
        out -= 1
        out *= np.float32(1 / math.sqrt(3))
    elif distribution == "normal":
        np.take(_normal_table(), words.view("<u2"), out=out, mode="clip")
    else:  # (2 u + 1 - 65536) / 65536, exact in float32 at each step
        np.multiply(words.view("<u2"), np.float32(2.0**-15), out=out)
        out += np.float32(2.0**-16 - 1)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "limbeck-bases")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has the pool, but not its threads


@dataclass(frozen=True)
class Stream:
    """The bases of one factor, without end: basis i has its own words, rounded up to whole counters."""

    seed: int
    key: str
    factor: str
    shape: tuple[int, int]
    distribution: str = "uniform"

    @property
    def size(self) -> int:
        """Values in one basis."""
        return self.shape[0] * self.shape[1]

    def draw(self, start: int, count: int) -> Float[Tensor, "count size"]:
        """Bases `start` to `start + count`, flat, of variance 1/3: one contiguous draw."""
        per_word = _VALUES_PER_WORD[self.distribution]
        words = _WORDS_PER_COUNTER * -(-self.size // (_WORDS_PER_COUNTER * per_word))  # of one basis
        values = np.empty((count, words * per_word), np.float32)
        flat, parts = values.reshape(-1), range(start * words, (start + count) * words, _PART)

        def fill(begin: int) -> None:
            number = min(_PART, parts.stop - begin)
            drawn = bits(self.seed, "nola", self.key, self.factor, start=begin, n=number)
            offset = begin - parts.start
            _values(drawn, self.distribution, flat[offset * per_word : (offset + number) * per_word])

        threads = torch.get_num_threads() if len(parts) > 1 else 1
        for _ in _pool(threads).map(fill, parts) if threads > 1 else map(fill, parts):
            pass
        return torch.from_numpy(np.ascontiguousarray(values[:, : self.size]))


class Bank:
    """The bases of a model: each stream in memory once, as long as a budget of bytes holds it, else drawn again.

    They are no buffers: they can be drawn at any time, so they are not saved, copied or pickled, and a model that is
    cast casts no basis. Only bases that a file gave (`save_basis`) are more than a cache; they are of one adapter.
    """

    def __init__(self, given: dict[Stream, Float[Tensor, "basis size"]] | None = None):
        self.given = given or {}
        self.kept: dict[tuple, Tensor] = {}

    def __getstate__(self) -> dict:
        return {"given": self.given, "kept": {}}

    def draw(self, stream: Stream, start: int, count: int) -> Float[Tensor, "count size"]:
        """As the stream draws them, or from the file."""
        given = self.given.get(stream)
        return stream.draw(start, count) if given is None else given[start : start + count]

    def chunks(
        self, stream: Stream, number: int, *, like: Tensor, chunk_size: int, budget: int
    ) -> Iterator[tuple[int, Float[Tensor, "count size"]]]:
        """(start, bases) that cover 0 to `number`, on the device and in the dtype of `like`: all in one if kept."""
        name = (stream, number, like.device, like.dtype)
        parts = ((start, min(chunk_size, number - start)) for start in range(0, number, chunk_size))
        cached, cached_bytes = self.kept.get(name), sum(bases.nbytes for bases in tuple(self.kept.values()))
        if cached is None and cached_bytes + number * stream.size * like.element_size() <= budget:
            cached = like.new_empty(number, stream.size)
            for start, count in parts:
                cached[start : start + count] = self.draw(stream, start, count)
            self.kept[name] = cached  # whole: an interrupt or another thread never meets half of it
        if cached is not None:
            yield 0, cached
        else:
            yield from ((start, self.draw(stream, start, count).to(like)) for start, count in parts)

    def checksum(self, streams: Iterable[Stream]) -> bytes:
        """SHA-256 over the name, the shape and the first values of each stream, in the order of their names."""
        digest = hashlib.sha256()
        for stream in sorted(set(streams), key=repr):
            head = min(_HEAD, stream.size)
            given = self.given.get(stream)
            first = replace(stream, shape=(1, head)).draw(0, 1) if given is None else given[:1, :head]
            digest.update(repr(stream).encode() + first.numpy().astype("<f4").tobytes())
        return digest.digest()
