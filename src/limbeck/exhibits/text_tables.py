"""Adapters on meanings and texts: the table and the figure that NOLA's `table_text` and its two kin share."""

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from limbeck.exhibits import figures, intervals

METRICS = (
    "storage/parameters",
    "storage/bytes",
    "train/loss",
    "validation/loss",
    "test/bleu",
    "test/rouge_l",
    "test/slot_error_rate",
    "chosen/rate",
)
_SHOWN = {"test BLEU": "test/bleu", "validation loss / nats a token": "validation/loss"}
_TITLE = ("none", "lora_1", "nola", "nola_fifth")  # the arms whose BLEU the title tells


def table(final: pd.DataFrame) -> list[dict[str, Any]]:
    """Every metric of every arm, with its interval over seeds."""
    return intervals.summarise(final, by=["arm"], metrics=list(METRICS))


def figure(final: pd.DataFrame) -> Figure:
    """BLEU and validation loss of each arm that was trained, side by side."""
    trained = final[final["arm"] != "none"].groupby("arm", sort=False)
    budgets = final.groupby("arm")["storage/parameters"].mean().to_dict()
    points = {name: figures.ordered(trained[metric].agg(list).to_dict(), budgets) for name, metric in _SHOWN.items()}
    means = final.groupby("arm")["test/bleu"].mean()
    title = "BLEU: " + ", ".join(f"{figures.look(arm).label} ({means[arm]:.1f})" for arm in _TITLE)
    height = 0.3 * len(trained) + 1.5
    drawn, axes = figures.panels(2, title=title, columns=2, height=height, left=1.8, bottom=0.8, shared=False)
    for axis, (name, estimates) in zip(axes, intervals.estimates(points).items(), strict=True):
        figures.interval_plot(axis, estimates, xlabel=name, points=points[name])
    axes[1].set_yticks([])
    axes[1].texts[0].set_visible(False)
    return drawn
