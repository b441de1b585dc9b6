"""School problems in words from reasoning-gym's `gsm_symbolic`, with worked solutions.

An answer is the last number of a text, or of its last box, read without units, currency and thousands separators; a
minus is its sign unless a digit, a letter or a bracket stands before it. Numbers are compared exactly, which
reasoning-gym's own scorer does not: it goes by `float`, and gives 0.01 for a wrong one. It loses signs too, so that
examples of a negative answer (one in thousands) are left out and a negative answer earns 0.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import reasoning_gym

from limbeck import seeding
from limbeck.params import positive
from limbeck.tasks import rational

_NUMBER = re.compile(rf"((?<![\w)])[-−])?[$£€]?({rational.NUMBER})", re.ASCII)
_END = "####"  # what stands before the answer at the end of a solution, as in GSM8K
_POOL = 2  # drawn examples for each wanted one, before giving up


@dataclass(frozen=True)
class Example:
    """One problem, as reasoning-gym made it."""

    entry: dict[str, Any]

    @property
    def question(self) -> str:
        """The problem in words."""
        return self.entry["question"]

    @property
    def gold(self) -> str:
        """The right answer."""
        return self.entry["answer"]


def examples(count: int, *, seed: int) -> list[Example]:
    """So many examples of distinct questions. Raises ValueError for none, or if there are too few.

    Item i of reasoning-gym is drawn by its seed + i, so that neighbouring seeds would share items; its seed is hashed
    from ours.
    """
    positive(count=count)
    start = int(seeding.bits(seed, "gsm_symbolic", n=1)[0])
    distinct: dict[str, Example] = {}
    for entry in reasoning_gym.create_dataset("gsm_symbolic", size=_POOL * count, seed=start):
        example = Example(entry)
        if reward(example, example.gold) == 1.0:
            distinct.setdefault(example.question, example)
        if len(distinct) == count:
            return list(distinct.values())
    raise ValueError(f"received count {count}, expected at most {len(distinct)}: seed {seed} has no more in its pool")


def solution(example: Example) -> str:
    """The worked solution, one sentence per line; the last line is `#### ` and the answer, spelled as the gold one."""
    return f"{example.entry['metadata']['answer_cot'].rpartition(_END)[0]}{_END} {example.gold}"


def answer(text: str) -> str:
    """The last number of a text, as digits with a sign or a point at most; empty where there is none.

    Of a text with boxes what the last one holds: a fraction, as such, where it is one.
    """
    box, match = rational.boxed(text), None
    if box is not None and rational.literal(box) is None:
        try:
            if (value := rational.number(box)) is not None:
                return str(value)
        except (OverflowError, ValueError):  # longer than what Python writes
            return ""
    for match in _NUMBER.finditer(text if box is None else box):  # noqa: B007  (the last one counts)
        pass
    if match is None:
        return ""
    sign, digits = match.groups()
    return ("-" if sign else "") + ("0" if digits[0] == "." else "") + rational.digits(digits)


def reward(example: Example, text: str) -> float:
    """1 if the text's answer is the gold number, exactly, else 0."""
    number = answer(text)
    return float(not number.startswith("-") and rational.number(number) == Fraction(example.gold))
