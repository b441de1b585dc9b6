"""Results as a paper prints them: a row per method, a column per metric, mean ± half-width, bold where one is best."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from pandas.io.formats.style import Styler

from limbeck.exhibits.intervals import FIELDS
from limbeck.exhibits.palette import look

Row = Mapping[str, Any]
_UP = ("accuracy", "agreement", "at_best", "best", "bleu", "greedy", "rouge_l", "score")  # what is better the larger
_DOWN = ("loss", "slot_error_rate")
_METHODS = ("arm", "loss")  # the coordinates that name a method
_BESIDE = ("teacher", "start", "none")  # shown for comparison; no method competes with them
_BETTER = {"↑": 1, "↓": -1}


@dataclass(frozen=True)
class Shown:
    """A table in a notebook: with its style where that is rendered, plain elsewhere; each time the same bytes."""

    style: Styler

    @classmethod
    def of(cls, table: pd.DataFrame) -> "Shown":
        """A table without style yet, every cell whole."""
        return cls(Styler(table, uuid="table", cell_ids=False))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.style.to_html(), "text/plain": self.style.data.to_string(max_colwidth=None)}


def styled(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> Shown:
    """The table for a notebook. `rows` are those of `intervals.summarise`; `columns` is metric -> heading, in order.

    A heading that ends in ↑ or ↓ says which way is better; only below it a cell can be bold: the best of its group,
    if its interval lies beyond those of all others. Raises ValueError for a metric that no row has.
    """
    texts, best = _cells(rows, columns)
    weights = best.replace({True: "font-weight: bold", False: ""})
    shown = Shown.of(texts)
    shown.style.apply(lambda _: weights, axis=None).set_caption(_note(rows))
    return shown


def markdown(rows: Sequence[Row], columns: Mapping[str, str] | None = None) -> str:
    """The same table for a page of results."""
    texts, best = _cells(rows, columns)
    marked = texts.where(~best, "**" + texts + "**").reset_index()
    sides = [":--"] * texts.index.nlevels + ["--:"] * len(texts.columns)
    lines = [list(marked), sides, *marked.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_note(rows)}.\n"


def _cells(rows: Sequence[Row], columns: Mapping[str, str] | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each cell says, and whether it is bold."""
    metrics = dict.fromkeys(row["metric"] for row in rows)
    columns = columns or {metric: _heading(metric) for metric in metrics}
    if missing := [metric for metric in columns if metric not in metrics]:
        raise ValueError(f"expected metrics among {', '.join(metrics)}; got {', '.join(missing)}")
    names = dict.fromkeys(name for row in rows for name in row if name not in (*FIELDS, "metric"))
    names = sorted(names, key=lambda name: name in _METHODS)
    places = list(dict.fromkeys(tuple(row.get(name) for name in names) for row in rows))
    groups = list(dict.fromkeys(place[:-1] for place in places))
    places.sort(key=lambda place: groups.index(place[:-1]))  # a teacher's row may come later than its group
    shown = {(tuple(row.get(name) for name in names), row["metric"]): row for row in rows}
    titles = ["method" if name in _METHODS else name.replace("_", " ") for name in names]
    index = pd.MultiIndex.from_tuples([_words(names, place) for place in places], names=titles)
    said = [[_text(shown.get((place, metric))) for metric in columns] for place in places]
    texts = pd.DataFrame(said, index=index, columns=list(columns.values()))
    best = [[_decided(shown, place, metric, heading) for metric, heading in columns.items()] for place in places]
    return texts, pd.DataFrame(best, index=index, columns=texts.columns)


def _heading(metric: str) -> str:
    last = metric.rpartition("/")[2]
    arrow = " ↑" if last in _UP else " ↓" if last in _DOWN else ""
    return metric.replace("/", " ").replace("_", " ") + arrow


def _words(names: Sequence[str], place: tuple) -> tuple[str, ...]:
    pairs = zip(names, place, strict=True)
    return tuple("–" if x is None else look(x).label if name in _METHODS else f"{x}" for name, x in pairs)


def _decided(shown: Mapping[tuple[tuple, str], Row], place: tuple, metric: str, heading: str) -> bool:
    """Whether the cell is better than each other with an interval in its group, interval beyond interval."""
    own, way = shown.get((place, metric)), _BETTER.get(heading[-1:], 0)
    group = [row for (other, name), row in shown.items() if name == metric and other[:-1] == place[:-1]]
    rivals = [row for row in group if row["low"] is not None and not {*_BESIDE} & {row.get(key) for key in _METHODS}]
    others = [row for row in rivals if row is not own]
    if own not in rivals or not way or not others:
        return False
    return all(own["low"] > row["high"] if way > 0 else own["high"] < row["low"] for row in others)


def _text(row: Row | None) -> str:
    """`0.871 ± 0.012`: two digits of the half-width, and the mean as far as it is known."""
    if row is None:
        return "–"
    half = 0.0 if row["low"] is None else (row["high"] - row["low"]) / 2
    if half > 0:
        decimals = max(0, 1 - math.floor(math.log10(half)))
        return f"{row['mean']:,.{decimals}f} ± {half:,.{decimals}f}"
    whole = f"{row['mean']:,.0f}" if row["mean"] == round(row["mean"]) else f"{row['mean']:,.4g}"
    return f"{whole} (n = 1)" if row["count"] == 1 else whole


def _note(rows: Sequence[Row]) -> str:
    levels = " or ".join(f"{100 * level:.4g}" for level in sorted({row["level"] for row in rows}))
    return f"Mean ± half of the {levels} % t interval; bold: better than all others, interval beyond interval"
