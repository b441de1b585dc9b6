"""Rules of claims: which keys each kind takes, how it reads in words, and the verdict it draws from an interval.

A rule speaks of left - right, or of Kendall's tau between a stated order and the measured one. Higher is better in
`not_worse`: for a loss, swap the sides. Written before any run, in data/claims; nothing here knows a paper.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from limbeck.exhibits import intervals

REPLICATES = 5  # with fewer, a t interval says more about the normal law than about the seeds
KEYS = {  # kind: the keys it needs; `replicate` may join any, `band` greater and less
    "greater": {"metric", "left", "right"},
    "less": {"metric", "left", "right"},
    "not_worse": {"metric", "left", "right", "margin"},
    "equivalent": {"metric", "left", "right", "margin"},
    "monotone": {"metric", "order"},
    "exact": {"metric", "left", "value", "tolerance"},
    "report": {"metric", "left"},
}
Rule = Mapping[str, Any]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _coordinates(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value)


def _order(value: object) -> bool:
    return isinstance(value, list) and len(value) >= 2 and all(map(_coordinates, value))


def _band(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value)) and value[0] <= value[1]


EXPECTED = {  # key: what must stand there, and the test of it
    "metric": ("a name with a namespace, such as eval/accuracy", lambda x: isinstance(x, str) and "/" in x),
    "left": ("coordinates, such as {arm: kl}", _coordinates),
    "right": ("coordinates, such as {arm: kl}, or a number", lambda x: _coordinates(x) or _number(x)),
    "order": ("a list of at least two coordinates, lowest first", _order),
    "margin": ("a number above 0", lambda x: _number(x) and x > 0),
    "value": ("a number", _number),
    "tolerance": ("a number of at least 0", lambda x: _number(x) and x >= 0),
    "band": ("[low, high], of left - right", _band),
    "replicate": ("the name of a column", lambda x: isinstance(x, str)),
}


def check(rule: Rule) -> None:
    """Raise ValueError for a kind, a key or a value that cannot be decided, or a band that the kind excludes."""
    kind, given = rule.get("kind"), set(rule) - {"kind"}
    if kind not in KEYS:
        raise ValueError(f"kind must be one of {', '.join(KEYS)}; got {kind!r}")
    optional = {"replicate", "band"} if kind in ("greater", "less") else {"replicate"}
    if not KEYS[kind] <= given <= KEYS[kind] | optional:
        raise ValueError(f"{kind} needs {sorted(KEYS[kind])} and may have {sorted(optional)}; got {sorted(given)}")
    for key in sorted(given):
        expected, fits = EXPECTED[key]
        if not fits(rule[key]):
            raise ValueError(f"{key} must be {expected}; got {rule[key]!r}")
    if "band" in given and (rule["band"][1] <= 0 if kind == "greater" else rule["band"][0] >= 0):
        raise ValueError(f"no {kind} difference lies in the band {rule['band']}; it is of left - right, with its sign")


def terms(rule: Rule) -> list[Any]:
    """What a rule compares, left first: coordinates, and perhaps a number on the right."""
    return rule["order"] if "order" in rule else [rule[key] for key in ("left", "right") if key in rule]


def describe(rule: Rule) -> str:
    """A rule as one line: `eval/accuracy: arm=sinkhorn − arm=kl > 0, over seed`."""
    relation = {
        "greater": " > 0",
        "less": " < 0",
        "not_worse": " > −{margin:g}",
        "equivalent": " within ±{margin:g}",
        "monotone": " rises (Kendall's tau > 0)",
        "exact": " = {value:g} ± {tolerance:g}",
        "report": "",
    }[rule["kind"]].format(**rule)
    band = ", stated as {:g} to {:g}".format(*rule["band"]) if "band" in rule else ""
    sides = [", ".join(f"{k}={v}" for k, v in x.items()) if _coordinates(x) else f"{x:g}" for x in terms(rule)]
    joint = " → " if rule["kind"] == "monotone" else " − "
    return f"{rule['metric']}: {joint.join(sides)}{relation}{band}, over {rule.get('replicate', 'seed')}"


def tested(rule: Rule, values: np.ndarray | None) -> bool:
    """Whether the rule takes part in Holm's family: it has a test, and enough replicates for one."""
    return rule["kind"] not in ("exact", "report") and values is not None and len(values) >= REPLICATES


def p_value(rule: Rule, values: np.ndarray) -> float:
    """Two-sided p at the rule's boundary; for `equivalent` at the nearer one, twice the p of two one-sided tests.

    Twice, because then the interval at 1 - alpha excludes the boundary exactly when p < alpha, as for the other kinds.
    """
    return max(intervals.paired_p_value(values, np.full(len(values), edge)) for edge in _boundaries(rule))


def verdict(rule: Rule, values: np.ndarray | None, estimate: intervals.Estimate | None) -> str:
    """One of the five words; `values` has one number per replicate, `estimate` is their mean with its interval."""
    kind = rule["kind"]
    if values is None or kind == "report":
        return "not tested"
    if kind == "exact":
        return "agrees" if (np.abs(values - rule["value"]) <= rule["tolerance"]).all() else "disagrees"
    if len(values) < REPLICATES:
        return "inconclusive"
    low, high = (-estimate.high, -estimate.low) if kind == "less" else (estimate.low, estimate.high)
    floor, ceiling = _boundaries(rule)[0], rule["margin"] if kind == "equivalent" else math.inf
    if high < floor or low > ceiling:
        return "disagrees"
    if low <= floor or high >= ceiling:
        return "inconclusive"
    within = "band" in rule and rule["band"][0] <= estimate.mean <= rule["band"][1]
    return "agrees" if within or kind in ("not_worse", "equivalent") else "agrees in direction"


def _boundaries(rule: Rule) -> tuple[float, ...]:
    margin = rule.get("margin", 0.0)
    return (-margin, margin) if rule["kind"] == "equivalent" else (-margin,)
