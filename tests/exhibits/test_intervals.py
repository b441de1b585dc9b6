import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from limbeck.exhibits import intervals

LEFT = [0.91, 0.88, 0.93, 0.90, 0.95, 0.89]
RIGHT = [0.90, 0.85, 0.94, 0.86, 0.91, 0.88]


def paired_interval(left, right, level=0.95):
    return intervals.mean_interval(np.subtract(left, right), level=level)


@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_mean_interval_equals_scipys_one_sample_interval(level):
    estimate = intervals.mean_interval(LEFT, level=level)
    oracle = stats.ttest_1samp(LEFT, 0).confidence_interval(level)
    assert (estimate.low, estimate.high) == pytest.approx((oracle.low, oracle.high), abs=1e-10)
    assert (estimate.mean, estimate.count, estimate.level) == (pytest.approx(np.mean(LEFT)), 6, level)


def test_the_interval_of_differences_and_the_p_value_equal_scipys_paired_test():
    estimate = paired_interval(LEFT, RIGHT, level=0.9)
    oracle = stats.ttest_rel(LEFT, RIGHT)
    bounds = oracle.confidence_interval(0.9)
    assert (estimate.low, estimate.high) == pytest.approx((bounds.low, bounds.high), abs=1e-10)
    assert intervals.paired_p_value(LEFT, RIGHT) == pytest.approx(oracle.pvalue, abs=1e-10)
    assert estimate.mean > 0


def test_the_interval_of_differences_is_of_pairs_and_not_of_two_samples():
    shuffled = RIGHT[1:] + RIGHT[:1]
    paired, broken = paired_interval(LEFT, RIGHT), paired_interval(LEFT, shuffled)
    assert paired.mean == pytest.approx(broken.mean)
    assert paired.high - paired.low < 0.6 * (broken.high - broken.low)


def test_swapping_the_sides_changes_the_sign_and_nothing_else():
    there, back = paired_interval(LEFT, RIGHT), paired_interval(RIGHT, LEFT)
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))
    assert intervals.paired_p_value(LEFT, RIGHT) == pytest.approx(intervals.paired_p_value(RIGHT, LEFT))


def test_without_spread_the_interval_has_no_width():
    estimate = intervals.mean_interval([0.1] * 3)
    assert (estimate.mean, estimate.low, estimate.high) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize(("right", "expected"), [([0.5, 1.5, 2.5], 0.0), ([1.0, 2.0, 3.0], 1.0)])
def test_without_spread_the_p_value_is_0_if_the_means_differ_and_1_if_not(right, expected):
    assert intervals.paired_p_value([1.0, 2.0, 3.0], right) == expected


def test_one_replicate_has_a_mean_and_no_interval():
    assert intervals.mean_interval([0.7]) == intervals.Estimate(0.7, None, None, 1, 0.95)
    with pytest.raises(ValueError, match="at least 2 replicates, got 1"):
        intervals.paired_p_value([0.7], [0.6])


def test_interval_covers_the_mean_as_often_as_it_says():
    # 4000 intervals at 0.9: sigma of the coverage is sqrt(0.9 * 0.1 / 4000) = 0.0047; 4 sigma allowed.
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    estimates = [intervals.mean_interval(row, level=0.9) for row in draws]
    coverage = np.mean([estimate.low <= 3.0 <= estimate.high for estimate in estimates])
    assert abs(coverage - 0.9) < 4 * 0.0047


@pytest.mark.parametrize("values", [[], [np.nan, 1.0], [np.inf], np.ones((1, 2))])
def test_values_that_have_no_mean_are_refused(values):
    with pytest.raises(ValueError, match="at least one finite value"):
        intervals.mean_interval(values)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
def test_a_level_outside_0_and_1_is_refused(level):
    with pytest.raises(ValueError, match=f"level must lie in .* got {level}"):
        intervals.mean_interval([1.0, 2.0], level=level)


def test_sides_of_different_length_are_refused():
    with pytest.raises(ValueError, match="got 2 and 1"):
        intervals.paired_p_value([1.0, 2.0], [1.0])


def test_holm_levels_of_an_example_by_hand():
    # Ascending 0.01, 0.02, 0.03, 0.04 against 0.05/4, 0.05/3, 0.05/2, 0.05/1: the first holds, 0.02 > 0.0167 fails,
    # and 0.03 and 0.04, below 0.05, must not be let in by the later, larger shares.
    levels = intervals.holm_levels([0.03, 0.01, 0.04, 0.02])
    assert levels == pytest.approx([1 - 0.05 / 3, 1 - 0.05 / 4, 1 - 0.05 / 3, 1 - 0.05 / 3])


