"""Problems with a mathematical answer from a `datasets` data set, judged by math-verify.

A data set is a hub name or a local folder, with a column of problems and one of answers. All its parts are pooled; of
a problem that occurs twice the first is kept. `reward` is slow at times, and can hang: run it in `tasks.isolated`,
whose limit replaces math-verify's own timeouts (they use signals, and are off).

Numbers are read by `tasks.rational` and compared exactly. math-verify reads what is no number, and texts without a box:
what follows words such as "answer", then any last expression. Its parser hands sympy's `parse_expr`, which evaluates,
digits and operators only; LaTeX goes through a grammar. Left out: units are not compared.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from limbeck import seeding
from limbeck.tasks import classification
from limbeck.tasks.rational import BITS, boxed, number, plain

_ASK = "Please reason step by step, and put your final answer within \\boxed{}."  # from the cards of R1's distillates
_DOTS = re.compile(r"\\[lc]?dots[cbmio]?(?![a-z])|…|\.{3,}")
_MOMENTS = (  # dates, and times of the day
    re.compile(r"(?<![\d-])(\d{4})-(\d\d?)-(\d\d?)(?![\d-])", re.ASCII),
    re.compile(r"(?<![\d:.])([01]?\d|2[0-4]):([0-5]\d)(?::([0-5]\d))?(?![\d:])\s*(?:([ap])\.?m\b)?", re.I | re.ASCII),
)
_FORMULA = r"(?:\$\$?(?:\\.|[^$\\])+\$\$?|\\\[.+?\\\]|\\\(.+?\\\))(?:\s*\\?%)?"
_FORMULAS = rf"{_FORMULA}(?:\s*(?:,|,?\s*and|,?\s*or)\s*{_FORMULA})*"
_RATIO = re.compile(r"(?<![\d:.])\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+(?![\d:])", re.ASCII)


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
    golds: dict[str, str] = {}
    for split, rows in classification.loaded(name).items():
        if missing := set(columns) - set(rows.column_names):
            received = f"the columns {rows.column_names} in its split {split}"
            raise ValueError(f"data set {name}: received {received}, expected {sorted(missing)} among them")
        for problem, gold in zip(*(rows[column] for column in columns), strict=True):
            if problem is None or gold is None:
                raise ValueError(f"data set {name}: received {problem!r} with answer {gold!r}, expected both")
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
    """1 if the text's answer equals the gold one, else 0; a text without an answer earns 0.

    The last box counts, all of it; without one a formula, without that the number that math-verify reads first. Numbers
    are equal only if they are exactly: 0.333333 is not 1/3. One of two percentages may lack its sign. Times of day,
    dates and what dots shorten are equal as they are written, ratios in proportion.

    Raises ValueError for a gold answer that cannot be read, which would make every text wrong, for a number too large
    to be compared, and whatever error a comparison ends in; with math-verify's defaults these would be a 0.
    """
    gold, answer = plain(gold), _given(text)
    if answer == "":
        return 0.0
    equal = _equal_as_written(gold, plain(text) if answer is None else answer, whole=answer is not None)
    if equal is None and answer is not None:
        equal = _equal_numbers(gold, answer)
    return float(_equal_expressions(gold, answer, text) if equal is None else equal)


def _given(text: str) -> str | None:
    """The formula that holds the answer: the last box, else the one after the last "answer", else the last one."""
    if (content := boxed(text)) is not None:
        return plain(content)
    prefix = "" if "answer" not in text.lower() else "(?i:answer).{0,50}?"
    formulas = re.findall(f"{prefix}({_FORMULAS})", text, re.DOTALL)
    return plain(formulas[-1]) if formulas else None


def _equal_as_written(gold: str, answer: str, *, whole: bool) -> bool | None:
    """Whether both agree in what arithmetic would misread: dots, dates, times and ratios. None where gold has none.

    Unless the answer is `whole`, it stands last in its text.
    """
    gold, answer = (re.sub(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}", r" \1 ", x) for x in (gold, answer))
    if _DOTS.search(gold) or (whole and _DOTS.search(answer)):
        return _spelled(gold) == _spelled(answer)
    for kind in _MOMENTS:
        expected, received = kind.findall(gold), kind.findall(answer)
        if expected and received:
            received = received if whole else received[-len(expected) :]
            return len(expected) == len(received) and all(map(_same_moment, expected, received))
        moments = expected or received * whole
        if moments and (kind is _MOMENTS[0] or moments[0][1].startswith("0")):  # 12:30 may be a ratio, 12:05 is none
            return False
    expected, received = ([match[0] for match in _RATIO.finditer(x)] for x in (gold, answer))
    if expected != [gold] or not received:
        return False if expected == [gold] and gold.count(":") > 1 else None
    terms, others = ([Fraction(term) for term in ratio.split(":")] for ratio in (gold, received[-1]))
    crossed = itertools.product(zip(terms, others, strict=False), repeat=2)
    return len(terms) == len(others) and any(others) and all(a * d == b * c for (a, b), (c, d) in crossed)


def _spelled(text: str) -> str:
    """A text without spaces, and all dots alike."""
    return re.sub(r"\s|\\[,;!: ]|\\(?:left|right)(?![a-z])", "", _DOTS.sub("…", text))


def _same_moment(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether the numbers of a date or a time are equal, and a.m. or p.m. too where both say it."""
    halves = [half.lower() for half in (*one[3:], *other[3:]) if half]
    return [int(x or 0) for x in one[:3]] == [int(x or 0) for x in other[:3]] and len(set(halves)) < 2


