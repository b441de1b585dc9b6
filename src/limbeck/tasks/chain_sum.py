"""Chains of additions and subtractions from reasoning-gym, with worked solutions.

A `Family` says how many terms and digits; its examples are drawn in one order and no expression comes twice, so
parts that are cut from it share none. A worked solution writes one step per term, whole (`12+5=17;17-3=14`) or only its
result (`17;14`); some steps may carry a mistake, with which it goes on.
"""

from dataclasses import dataclass
from typing import Any

import reasoning_gym

from limbeck import seeding
from limbeck.params import positive
from limbeck.tasks import rational

ALPHABET = "0123456789+-=;"
_SLIPS = (-10, -2, -1, 1, 2, 10)  # what a mistake adds to a step's result
_POOL = 4  # drawn examples for each wanted one, before giving up


@dataclass(frozen=True)
class Family:
    """How many terms and digits a chain may have, both ends included."""

    terms: tuple[int, int]
    digits: tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One chain, as reasoning-gym made it."""

    entry: dict[str, Any]

    @property
    def question(self) -> str:
        """The question in words."""
        return self.entry["question"]

    @property
    def expression(self) -> str:
        """The chain alone, without spaces: what a model of characters reads before `=`."""
        return self.entry["metadata"]["expression"].replace(" ", "")

    @property
    def gold(self) -> str:
        """The right answer."""
        return self.entry["answer"]


def examples(family: Family, count: int, *, seed: int) -> list[Example]:
    """So many examples of distinct expressions. Raises ValueError for none, or more than the family has."""
    positive(count=count)
    sizes = zip(("terms", "digits"), (family.terms, family.digits), strict=True)
    limits = {f"{end}_{name}": value for name, pair in sizes for end, value in zip(("min", "max"), pair, strict=True)}
    drawn = reasoning_gym.create_dataset("chain_sum", size=_POOL * count, seed=seed, **limits)
    distinct: dict[str, Example] = {}
    for entry in drawn:
        example = Example(entry)
        distinct.setdefault(example.expression, example)
        if len(distinct) == count:
            return list(distinct.values())
    raise ValueError(f"received count {count}, expected at most {len(distinct)}: {family} with seed {seed} has no more")


def solution(example: Example, *, terse: float = 0.0, mistakes: float = 0.0, seed: int = 0) -> str:
    """A worked solution: one step per term, with its working or, with probability `terse` each, its result alone.

    Each result is wrong with probability `mistakes`, and the chain goes on with it. Both are drawn by `seed` and the
    expression.
    """
    first, *rest = example.entry["metadata"]["expression"].split(" ")
    words = seeding.bits(seed, "solution", example.expression, n=3 * len(rest) // 2).reshape(-1, 3)
    total, steps = int(first), []
    for sign, term, (slips, which, short) in zip(rest[::2], rest[1::2], words, strict=True):
        result = total + int(sign + term)
        if slips < mistakes * 2**64:
            result += _SLIPS[which % len(_SLIPS)]
        steps.append(str(result) if short < terse * 2**64 else f"{total}{sign}{term}={result}")
        total = result
    return ";".join(steps)


def answer(text: str) -> str:
    """What a text gives as its answer: all that follows its last `;` or `=`."""
    return text.replace("=", ";").rpartition(";")[2].strip()


def reward(example: Example, text: str) -> float:
    """1 if the answer is the gold number, else 0: `+014.0` is 14, a part of a number or a longer one is not."""
    return float(rational.literal(answer(text)) == int(example.gold))
