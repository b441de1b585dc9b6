"""Figures: one style, one look per arm, and helpers that draw what they are given and compute nothing.

An arm looks the same everywhere (`palette`). Titles state the finding and are passed in; every interval is drawn, and
the caption says over what. Long because it holds one helper per kind of picture.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from limbeck import paths
from limbeck.exhibits.palette import ARMS, Look, look

if TYPE_CHECKING:  # an exhibit's picture should not wait for scipy
    from limbeck.exhibits.intervals import Estimate

STYLE = Path(__file__).with_name("limbeck.mplstyle")
WIDTH = 7.2  # inches: about the text column of a README
LINE, LEADING = 95, 0.17  # of a figure's title: characters, and inches
GREY = "#8a8a8a"


def style() -> AbstractContextManager[None]:
    """The project's style, for the figures made inside."""
    return plt.style.context(STYLE)


def save(figure: Figure, path: Path, *, note: str = "") -> None:
    """Write an SVG, whole or not at all: no date, no version, fixed ids, so that the same figure gives the same bytes.

    Text is drawn as paths; `note` stands small in a corner; by hand, nothing is written. ValueError for another suffix.
    """
    if path.suffix != ".svg":
        raise ValueError(f"expected a path that ends in .svg, got {path}")
    figure.text(0.995, 0.008, note, ha="right", fontsize=6.5, color=GREY)
    if paths.by_hand():
        return
    with style():
        figure.savefig(text := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    from limbeck import records  # noqa: PLC0415  (a picture alone should not wait for pandas)

    records.replace_text(path, text.getvalue())


def panels(
    count: int,
    *,
    columns: int = 1,
    height: float = 2.8,
    left: float = 1.2,
    bottom: float = 0.75,
    extra: float = 0.0,
    title: str = "",
    shared: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure of README width with `count` axes that share their scales, if not told otherwise, under one title.

    Units: inches, of a row, of the margins, and `extra` height; fixed, for a fitted layout drifts in its last bits.
    """
    rows, title = -(-count // columns), textwrap.fill(title, LINE)
    top, right, across, between = (0.7 if title else 0.35) + LEADING * title.count("\n"), 0.15, 0.4, 0.5
    tall = rows * height + top - 0.35 + extra
    wide, high = WIDTH - left - right - across * (columns - 1), tall - top - bottom - between * (rows - 1)
    place = {"left": left / WIDTH, "right": 1 - right / WIDTH, "bottom": bottom / tall, "top": 1 - top / tall}
    place |= {"wspace": across * columns / wide, "hspace": between * rows / high}
    with style():
        figure = plt.figure(figsize=(WIDTH, tall))
        axes = list(figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False, gridspec_kw=place).flat)
        figure.suptitle(title, x=0.012, y=1 - 0.1 / tall, ha="left", va="top", fontsize=10)
    for spare in axes[count:]:
        spare.remove()
    for lowest in axes[:count][-columns:]:
        lowest.tick_params(labelbottom=True)
    return figure, axes[:count]


def interval_plot(
    axes: Axes,
    estimates: Mapping[str, "Estimate"],
    *,
    xlabel: str,
    points: Mapping[str, Sequence[float | int] | np.ndarray],
    title: str = "",
) -> Axes:
    """Arms from top to bottom: mean as marker, interval as whisker, every replicate as a faint point beneath.

    `xlabel` carries the unit. An arm with one replicate has no whisker and a hollow marker.
    Raises ValueError for an arm without a look, or one whose points are not the replicates of its estimate.
    """
    _check_arms(estimates)
    for arm, estimate in estimates.items():
        if len(points.get(arm, ())) != estimate.count:
            raise ValueError(f"expected the {estimate.count} replicates of {arm!r}, got {points.get(arm)}")
    with style():
        for row, (arm, estimate) in enumerate(estimates.items()):
            _whisker(axes, row, look(arm), estimate, points[arm])
        axes.set_yticks(range(len(estimates)), [look(arm).label for arm in estimates])
        axes.set_ylim(len(estimates) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(xlabel)
        place = {"xycoords": "axes fraction", "xytext": (0, -36), "textcoords": "offset points", "ha": "center"}
        axes.annotate(_caption(estimates), (0.5, 0), fontsize=7.5, color=GREY, va="top", **place)
        axes.set_title(title)
    return axes


def _whisker(axes: Axes, row: int, shape: Look, estimate: "Estimate", points: Sequence[float] | np.ndarray) -> None:
    axes.scatter(points, [row + 0.24] * estimate.count, s=11, color=shape.colour, alpha=0.35, linewidths=0)
    if estimate.low is not None:
        axes.plot([estimate.low, estimate.high], [row, row], color=shape.colour)
    face = "white" if estimate.low is None else shape.colour
    axes.plot(estimate.mean, row, shape.marker, color=shape.colour, markerfacecolor=face, markersize=6.5)


def decided(estimates: Mapping[str, "Estimate"]) -> str:
    """Which arms' intervals exclude 0, in words for a title: `above 0: RKD; below 0: none`."""
    above = [look(arm).label for arm, estimate in estimates.items() if estimate.low is not None and estimate.low > 0]
    below = [look(arm).label for arm, estimate in estimates.items() if estimate.high is not None and estimate.high < 0]
    return f"above 0: {', '.join(above) or 'none'}; below 0: {', '.join(below) or 'none'}"


def interval_panels(
    parts: Mapping[str, Mapping[str, "Estimate"]],
    *,
    title: str,
    xlabel: str,
    points: Mapping[str, Mapping[str, Sequence[float]]],
    columns: int = 2,
    zero: bool = False,
) -> Figure:
    """One `interval_plot` per title, on one scale; names and caption stand once. `zero` marks no difference.

    Raises ValueError if the panels have other arms, or the same in another order: the names would be wrong.
    """
    if len(orders := {tuple(estimates) for estimates in parts.values()}) > 1:
        raise ValueError(f"received panels with arms {sorted(orders)}, expected the same in the same order")
    rows, arms = -(-len(parts) // columns), len(*orders)
    named = {f"{name}, {arm}": estimate for name, part in parts.items() for arm, estimate in part.items()}
    figure, axes = panels(
        len(parts), title=title, columns=columns, height=0.3 * arms + (0.9 if rows > 1 else 1.4), left=2.0, bottom=0.8
    )
    for axis, (name, estimates) in zip(axes, parts.items(), strict=True):
        interval_plot(axis, estimates, xlabel=xlabel, points=points[name], title=name)
        axis.texts[0].set(text=_caption(named), visible=axis is axes[(rows - 1) * columns])
        axis.set_xlabel(xlabel if axis in axes[-columns:] else "")
        if zero:
            axis.axvline(0, color=GREY, linewidth=1.0, zorder=1)
    return figure


def response_panels(
    groups: Mapping[str, Mapping[str, Mapping[float, "Estimate"]]],
    *,
    title: str,
    ylabel: str,
    columns: int = 3,
    zero: bool = True,
) -> Figure:
    """One panel per name: one line per arm, with intervals, over the values of one setting at equal distances.

    `groups` is name -> arm -> value -> estimate. With `zero`, no difference is marked and all panels have one scale.
    """
    keys = LEADING * ((max(map(len, groups.values())) - 1) // 3)  # lines but the first
    margins = {"height": 2.1, "left": 0.75, "bottom": 0.75 + keys, "extra": keys}
    figure, axes = panels(len(groups), title=title, columns=columns, shared=False, **margins)
    with style():
        for axis, (name, arms) in zip(axes, groups.items(), strict=True):
            for arm, estimates in arms.items():
                _response(axis, look(arm), list(estimates.values()))
            ticks = [f"{value:g}" for value in next(iter(arms.values()))]
            axis.set_xticks(range(len(ticks)), ticks)
            axis.set_title(name)
            if zero:
                axis.axhline(0, color=GREY, linewidth=0.8, zorder=0)
        limits = [axis.get_ylim() for axis in axes]
        for axis in axes if zero else ():
            axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        figure.supylabel(ylabel, x=0.01, fontsize=9, color="#444444")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3)
    return figure


def _response(axes: Axes, shape: Look, estimates: Sequence["Estimate"]) -> None:
    means = [estimate.mean for estimate in estimates]
    ends = [(e.mean, e.mean) if e.low is None else (e.low, e.high) for e in estimates]
    spread = [[e.mean - low, high - e.mean] for e, (low, high) in zip(estimates, ends, strict=True)]
    drawn = {"color": shape.colour, "marker": shape.marker, "label": shape.label}
    axes.errorbar(range(len(means)), means, np.transpose(spread), markersize=4, linewidth=1.2, **drawn)


def heat_panels(
    matrices: Mapping[str, Sequence[float]], *, title: str, xlabel: str, ylabel: str, edges: Mapping[str, Sequence[int]]
) -> Figure:
    """Square matrices, flat and row by row, as shades, each on its own scale from 0; `edges` end a name's groups."""
    figure, axes = panels(len(matrices), columns=2, height=3.1, left=0.45, bottom=0.6, title=title, shared=False)
    with style():
        for axis, (name, values) in zip(axes, matrices.items(), strict=True):
            side = math.isqrt(len(values))
            shade = axis.imshow(np.reshape(values, (side, side)), cmap="cividis", vmin=0, interpolation="nearest")
            figure.colorbar(shade, ax=axis, shrink=0.85)
            for edge in edges.get(name, ()):
                axis.axhline(edge - 0.5, color="white", linewidth=0.4)
                axis.axvline(edge - 0.5, color="white", linewidth=0.4)
            axis.grid(visible=False)
            axis.set(title=name, xticks=[], yticks=[], xlabel=xlabel, ylabel=ylabel)
    return figure


def line_plot(
    axes: Axes, x: ArrayLike, curves: Mapping[str, ArrayLike], *, xlabel: str, ylabel: str, title: str = ""
) -> Axes:
    """One line per arm over a common axis, on a logarithmic scale, named in a key.

    Both labels carry their units. Raises ValueError for an arm without a look, or a curve that does not fit `x`.
    """
    _check_arms(curves)
    if wrong := {arm: np.shape(y) for arm, y in curves.items() if np.shape(y) != np.shape(x)}:
        raise ValueError(f"expected curves of {np.shape(x)}, got {wrong}")
    with style():
        for index, (arm, y) in enumerate(curves.items()):  # ever thinner, so that lines that coincide both show
            axes.plot(x, y, color=look(arm).colour, label=look(arm).label, linewidth=3.2 - 0.6 * index)
        axes.set_yscale("log")
        axes.grid(axis="y")
        axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
        axes.legend(loc="lower left")
    return axes


def toy_panels(
    grid: ArrayLike, teacher: ArrayLike, fits: Mapping[str, ArrayLike], *, titles: Mapping[str, str]
) -> Figure:
    """One panel per divergence: the teacher filled, the students fitted to it as lines.

    All are [grid]; a fit may be [starts, grid], its best start first: that one is drawn strong, the others faint.
    Units: probability of one bin of the grid, for teacher and students alike.
    Raises ValueError for an arm without a look or a title, and for shapes that do not fit the grid.
    """
    _check_arms(fits)
    if set(titles) != set(fits):
        raise ValueError(f"expected a title for each of {list(fits)}, got {list(titles)}")
    shapes = {"teacher": np.shape(teacher)} | {arm: np.atleast_2d(fit)[0].shape for arm, fit in fits.items()}
    if any(shape != np.shape(grid) for shape in shapes.values()) or any(np.ndim(fit) > 2 for fit in fits.values()):
        raise ValueError(f"expected densities on a grid of {np.shape(grid)}, got {shapes}")
    figure, axes = panels(len(fits), columns=min(2, len(fits)), height=2.3, left=0.8, bottom=0.85)
    with style():
        for axis, (arm, fit) in zip(axes, fits.items(), strict=True):
            _toy_panel(axis, grid, teacher, arm, np.atleast_2d(fit))
            axis.set_title(titles[arm])
        axes[0].set(xlim=(grid[0], grid[-1]), ylim=(0, None))
        for axis in axes[-2:]:
            axis.set_xlabel("position x on the grid")
        figure.supylabel("probability of a bin", x=0.01, fontsize=9, color="#444444")
        _toy_legend(figure, starts=any(np.ndim(fit) == 2 and len(fit) > 1 for fit in fits.values()))
    return figure


def _toy_panel(axes: Axes, grid: ArrayLike, teacher: ArrayLike, arm: str, fits: np.ndarray) -> None:
    colour = ARMS[arm].colour
    axes.fill_between(grid, teacher, color=ARMS["teacher"].colour, alpha=0.16, linewidth=0)
    axes.plot(grid, fits[1:].T, color=colour, alpha=0.4, linewidth=0.8)
    axes.plot(grid, fits[0], color=colour)


def _toy_legend(figure: Figure, *, starts: bool) -> None:
    """One neutral key for all panels, since the titles name the divergences."""
    keys = {
        "teacher": Patch(color=ARMS["teacher"].colour, alpha=0.16, linewidth=0),
        "best student": Line2D([], [], color=GREY),
        "best student at the other mode": Line2D([], [], color=GREY, alpha=0.5, linewidth=0.8),
    }
    labels = list(keys)[: 3 if starts else 2]
    figure.legend([keys[label] for label in labels], labels, loc="lower center", ncols=3)


def _caption(estimates: Mapping[str, "Estimate"]) -> str:
    """What marker, whisker and points are, and over how many replicates."""
    over = "–".join(map(str, sorted({find(e.count for e in estimates.values()) for find in (min, max)})))
    percent = " or ".join(f"{100 * level:.4g}" for level in sorted({e.level for e in estimates.values()}))
    return f"marker: mean; line: {percent} % t interval; points: each replicate (n = {over})"


def _check_arms(arms: Mapping[str, object]) -> None:
    if not arms:
        raise ValueError("expected at least one arm to draw, got none")
    for arm in arms:
        look(arm)
