import subprocess
import sys
import xml.etree.ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest

from limbeck import paths
from limbeck.exhibits import canvas, figures, intervals, palette

GRID = np.linspace(-10, 10, 101)
TEACHER = np.exp(-(GRID**2)) / np.exp(-(GRID**2)).sum()
POINTS = {"kl": [0.80, 0.82, 0.81, 0.85, 0.79], "sinkhorn": [0.84, 0.86, 0.83, 0.88, 0.85], "teacher": [0.9]}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def whiskers(values=POINTS, points=None):
    figure, (axes,) = figures.panels(1)
    estimates = {arm: intervals.mean_interval(row) for arm, row in values.items()}
    points = values if points is None else points
    return figure, figures.interval_plot(axes, estimates, xlabel="accuracy", points=points, title="T")


def toy(fits, titles=None):
    return figures.toy_panels(GRID, TEACHER, fits, titles={arm: arm for arm in fits} if titles is None else titles)


def test_whiskers_points_and_markers_stand_where_the_estimates_are():
    _, axes = whiskers()
    estimate = intervals.mean_interval(POINTS["kl"])
    whisker, marker = axes.lines[0], axes.lines[1]
    assert whisker.get_xdata() == pytest.approx([estimate.low, estimate.high])
    assert float(np.ravel(marker.get_xdata())[0]) == pytest.approx(estimate.mean)
    assert sorted(axes.collections[0].get_offsets()[:, 0]) == pytest.approx(sorted(POINTS["kl"]))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["KL", "Sinkhorn", "Teacher"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert (axes.get_title(loc="left"), axes.get_xlabel()) == ("T", "accuracy")


def test_one_replicate_has_no_whisker_and_a_hollow_marker():
    _, axes = whiskers({"teacher": [0.9]})
    assert len(axes.lines) == 1
    assert axes.lines[0].get_markerfacecolor() == "white"


def test_the_caption_says_over_what_the_intervals_are():
    _, axes = whiskers()
    kind = "marker: mean; line: 95 % t interval; points: each replicate"
    assert axes.texts[0].get_text() == f"{kind} (n = 1–5); hollow: one replicate, no interval"
    _, axes = whiskers({"kl": POINTS["kl"]})
    assert axes.texts[0].get_text() == f"{kind} (n = 5)"
    _, axes = whiskers({"teacher": [0.9]})
    assert axes.texts[0].get_text() == "hollow: one replicate, no interval (n = 1)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"points": {}}, "5 replicates of 'kl', got None"),
        ({"points": POINTS | {"sinkhorn": [0.5]}}, r"5 replicates of 'sinkhorn', got \[0.5\]"),
    ],
)
def test_points_that_are_not_the_replicates_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        whiskers(POINTS, **changes)


def test_an_arm_without_a_look_is_refused():
    with pytest.raises(ValueError, match=r"expected arms among teacher.*got klx"):
        whiskers({"klx": [0.5, 0.6]})
    with pytest.raises(ValueError, match=r"expected arms among teacher.*got klx"):
        toy({"klx": TEACHER})


@pytest.mark.parametrize("draw", [whiskers, toy])
def test_a_figure_of_nothing_is_refused(draw):
    with pytest.raises(ValueError, match="at least one arm to draw"):
        draw({})


def test_toy_panels_draw_the_teacher_and_every_start():
    figure = toy({"kl": TEACHER, "rkl": np.stack([TEACHER, TEACHER / 2, TEACHER / 3]), "js": TEACHER})
    first, second, third = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["kl", "rkl", "js"]
    assert [len(axes.lines) for axes in (first, second, third)] == [1, 3, 1]
    assert all(len(axes.collections) == 1 for axes in figure.axes)
    strong = max(second.lines, key=lambda line: line.get_linewidth())
    assert strong.get_ydata() == pytest.approx(TEACHER)
    assert strong.get_color() == figures.ARMS["rkl"].colour
    assert second.get_xlabel() and third.get_xlabel() and figure.get_supylabel()


def test_the_key_names_other_starts_only_where_there_are_some():
    def labels(fits):
        return [text.get_text() for text in toy(fits).legends[0].get_texts()]

    assert labels({"kl": TEACHER}) == ["teacher", "best student"]
    assert labels({"kl": np.stack([TEACHER, TEACHER])}) == ["teacher", "best student", "best student at the other mode"]


