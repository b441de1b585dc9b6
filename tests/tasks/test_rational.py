"""The grammar of numbers, against Python's own fractions on expressions drawn here."""

import random
import time
from fractions import Fraction

import pytest

from limbeck.tasks import rational


def drawn(source, depth=3):
    """An expression as LaTeX, in brackets wherever they may matter, and its value."""
    kind = source.choice("nnd+-*/^f!") if depth else "n"
    if kind == "n":
        return str(number := source.randint(0, 20_000)), Fraction(number)
    if kind == "d":
        whole, places = source.randint(0, 99), source.randint(0, 999)
        return f"{whole}.{places:03}", Fraction(1000 * whole + places, 1000)
    if kind == "!":
        number = source.randint(0, 6)
        return f"{number}!", Fraction([1, 1, 2, 6, 24, 120, 720][number])
    (left, one), (right, other) = drawn(source, depth - 1), drawn(source, depth - 1)
    if kind == "^":
        power = source.randint(-3, 3)
        return (f"({left})^{{{power}}}", one**power) if one else (left, one)
    if kind in "f/":
        texts = {"f": f"\\frac{{{left}}}{{{right}}}", "/": f"({left})/({right})"}
        return (texts[kind], one / other) if other else (left, one)
    signs = {"+": ("+", one + other), "-": ("-", one - other), "*": ("\\cdot ", one * other)}
    return f"({left}){signs[kind][0]}({right})", signs[kind][1]


def test_expressions_have_the_values_that_python_computes():
    source = random.Random(0)
    for _ in range(2000):
        text, value = drawn(source)
        assert rational.number(text) == value, text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1{,}234", 1234),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1\\,234", 1234),
        ("1{,}234{,}567", 1234567),
        ("12,\\!345", 12345),
        ("1 000", 1000),
        ("1\u202f000", 1000),
        ("\\$12.50", Fraction(25, 2)),
        ("−5", -5),
        ("+.5", Fraction(1, 2)),
        ("-2^2", -4),
        ("(-2)^2", 4),
        ("2^3^2", 512),
        ("2^{-1}", Fraction(1, 2)),
        ("2**10", 1024),
        ("-3!", -6),
        ("2 \\times 3 - 4 \\div 8", Fraction(11, 2)),
        ("8-4-2", 2),
        ("8/4/2", 1),
        ("\\dfrac12", Fraction(1, 2)),
        ("3\\frac{1}{2}", Fraction(7, 2)),
        ("1 1/2", Fraction(3, 2)),
        ("\\left(2\\right)(3)", 6),
        ("101_2", 5),
        ("77_{8}", 63),
        ("9.", 9),
        ("0.\\overline{3}", Fraction(1, 3)),
        ("-0.1\\overline{6}", Fraction(-1, 6)),
        ("2.\\overline{142857}", Fraction(15, 7)),
        (".\\overline{09}", Fraction(1, 11)),
    ],
)
def test_a_number_is_read_as_it_is_meant(text, value):
    assert rational.number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "1,23",
        "1,2",
        "(1,234)",
        "12:00",
        "1 2",
        "1e3",
        "\\pi",
        "2^{1/2}",
        "(-1)!",
        "3!!",
        "1/0",
        "102_2",
        "0^{-1}",
        "1..2",
        "\\frac{1}",
        "(1",
        "1)",
        "1+",
        "\\sqrt{4}",
        "nan",
        "inf",
        "1_000",
        "٧",
        "(" * 3000,
        "9" * 5000,
    ],
)
def test_what_is_no_number_is_none(text):
    assert rational.number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "10**10**10",
        "10^{10^{10}}",
        "9**9**9**9",
        "9999999!",
        "1/9999999!",
        "(((9!)!)!)!",
        "2^{-99999}",
        "3!^{3!^{3!^9}}",
    ],
)
def test_no_number_is_too_large_to_be_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(OverflowError, match="bits, expected fewer"):
        rational.number(text)
    assert time.perf_counter() - start < 1.0


def test_long_sums_of_large_numbers_end_soon():
    start = time.perf_counter()
    assert rational.number("+".join(f"1/{n}!" for n in range(500, 900))) > 0
    with pytest.raises(OverflowError):
        rational.number("*".join(["5000!"] * 500))
    assert time.perf_counter() - start < 5.0


def test_a_literal_has_no_operators():
    assert rational.literal("+014.0") == 14
    assert rational.literal("-1,234") == -1234
    assert [rational.literal(text) for text in ("1+2", "--1", "1/2", "1,4", "1_4", "", "a1", "1 ")] == [None] * 8


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("none", None),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}} {", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1} \\boxed{2", "1"),
        ("} \\boxed {3}", "3"),
        ("\\boxed{}", ""),
        ("\\fbox{4}", "4"),
    ],
)
def test_the_last_box_that_is_closed_is_whole(text, content):
    assert rational.boxed(text) == content
