"""Names beside the ends of lines stand in the lines' order, apart, and follow a change of scale."""

import matplotlib as mpl
import pytest

mpl.use("Agg")

from limbeck.exhibits import canvas, direct_labels, palette


@pytest.fixture
def axes():
    _, (axes,) = canvas.panels(1)
    axes.set_ylim(0, 10)
    yield axes
    canvas.plt.close("all")


def ends(**heights):
    return [direct_labels.End(palette.look(arm), y, False) for arm, y in heights.items()]


def places(axes):
    return {text.get_text(): text.get_position()[1] for text in axes.texts}


def test_labels_with_room_stand_where_their_lines_end(axes):
    direct_labels.label(axes, ends(kl=2.0, js=8.0))
    assert places(axes) == pytest.approx({"KL": 0.2, "Jensen–Shannon": 0.8})


def test_labels_of_lines_that_meet_stand_apart_in_the_lines_order():
    placed = direct_labels.spread([50.0, 50.5, 50.2], [10.0, 10.0, 10.0], top=100.0)
    assert placed[1] - placed[2] >= 10 and placed[2] - placed[0] >= 10


@pytest.mark.parametrize("wanted", [[0.0, 0.0, 1.0], [100.0, 99.0, 100.0]])
def test_labels_stay_within_the_panel(wanted):
    placed = sorted(direct_labels.spread(wanted, [10.0, 20.0, 10.0], top=100.0))
    assert placed[0] >= 5 and placed[-1] <= 95
    assert len(set(placed)) == 3


def test_labels_follow_a_later_change_of_scale_and_stay_at_the_edge_when_their_line_leaves(axes):
    direct_labels.label(axes, ends(kl=2.0))
    axes.set_ylim(0, 4)
    assert places(axes)["KL"] == pytest.approx(0.5)
    axes.set_ylim(3, 10)
    assert places(axes)["KL"] < 0.1
    axes.set_ylim(0.02, 200)
    axes.set_yscale("log")
    axes.set_ylim(0.02, 200)
    assert places(axes)["KL"] == pytest.approx(0.5)


def test_a_line_of_one_replicate_has_a_hollow_marker_beside_its_name(axes):
    direct_labels.label(axes, [direct_labels.End(palette.look("kl"), 2.0, True)])
    key = next(line for line in axes.figure.artists if line.get_marker() == palette.look("kl").marker)
    assert key.get_markerfacecolor() == "white"
