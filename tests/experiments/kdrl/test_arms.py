"""How arms are written, and what is read off their curves."""

import pytest

from experiments.kdrl.parts import changed
from limbeck import params
from limbeck.experiments.kdrl import arms, comparison

CURVE = {
    "validation/accuracy": [0.25, 0.75, 0.5],
    "optimiser/gradient_norm": [1.0, 6.0, 2.0],
    "optimiser/gradient_norm_max": [50.0, 7.0, 8.0],
    "rollout/reward": [0.25, 0.875, 0.5],
    "rollout/tokens": [100.0, 200.0, 300.0],
    "kd/kept": [1.0, 0.25, 0.5],
}


@pytest.fixture(scope="module")
def loop():
    """One of 25 steps, with a window every 10."""
    committed = params.load("kdrl", "table_main", "smoke", comparison.Params).loop
    return changed(committed, steps=25, save_every=10, target=0.6)


def test_windows_end_every_so_many_steps_and_the_last_at_the_last_step(loop):
    assert loop.window_ends == [10, 20, 25]
    assert changed(loop, steps=20).window_ends == [10, 20]
    assert changed(loop, steps=4).window_ends == [4]


@pytest.mark.parametrize(
    ("scores", "step"),
    [
        ([0.1, 0.2, 0.3, 0.3, 0.9], 40),
        ([0.5, 0.4, 0.6, 0.7, 0.8], 20),
        ([0.1, 0.5, 0.2, 0.3, 0.6], 30),
        ([0.1, 0.2, 0.3, 0.4, 0.5], 45),
        ([0.1, 0.2, 0.3, 0.4, 0.4], 45),
        ([0.1], 10),
    ],
)
def test_the_switch_ends_the_first_window_of_kd_that_is_not_above_its_best(loop, scores, step):
    """Windows of 10 steps, of at most 45, of kd at the same other coordinates."""
    coordinates = {"phase": "final", "student": "s", "teacher": "t", "arm": "kd_then_rl", "seed": 3}
    others = ({"seed": 4}, {"teacher": "u"}, {"student": "v"}, {"arm": "kdrl"})
    records = [
        {"cell": coordinates | {"arm": "kd"} | change, "curve": {"validation/accuracy": values}}
        for change, values in [*((other, [0.9, 0.1, 0.1]) for other in others), ({}, scores)]
    ]
    assert arms.switch_step(coordinates, records, changed(loop, steps=45)) == step


def test_a_summary_says_where_a_run_ended_how_fast_and_how_steadily(loop):
    """Windows of 10, 10 and 5 steps."""
    assert arms.summary(CURVE, loop) == {
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
def test_a_target_is_reached_at_its_score_and_one_that_is_not_counts_as_all_steps(loop, target, steps, tokens):
    summary = arms.summary(CURVE, changed(loop, target=target))
    assert (summary["train/steps_to_target"], summary["train/tokens_to_target"]) == (steps, tokens)


def test_a_run_without_gradients_or_a_teacher_has_no_peak_and_no_change(loop):
    still = {name: values for name, values in CURVE.items() if name != "kd/kept"}
    norms = {name: [0.0, 0.0, 0.0] for name in ("optimiser/gradient_norm", "optimiser/gradient_norm_max")}
    summary = arms.summary(still | norms, loop)
    assert (summary["train/norm_peak"], summary["kd/kept_change"]) == (0.0, 0.0)


def test_the_early_score_is_the_mean_over_the_first_quarter_of_the_steps(loop):
    scores = [0.125, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    norms = ("optimiser/gradient_norm", "optimiser/gradient_norm_max")
    flat = dict.fromkeys((*norms, "rollout/reward", "rollout/tokens"), [1.0] * 8)
    summary = arms.summary({"validation/accuracy": scores, **flat}, changed(loop, steps=80))
    assert summary["validation/early"] == 0.1875


@pytest.mark.parametrize(
    ("written", "arm"),
    [
        ("grpo", ("student", "teacher", "grpo", None)),
        ("kdrl 0.3", ("student", "teacher", "kdrl", 0.3)),
        ("kdrl 2e-3 from weak by terse", ("weak", "terse", "kdrl", 0.002)),
        ("kd by terse", ("student", "terse", "kd", None)),
        ("start from weak", ("weak", "teacher", "start", None)),
        ("raw_student_4 1", ("student", "teacher", "raw_student_4", 1.0)),
    ],
)
def test_an_arm_is_read_as_it_is_written(written, arm):
    assert arms.read(written) == arm


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "received arm '', expected `method`"),
        ("kdrl by terse from weak", "received arm 'kdrl by terse from weak', expected `method`"),
        ("kdrl from", "received arm 'kdrl from', expected `method`"),
        ("dpo", "received arm 'dpo', expected one of sft, rejection, grpo"),
        ("kd 0.3", "received arm 'kd 0.3', expected no weight: nothing is weighed in it"),
        ("start 0.3", "received arm 'start 0.3', expected no weight"),
        ("kd_then_rl 0.3", "received arm 'kd_then_rl 0.3', expected no weight"),
    ],
)
def test_an_arm_that_is_written_otherwise_is_refused(written, message):
    with pytest.raises(ValueError, match=message):
        arms.read(written)