def test_holm_levels_relax_while_every_step_rejects():
    assert intervals.holm_levels([0.001, 0.01, 0.04], alpha=0.05) == pytest.approx([1 - 0.05 / 3, 1 - 0.05 / 2, 0.95])


def test_holm_levels_of_one_claim_are_uncorrected_and_of_none_are_none():
    assert intervals.holm_levels([0.5]) == [pytest.approx(0.95)]
    assert intervals.holm_levels([]) == []


@pytest.mark.parametrize(("p_values", "alpha"), [([-0.1], 0.05), ([1.1], 0.05), ([float("nan")], 0.05), ([0.1], 0.0)])
def test_holm_refuses_what_is_no_probability(p_values, alpha):
    with pytest.raises(ValueError, match="p values in"):
        intervals.holm_levels(p_values, alpha=alpha)


def holm_rejects(p_values, alpha):
    """The textbook form: reject in ascending order while max over j <= i of (m - j) p_(j) stays at most alpha."""
    order, rejected = np.argsort(p_values, kind="stable"), [False] * len(p_values)
    for step, index in enumerate(order):
        if (len(p_values) - step) * p_values[index] > alpha:
            break
        rejected[index] = True
    return rejected


@given(st.lists(st.floats(0, 0.2), min_size=1, max_size=8))
def test_p_is_below_its_own_share_exactly_when_holm_rejects(p_values):
    shares = [1 - level for level in intervals.holm_levels(p_values)]
    if all(abs(p - share) > 1e-9 for p, share in zip(p_values, shares, strict=True)):
        assert [p < share for p, share in zip(p_values, shares, strict=True)] == holm_rejects(p_values, 0.05)


def test_intervals_at_holm_levels_exclude_0_exactly_when_holm_rejects():
    rows = np.random.default_rng(1).normal([[0.0], [0.4], [0.8], [1.2]], 1.0, size=(50, 4, 8))
    for samples in rows:
        p_values = [stats.ttest_1samp(sample, 0).pvalue for sample in samples]
        levels = intervals.holm_levels(p_values)
        estimates = [
            intervals.mean_interval(sample, level=level) for sample, level in zip(samples, levels, strict=True)
        ]
        assert [not est.low <= 0 <= est.high for est in estimates] == holm_rejects(p_values, 0.05)


def measured(scores):
    """A frame of test scores, in an order that is not that of the seeds: group -> arm -> {seed: score}."""
    rows = [
        {"task": group, "arm": arm, "seed": seed, "test/score": score}
        for group, arms in scores.items()
        for arm, seeds in arms.items()
        for seed, score in seeds.items()
    ]
    return pd.DataFrame(rows)


def test_gains_are_differences_of_the_same_seed_in_the_same_group():
    frame = measured({
        "b": {"kl": {2: 0.75, 0: 0.5, 1: 1.0}, "ce": {0: 0.25, 1: 0.5, 2: 0.125}},
        "a": {"kl": {1: 0.5, 0: 0.25, 2: 0.0}, "ce": {2: 1.0, 1: 0.25, 0: 0.25}},
    })  # fmt: skip
    gains = intervals.gains(frame, "test/score", reference="ce", by="task")
    assert gains == {
        "b": {"kl": [0.25, 0.5, 0.625]},
        "a": {"kl": [0.0, 0.25, -1.0]},
        "mean": {"kl": [0.125, 0.375, -0.1875]},
    }
    estimate = intervals.estimates(gains)["a"]["kl"]
    assert estimate == paired_interval([0.25, 0.5, 0.0], [0.25, 0.25, 1.0])


def test_gains_of_one_group_have_no_mean_and_short_sums_come_first():
    frame = measured({"a": {"ce+kl+js": {0: 0.75}, "ce": {0: 0.5}, "ce+kl": {0: 0.25}}})
    gains = intervals.gains(frame, "test/score", reference="ce", by="task")
    assert gains == {"a": {"ce+kl": [-0.25], "ce+kl+js": [0.25]}}
    assert list(gains["a"]) == ["ce+kl", "ce+kl+js"]
    assert intervals.estimates(gains)["a"]["ce+kl"] == intervals.Estimate(-0.25, None, None, 1, 0.95)


def test_gains_over_an_arm_that_was_not_measured_are_refused():
    with pytest.raises(ValueError, match="expected the reference arm 'ce' among js, kl"):
        intervals.gains(measured({"a": {"kl": {0: 1.0}, "js": {0: 0.5}}}), "test/score", reference="ce", by="task")


