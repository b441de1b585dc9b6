"""Problems with a mathematical answer from a `datasets` data set, judged by math-verify.

A data set is a hub name or a local folder, with a column of problems and one of answers. All its parts are pooled; of
a problem that occurs twice the first is kept. `reward` is slow at times, and can hang: run it in `tasks.isolated`,
whose limit replaces math-verify's own timeouts (they use signals, and are off).

math-verify reads a last `\\boxed{}` first, then what follows words such as "answer", then any last expression. Its
parser hands sympy's `parse_expr`, which evaluates, digits and operators only; LaTeX goes through a grammar.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from limbeck import seeding

_ASK = "Please reason step by step, and put your final answer within \\boxed{}."  # from the cards of R1's distillates


@dataclass(frozen=True)
class Example:
    """One problem; `gold` is its answer in LaTeX."""

    problem: str
    gold: str

    @property
    def question(self) -> str:
        """The problem, and how its answer is to be given."""
        return f"{self.problem} {_ASK}"


def examples(name: str, count: int, *, columns: Sequence[str], seed: int) -> list[Example]:
    """So many examples of distinct problems, in a drawn order; `columns` are that of problems and that of answers.

    Raises ValueError for a data set without these columns, or too few problems.
    """
    from datasets import load_dataset  # noqa: PLC0415  (slow, and only needed here)

    golds: dict[str, str] = {}
    for split, rows in load_dataset(name).items():
        if missing := set(columns) - set(rows.column_names):
            received = f"the columns {rows.column_names} in its split {split}"
            raise ValueError(f"data set {name}: received {received}, expected {sorted(missing)} among them")
        for problem, gold in zip(*(rows[column] for column in columns), strict=True):
            golds.setdefault(str(problem).strip(), str(gold).strip())
    if count > len(golds):
        raise ValueError(f"received count {count}, expected at most the {len(golds)} problems of {name}")
    order = torch.randperm(len(golds), generator=seeding.generator(seed, "mathematics")).tolist()
    pairs = list(golds.items())
    return [Example(*pairs[i]) for i in order[:count]]


def solution(example: Example) -> str:
    """The answer alone, in a box: the data set's own workings are not read."""
    return f"\\boxed{{{example.gold}}}"


def reward(gold: str, text: str) -> float:
    """1 if math-verify finds the text's answer equal to the gold one, else 0; a text without an answer earns 0.

    Raises ValueError for a gold answer that math-verify cannot read, which would make every text wrong, and whatever
    error a comparison ends in; with math-verify's defaults both would be a 0.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # noqa: PLC0415  (not for all)

    expected = parse(f"${gold.strip('$')}$", parsing_timeout=None, raise_on_error=True)
    expressions = [expression for expression in expected if not isinstance(expression, str)]
    if not expressions or not verify(expressions, expressions, timeout_seconds=None, raise_on_error=True):
        raise ValueError(f"received the gold answer {gold!r}, expected one that math-verify reads; it read {expected}")
    forms = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    answers = parse(text, forms, parsing_timeout=None, raise_on_error=True)
    return float(verify(expected, answers, timeout_seconds=None, raise_on_error=True))
