"""Lines of estimates: curves over steps or tokens, responses to a setting, fronts. They compute nothing.

A panel holds at most five lines; more arms are drawn in panels beside each other. Every line has a marker and its name
at its end.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from limbeck.exhibits import canvas, direct_labels
from limbeck.exhibits.canvas import GREY, INK
from limbeck.exhibits.direct_labels import ROOM, End
from limbeck.exhibits.palette import look

if TYPE_CHECKING:
    from limbeck.exhibits.intervals import Estimate

    Curve = Sequence[tuple[float, Estimate]]

Drawn = TypeVar("Drawn")
MOST_LINES = 5  # in one panel


def curve_panels(panels: Mapping[str, Mapping[str, "Curve"]], *, title: str, columns: int = 2) -> Figure:
    """One panel per name: one line per arm through its means, with intervals at some of them; its name at its end.

    `panels` is name -> arm -> points (x, estimate of y); names carry what is on both axes, with units. A curve of one
    run has no interval. Raises ValueError for an arm without a look.
    """
    drawn, columns = _at_most_five(panels, columns)
    figure, axes = _line_panels(len(drawn), columns, title=title, left=0.55)
    with canvas.style():
        for axis, (name, curves) in zip(axes, drawn, strict=True):
            for index, (arm, points) in enumerate(curves.items()):
                every = len(curves) if len(points) >= 2 * len(curves) else 1
                _line(axis, arm, points, marked=slice(index % every, None, every))
            _finish(axis, name, {arm: points[-1][1] for arm, points in curves.items()})
        _one_scale(axes, [name for name, _ in drawn], always=False)
        _say(figure, [e for _, curves in drawn for points in curves.values() for _, e in points])
    return figure


def response_panels(
    groups: Mapping[str, Mapping[str, Mapping[float, "Estimate"]]],
    *,
    title: str,
    ylabel: str | Mapping[str, str],
    columns: int = 3,
    zero: bool = True,
    xlabel: str = "",
    ylim: tuple[float, float] | None = None,
) -> Figure:
    """One panel per name: one line per arm, with intervals, over the values of one setting at equal distances.

    `groups` is name -> arm -> value -> estimate; `ylabel` is one label, or name -> label where quantities differ. With
    `zero`, no difference is marked and all panels have one scale if it flattens none. Lines leave `ylim`, if given.
    """
    drawn, columns = _at_most_five(groups, columns)
    labels = ylabel if isinstance(ylabel, Mapping) else {}
    figure, axes = _line_panels(len(drawn), columns, title=title, left=0.75, across=0.45 * bool(labels))
    with canvas.style():
        for axis, (name, arms) in zip(axes, drawn, strict=True):
            for index, (arm, line) in enumerate(arms.items()):
                aside = 0.07 * (index - (len(arms) - 1) / 2)  # so that intervals of equal value both show
                _line(axis, arm, [(place + aside, estimate) for place, estimate in enumerate(line.values())])
            canvas.name_ticks(axis, [f"{value:g}" for value in next(iter(arms.values()))])
            axis.set(xlabel=xlabel, ylabel=labels.get(name, ""))
            if zero:
                axis.axhline(0, color=GREY, linewidth=0.8, zorder=0)
            _finish(axis, name, {arm: list(line.values())[-1] for arm, line in arms.items()}, ylim)
        one = _one_scale(axes, [name for name, _ in drawn], always=zero)
        figure.supylabel("" if labels else ylabel, x=0.01, fontsize=9, color=INK)
        own = zero and len(groups) > 1 and not one
        _say(figure, [e for _, arms in drawn for line in arms.values() for e in line.values()], own=own)
    return figure


def line_plot(
    axes: Axes, x: ArrayLike, curves: Mapping[str, ArrayLike], *, xlabel: str, ylabel: str, title: str = ""
) -> Axes:
    """One line per arm over a common axis, on a logarithmic scale, its name at its end.

    Both labels carry their units. Raises ValueError for an arm without a look, or a curve that does not fit `x`.
    """
    canvas.check_arms(curves)
    if wrong := {arm: np.shape(y) for arm, y in curves.items() if np.shape(y) != np.shape(x)}:
        raise ValueError(f"expected curves of {np.shape(x)}, got {wrong}")
    box, every = axes.get_position(), max(1, len(np.atleast_1d(x)) // 8)
    axes.set_position([box.x0, box.y0, box.width - ROOM / canvas.WIDTH, box.height])
    with canvas.style():
        for index, (arm, y) in enumerate(curves.items()):  # ever thinner, so that lines that coincide both show
            shape, marked = look(arm), (index * every // len(curves), every)
            drawn = {"color": shape.colour, "marker": shape.marker, "markevery": marked, "markersize": 4.5}
            axes.plot(x, y, label=shape.label, linewidth=max(1.0, 3.2 - 0.6 * index), **drawn)
        axes.set_yscale("log")
        axes.grid(axis="y")
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        direct_labels.label(axes, [End(look(arm), float(np.ravel(y)[-1]), False) for arm, y in curves.items()])
    return axes


def front(points: Mapping[str, tuple["Estimate", "Estimate"]], *, title: str, xlabel: str, ylabel: str) -> Figure:
    """Two estimates per arm as a cross of intervals, with the arm's marker where the means meet, and its name aside."""
    canvas.check_arms(points)
    figure, (axes,) = canvas.panels(1, title=title, height=3.6, left=0.75, right=ROOM + 0.1, bottom=0.75)
    with canvas.style():
        for arm, (x, y) in points.items():
            shape, (across, along) = look(arm), (_spread(x), _spread(y))
            face = "white" if x.low is None else shape.colour
            drawn = {"color": shape.colour, "marker": shape.marker, "markerfacecolor": face, "linestyle": "none"}
            axes.errorbar([x.mean], [y.mean], xerr=across, yerr=along, **drawn, markersize=6, elinewidth=1.1)
        axes.set_xlim(canvas.widened(*axes.get_xlim()))
        axes.set_ylim(canvas.widened(*axes.get_ylim()))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        direct_labels.label(axes, [End(look(arm), y.mean, y.low is None) for arm, (_, y) in points.items()])
        _say(figure, [estimate for both in points.values() for estimate in both])
    return figure


