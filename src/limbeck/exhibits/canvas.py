"""What every figure stands on: the style, saving, panels, and scales that neither hide nor invent a difference."""

import io
import re
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from limbeck import paths
from limbeck.exhibits.palette import look

if TYPE_CHECKING:  # an exhibit's picture should not wait for scipy
    from limbeck.exhibits.intervals import Estimate

STYLE = Path(__file__).with_name("limbeck.mplstyle")
WIDTH = 7.2  # inches: about the text column of a README
LINE, LEADING = 95, 0.17  # of a figure's title: characters, and inches
GREY, INK = "#8a8a8a", "#444444"
LEAST_SPAN = 0.05  # of the largest value on an axis: what is less apart than this is drawn close together
OWN_SHARE = 1 / 3  # of a common scale: a panel that fills less is flattened by it


def style() -> AbstractContextManager[None]:
    """The project's style, for the figures made inside."""
    return plt.style.context(STYLE)


def save(figure: Figure, path: Path, *, note: str = "", alt: str = "") -> None:
    """Write an SVG, whole or not at all: no date, no version, fixed ids, so that the same figure gives the same bytes.

    Text is drawn as paths, to look alike everywhere; `note` stands small in a corner. For those who do not see it, the
    title is the figure's, and the description is `alt`, or the title and what the panels show. A notebook run by hand
    writes nothing. ValueError for another suffix.
    """
    if path.suffix != ".svg":
        raise ValueError(f"expected a path that ends in .svg, got {path}")
    figure.text(0.995, 0.008, note, ha="right", fontsize=6.5, color=GREY)
    if paths.by_hand():
        return
    from limbeck import records  # noqa: PLC0415  (a picture alone should not wait for pandas)

    headings = [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]
    title = " ".join((figure.get_suptitle() or "; ".join(headings)).split())
    description = alt or ". Panels: ".join(filter(None, [title, "; ".join(headings) if figure.get_suptitle() else ""]))
    buffer, titled = io.StringIO(), {"Title": title} if title else {}
    with style():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None} | titled)
    words = f"<desc>{escape(description)}</desc>\n" if description else ""
    text = re.sub(r"(?=\n <metadata>)", lambda _: f"\n {words}".rstrip(), buffer.getvalue(), count=1)
    records.replace_text(path, text.replace("<svg ", '<svg role="img" ', 1))


def panels(
    count: int,
    *,
    columns: int = 1,
    height: float = 2.8,
    left: float = 1.2,
    right: float = 0.15,
    bottom: float = 0.75,
    extra: float = 0.0,
    across: float = 0.4,
    title: str = "",
    shared: bool = True,
) -> tuple[Figure, list[Axes]]:
    """A figure of README width with `count` axes that share their scales, if not told otherwise, under one title.

    Units: inches, of a row, of the margins, `extra` height and the gap `across`; a fitted layout drifts in its last
    bits.
    """
    rows, title = -(-count // columns), textwrap.fill(title, LINE)
    top, between = (0.7 if title else 0.35) + LEADING * title.count("\n"), 0.5 if shared else 0.72
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


def inches(axes: Axes) -> tuple[float, float]:
    """Width and height of the axes."""
    box, (wide, tall) = axes.get_position(), axes.figure.get_size_inches()
    return box.width * wide, box.height * tall


def heading(axes: Axes, title: str, *, beside: float = 0.0) -> None:
    """A panel's title, smaller if it would run into the next panel; `beside` inches on its right are free."""
    room = 72 * (inches(axes)[0] + beside + 0.25)
    axes.set_title(title, fontsize=max(6.5, min(10.0, room / (0.56 * max(1, len(title))))))


def check_arms(arms: Iterable[str]) -> None:
    """ValueError for no arm, or one without a look."""
    if not (names := list(arms)):
        raise ValueError("expected at least one arm to draw, got none")
    for arm in names:
        look(arm)


def widened(low: float, high: float) -> tuple[float, float]:
    """The limits, or wider ones about the same middle: an axis spans `LEAST_SPAN` of the largest value on it."""
    missing = LEAST_SPAN * max(abs(low), abs(high)) - (high - low)
    return (low - missing / 2, high + missing / 2) if missing > 0 else (low, high)


def comparable(spans: Sequence[tuple[float, float]]) -> bool:
    """Whether one scale suits all panels, given the ends of each: none would fill less than `OWN_SHARE` of it."""
    whole = max(high for _, high in spans) - min(low for low, _ in spans)
    return all(high - low >= OWN_SHARE * whole for low, high in spans)


def thin_ticks(axes: Axes) -> None:
    """As many numbers below a panel as stand beside each other."""
    wide = inches(axes)[0]
    least = 3 if wide > 1.6 else 2
    axes.xaxis.set_major_locator(MaxNLocator(max(2, int(wide / 0.55)), steps=[1, 2, 5, 10], min_n_ticks=least))


def name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """One tick per name; if they would touch, only every second, third, … is written."""
    letters = int(inches(axes)[0] / 0.085)
    fits = (step for step in range(1, len(names)) if sum(len(name) + 1 for name in names[::step]) <= letters)
    every = next(fits, len(names))
    shown = [name if place % every == 0 else "" for place, name in enumerate(names)]
    axes.set_xticks(range(len(names)), shown)


def replicates(estimates: Iterable["Estimate"]) -> str:
    """Over how many replicates the estimates are, as `n = 3–5`."""
    counts = {estimate.count for estimate in estimates}
    return f"n = {'–'.join(str(count) for count in sorted({min(counts), max(counts)}))}"


def level(estimates: Iterable["Estimate"]) -> str:
    """The level of the intervals that the estimates have, as `95 % t interval`; empty if none has."""
    levels = sorted({estimate.level for estimate in estimates if estimate.low is not None})
    return f"{' or '.join(f'{100 * share:.4g}' for share in levels)} % t interval" if levels else ""


def outer(values: Iterable[float]) -> tuple[float, float]:
    """The least and the largest value."""
    array = np.fromiter(values, float)
    return float(array.min()), float(array.max())
