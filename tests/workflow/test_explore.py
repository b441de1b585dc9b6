"""The notebooks with sliders: every callback at the ends of every slider, since a widget swallows its errors."""

import itertools

import ipywidgets
import nbformat
import pytest
from matplotlib import pyplot

from limbeck import paths

NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("explore_*.ipynb"))


def ends(widget):
    """The values at which a slider, a box or a list ends; of a list all."""
    if isinstance(widget, ipywidgets.FloatLogSlider):
        return [widget.base**widget.min, widget.base**widget.max]
    if isinstance(widget, ipywidgets.Dropdown):
        return [option[1] if isinstance(option, tuple) else option for option in widget.options]
    return [False, True] if isinstance(widget, ipywidgets.Checkbox) else [widget.min, widget.max]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_callback_works_at_the_ends_of_every_slider(path, tmp_path, monkeypatch, capsys):
    callbacks = []
    monkeypatch.setattr(ipywidgets, "interact", lambda function, **widgets: callbacks.append((function, widgets)))
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.gcf()))
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            exec(cell.source, names)
    assert len(callbacks) == 2
    for function, widgets in callbacks:
        for corner in itertools.product(*map(ends, widgets.values())):
            before = len(shown)
            function(**dict(zip(widgets, corner, strict=True)))
            assert len(shown) > before or capsys.readouterr().out, corner
            pyplot.close("all")
    assert not list(tmp_path.iterdir())


def test_each_paper_has_one():
    assert [path.stem for path in NOTEBOOKS] == [
        f"explore_{paper.stem}" for paper in sorted(paths.PARAMS.glob("*.yaml"))
    ]