def _at_most_five(
    panels: Mapping[str, Mapping[str, Drawn]], columns: int
) -> tuple[list[tuple[str, dict[str, Drawn]]], int]:
    """The panels and how many stand in a row: with more arms than five, each name has a row of panels."""
    arms = list(dict.fromkeys(arm for lines in panels.values() for arm in lines))
    canvas.check_arms(arms)
    parts = -(-len(arms) // MOST_LINES)
    size = -(-len(arms) // parts)
    split = [arms[start : start + size] for start in range(0, len(arms), size)]
    shown = [
        (name, {arm: lines[arm] for arm in part if arm in lines}) for name, lines in panels.items() for part in split
    ]
    return shown, parts if parts > 1 else min(columns, len(shown), 2)


def _line_panels(
    count: int, columns: int, *, title: str, left: float, across: float = 0.0
) -> tuple[Figure, list[Axes]]:
    margins = {"left": left, "right": ROOM + 0.1, "across": ROOM + 0.5 + across, "bottom": 0.72, "height": 2.3}
    return canvas.panels(count, title=title, columns=columns, shared=False, **margins)


def _line(axes: Axes, arm: str, points: "Curve", *, marked: slice = slice(None)) -> None:
    """The arm's line through all means, and its marker with the interval at those that are marked."""
    shape = look(arm)
    axes.plot([x for x, _ in points], [y.mean for _, y in points], color=shape.colour, label=shape.label, linewidth=1.3)
    for hollow in (False, True):
        if shown := [(x, y) for x, y in points[marked] if (y.low is None) is hollow]:
            places, estimates = zip(*shown, strict=True)
            spread = None if hollow else np.hstack([_spread(estimate) for estimate in estimates])
            drawn = {"color": shape.colour, "marker": shape.marker, "linestyle": "none", "elinewidth": 0.9}
            face = "white" if hollow else shape.colour
            axes.errorbar(places, [y.mean for y in estimates], spread, markersize=4.2, markerfacecolor=face, **drawn)


def _spread(estimate: "Estimate") -> list[list[float]] | None:
    return None if estimate.low is None else [[estimate.mean - estimate.low], [estimate.high - estimate.mean]]


def _finish(axes: Axes, name: str, last: Mapping[str, "Estimate"], ylim: tuple[float, float] | None = None) -> None:
    if not last:  # no arm of this part was measured so
        axes.set_visible(False)
        return
    drawn = axes.get_ylim()
    if (limits := ylim or canvas.widened(*drawn)) != drawn:
        axes.set_ylim(limits)
    canvas.heading(axes, name, beside=ROOM)
    direct_labels.label(axes, [End(look(arm), e.mean, e.low is None) for arm, e in last.items()])


def _one_scale(axes: Sequence[Axes], names: Sequence[str], *, always: bool) -> bool:
    """One scale for the panels of a name; for those of all names too, if wanted and it flattens none: whether so."""
    shown = [(axis, name, axis.get_ylim()) for axis, name in zip(axes, names, strict=True) if axis.get_visible()]
    everywhere = always and canvas.comparable([limits for _, _, limits in shown])
    for axis, name, _ in shown:
        own = [limits for _, other, limits in shown if everywhere or other == name]
        if (common := canvas.outer(np.ravel(own))) != axis.get_ylim():
            axis.set_ylim(common)
    return everywhere


def _say(figure: Figure, estimates: Sequence["Estimate"], *, own: bool = False) -> None:
    """What the whiskers are, over how many replicates; hollow markers have none."""
    kind, single = canvas.level(estimates), any(estimate.low is None for estimate in estimates)
    parts = [f"whiskers: {kind} ({canvas.replicates(estimates)})"] if kind else []
    parts += ["hollow: n = 1, no interval"] if single else []
    parts += ["each quantity has its own scale"] if own else []
    figure.text(0.012, 0.02, "; ".join(parts), fontsize=7.5, color=GREY)