@pytest.mark.parametrize(
    ("fits", "titles", "message"),
    [
        ({"kl": TEACHER[:-1]}, None, r"on a grid of \(101,\), got .*100"),
        ({"kl": np.ones((1, 2, 101))}, None, "on a grid of"),
        ({"kl": TEACHER}, {"rkl": "x"}, r"title for each of \['kl'\], got \['rkl'\]"),
    ],
)
def test_toy_panels_refuse_what_does_not_fit_the_grid_or_the_titles(fits, titles, message):
    with pytest.raises(ValueError, match=message):
        toy(fits, titles)


def test_the_style_ends_with_its_block():
    before = mpl.rcParams["font.size"], mpl.rcParams["axes.spines.top"]
    with figures.style():
        assert mpl.rcParams["axes.spines.top"] is False
        whiskers()
    assert (mpl.rcParams["font.size"], mpl.rcParams["axes.spines.top"]) == before


def test_a_saved_figure_is_the_same_bytes_each_time_and_has_no_date(tmp_path):
    figure, _ = whiskers()
    figures.save(figure, tmp_path / "deep" / "a.svg")
    figure.savefig(tmp_path / "shown.png", dpi=200)
    figures.save(figure, tmp_path / "deep" / "b.svg")
    figures.save(whiskers()[0], tmp_path / "deep" / "c.svg")
    texts = {file.read_text() for file in (tmp_path / "deep").iterdir()}
    assert len(list((tmp_path / "deep").iterdir())) == 3
    assert len(texts) == 1
    assert "<dc:date>" not in texts.copy().pop() and "Matplotlib v" not in texts.pop()


def test_a_saved_figure_tells_its_finding_to_those_who_do_not_see_it(tmp_path):
    figure = figures.toy_panels(
        GRID, TEACHER, {"kl": TEACHER, "js": TEACHER}, titles={"kl": "a < b", "js": "c"}, title="T & U"
    )
    for name, alt in (("own", "They fit."), ("default", "")):
        figures.save(figure, tmp_path / f"{name}.svg", alt=alt)
    root = xml.etree.ElementTree.parse(tmp_path / "default.svg").getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img"
    assert [(child.tag, child.text) for child in root[:2]] == [
        (f"{space}title", "T & U"),
        (f"{space}desc", "T & U. Panels: a < b; c"),
    ]
    assert xml.etree.ElementTree.parse(tmp_path / "own.svg").getroot().find(f"{space}desc").text == "They fit."


def test_only_an_svg_is_saved_and_a_failure_leaves_nothing(tmp_path):
    figure, axes = whiskers()
    with pytest.raises(ValueError, match=r"ends in \.svg, got .*a\.png"):
        figures.save(figure, tmp_path / "a.png")
    axes.set_title("$\\broken{$")
    with pytest.raises(ValueError, match="broken"):
        figures.save(figure, tmp_path / "a.svg")
    assert list(tmp_path.iterdir()) == []


def test_another_process_saves_the_same_bytes_and_loads_neither_torch_nor_scipy(tmp_path):
    code = (
        "import sys, pathlib, numpy as np\nfrom limbeck.exhibits import figures\n"
        "assert not {'torch', 'scipy', 'pandas'} & set(sys.modules), 'figures must open in a second'\n"
        "grid = np.linspace(-10, 10, 101); density = np.exp(-(grid**2)) / np.exp(-(grid**2)).sum()\n"
        "figure = figures.toy_panels(grid, density, {'kl': np.stack([density] * 2)}, titles={'kl': 'kl'})\n"
        "figures.save(figure, pathlib.Path(sys.argv[1]))\n"
    )
    environment = {"MPLBACKEND": "Agg", "PYTHONHASHSEED": "7", "PATH": "", "PYTHONPATH": str(paths.ROOT / "src")}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there.svg")], check=True, env=environment)
    figures.save(toy({"kl": np.stack([TEACHER] * 2)}), tmp_path / "here.svg")
    assert (tmp_path / "here.svg").read_bytes() == (tmp_path / "there.svg").read_bytes()


