import pytest

from limbeck.experiments.kdrl import curves

CURVE = {
    "validation/accuracy": [0.25, 0.75, 0.5],
    "optimiser/gradient_norm": [1.0, 6.0, 2.0],
    "optimiser/gradient_norm_max": [50.0, 7.0, 8.0],
    "rollout/reward": [0.25, 0.875, 0.5],
    "rollout/tokens": [100.0, 200.0, 300.0],
    "kd/kept": [1.0, 0.25, 0.5],
}
SIZE = {"steps": 25, "window": 10, "target": 0.6}


def test_windows_end_every_so_many_steps_and_the_last_at_the_last_step():
    assert curves.ends(25, 10) == [10, 20, 25]
    assert curves.ends(20, 10) == [10, 20]
    assert curves.ends(4, 10) == [4]


@pytest.mark.parametrize(
    ("scores", "window"),
    [
        ([0.1, 0.2, 0.3, 0.3, 0.9], 3),
        ([0.5, 0.4, 0.6, 0.7, 0.8], 1),
        ([0.1, 0.5, 0.2, 0.3, 0.6], 2),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 4),
        ([0.1, 0.2, 0.3, 0.4, 0.4], 4),
        ([0.1], 0),
    ],
)
def test_a_curve_stops_where_it_is_first_not_above_its_best(scores, window):
    assert curves.stopped(scores) == window


def test_a_summary_says_where_a_run_ended_how_fast_and_how_steadily():
    """Windows of 10, 10 and 5 steps."""
    assert curves.summary(CURVE, **SIZE) == {
        "validation/accuracy": 0.5,
        "validation/early": 0.25,
        "validation/best": 0.75,
        "train/tokens": 4500.0,
        "train/steps_to_target": 20.0,
        "train/tokens_to_target": 3000.0,
        "train/reward_drop": 0.375,
        "train/norm_peak": 4.0,
        "kd/kept_change": -0.5,
    }


@pytest.mark.parametrize(
    ("target", "steps", "tokens"), [(0.8, 25.0, 4500.0), (0.25, 10.0, 1000.0), (0.75, 20.0, 3000.0)]
)
def test_a_target_is_reached_at_its_score_and_one_that_is_not_counts_as_all_steps(target, steps, tokens):
    found = curves.summary(CURVE, **SIZE | {"target": target})
    assert (found["train/steps_to_target"], found["train/tokens_to_target"]) == (steps, tokens)


def test_a_run_without_gradients_or_a_teacher_has_no_peak_and_no_change():
    still = {name: values for name, values in CURVE.items() if name != "kd/kept"}
    norms = {name: [0.0, 0.0, 0.0] for name in ("optimiser/gradient_norm", "optimiser/gradient_norm_max")}
    found = curves.summary(still | norms, **SIZE)
    assert (found["train/norm_peak"], found["kd/kept_change"]) == (0.0, 0.0)


def test_the_early_score_is_the_mean_over_the_first_quarter_of_the_steps():
    scores = [0.125, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    norms = ("optimiser/gradient_norm", "optimiser/gradient_norm_max")
    flat = dict.fromkeys((*norms, "rollout/reward", "rollout/tokens"), [1.0] * 8)
    found = curves.summary({"validation/accuracy": scores, **flat}, steps=80, window=10, target=0.6)
    assert found["validation/early"] == 0.1875
