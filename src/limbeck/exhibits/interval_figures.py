"""Arms from top to bottom: means, intervals and replicates, on scales that an outlier does not squash."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from limbeck.exhibits import canvas
from limbeck.exhibits.canvas import GREY, INK, OWN_SHARE
from limbeck.exhibits.palette import Look, look

if TYPE_CHECKING:
    from limbeck.exhibits.intervals import Estimate

Value = TypeVar("Value")
Points = Sequence[float | int] | np.ndarray
_OUTLIERS = 6  # from so many arms on, a few far ones are named at the edge instead of drawn to scale
_DECADES = 50  # from such a ratio of the ends on, the scale is logarithmic


def interval_plot(
    axes: Axes,
    estimates: Mapping[str, "Estimate"],
    *,
    xlabel: str,
    points: Mapping[str, Points],
    title: str = "",
    window: tuple[float, float] | None = None,
) -> Axes:
    """Arms from top to bottom: mean as marker, interval as whisker, every replicate as a faint point beneath.

    `xlabel` carries the unit. An arm with one replicate has no whisker and a hollow marker. The scale is `window` or
    fits what is drawn; an arm that leaves it gets an arrow at the edge and its numbers.
    Raises ValueError for an arm without a look, or one whose points are not the replicates of its estimate.
    """
    canvas.check_arms(estimates)
    for arm, estimate in estimates.items():
        if len(points.get(arm, ())) != estimate.count:
            raise ValueError(f"expected the {estimate.count} replicates of {arm!r}, got {points.get(arm)}")
    left, right = window or _window(_ends(estimates, points))
    with canvas.style():
        for row, (arm, estimate) in enumerate(estimates.items()):
            _whisker(axes, row, look(arm), estimate, points[arm])
        axes.set_yticks(range(len(estimates)), [look(arm).label for arm in estimates])
        axes.set(xlim=(left, right), ylim=(len(estimates) - 0.4, -0.6), xlabel=xlabel)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        canvas.thin_ticks(axes)
        place = {"xycoords": "axes fraction", "xytext": (0, -36), "textcoords": "offset points", "ha": "center"}
        axes.annotate(_caption(estimates.values()), (0.5, 0), fontsize=7.5, color=GREY, va="top", **place)
        for row, (arm, estimate) in enumerate(estimates.items()):
            _beyond(axes, row, look(arm), estimate, (left, right))
        canvas.heading(axes, title)
    return axes


def _whisker(axes: Axes, row: int, shape: Look, estimate: "Estimate", points: Points) -> None:
    axes.scatter(points, [row + 0.24] * estimate.count, s=11, color=shape.colour, alpha=0.35, linewidths=0)
    if estimate.low is not None:
        axes.plot([estimate.low, estimate.high], [row, row], color=shape.colour)
    face = "white" if estimate.low is None else shape.colour
    axes.plot(estimate.mean, row, shape.marker, color=shape.colour, markerfacecolor=face, markersize=6.5)


def _beyond(axes: Axes, row: int, shape: Look, estimate: "Estimate", window: tuple[float, float]) -> None:
    """An arrow where an arm's interval leaves the window, with its numbers if its mean does."""
    low, high = _interval(estimate)
    for outside, edge, marker, side in ((low < window[0], 0, "<", "left"), (high > window[1], 1, ">", "right")):
        if outside:
            drawn = {"color": shape.colour, "clip_on": False, "transform": axes.get_yaxis_transform()}
            axes.plot([edge], [row], marker, markersize=6, **drawn)
            if not window[0] <= estimate.mean <= window[1]:
                text = f"{estimate.mean:.3g}" + ("" if estimate.low is None else f" [{low:.3g}, {high:.3g}]")
                place = {"xytext": (7 - 14 * edge, 0), "textcoords": "offset points", "ha": side, "va": "center"}
                axes.annotate(text, (edge, row), xycoords=drawn["transform"], fontsize=7.5, color=INK, **place)


def _interval(estimate: "Estimate") -> tuple[float, float]:
    return (estimate.mean, estimate.mean) if estimate.low is None else (estimate.low, estimate.high)


def _ends(estimates: Mapping[str, "Estimate"], points: Mapping[str, Points]) -> list[tuple[float, float]]:
    """The least and the largest number drawn of each arm."""
    return [canvas.outer([*points[arm], *_interval(estimate)]) for arm, estimate in estimates.items()]