GROUPS = {
    "first": {"ce+kl": [0.01, 0.02, 0.0], "ce+js": [0.03, 0.01, 0.02]},
    "second": {"ce+kl": [-0.01, 0.0, 0.01], "ce+js": [0.5, 0.25, 0.75]},
    "mean": {"ce+kl": [0.0, 0.01, 0.005], "ce+js": [0.25, 0.125, 0.375]},
}


def test_interval_panels_draw_each_group_with_one_caption():
    groups = intervals.estimates(GROUPS)
    figure = figures.interval_panels(groups, title="T", xlabel="gain", points=GROUPS, zero=True)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(GROUPS)
    for axes, (group, arms) in zip(figure.axes, GROUPS.items(), strict=True):
        drawn = sorted(x for collection in axes.collections for x in collection.get_offsets()[:, 0])
        assert drawn == pytest.approx(sorted([*arms["ce+kl"], *arms["ce+js"]])), group
        assert [0, 0] in [list(line.get_xdata()) for line in axes.lines]
    for left in figure.axes[::2]:
        assert [text.get_text() for text in left.get_yticklabels()] == ["CE + KL", "CE + Jensen–Shannon"]
    assert [any(text.get_visible() for text in axes.texts) for axes in figure.axes] == [False, False, True]
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "gain", "gain"]
    plain = figures.interval_panels(groups, title="T", xlabel="gain", points=GROUPS)
    assert len(plain.axes[0].lines) == len(figure.axes[0].lines) - 1


def test_the_caption_counts_the_replicates_of_every_panel():
    fewer = {"a few": {arm: values[:2] for arm, values in GROUPS["first"].items()}} | GROUPS
    figure = figures.interval_panels(intervals.estimates(fewer), title="T", xlabel="gain", points=fewer)
    (caption,) = (text.get_text() for axes in figure.axes for text in axes.texts if text.get_visible())
    assert "points: each replicate (n = 2–3)" in caption


def panels_of(**values):
    parts = {name: {"kl": row, "js": [x + 0.1 for x in row]} for name, row in values.items()}
    figure = figures.interval_panels(intervals.estimates(parts), title="T", xlabel="gain", points=parts)
    (caption,) = (text.get_text() for axes in figure.axes for text in axes.texts if text.get_visible())
    return figure, "each panel has its own scale" in caption


def test_panels_share_a_scale_unless_it_flattens_one_and_then_the_caption_says_so():
    figure, own = panels_of(first=[0.1, 0.2, 0.3], second=[0.3, 0.4, 0.5])
    assert (len({axes.get_xlim() for axes in figure.axes}), own) == (1, False)
    figure, own = panels_of(first=[0.1, 0.11, 0.12], second=[0.1, 1.0, 2.0])
    assert (len({axes.get_xlim() for axes in figure.axes}), own) == (2, True)
    figure, own = panels_of(first=[0.1], second=[2.0])
    assert (len({axes.get_xlim() for axes in figure.axes}), own) == (1, False), "markers alone are never flattened"


def test_positive_numbers_that_lie_decades_apart_are_on_one_logarithmic_scale():
    figure, own = panels_of(first=[0.1, 0.11], second=[300.0, 301.0])
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    assert (len({axes.get_xlim() for axes in figure.axes}), own) == (1, False)


def test_no_difference_is_on_the_scale_of_every_panel_that_marks_it():
    parts = {"first": {"kl": [0.5, 0.51], "js": [0.6, 0.61]}}
    figure = figures.interval_panels(intervals.estimates(parts), title="T", xlabel="gain", points=parts, zero=True)
    assert figure.axes[0].get_xlim()[0] < 0


ELEVEN = {arm: [0.01 * n, 0.01 * n + 0.02] for n, arm in enumerate(list(palette.ARMS)[:11])}


def test_an_outlier_gets_an_arrow_and_its_numbers_instead_of_the_scale():
    _, axes = whiskers(ELEVEN | {"value": [-2.01, -1.99]})
    low, high = axes.get_xlim()
    assert -0.2 < low < -0.1 and 0.2 < high < 0.3
    assert [line.get_marker() for line in axes.lines if list(line.get_xdata()) == [0]] == ["<"]
    assert [text.get_text() for text in axes.texts[1:]] == ["-2 [-2.13, -1.87]"]


