"""Curves and fronts show the numbers that they are given."""

import matplotlib.pyplot as plt
import pytest
from matplotlib.collections import PolyCollection

from limbeck.exhibits import curve_figures
from limbeck.exhibits.intervals import Estimate


def estimate(mean, half):
    return Estimate(mean, mean - half, mean + half, 5, 0.95)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_curve_goes_through_its_means_between_the_ends_of_its_intervals():
    points = [(10.0, estimate(0.2, 0.1)), (20.0, estimate(0.5, 0.05))]
    figure = curve_figures.curve_panels({"accuracy, by step": {"kd": points}, "length": {"kd": points[:1]}}, title="t")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "accuracy, by step"
    (line,) = axes.lines
    assert line.get_xydata().tolist() == [[10.0, 0.2], [20.0, 0.5]]
    (band,) = (part for part in axes.collections if isinstance(part, PolyCollection))
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0.1)
    assert corners[:, 1].max() == pytest.approx(0.55)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Distillation (RKL)"]


def test_a_curve_of_one_run_has_no_band():
    points = [(10.0, Estimate(0.2, None, None, 1, 0.95)), (20.0, Estimate(0.5, None, None, 1, 0.95))]
    figure = curve_figures.curve_panels({"accuracy": {"kd": points}}, title="t", columns=1)
    assert not figure.axes[0].collections


def test_the_key_names_every_arm_of_every_panel_that_has_one():
    points = [(1.0, estimate(0.2, 0.1))]
    figure = curve_figures.curve_panels({"all": {"kd": points, "grpo": points}, "one": {"kd": points}}, title="t")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Distillation (RKL)", "GRPO"]


def test_an_arm_without_a_look_is_refused():
    with pytest.raises(ValueError, match="ghost"):
        curve_figures.curve_panels({"all": {"ghost": [(1.0, estimate(0.2, 0.1))]}}, title="t")


def test_a_front_crosses_both_intervals_where_the_means_meet():
    figure = curve_figures.front({"kdrl": (estimate(17.0, 1.0), estimate(0.8, 0.1))}, title="t", xlabel="x", ylabel="y")
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[17.0, 0.8]]
    ends = [path.vertices.tolist() for part in axes.collections for path in part.get_paths()]
    assert [[16.0, 0.8], [18.0, 0.8]] in ends
    assert any(tall[0] == pytest.approx([17.0, 0.7]) and tall[1] == pytest.approx([17.0, 0.9]) for tall in ends)
