"""Rational numbers as texts write them, plainly or in LaTeX: the one grammar of all tasks, and exact arithmetic.

By recursive descent over tokens, never through Python's or sympy's evaluation. Sizes are bounded before anything is
computed, so that no text takes long or much memory. Left out: scientific notation (`1e3`).
"""

import re
from fractions import Fraction
from math import factorial

_MARK = r"(?:\{,\}|,\\!|\\[,;]|[\u2009\u202f])"  # what stands between thousands, besides a comma
NUMBER = rf"(?:\d{{1,3}}(?:(?:,|{_MARK})\d{{3}})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_TOKEN = re.compile(rf"\s*({NUMBER}|\\frac|[-+*/^_!(){{}}])", re.ASCII)
_SPELLINGS = (
    (r"(\d*)\.(\d*)\\overline\{(\d+)\}", lambda match: _repeating(*match.groups())),
    (r"\\(?:left|right|displaystyle)(?![a-z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
    (r"\*\*", "^"),
    (r"\\times|\\cdot|[×⋅·]", "*"),
    (r"\\div|÷", "/"),
    (r"^(\d+) (\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"^([-+]?\d{1,3}(?: \d{3})+)$", lambda match: match[1].replace(" ", "")),
)
BITS = 2**16  # of a numerator or a denominator, at most; 5,000! still fits
_LENGTH = 4000  # of a number's text, at most: Python reads integers of 4,300 digits


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{}` that is closed; None without one."""
    content, open_boxes = None, []
    for match in re.finditer(r"\\f?box(?:ed)?\s*\{|\\[{}]|[{}]", text):
        if match[0].endswith("{") and match[0] != "\\{":
            open_boxes.append(match.end() if match[0] != "{" else None)
        elif match[0] == "}" and open_boxes and (start := open_boxes.pop()) is not None:
            content = text[start : match.start()].strip()
    return content


def plain(text: str) -> str:
    """A formula without the signs around it, marks between thousands, or a full stop."""
    text = re.sub(rf"(?<=\d){_MARK}(?=\d{{3}}(?!\d))", "", text).replace("−", "-")
    text = re.sub(r"\\(?:mathrm|text)\{([ei])\}", r"\1", text)
    return re.sub(r"\\?\$|\\[()\[\]]", "", text).strip().removesuffix(".")


def digits(token: str) -> str:
    """A number that matched `NUMBER`, without what stands between thousands."""
    return re.sub(rf",|{_MARK}", "", token)


def literal(text: str) -> Fraction | None:
    """The number that a text is, in digits alone, with a sign, a point or thousands at most; None for another text."""
    return number(text) if re.fullmatch(rf"[-+]?(?:{NUMBER})", text, re.ASCII) else None


def number(text: str) -> Fraction | None:
    """The rational number that a text is, exactly: digits and operators, plain or in LaTeX; None for any other text.

    It reads thousands (`1,234`, `1{,}234`), points, `0.\\overline{3}`, `+ - * / ^ !`, `\\frac`, `3\\frac{1}{2}`,
    `1 1/2` and bases (`101_2`).

    Raises OverflowError for one with a part of more than 2^16 bits, such as 9999999!.
    """
    text = plain(text)
    if len(text) > _LENGTH or ("," in text and not re.fullmatch(rf"[-+]?(?:{NUMBER})", text, re.ASCII)):
        return None
    for pattern, spelling in _SPELLINGS:
        text = re.sub(pattern, spelling, text, flags=re.ASCII)
    tokens, end = [], 0
    while match := _TOKEN.match(text, end):
        tokens.append(match[1])
        end = match.end()
    if text[end:].strip():
        return None
    tokens.reverse()
    try:
        value = _sum(tokens)
    except (IndexError, SyntaxError, ZeroDivisionError, RecursionError):
        return None
    return None if tokens else value


def _repeating(whole: str, first: str, again: str) -> str:
    """0.1666... as a fraction, of `0`, `1` and `6`."""
    above = int(f"{whole}{first}{again}") - int(f"0{whole}{first}")
    return f"(\\frac{{{above}}}{{{(10 ** len(again) - 1) * 10 ** len(first)}}})"


def _took(tokens: list[str], *expected: str) -> str:
    """The next token (the last of the list), taken, if it is one of these; else nothing."""
    return tokens.pop() if tokens and tokens[-1] in expected else ""


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > BITS:
        raise OverflowError(f"received a number of more than {BITS} bits, expected fewer")
    return value


def _sum(tokens: list[str]) -> Fraction:
    value = _signed(tokens)
    while sign := _took(tokens, "+", "-"):
        term = _product(tokens)
        value = _bounded(value + term if sign == "+" else value - term)
    return value


def _signed(tokens: list[str]) -> Fraction:
    sign = _took(tokens, "+", "-")
    return -_product(tokens) if sign == "-" else _product(tokens)


def _product(tokens: list[str]) -> Fraction:
    value = _postfix(tokens)
    while tokens and tokens[-1] in ("*", "/", "(", "\\frac"):
        operator = _took(tokens, "*", "/")
        factor = _postfix(tokens)
        value = _bounded(value / factor if operator == "/" else value * factor)
    return value


def _postfix(tokens: list[str]) -> Fraction:
    """A power, or what has none: factorials bind tighter, and powers to the right."""
    value = _atom(tokens)
    while _took(tokens, "!"):
        if value.denominator > 1 or value < 0 or tokens[-1:] == ["!"]:
            raise SyntaxError("expected a whole number before a single !")
        if value * value.numerator.bit_length() > BITS:
            raise OverflowError(f"received a factorial of more than {BITS} bits, expected fewer")
        value = Fraction(factorial(int(value)))
    if not _took(tokens, "^"):
        return value
    sign = _took(tokens, "-")
    exponent = -_postfix(tokens) if sign else _postfix(tokens)
    if exponent.denominator > 1:
        raise SyntaxError("expected a whole number as an exponent")
    if abs(value) not in (0, 1) and abs(exponent) * max(map(int.bit_length, value.as_integer_ratio())) > BITS:
        raise OverflowError(f"received a power of more than {BITS} bits, expected fewer")
    return value ** int(exponent)


def _atom(tokens: list[str]) -> Fraction:
    token = tokens.pop()
    if token in ("(", "{"):
        value = _sum(tokens)
        if not _took(tokens, {"(": ")", "{": "}"}[token]):
            raise SyntaxError(f"expected the end of {token}")
        return value
    if token == "\\frac":
        if tokens[-1] != "{":
            raise SyntaxError("expected { after frac")
        upper = _atom(tokens)
        return _bounded(upper / _atom(tokens))
    written = digits(token)
    if not re.fullmatch(r"\d*\.?\d+", written, re.ASCII):
        raise SyntaxError(f"expected a number, got {token}")
    if _took(tokens, "_"):
        return _of_base(written, _atom(tokens))
    mixed = tokens[-1:] == ["\\frac"] and written.isdecimal()
    return Fraction(written) + _atom(tokens) if mixed else Fraction(written)


def _of_base(written: str, base: Fraction) -> Fraction:
    if base.denominator > 1 or not 2 <= base <= 36 or not written.isdecimal() or int(max(written)) >= base:
        raise SyntaxError("expected a base between 2 and 36 above its digits")
    return Fraction(int(written, int(base)))
