"""Figures: one style, one look per arm, and helpers that draw what they are given and compute nothing.

An arm looks the same everywhere (`palette`). Titles state the finding and are passed in; every interval is drawn, and
the caption says over what. Each kind of picture has its module; notebooks find all of them here.
"""

from limbeck.exhibits.canvas import panels, save, style
from limbeck.exhibits.curve_figures import curve_panels, front, line_plot, response_panels
from limbeck.exhibits.density_figures import heat_panels, toy_panels
from limbeck.exhibits.interval_figures import decided, interval_panels, interval_plot, ordered
from limbeck.exhibits.palette import ARMS, look

__all__ = [
    "ARMS",
    "curve_panels",
    "decided",
    "front",
    "heat_panels",
    "interval_panels",
    "interval_plot",
    "line_plot",
    "look",
    "ordered",
    "panels",
    "response_panels",
    "save",
    "style",
    "toy_panels",
]