@pytest.mark.parametrize("values", [ELEVEN, {"kl": [0.0, 0.01], "js": [0.0, 0.02], "rkl": [5.0, 5.1]}])
def test_no_arm_is_left_out_of_a_scale_that_it_does_not_squash_or_that_few_share(values):
    _, axes = whiskers(values)
    assert len(axes.texts) == 1
    low, high = axes.get_xlim()
    assert all(low < x < high for row in values.values() for x in row)


def test_an_axis_spans_a_twentieth_of_what_it_measures():
    _, axes = whiskers({"kl": [17.13, 17.14], "js": [17.14, 17.15]})
    low, high = axes.get_xlim()
    assert high - low > 0.05 * 17
    _, axes = whiskers({"kl": [-0.01, 0.02], "js": [0.0, 0.01]})
    low, high = axes.get_xlim()
    assert high - low < 0.6, "a difference about 0 is not pressed together"


def test_arms_stand_in_the_order_of_their_budgets():
    assert list(figures.ordered({"nola": 1, "none": 2, "full": 3}, {"full": 9, "none": 0, "nola": 5})) == [
        "full",
        "nola",
        "none",
    ]
    with pytest.raises(ValueError, match=r"budget for each of \['nola', 'full'\], got none for \['full'\]"):
        figures.ordered({"nola": 1, "full": 3}, {"nola": 5})


def test_panels_whose_rows_differ_are_refused_since_the_names_stand_once():
    turned = GROUPS | {"second": dict(reversed(GROUPS["second"].items()))}
    with pytest.raises(ValueError, match="expected the same in the same order"):
        figures.interval_panels(intervals.estimates(turned), title="T", xlabel="gain", points=turned)


def test_a_title_too_long_for_a_line_takes_two_and_makes_room_for_itself():
    short, long = (figures.panels(1, title=title)[0] for title in ("word " * 19, "word " * 20))
    assert [figure.get_suptitle().count("\n") for figure in (short, long)] == [0, 1]
    assert long.get_suptitle().split() == ["word"] * 20
    heights = [figure.axes[0].get_position().height * figure.get_figheight() for figure in (short, long)]
    assert heights[0] == pytest.approx(heights[1])
    assert long.get_figheight() == pytest.approx(short.get_figheight() + canvas.LEADING)


def responses(scale=1.0):
    gains = {0.01: [0.1, 0.3], 0.1: [0.2, 0.2], 10.0: [-0.4, 0.0]}
    return {value: intervals.mean_interval([scale * x for x in gain]) for value, gain in gains.items()}


def test_response_panels_draw_a_line_an_arm_over_equally_spaced_values_with_intervals():
    groups = {
        "epsilon": {"ce+sinkhorn": responses(), "ce+debiased": responses(0.5)},
        "group": {"ce+sinkhorn": responses(3)},
    }
    figure = figures.response_panels(groups, title="T", ylabel="gain")
    first, second = figure.axes
    assert (first.get_title(loc="left"), second.get_title(loc="left")) == ("epsilon", "group")
    assert [text.get_text() for text in first.get_xticklabels()] == ["0.01", "0.1", "10"]
    for line, (arm, estimates) in zip(first.containers, groups["epsilon"].items(), strict=True):
        assert (line.lines[0].get_color(), line.lines[0].get_marker()) == palette.look(arm)[1:]
        assert list(line.lines[0].get_xdata()) == pytest.approx([0, 1, 2], abs=0.1)
        assert list(line.lines[0].get_ydata()) == [estimate.mean for estimate in estimates.values()]
        for segment, estimate in zip(line.lines[2][0].get_segments(), estimates.values(), strict=True):
            assert sorted(segment[:, 1]) == pytest.approx([estimate.low, estimate.high])
    assert first.get_ylim() == second.get_ylim()
    named = [" ".join(text.get_text().split()) for text in first.texts]
    assert named == ["CE + Sinkhorn", "CE + Sinkhorn, debiased"]


def test_response_panels_of_two_quantities_have_a_label_each():
    groups = {"scale": {"sinkhorn": responses()}, "gain": {"sinkhorn": responses(3)}}
    figure = figures.response_panels(groups, title="T", ylabel={"scale": "width", "gain": "accuracy"}, zero=False)
    assert [axes.get_ylabel() for axes in figure.axes] == ["width", "accuracy"]
    assert not figure.get_supylabel()


