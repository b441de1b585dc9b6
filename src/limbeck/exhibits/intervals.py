"""Estimates with Student t intervals over replicates, and Holm's correction written as confidence levels.

Items are averaged before they come here: a replicate is a seed (or a random start), never a test item.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from limbeck.exhibits.palette import ARMS, look

FIELDS = ("mean", "low", "high", "count", "level")  # of an Estimate, as `summarise` spells them
Numbers = Sequence[float | int] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over `count` replicates with its two-sided interval; `low` and `high` are None for one replicate."""

    mean: float
    low: float | None
    high: float | None
    count: int
    level: float


def mean_interval(values: Numbers, *, level: float = 0.95) -> Estimate:
    """Mean and Student t interval: mean +- t_{(1 + level) / 2, n - 1} s / sqrt(n), s with n - 1.

    No spread gives an interval of no width. Raises ValueError for no values, one that is not finite, or a level
    outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    mean, error, count = _moments(values)
    if count == 1:
        return Estimate(mean, None, None, count, level)
    half = float(stats.t.isf((1 - level) / 2, count - 1)) * error
    return Estimate(mean, mean - half, mean + half, count, level)


def paired_p_value(left: Numbers, right: Numbers) -> float:
    """Two-sided p of the paired t test of mean(left - right) = 0; without spread 0 if the mean differs, else 1.

    Below 1 - level exactly when the interval of left - right at that level excludes 0.
    Raises ValueError for fewer than two replicates.
    """
    mean, error, count = _moments(_differences(left, right))
    if count < 2:
        raise ValueError(f"a p value needs at least 2 replicates, got {count}")
    if error == 0:
        return float(mean == 0)
    return float(2 * stats.t.sf(abs(mean) / error, count - 1))


def holm_levels(p_values: Numbers, *, alpha: float = 0.05) -> list[float]:
    """Confidence level of each interval, such that it excludes 0 exactly when Holm's procedure rejects.

    In ascending order of p, the i-th of m (from 0) is tested at alpha / (m - i); after the first that fails, the rest
    keep the alpha of the failure. Levels come back in the order of `p_values`. The family-wise error is alpha.
    """
    if not 0 < alpha < 1 or any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"alpha must lie in (0, 1) and p values in [0, 1], got {alpha} and {list(p_values)}")
    levels = [0.0] * len(p_values)
    failed = None
    for step, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        share = failed or alpha / (len(p_values) - step)
        if p_values[index] > share:
            failed = share
        levels[index] = 1 - share
    return levels


def _differences(left: Numbers, right: Numbers) -> np.ndarray:
    if len(left) != len(right):
        raise ValueError(f"pairs need as many values on the left as on the right, got {len(left)} and {len(right)}")
    return np.asarray(left, dtype=float) - np.asarray(right, dtype=float)


def _moments(values: Numbers) -> tuple[float, float, int]:
    """Mean, standard error of the mean, count; the error of one value is taken as 0."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"expected at least one finite value in one row, got {array.tolist()}")
    if np.ptp(array) == 0:  # a sum of equal numbers may round away from them
        return float(array[0]), 0.0, array.size
    return float(array.mean()), float(array.std(ddof=1)) / math.sqrt(array.size), array.size


def gains(frame: pd.DataFrame, metric: str, *, reference: str, by: str) -> dict[str, dict[str, list[float]]]:
    """The metric of every arm minus the reference arm's, seed by seed: group -> arm -> differences, short sums first.

    With several groups, `mean` is their average, seed by seed. Raises ValueError if the reference was not measured.
    """
    if reference not in set(frame["arm"]):
        raise ValueError(f"expected the reference arm {reference!r} among {', '.join(sorted(set(frame['arm'])))}")
    arms = sorted(set(frame["arm"]) - {reference}, key=lambda arm: (arm.count("+"), arm))
    wide = frame.pivot(index=[by, "seed"], columns="arm", values=metric)
    wide = wide[arms].sub(wide[reference], axis=0)
    groups = {str(group): wide.loc[group] for group in dict.fromkeys(frame[by])}
    if len(groups) > 1:
        groups["mean"] = wide.groupby(level="seed").mean()
    return {group: {arm: part[arm].dropna().tolist() for arm in arms} for group, part in groups.items()}