def _equal_numbers(gold: str, answer: str) -> bool | None:
    """Whether two numbers are equal, exactly; None where one is none."""
    percentages = [re.fullmatch(r"(.*?)\s*(?:\\?%|percent)", text, re.DOTALL) for text in (gold, answer)]
    shown = [found[1] if found else text for found, text in zip(percentages, (gold, answer), strict=True)]
    try:
        one, other = map(number, shown)
    except OverflowError:
        return _equal_huge(gold, answer)
    if one is None or other is None:
        return None
    if bool(percentages[0]) == bool(percentages[1]):
        return one == other
    return one == other or (one == 100 * other if percentages[0] else 100 * one == other)


def _equal_huge(gold: str, answer: str) -> bool:
    """Whether two numbers are equal of which one is too large; that of sums and powers alone is above any other."""
    if _spelled(gold) == _spelled(answer):
        return True
    sizes = []
    for text in (gold, answer):
        try:
            sizes.append(number(text))
        except OverflowError:
            sizes.append("huge" if re.fullmatch(r"(?:[^-/\\.\d]|(?<![\d])[1-9]\d*|\\(?:times|cdot))+", text) else None)
    if "huge" in sizes and any(isinstance(size, Fraction) for size in sizes):
        return False
    raise ValueError(f"received {answer!r} where {gold!r} is right, expected numbers of fewer than {BITS} bits")


def _equal_expressions(gold: str, answer: str | None, text: str) -> bool:
    """What math-verify says, with its reading of a formula whole or not at all, and its numbers compared exactly."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, grader, parse, verify  # noqa: PLC0415  (not for all)

    grader.sympy_numeric_eq = _equal_values  # its own takes numbers that differ by less than 1e-15 for equal
    given = text if answer is None else f"${_canonical(answer)}$"
    gold_formula, text = (re.sub(r"\s*\\?%\s*\$", "$%", x) for x in (f"${_canonical(gold)}$", given))
    options = {"parsing_timeout": None, "raise_on_error": True, "extraction_mode": "first_match"}
    latex = LatexExtractionConfig(boxed_match_priority=0)
    expected = parse(gold_formula, [latex], **options)
    expressions = [expression for expression in expected if not isinstance(expression, str)]
    if not expressions or not verify(expressions, expressions, timeout_seconds=None, raise_on_error=True):
        raise ValueError(f"received the gold answer {gold!r}, expected one that math-verify reads; it read {expected}")
    answers = parse(text, [latex, ExprExtractionConfig()] if answer is None else [latex], **options)
    return verify(expected, answers, timeout_seconds=None, raise_on_error=True)


def _canonical(formula: str) -> str:
    """A number of ordinary size as a fraction of digits, another formula as it is."""
    try:
        value = number(formula)
    except OverflowError as error:
        raise ValueError(f"received {formula!r:.200}: {error}") from None
    if value is None or max(map(abs, value.as_integer_ratio())) > 10**1000:
        return formula
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}" if value.denominator > 1 else str(value)


def _equal_values(one: Any, other: Any, *_: object) -> bool:
    """Whether two expressions of sympy without symbols are equal: rational ones exactly, others to 50 digits.

    What has symbols is simplified elsewhere. Matrices go by elements; of two percentages one may lack the sign.
    """
    from math_verify.grader import get_pct_val  # noqa: PLC0415  (not for all)

    shares = [get_pct_val(value) for value in (one, other)]
    if (shares[0] is None) != (shares[1] is None) and _equal_values(get_pct_val(one, one), get_pct_val(other, other)):
        return True
    one, other = (value.doit() for value in (one, other))
    if one.is_Matrix or other.is_Matrix:
        same = one.is_Matrix and other.is_Matrix and one.shape == other.shape
        return same and all(map(_equal_values, one.flat(), other.flat()))
    one, other = (value.replace(lambda x: x.is_Float, _rational) for value in (one, other))
    if one.free_symbols or other.free_symbols:
        return False
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    first, second = one.evalf(50), other.evalf(50)
    if not (first.is_finite and second.is_finite):
        return bool(first == second)
    return bool(abs(first - second) <= abs(first) * 1e-40)


def _rational(value: Any) -> Any:
    """A decimal number of sympy as the fraction that it writes."""
    from sympy import Rational  # noqa: PLC0415  (not for all)

    return Rational(str(value))