def test_no_panel_of_responses_is_flattened_by_the_scale_of_another():
    groups = {"epsilon": {"ce+sinkhorn": responses()}, "group": {"ce+sinkhorn": responses(100)}}
    figure = figures.response_panels(groups, title="T", ylabel="gain")
    assert figure.axes[0].get_ylim() != figure.axes[1].get_ylim()
    assert "each quantity has its own scale" in figure.texts[-1].get_text()


def test_numbers_below_a_panel_that_would_touch_are_thinned():
    _, axes = canvas.panels(4, columns=4)
    canvas.name_ticks(axes[0], ["-10.125", "-8.5", "-7.25", "-5.5", "-4.125"])
    assert [text.get_text() for text in axes[0].get_xticklabels()] == ["-10.125", "", "", "-5.5", ""]


def test_response_panels_without_a_line_of_no_difference_keep_their_own_scales():
    groups = {"epsilon": {"ce+sinkhorn": responses()}, "group": {"ce+sinkhorn": responses(3)}}

    def at_zero(figure):
        return [any(list(line.get_ydata()) == [0, 0] for line in axes.lines) for axes in figure.axes]

    free = figures.response_panels(groups, title="T", ylabel="gain", zero=False)
    assert free.axes[0].get_ylim() != free.axes[1].get_ylim()
    assert at_zero(free) == [False, False]
    assert at_zero(figures.response_panels(groups, title="T", ylabel="gain")) == [True, True]


def test_heat_panels_draw_the_matrix_row_by_row_from_0_and_part_its_groups():
    values = [float(value) for value in range(9)]
    figure = figures.heat_panels(
        {"cost": values, "plan": [2.0] * 4}, title="T", xlabel="teacher", ylabel="student", edges={"cost": [1]}
    )
    cost, plan, *bars = figure.axes
    assert np.array_equal(cost.images[0].get_array(), [[0, 1, 2], [3, 4, 5], [6, 7, 8]])
    assert cost.images[0].get_clim() == (0, 8)
    assert plan.images[0].get_clim() == (0, 2), "a matrix is shaded on the scale of another"
    assert [list(line.get_ydata()) for line in cost.lines if line.get_xdata()[0] == 0] == [[0.5, 0.5]]
    assert [list(line.get_xdata()) for line in cost.lines if line.get_ydata()[0] == 0] == [[0.5, 0.5]]
    assert not plan.lines
    assert (cost.get_xlabel(), cost.get_ylabel(), cost.get_title(loc="left")) == ("teacher", "student", "cost")
    assert len(bars) == 2


def test_a_line_plot_draws_each_curve_in_its_arms_colour_and_refuses_one_of_another_length():
    _, axes = figures.panels(1)
    figures.line_plot(axes[0], [1.0, 2.0], {"kl": [1.0, 2.0], "js": [3.0, 4.0]}, xlabel="x", ylabel="y", title="t")
    drawn = {line.get_label(): (line.get_color(), list(line.get_ydata())) for line in axes[0].get_lines()}
    assert drawn == {
        figures.ARMS[arm].label: (figures.ARMS[arm].colour, y) for arm, y in (("kl", [1, 2]), ("js", [3, 4]))
    }
    with pytest.raises(ValueError, match=r"expected curves of \(2,\), got \{'kl': \(3,\)\}"):
        figures.line_plot(axes[0], [1.0, 2.0], {"kl": [1.0, 2.0, 3.0]}, xlabel="x", ylabel="y")


def test_a_title_names_the_arms_whose_interval_excludes_no_difference():
    def estimate(low, high):
        return intervals.Estimate(0.0, low, high, 5, 0.95)

    estimates = {"ce+kl": estimate(0.1, 0.2), "ce+js": estimate(-0.1, 0.2), "ce+rkd": estimate(-0.3, -0.1)}
    assert figures.decided(estimates) == "CE + KL above 0; CE + RKD below 0; 1 not told apart"
    edges = {"kl": estimate(0.0, 0.2), "js": estimate(-0.2, 0.0), "rkl": intervals.Estimate(1.0, None, None, 1, 0.95)}
    assert figures.decided(edges, reference="CE") == "no arm is told apart from CE"