def test_responses_are_gains_over_the_reference_at_the_centre_which_is_a_point_of_every_axis():
    rows = [
        ("centre", 0, "ce", {0: 0.25, 1: 0.5}),
        ("centre", 0, "ce+kl", {0: 0.5, 1: 0.5}),
        ("centre", 0, "sinkhorn", {1: 1.0, 0: 0.5}),
        ("epsilon", 10.0, "sinkhorn", {1: 0.25, 0: 0.75}),
        ("epsilon", 0.01, "sinkhorn", {0: 0.25, 1: 0.5}),
        ("group", 1, "sinkhorn", {0: 1.0, 1: 1.0}),
    ]
    frame = pd.DataFrame(
        {"axis": axis, "value": value, "arm": arm, "seed": seed, "test/score": score}
        for axis, value, arm, scores in rows
        for seed, score in scores.items()
    )
    responses = intervals.responses(frame, "test/score", reference="ce", centre={"epsilon": 0.1, "group": 32, "p": 1})
    expected = {
        "epsilon": {0.01: [0.0, 0.0], 0.1: [0.25, 0.5], 10.0: [0.5, -0.25]},
        "group": {1: [0.75, 0.5], 32: [0.25, 0.5]},
    }
    assert responses == {
        axis: {"sinkhorn": {value: intervals.mean_interval(gains) for value, gains in values.items()}}
        for axis, values in expected.items()
    }
    assert {axis: list(arms["sinkhorn"]) for axis, arms in responses.items()} == {
        axis: list(values) for axis, values in expected.items()
    }, "values ascend"


def test_a_summary_has_a_row_a_group_and_metric_and_none_where_nothing_was_measured():
    frame = pd.DataFrame(
        {"arm": ["a", "a", "b"], "size": [1, 1, 2], "eval/x": [1.0, 3.0, 5.0], "eval/y": [None, None, 2.0]}
    )
    rows = intervals.summarise(frame, by=["arm", "size"], metrics=["eval/x", "eval/y"])
    assert [(row["arm"], row["size"], row["metric"], row["mean"], row["count"]) for row in rows] == [
        ("a", 1, "eval/x", 2.0, 2),
        ("b", 2, "eval/x", 5.0, 1),
        ("b", 2, "eval/y", 2.0, 1),
    ]
    expected = stats.ttest_1samp([1.0, 3.0], 0).confidence_interval()
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((expected.low, expected.high))
    json.dumps(rows)


@pytest.mark.parametrize("by", [["arm"], ["arm", "size"]])
def test_the_shown_table_keeps_the_order_of_groups_and_metrics_and_marks_gaps(by):
    frame = pd.DataFrame({"arm": ["b", "a", "a"], "size": [9, 1, 1], "eval/y": [1, 2, 4], "eval/x": [0.5, None, None]})
    table = intervals.show(intervals.summarise(frame, by=by, metrics=["eval/y", "eval/x"]))
    assert list(table.columns) == ["eval/y", "eval/x"]
    assert list(table["eval/x"]) == ["0.5", "–"]
    assert table["eval/y"].iloc[0] == "1"
    assert table["eval/y"].iloc[1].startswith("3 [-")
    assert list(table.index.get_level_values("arm")) == ["b", "a"]


@pytest.mark.parametrize("by", [["arm"], ["arm", "task"]])
def test_the_shown_table_names_arms_as_figures_do_and_nothing_else(by):
    frame = pd.DataFrame({"arm": ["ce+kl", "kdrl", "step"], "task": ["kl", "none", "kdrl"], "eval/y": [1.0, 2.0, 3.0]})
    table = intervals.show(intervals.summarise(frame, by=by, metrics=["eval/y"]))
    assert list(table.index.get_level_values("arm")) == ["CE + KL", "KDRL", "step"]
    assert len(by) == 1 or list(table.index.get_level_values("task")) == ["kl", "none", "kdrl"]
    assert list(table["eval/y"]) == ["1", "2", "3"]


def test_a_curve_has_the_mean_over_seeds_of_both_axes_window_by_window():
    rows = [
        {
            "arm": arm,
            "seed": seed,
            "window": window,
            "tokens": 10.0 * (window + 1) + seed,
            "score": window + seed + shift,
        }
        for arm, shift in (("kd", 0.0), ("grpo", 0.5))
        for seed in (0, 2)
        for window in (0, 1)
    ]
    curves = intervals.curves(pd.DataFrame(rows), "score", over="tokens")
    assert list(curves) == ["kd", "grpo"]
    assert [x for x, _ in curves["kd"]] == [11.0, 21.0]
    assert [y.mean for _, y in curves["grpo"]] == [1.5, 2.5]
    assert curves["kd"][0][1] == intervals.mean_interval([0.0, 2.0])
