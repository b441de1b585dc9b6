"""School problems in words from reasoning-gym's `gsm_symbolic`, with worked solutions and its own scorer.

An answer is the last number of a text, read without units, currency and thousands separators; a minus is its sign
unless a digit, a letter or a bracket stands before it. The scorer reads its number with a regular expression and
`float`, never as code. It gives 0.01 for a wrong number, which counts as 0 here, and loses signs, so that examples of
a negative answer (one in thousands) are left out and a negative answer earns 0.
"""

import re
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from limbeck import seeding
from limbeck.params import positive

_NUMBER = re.compile(r"((?<![\w)])[-−])?[$£€]?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII)
_END = "####"  # what stands before the answer at the end of a solution, as in GSM8K
_POOL = 2  # drawn examples for each wanted one, before giving up
_scorer = reasoning_gym.create_dataset("gsm_symbolic", size=1, seed=0)


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
    """The last number of a text, as digits with a sign or a point at most; empty where there is none."""
    match = None
    for match in _NUMBER.finditer(text):  # noqa: B007  (the last one counts)
        pass
    if match is None:
        return ""
    sign, digits = match.groups()
    return ("-" if sign else "") + ("0" if digits[0] == "." else "") + digits.replace(",", "")


def reward(example: Example, text: str) -> float:
    """1 for reasoning-gym's full score of the text's answer, else 0."""
    number = answer(text)
    return float(not number.startswith("-") and _scorer.score_answer(number, example.entry) == 1.0)