def _window(ends: Sequence[tuple[float, float]], *, zero: bool = False) -> tuple[float, float]:
    """What an axis shows: every arm, or all but a few that would leave the others less than `OWN_SHARE` of it."""
    middle = float(np.median(np.mean(ends, axis=1)))
    near = sorted(ends, key=lambda pair: max(middle - pair[0], pair[1] - middle))
    low, high = canvas.outer(np.ravel(ends))
    for dropped in range(1, len(ends) // 4 + 1 if len(ends) >= _OUTLIERS else 1):
        left, right = canvas.outer(np.ravel(near[:-dropped]))
        if right - left < OWN_SHARE * (high - low):
            low, high = left, right
            break
    low, high = canvas.widened(min(low, 0.0) if zero else low, max(high, 0.0) if zero else high)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def decided(estimates: Mapping[str, "Estimate"], *, reference: str = "0") -> str:
    """Which arms' intervals exclude no difference, to end a title: `RKD above CE; 5 not told apart`."""
    above = [look(arm).label for arm, estimate in estimates.items() if estimate.low is not None and estimate.low > 0]
    below = [look(arm).label for arm, estimate in estimates.items() if estimate.high is not None and estimate.high < 0]
    if not above and not below:
        return f"no arm is told apart from {reference}"
    parts = [f"{', '.join(arms)} {side} {reference}" for arms, side in ((above, "above"), (below, "below")) if arms]
    rest = len(estimates) - len(above) - len(below)
    return "; ".join([*parts, *([f"{rest} not told apart"] if rest else [])])


def ordered(arms: Mapping[str, Value], budgets: Mapping[str, float | int]) -> dict[str, Value]:
    """The same arms, the largest budget (parameters, bytes) first; equal ones stay in order.

    Raises ValueError for an arm without a budget.
    """
    if missing := [arm for arm in arms if arm not in budgets]:
        raise ValueError(f"expected a budget for each of {list(arms)}, got none for {missing}")
    return {arm: arms[arm] for arm in sorted(arms, key=lambda arm: -budgets[arm])}


def interval_panels(
    parts: Mapping[str, Mapping[str, "Estimate"]],
    *,
    title: str,
    xlabel: str,
    points: Mapping[str, Mapping[str, Sequence[float]]],
    columns: int = 2,
    zero: bool = False,
) -> Figure:
    """One `interval_plot` per title; names and caption stand once. `zero` marks no difference.

    All are on one scale if it flattens none of them, otherwise each on its own, and the caption says so; positive
    numbers that lie orders of magnitude apart are on one logarithmic scale.
    Raises ValueError if the panels have other arms, or the same in another order: the names would be wrong.
    """
    if len(orders := {tuple(estimates) for estimates in parts.values()}) > 1:
        raise ValueError(f"received panels with arms {sorted(orders)}, expected the same in the same order")
    rows, arms = -(-len(parts) // columns), [look(arm).label for arm in next(iter(orders))]
    windows, scale = _windows(parts, points, zero=zero)
    margins = {"height": 0.3 * len(arms) + (0.95 if rows > 1 else 1.4), "left": 0.45 + 0.075 * max(map(len, arms))}
    figure, axes = canvas.panels(len(parts), title=title, columns=columns, bottom=0.8, shared=False, **margins)
    caption = _caption([e for part in parts.values() for e in part.values()])
    caption += "; each panel has its own scale" if scale == "own" else ""
    for place, (axis, (name, estimates)) in enumerate(zip(axes, parts.items(), strict=True)):
        interval_plot(axis, estimates, xlabel=xlabel, points=points[name], title=name, window=windows[name])
        axis.tick_params(labelleft=place % columns == 0)
        axis.texts[0].set(text=caption, visible=place == (rows - 1) * columns)
        axis.set_xlabel(xlabel if axis in axes[-columns:] else "")
        if zero:
            axis.axvline(0, color=GREY, linewidth=1.0, zorder=1)
        if scale == "log":
            axis.set_xscale("log")
    return figure


def _windows(
    parts: Mapping[str, Mapping[str, "Estimate"]], points: Mapping[str, Mapping[str, Points]], *, zero: bool
) -> tuple[dict[str, tuple[float, float]], str]:
    """What each panel shows, and on which scale: one logarithmic, one for all, or its own."""
    drawn = {name: _ends(estimates, points[name]) for name, estimates in parts.items()}
    low, high = canvas.outer(np.ravel([end for ends in drawn.values() for end in ends]))
    if low > 0 and high > _DECADES * low:
        return dict.fromkeys(parts, (low / 1.3, high * 1.3)), "log"
    windows = {name: _window(ends, zero=zero) for name, ends in drawn.items()}
    single = all(estimate.low is None for part in parts.values() for estimate in part.values())
    if single or canvas.comparable(list(windows.values())):
        return dict.fromkeys(parts, canvas.outer(np.ravel(list(windows.values())))), "one"
    return windows, "own"


def _caption(estimates: Collection["Estimate"]) -> str:
    """What marker, whisker and points are, and over how many replicates."""
    single = "hollow: one replicate, no interval"
    if not (kind := canvas.level(estimates)):
        return f"{single} (n = 1)"
    alone = f"; {single}" if any(estimate.low is None for estimate in estimates) else ""
    return f"marker: mean; line: {kind}; points: each replicate ({canvas.replicates(estimates)}){alone}"
