"""The papers' statements, and the verdicts on them from what we measured.

A statement carries a rule written before any run (`exhibits.rules`). Measurements are paired replicate by replicate and
meet the rule as a Student t interval, at the confidence that Holm's procedure leaves it among its neighbours. Five
words come out: agrees, agrees in direction, inconclusive, disagrees, not tested. No verdict is typed by hand.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from limbeck import paths
from limbeck.exhibits import intervals, rules
from limbeck.exhibits.result_table import Shown

ALPHA = 0.05
ROLES = ("main", "exact", "exploratory")  # what the abstract asserts; an identity or a count; everything else


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of a paper: where it stands, how far to trust our reading of it, its role, and what decides it."""

    id: str
    exhibit: str
    statement: str
    source: str
    reliability: str
    role: str
    rule: dict[str, Any]

    def __post_init__(self) -> None:
        """Raise ValueError, naming the claim, for an unknown role or a rule that cannot be decided."""
        if self.role not in ROLES:
            raise ValueError(f"claim {self.id!r}: role must be one of {', '.join(ROLES)}; got {self.role!r}")
        try:
            rules.check(self.rule)
        except ValueError as error:
            raise ValueError(f"claim {self.id!r}: {error}") from None


def load(paper: str) -> tuple[Claim, ...]:
    """Every claim of data/claims/<paper>.yaml, in its order: a list of mappings with the fields of `Claim`."""
    path = paths.DATA / "claims" / f"{paper}.yaml"
    if not path.is_file():
        raise ValueError(f"expected the claims of {paper} at {path}, found none")
    entries = paths.read_yaml(path)
    fields = [field.name for field in dataclasses.fields(Claim)]
    if not isinstance(entries, list):
        raise ValueError(f"{path} must be a list of claims, got {type(entries).__name__}")
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) != set(fields):
            raise ValueError(f"{path}: a claim has exactly the keys {', '.join(fields)}; got {entry!r}")
        for name in fields:
            kind = dict if name == "rule" else str
            if not entry[name] or not isinstance(entry[name], kind):
                raise ValueError(f"{path}: {name} must be a {kind.__name__} with content, got {entry[name]!r}")
    names = [entry["id"] for entry in entries]
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{path}: expected every id once, got {repeated} more often")
    try:
        return tuple(Claim(**entry) for entry in entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def decide(claims: Sequence[Claim], frame: pd.DataFrame) -> list[dict[str, Any]]:
    """One decision per claim, ready for JSON: `ours` with `interval`, `level`, `count`, the rule in words, the verdict.

    `ours` is the mean of left - right, of Kendall's tau for `monotone`, of left for `exact` and `report`; `sides` are
    the means of what was compared, in the rule's order, where that is more than one thing.
    Holm's family is every claim with a test and enough replicates: pass the claims of one exhibit, all of them.
    An order agrees in direction only if it holds for the means over replicates as well.
    A claim whose arms are not in the frame is "not tested". Raises ValueError for a metric or a coordinate that is no
    column, and for sides that were not measured on the same replicates.
    """
    measured = [_measure(claim.rule, frame) for claim in claims]
    family = [i for i, claim in enumerate(claims) if rules.tested(claim.rule, measured[i])]
    p_values = [rules.p_value(claims[i].rule, measured[i]) for i in family]
    levels = dict(zip(family, intervals.holm_levels(p_values, alpha=ALPHA), strict=True))
    decisions = [_decision(claim, measured[i], levels.get(i, 1 - ALPHA)) for i, claim in enumerate(claims)]
    for claim, decision in zip(claims, decisions, strict=True):
        compared = decision["ours"] is not None and len(rules.terms(claim.rule)) > 1
        decision["sides"] = _sides(claim.rule, frame) if compared else None
        broken = claim.rule["kind"] == "monotone" and compared and not (np.diff(decision["sides"]) > 0).all()
        if decision["verdict"] == "agrees in direction" and broken:
            decision["verdict"] = "inconclusive"
    return decisions


def table(decisions: Sequence[Mapping[str, Any]]) -> Shown:
    """Decisions as a table to show, one row per claim, its statement whole and its verdict coloured."""
    columns = ["statement", "rule", "ours", "interval", "level", "count", "verdict"]
    rows = [decision | {"interval": _brackets(decision["interval"])} for decision in decisions]
    shown = Shown.of(pd.DataFrame(rows, columns=["id", *columns]).set_index("id"))
    shown.style.map(_coloured, subset=["verdict"]).format(escape="html", precision=4)
    return shown


def _brackets(interval: Sequence[float] | None) -> str:
    return f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "–"


def _coloured(verdict: str) -> str:
    """Green where ours agrees, red where it disagrees, grey where nothing is decided."""
    colours = {"agrees": "#d5ecd4", "disagrees": "#f6d0cb", "smaller": "#f7ebc3"}
    return f"background-color: {colours.get(verdict.split(maxsplit=1)[0], '#e8e8e8')}; color: black"


def _measure(rule: Mapping[str, Any], frame: pd.DataFrame) -> np.ndarray | None:
    """The statistic of a rule, one number per replicate (for `exact`, per row); None where an arm was not run."""
    terms, metric, replicate = rules.terms(rule), rule["metric"], rule.get("replicate", "seed")
    sides = [term for term in terms if isinstance(term, Mapping)]
    named_columns = {replicate, *(name for side in sides for name in side)}
    if missing := sorted({metric, *named_columns} - set(frame.columns)):
        raise ValueError(f"expected {', '.join(missing)} among the columns, got {', '.join(frame.columns)}")
    others = [name for name in frame.columns if "/" not in name and name not in named_columns]
    parts = [_select(frame.dropna(subset=[metric, replicate]), side) for side in sides]
    if any(part.empty for part in parts):
        return None
    _check_matched(parts, replicate, others)
    if rule["kind"] == "exact":
        return parts[0][metric].to_numpy(dtype=float)
    means = _means(parts, metric, replicate)
    if rule["kind"] == "monotone":
        taus = [stats.kendalltau(range(len(sides)), row).statistic for row in means]
        return np.nan_to_num(taus)  # equal values throughout have no order, hence tau 0
    return means[:, 0] - (means[:, 1] if len(sides) == 2 else rule.get("right", 0.0))


def _means(parts: Sequence[pd.DataFrame], metric: str, replicate: str) -> np.ndarray:
    """The metric of every side, items averaged: [replicate, side]."""
    return np.stack([part.groupby(replicate)[metric].mean().to_numpy(dtype=float) for part in parts], axis=1)


def _sides(rule: Mapping[str, Any], frame: pd.DataFrame) -> list[float]:
    """The mean over replicates of each thing that a rule compares; a number stands for itself."""
    frame, replicate = frame.dropna(subset=[rule["metric"]]), rule.get("replicate", "seed")
    return [
        float(_select(frame, term).groupby(replicate)[rule["metric"]].mean().mean())
        if isinstance(term, Mapping)
        else float(term)
        for term in rules.terms(rule)
    ]


def _select(frame: pd.DataFrame, side: Mapping[str, Any]) -> pd.DataFrame:
    for name, value in side.items():
        frame = frame[frame[name] == value]
    return frame


def _check_matched(parts: Sequence[pd.DataFrame], replicate: str, others: Sequence[str]) -> None:
    """Every replicate of every side must cover the same cells: else a difference is not the arms' alone."""
    layouts = []
    for part in parts:
        cells = pd.Series([str(row) for row in part[others].to_numpy(dtype=object).tolist()], index=part[replicate])
        layouts.append({key: sorted(group) for key, group in cells.groupby(level=0)})
    if any(layout.keys() != layouts[0].keys() for layout in layouts):
        got = " and ".join(str(list(layout)) for layout in layouts)
        raise ValueError(f"expected the same values of {replicate!r} on every side of a rule, got {got}")
    first = next(iter(layouts[0].values()))
    if any(cells != first for layout in layouts for cells in layout.values()):
        raise ValueError(
            f"expected each {replicate!r} of each side to cover the same {', '.join(others) or 'rows'}, got {layouts}; "
            "run the missing cells, or name in the rule the coordinates in which its sides differ"
        )


def _decision(claim: Claim, values: np.ndarray | None, level: float) -> dict[str, Any]:
    estimate = None if values is None else intervals.mean_interval(values, level=level)
    return {
        "id": claim.id,
        "statement": claim.statement,
        "source": claim.source,
        "reliability": claim.reliability,
        "ours": estimate and estimate.mean,
        "interval": [estimate.low, estimate.high] if estimate and estimate.count > 1 else None,
        "level": estimate and estimate.level,
        "count": estimate.count if estimate else 0,
        "rule": rules.describe(claim.rule),
        "verdict": rules.verdict(claim.rule, values, estimate),
    }