def estimates(differences: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Estimate]]:
    """`mean_interval` of every list of `gains`."""
    return {group: {arm: mean_interval(values) for arm, values in arms.items()} for group, arms in differences.items()}


def responses(
    frame: pd.DataFrame, metric: str, *, reference: str, centre: dict[str, float]
) -> dict[str, dict[str, dict[float, Estimate]]]:
    """Gains over the reference arm at the centre, seed by seed: axis -> arm -> value -> estimate, values ascending.

    `centre` holds the axes and the value that each has at the centre, which is a point of every axis.
    """
    at_centre = frame[frame["axis"] == "centre"]
    base = at_centre[at_centre["arm"] == reference].set_index("seed")[metric]
    estimates_by_axis: dict[str, dict[str, dict[float, Estimate]]] = {}
    for axis, value in centre.items():
        part = frame[frame["axis"] == axis]
        part = pd.concat([part, at_centre[at_centre["arm"].isin(part["arm"])].assign(value=value)])
        for (arm, setting), group in part.groupby(["arm", "value"]):
            gain = (group.set_index("seed")[metric] - base).dropna().tolist()
            estimates_by_axis.setdefault(axis, {}).setdefault(arm, {})[setting] = mean_interval(gain)
    return estimates_by_axis


def summarise(frame: pd.DataFrame, *, by: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row per group and metric, ready for JSON: the group's coordinates, the metric, and its `mean_interval`.

    A metric that a group was not measured by has no row.
    """
    rows = []
    for group, part in frame.groupby(list(by), sort=False):
        for metric in part[list(metrics)].dropna(axis=1, how="all"):
            estimate = mean_interval(part[metric].dropna().tolist())
            rows.append(dict(zip(by, group, strict=True)) | {"metric": metric} | dataclasses.asdict(estimate))
    return rows


def show(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The rows of `summarise` for the eye: one line per group, one column per metric, `mean [low, high]` in each.

    Arms have the names that they have in figures.
    """
    by = [name for name in rows[0] if name not in ("metric", *(field.name for field in dataclasses.fields(Estimate)))]
    cells = pd.DataFrame(
        [{name: row[name] for name in by} | {"metric": row["metric"], "text": _text(row)} for row in rows]
    )
    order = list(dict.fromkeys(cells["metric"]))
    groups = cells[by].drop_duplicates()
    wide = cells.pivot(index=by, columns="metric", values="text")[order].fillna("–")
    table = wide.reindex(pd.MultiIndex.from_frame(groups) if len(by) > 1 else pd.Index(groups[by[0]]))
    if "arm" not in by:
        return table
    names = {arm: look(arm).label if ARMS.keys() >= {*arm.split("+")} else arm for arm in groups["arm"]}
    return table.rename(index=names, level="arm" if len(by) > 1 else None)


def _text(row: dict[str, Any]) -> str:
    if row["low"] is None:
        return f"{row['mean']:.4g}"
    return f"{row['mean']:.4g} [{row['low']:.4g}, {row['high']:.4g}]"


def curves(frame: pd.DataFrame, metric: str, *, over: str) -> dict[str, list[tuple[float, Estimate]]]:
    """A metric window by window: arm -> points (mean over seeds of `over`, estimate over seeds), in the windows' order.

    `frame` is that of `records.curves`. Windows in which an arm was not measured have no point.
    """
    points: dict[str, list[tuple[float, Estimate]]] = {}
    for (arm, _), part in frame.dropna(subset=[metric]).groupby(["arm", "window"], sort=False):
        points.setdefault(arm, []).append((float(part[over].mean()), mean_interval(part[metric].tolist())))
    return points
