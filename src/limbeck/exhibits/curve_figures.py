"""Figures of how runs went: curves over steps or tokens, and what was reached at which length. They compute nothing."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from limbeck.exhibits import figures
from limbeck.exhibits.palette import look

if TYPE_CHECKING:
    from limbeck.exhibits.intervals import Estimate

    Curve = Sequence[tuple[float, Estimate]]

_KEYS_A_ROW = 4


def curve_panels(panels: Mapping[str, Mapping[str, "Curve"]], *, title: str, columns: int = 2) -> Figure:
    """One panel per name: one line per arm through its means, with its intervals as a band; one key below all.

    `panels` is name -> arm -> points (x, estimate of y); names carry what is on both axes, with units. A curve of one
    run has no band. Raises ValueError for an arm without a look.
    """
    arms = list(dict.fromkeys(arm for curves in panels.values() for arm in curves))
    keys = figures.LEADING * ((len(arms) - 1) // _KEYS_A_ROW)
    margins = {"height": 2.3, "left": 0.55, "bottom": 0.75 + keys, "extra": keys}
    figure, axes = figures.panels(len(panels), title=title, columns=columns, shared=False, **margins)
    with figures.style():
        for axis, (name, curves) in zip(axes, panels.items(), strict=True):
            for arm, points in curves.items():
                _curve(axis, arm, points)
            axis.set_title(name)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=_KEYS_A_ROW)
    return figure


def _curve(axes: Axes, arm: str, points: "Curve") -> None:
    shape, places = look(arm), [x for x, _ in points]
    axes.plot(places, [y.mean for _, y in points], color=shape.colour, label=shape.label, linewidth=1.4)
    if all(y.low is not None for _, y in points):
        low, high = zip(*((y.low, y.high) for _, y in points), strict=True)
        axes.fill_between(places, low, high, color=shape.colour, alpha=0.15, linewidth=0)


def front(points: Mapping[str, tuple["Estimate", "Estimate"]], *, title: str, xlabel: str, ylabel: str) -> Figure:
    """Two estimates per arm as a cross of intervals, with the arm's marker where the means meet."""
    figure, (axes,) = figures.panels(1, title=title, height=3.6, left=0.75, bottom=1.15)
    with figures.style():
        for arm, (x, y) in points.items():
            shape = look(arm)
            spread = {
                f"{name}err": [[value.mean - value.low], [value.high - value.mean]]
                for name, value in (("x", x), ("y", y))
                if value.low is not None
            }
            drawn = {"color": shape.colour, "marker": shape.marker, "label": shape.label, "linestyle": "none"}
            axes.errorbar([x.mean], [y.mean], **spread, **drawn, markersize=6, elinewidth=1.1)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        figure.legend(*axes.get_legend_handles_labels(), loc="lower center", ncols=_KEYS_A_ROW)
    return figure
