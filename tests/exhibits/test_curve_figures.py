"""Curves and fronts show the numbers that they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from limbeck.exhibits import curve_figures, palette
from limbeck.exhibits.intervals import Estimate


def estimate(mean, half):
    return Estimate(mean, mean - half, mean + half, 5, 0.95)


def names(axes):
    return [" ".join(text.get_text().split()) for text in axes.texts]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_a_curve_goes_through_its_means_between_the_ends_of_its_intervals():
    points = [(10.0, estimate(0.2, 0.1)), (20.0, estimate(0.5, 0.05))]
    figure = curve_figures.curve_panels({"accuracy, by step": {"kd": points}, "length": {"kd": points[:1]}}, title="t")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "accuracy, by step"
    line, *_ = axes.lines
    assert line.get_xydata().tolist() == [[10.0, 0.2], [20.0, 0.5]]
    (marks,) = axes.containers
    ends = [segment[:, 1].tolist() for segment in marks.lines[2][0].get_segments()]
    assert np.allclose(ends, [[0.1, 0.3], [0.45, 0.55]])
    assert names(axes) == ["Distillation (RKL)"]


def test_a_curve_of_one_run_has_no_interval_and_hollow_markers_and_the_caption_says_so():
    points = [(10.0, Estimate(0.2, None, None, 1, 0.95)), (20.0, Estimate(0.5, None, None, 1, 0.95))]
    figure = curve_figures.curve_panels({"accuracy": {"kd": points}}, title="t", columns=1)
    assert not figure.axes[0].collections
    assert figure.axes[0].containers[0].lines[0].get_markerfacecolor() == "white"
    assert figure.texts[-1].get_text() == "hollow: n = 1, no interval"


def test_every_line_is_named_in_each_panel_that_has_it():
    points = [(1.0, estimate(0.2, 0.1))]
    figure = curve_figures.curve_panels({"all": {"kd": points, "grpo": points}, "one": {"kd": points}}, title="t")
    assert [names(axes) for axes in figure.axes] == [["Distillation (RKL)", "GRPO"], ["Distillation (RKL)"]]


def test_more_than_five_lines_are_drawn_in_panels_beside_each_other_on_one_scale():
    arms = ["kd", "grpo", "kdrl", "annealed", "sft", "rejection", "kd_then_rl", "k3", "exact"]
    curves = {arm: [(x, estimate(0.1 * n, 0.01)) for x in range(20)] for n, arm in enumerate(arms)}
    figure = curve_figures.curve_panels({"accuracy": curves, "length": {"kd": curves["kd"]}}, title="t")
    shown = [names(axes) for axes in figure.axes]
    assert [len(panel) for panel in shown] == [5, 4, 1, 0]
    assert {name for panel in shown[:2] for name in panel} == {palette.look(arm).label for arm in arms}
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim() != figure.axes[2].get_ylim()
    assert figure.axes[2].get_ylim()[1] < 0.5, "an empty panel has a say in the scale"
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]


def test_lines_that_coincide_take_turns_in_showing_their_markers():
    curves = {arm: [(x, estimate(0.5, 0.01)) for x in range(12)] for arm in ("kd", "grpo", "kdrl")}
    (axes,) = curve_figures.curve_panels({"accuracy": curves}, title="t").axes
    marked = [set(container.lines[0].get_xdata()) for container in axes.containers]
    assert len(set.union(*marked)) == sum(map(len, marked)) == 12


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
    assert axes.get_xlim()[1] - axes.get_xlim()[0] >= 0.05 * 17
    assert names(axes) == ["KDRL"]
