"""Densities over a grid, and matrices as shades. They compute nothing."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from limbeck.exhibits import canvas
from limbeck.exhibits.canvas import GREY, INK
from limbeck.exhibits.palette import ARMS


def heat_panels(
    matrices: Mapping[str, Sequence[float]], *, title: str, xlabel: str, ylabel: str, edges: Mapping[str, Sequence[int]]
) -> Figure:
    """Square matrices, flat and row by row, as shades, each on its own scale from 0; `edges` end a name's groups."""
    figure, axes = canvas.panels(len(matrices), columns=2, height=3.1, left=0.45, bottom=0.6, title=title, shared=False)
    with canvas.style():
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


def toy_panels(
    grid: ArrayLike, teacher: ArrayLike, fits: Mapping[str, ArrayLike], *, titles: Mapping[str, str], title: str = ""
) -> Figure:
    """One panel per divergence: the teacher filled, the students fitted to it as lines.

    All are [grid]; a fit may be [starts, grid], its best start first: that one is drawn strong, the others faint.
    Units: probability of one bin of the grid, for teacher and students alike.
    Raises ValueError for an arm without a look or a title, and for shapes that do not fit the grid.
    """
    canvas.check_arms(fits)
    if set(titles) != set(fits):
        raise ValueError(f"expected a title for each of {list(fits)}, got {list(titles)}")
    shapes = {"teacher": np.shape(teacher)} | {arm: np.atleast_2d(fit)[0].shape for arm, fit in fits.items()}
    if any(shape != np.shape(grid) for shape in shapes.values()) or any(np.ndim(fit) > 2 for fit in fits.values()):
        raise ValueError(f"expected densities on a grid of {np.shape(grid)}, got {shapes}")
    figure, axes = canvas.panels(len(fits), columns=min(2, len(fits)), height=2.3, left=0.8, bottom=0.85, title=title)
    with canvas.style():
        for axis, (arm, fit) in zip(axes, fits.items(), strict=True):
            _toy_panel(axis, grid, teacher, arm, np.atleast_2d(fit))
            axis.set_title(titles[arm])
        axes[0].set(xlim=(grid[0], grid[-1]), ylim=(0, None))
        for axis in axes[-2:]:
            axis.set_xlabel("position x on the grid")
        figure.supylabel("probability of a bin", x=0.01, fontsize=9, color=INK)
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
