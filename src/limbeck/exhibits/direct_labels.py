"""The names of lines, written beside their ends: nobody has to carry a colour from a key to a line."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from limbeck.exhibits.canvas import GREY, INK, inches

if TYPE_CHECKING:
    from limbeck.exhibits.palette import Look

ROOM = 1.02  # inches that the labels take on the right of a panel
_SIZE, _LETTERS = 7.5, 14  # of the labels: points, and letters in a line


class End(NamedTuple):
    """The line of an arm, its height where it ends, and whether it is of one replicate."""

    look: "Look"
    y: float
    single: bool


def spread(wanted: Sequence[float], heights: Sequence[float], *, top: float) -> list[float]:
    """Places for labels as near to the wanted ones as their heights allow, in the same order, between 0 and `top`."""
    places = list(wanted)
    order = sorted(range(len(wanted)), key=lambda index: -wanted[index])
    ceiling = top
    for index in order:
        places[index] = min(wanted[index], ceiling - heights[index] / 2)
        ceiling = places[index] - heights[index] / 2
    floor = 0.0
    for index in reversed(order):
        places[index] = max(places[index], floor + heights[index] / 2)
        floor = places[index] + heights[index] / 2
    return places


def label(axes: Axes, ends: Sequence[End]) -> None:
    """Each arm's marker and name on the right of the panel, tied to its line; they follow later changes of scale."""
    inch = 1 / inches(axes)[0]
    texts, keys, ties = [], [], []
    for shape, _, single in ends:
        name = textwrap.fill(shape.label, _LETTERS)
        drawn = {"transform": axes.transAxes, "clip_on": False}
        texts.append(
            axes.text(1 + 0.22 * inch, 0, name, fontsize=_SIZE, color=INK, va="center", linespacing=0.95, **drawn)
        )
        face = "white" if single else shape.colour
        keys.append(Line2D([1 + 0.14 * inch], [0], color=shape.colour, marker=shape.marker, mfc=face, ms=4.5, **drawn))
        ties.append(Line2D([1, 1 + 0.08 * inch], [0, 0], color=GREY, linewidth=0.5, **drawn))
    for artist in (*keys, *ties):
        axes.figure.add_artist(artist)
    heights = [_SIZE * (text.get_text().count("\n") + 1) + 1.5 for text in texts]

    def place(axes: Axes) -> None:
        axes.get_ylim()  # brings the scale up to date
        to_axes = axes.get_yaxis_transform() - axes.transAxes
        at = np.nan_to_num(to_axes.transform([(0, end.y) for end in ends])[:, 1], nan=0.0, posinf=1.0, neginf=0.0)
        points = 72 * inches(axes)[1]
        places = spread(list(points * at.clip(0, 1)), heights, top=points)
        for index, (text, key, tie) in enumerate(zip(texts, keys, ties, strict=True)):
            text.set_y(places[index] / points)
            key.set_ydata([places[index] / points])
            tie.set_ydata([at[index].clip(0, 1), places[index] / points])

    place(axes)
    axes.callbacks.connect("ylim_changed", place)
