"""A comparison of arms on models that KDRL's experiments begin with, whole, at a size of seconds."""

import json

import pytest
import torch

import cells
from experiments.kdrl.parts import SMALL, changed
from limbeck import params, records
from limbeck.experiments.kdrl import comparison, starting_models
from limbeck.experiments.kdrl.problems import Chains
from limbeck.training import grpo

SEED = 100
SHORT = {"steps": 4, "prompts": 4, "learning_rate": 0.003, "selection_seed": SEED}
ARMS = ("start", "teacher", "sft", "rejection", "grpo", "kd", "kdrl", "annealed", "kd_then_rl", "response_annealed")
SHARES = ("accuracy", "ended", "greedy")
WEIGHED = {"kdrl": "kdrl", "annealed": "kdrl", "response_annealed": "response"}  # and whose choice an arm takes


@pytest.fixture(scope="module")
def section():
    committed = params.load("kdrl", "table_main", "smoke", comparison.Params)
    return changed(committed, arms=ARMS, **SMALL, **SHORT)


@pytest.fixture(scope="module")
def ran(section, begun):
    """The records of the whole comparison at the selection's own seed, and its folder."""
    folder = begun[1].parent / "table_main"
    return cells.run_all(comparison, section, folder, (SEED,)), folder


def cell_at(section, seed=SEED, **coordinates):
    listed = comparison.cells(section, (seed,))
    (cell,) = [cell for cell in listed if coordinates.items() <= cell.coordinates.items()]
    return cell


def final(section, arm, seed=SEED):
    return cell_at(section, seed, phase="final", arm=arm)


def test_the_whole_comparison_runs_and_every_arm_has_its_own_steps(section, ran):
    runs, _ = ran
    assert len(runs) == 2 * len(section.kd_coefs) + len(ARMS)
    for run in runs:
        trained = run["cell"]["arm"] not in ("start", "teacher")
        shares = {name: value for name, value in run["metrics"].items() if name.endswith(SHARES)}
        assert all(0 <= value <= 1 for value in shares.values())
        assert ("test/accuracy" in shares and "larger/greedy" in shares) == (run["cell"]["phase"] == "final")
        assert ("validation/accuracy" in shares) == trained == bool(run["curve"])
        for name in ("validation/accuracy", "rollout/reward", "policy/entropy") if trained else ():
            assert len(run["curve"][name]) == section.loop.steps
    taken = {arm: cells.pick(runs, phase="final", arm=arm)["curve"] for arm in ARMS[2:] if arm != "kd_then_rl"}
    assert len(set(map(json.dumps, taken.values()))) == len(taken), "two arms took the same steps"
    rewards = [reward for run in runs if run["curve"] for reward in run["curve"]["rollout/reward"]]
    assert any(0 < reward < 1 for reward in rewards), "a comparison without rewards tests little"


def test_a_final_cell_at_the_selections_seed_takes_the_steps_of_the_best_cell(section, ran):
    runs, _ = ran
    tried = [run for run in runs if run["cell"]["phase"] == "selection"]
    assert {run["cell"]["arm"] for run in tried} == set(WEIGHED.values())
    for arm, chooser in WEIGHED.items():
        grid = {run["cell"]["kd_coef"]: run for run in tried if run["cell"]["arm"] == chooser}
        assert set(grid) == set(section.kd_coefs)
        best = max(sorted(grid), key=lambda coef: grid[coef]["metrics"]["validation/accuracy"])
        last = cells.pick(runs, phase="final", arm=arm)
        assert last["metrics"]["kd/coefficient"] == best
        assert (last["curve"] == grid[best]["curve"]) == (arm == chooser)
        assert last["curve"]["kd/coefficient"][0] == pytest.approx(best * (1.0 if arm == chooser else 2.5))


@pytest.mark.parametrize("best", [0, 1])
@pytest.mark.parametrize("arm", WEIGHED)
def test_an_arm_takes_the_weight_that_was_best_on_the_validation_split(section, ran, arm, best):
    runs, _ = ran
    altered = []
    for run in (run for run in runs if run["cell"]["phase"] == "selection"):
        other = run["cell"]["arm"] != WEIGHED[arm]
        score = 0.75 if (run["cell"]["kd_coef"] == section.kd_coefs[best]) != other else 0.25
        altered.append(run | {"metrics": run["metrics"] | {"validation/accuracy": score}})
    chosen = comparison.coefficient(final(section, arm).coordinates, altered)
    assert chosen == section.kd_coefs[best]


def test_of_equals_the_smallest_weight_is_taken_and_each_pair_chooses_for_itself():
    scores = {("near", 0.3): 0.5, ("near", 0.1): 0.75, ("near", 1.0): 0.75, ("far", 1.0): 1.0, ("far", 0.1): 0.0}
    runs = [
        {
            "cell": {"phase": "selection", "student": "s", "teacher": teacher, "arm": "k3", "kd_coef": coef, "seed": 9},
            "metrics": {"validation/accuracy": score},
        }
        for (teacher, coef), score in scores.items()
    ]
    coordinates = {"phase": "final", "student": "s", "arm": "k3", "seed": 0}
    assert comparison.coefficient(coordinates | {"teacher": "near"}, runs) == 0.1
    assert comparison.coefficient(coordinates | {"teacher": "far"}, runs) == 1.0
    assert comparison.coefficient(coordinates | {"teacher": "far", "kd_coef": 0.3}, runs) == 0.3
    assert comparison.coefficient(coordinates | {"teacher": "far", "arm": "kd"}, runs) == 1.0
    assert comparison.coefficient(coordinates | {"teacher": "far", "arm": "grpo"}, runs) == 0.0


def as_if(runs, seed):
    """The records, those of final cells as if they were of another seed."""
    final_at = {"phase": "final"}.items()
    return [run | {"cell": run["cell"] | {"seed": seed}} if final_at <= run["cell"].items() else run for run in runs]


class HandedError(Exception):
    """Raised with what a cell hands to the loop."""


@pytest.fixture
def handed(section, ran, monkeypatch):
    """A function of arm and seed: the run, the problems and the measurement that the loop gets."""
    runs, folder = ran

    def fit(run, _, problems, *__, measure, **___):
        raise HandedError(run, problems, measure)

    def of(arm, seed=SEED):
        with monkeypatch.context() as patched, pytest.raises(HandedError) as caught:
            patched.setattr(grpo, "fit", fit)
            cells.drive(comparison, section, final(section, arm, seed), cells.place(folder, "x", as_if(runs, seed)))
        return caught.value.args

    return of


def test_all_arms_of_a_seed_meet_the_same_prompts_from_the_same_start_and_another_seed_has_others(
    section, ran, starts, begun, handed
):
    data, seen = Chains(section.starts.chains), []
    start, teacher = (starting_models.trained(starts, data, begun[1], name) for name in ("student", "teacher"))
    for arm in ARMS[2:]:
        run, problems, _ = handed(arm)
        seen.append(problems)
        same = [torch.equal(x, y) for x, y in zip(run.policy.parameters(), start.parameters(), strict=True)]
        assert all(same), arm
        assert (run.sampler.model is run.policy) == (arm not in ("sft", "rejection"))
        assert (run.teacher is None) == (arm in ("sft", "rejection", "grpo"))
        scorer = run.sampler.model if run.teacher is None else run.teacher
        if arm != "grpo":
            for weight, expected in zip(scorer.parameters(), teacher.parameters(), strict=True):
                assert torch.equal(weight, expected)
        assert run.settings.seed == SEED
    assert all(problems == seen[0] for problems in seen)
    flat = [problem.name for step in seen[0] for problem in step]
    assert [len(step) for step in seen[0]] == [section.loop.prompts] * section.loop.steps
    assert len(set(flat)) == len(flat)
    assert set(flat) <= {example.expression for example in data.train}
    run, other, _ = handed("kdrl", SEED + 1)
    assert run.settings.seed == SEED + 1
    assert not set(flat) >= {problem.name for step in other for problem in step}


def test_a_run_is_watched_on_the_validation_split(section, handed, monkeypatch):
    run, _, measure = handed("kdrl")

    def measured(_, model, examples, *, samples, **__):
        assert model is run.policy
        expected = Chains(section.starts.chains).validation
        assert [example.expression for example in examples] == [example.expression for example in expected]
        assert samples == section.loop.validation_samples
        return {"accuracy": 0.5}

    monkeypatch.setattr(Chains, "measure", measured)
    assert measure() == {"validation/accuracy": 0.5}


def test_prompts_go_through_all_chains_before_one_comes_again(section):
    data = Chains(section.starts.chains)
    long = changed(section, steps=75, prompts=4)
    flat = [problem.name for step in comparison.step_problems(data, long.loop, 0) for problem in step]
    epochs = [flat[:120], flat[120:240]]
    assert all(len(set(epoch)) == 120 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_before_the_first_step_all_arms_have_the_same_completions_and_sft_has_the_teachers(ran):
    runs, _ = ran
    firsts = {}
    for run in (run for run in runs if run["curve"]):
        texts = {name: run["curve"][name][0] for name in run["curve"] if name.startswith("rollout/")}
        firsts.setdefault(json.dumps(texts), set()).add(run["cell"]["arm"])
    assert sorted(map(sorted, firsts.values())) == [sorted({*ARMS[4:], "response"}), ["rejection", "sft"]]


def test_kd_then_rl_takes_kds_steps_up_to_its_switch_and_then_learns_from_rewards(section, ran):
    """The scores of kd, as if its third window of four were the first without a rise."""
    runs, folder = ran
    kd = cells.pick(runs, arm="kd")
    scores = [0.125, 0.25, 0.25, 0.5]
    altered = kd | {"curve": kd["curve"] | {"validation/accuracy": scores}}
    result = cells.drive(comparison, section, final(section, "kd_then_rl"), cells.place(folder, "kd", [altered]))
    assert result.metrics["kd/switch"] == 3.0
    assert result.curve["loss/kd"] == kd["curve"]["loss/kd"][:3]
    assert len(result.curve["loss/policy"]) == 1
    assert result.curve["rollout/length"] == kd["curve"]["rollout/length"]
    assert result.curve["optimiser/gradient_norm"][:3] == kd["curve"]["optimiser/gradient_norm"][:3]
    assert result.curve["optimiser/gradient_norm"][3] != kd["curve"]["optimiser/gradient_norm"][3]


def test_a_trained_cells_summary_is_that_of_its_curve(section, ran):
    for run in (run for run in ran[0] if run["curve"]):
        assert comparison.summary(run["curve"], section.loop).items() <= run["metrics"].items()
        assert run["metrics"]["train/tokens"] == pytest.approx(sum(run["curve"]["rollout/tokens"]))


@pytest.mark.parametrize("arm", ["kdrl", "rejection", "kd_then_rl"])
def test_a_cell_run_twice_is_the_same_to_the_bit_and_another_seed_is_not(section, ran, arm, global_generators):
    runs, folder = ran
    torch.rand(11)
    before = global_generators()
    again = cells.drive(comparison, section, final(section, arm), cells.place(folder, f"twice {arm}", runs))
    assert global_generators() == before
    run = cells.pick(runs, phase="final", arm=arm)
    assert vars(again).items() <= run.items()
    other, where = final(section, arm, SEED + 1), cells.place(folder, f"other {arm}", as_if(runs, SEED + 1))
    changed = cells.drive(comparison, section, other, where)
    assert changed.curve["rollout/length"] != again.curve["rollout/length"]


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_an_interrupted_cell_goes_on_to_the_same_bits(section, ran, stop):
    """A window ends at each step, and is saved before the next."""
    runs, folder = ran
    where, cell = cells.place(folder, f"cut {stop}", runs), final(section, "kdrl")
    assert cells.drive(comparison, section, cell, where, kill_at=stop) is None
    assert where.state.is_file() == (stop > 1)
    torch.rand(7)
    assert next(comparison.run(cell, section, where))["step"] == stop
    resumed = cells.drive(comparison, section, cell, where)
    assert vars(resumed).items() <= cells.pick(runs, phase="final", arm="kdrl").items()


@pytest.mark.parametrize(("arm", "name"), [("start", "student"), ("teacher", "teacher")])
def test_start_and_teacher_are_the_models_as_they_were_left(section, ran, begun, arm, name):
    run, data = cells.pick(ran[0], phase="final", arm=arm), Chains(section.starts.chains)
    model = starting_models.trained(section.starts, data, begun[1], name)
    assert run["metrics"] == data.test_scores(model, seed=SEED, dtype=torch.float32)
    assert cells.pick(begun[0], arm=name)["metrics"]["test/greedy"] == run["metrics"]["test/greedy"]


def test_the_choice_comes_first_and_kd_then_rl_last_and_an_arm_with_its_weight_waits_for_no_choice(section):
    listed = comparison.cells(section, (0, 1))
    turns = [(cell.coordinates["phase"], cell.coordinates["arm"] == "kd_then_rl", cell.wave) for cell in listed]
    assert set(turns) == {("selection", False, 0), ("final", False, 1), ("final", True, 2)}
    assert [turn for *_, turn in turns] == sorted(turn for *_, turn in turns)
    written = ("grpo", "kdrl 0.3", "kdrl 1.0", "k3 2e-3 from base by teacher")
    alone = comparison.cells(changed(section, arms=written), (0, 1))
    assert [(c.coordinates["phase"], c.coordinates.get("kd_coef"), c.coordinates["student"]) for c in alone[:4]] == [
        ("final", None, "student"),
        ("final", 0.3, "student"),
        ("final", 1.0, "student"),
        ("final", 0.002, "base"),
    ]
    assert len(alone) == 2 * len(written)


def test_another_seed_arm_or_teacher_changes_no_cell_and_a_grid_or_a_step_all(section):
    def named(**change):
        seeds = change.pop("seeds", (0,))
        listed = comparison.cells(changed(section, **change), seeds)
        by_name = {records.cell_name(cell.coordinates): cell for cell in listed}
        assert len(by_name) == len(listed), "two cells have one record"
        return by_name

    one = named()
    for change in ({"seeds": (0, 1)}, {"arms": (*ARMS, "pre")}, {"arms": (*ARMS, "kd by base", "kdrl from base")}):
        more = named(**change)
        assert len(more) > len(one)
        assert one.items() <= more.items()
    for change in ({"steps": 5}, {"kd_coefs": (0.1, 1.0, 3.0)}, {"rates": (0.1, 0.1, 0.1)}):
        other = named(**change)
        assert not [name for name in one if one[name] == other[name]]


def committed():
    """Every section of params/kdrl.yaml that compares arms on chains."""
    sections = [(name, profile) for name, profiles in params.experiments("kdrl").items() for profile in profiles]
    return [place for place in sections if "selection_seed" in params.section("kdrl", *place)]


@pytest.mark.parametrize(("name", "profile"), committed())
def test_every_committed_comparison_has_cells_that_come_after_all_that_they_read(name, profile):
    loaded = params.load("kdrl", name, profile, comparison.Params)
    turns = {tuple(cell.coordinates.values()): cell.wave for cell in comparison.cells(loaded, (0, 1))}
    selected = {key[:4] for key in turns if key[0] == "selection"}
    for phase, *pair, arm, seed in (key for key in turns if len(key) == 5):
        if arm in WEIGHED:
            assert ("selection", *pair, WEIGHED[arm]) in selected
        assert arm != "kd_then_rl" or turns[phase, *pair, "kd", seed] < turns[phase, *pair, arm, seed]
    assert all((turn == 0) == (key[0] == "selection") for key, turn in turns.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("grpo", "kd_then_rl")}, r"received kd_then_rl among \('grpo', 'kd_then_rl'\), expected kd too"),
        ({"arms": ("kd by base", "kd_then_rl")}, r"received kd_then_rl among .* expected kd too"),
        ({"kd_coefs": ()}, "received kdrl without kd_coefs, expected its weight, or some to choose from"),
        ({"arms": ("grpo", "dpo")}, "received arm 'dpo', expected one of sft, rejection, grpo"),
        ({"arms": ("kd from pupil",)}, "models of kd from pupil must be one of teacher, base, student; got 'pupil'"),
        ({"arms": ("kd by nothing",)}, "models of kd by nothing must be one of teacher, base, student; got 'nothing'"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"prompts": 0}, "prompts must be above 0, got 0"),
        ({"validation_samples": 0}, "validation_samples must be above 0, got 0"),
        (
            {"begins": ("nothing", "nothing", "pupil")},
            "begins of student must be one of nothing, teacher",
        ),
        ({"begins": ("base", "nothing", "base")}, "begins of teacher must be one of nothing; got 'base'"),
        (
            {"rates": (0.1, 0.1)},
            r"received rates \(0.1, 0.1\), expected one for each of \('teacher', 'base'",
        ),
        ({"terse": ()}, r"received terse \(\), expected one for each of"),
        ({"start_batch": 0}, "start_batch must be above 0, got 0"),
        ({"start_steps": (1, 0, 1)}, "start_steps must be above 0, got 0"),
        ({"start_batch": 161}, r"received train_sizes \(120, 20, 20\), expected at least 161 in all"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        changed(section, **change)


def test_models_that_are_not_there_are_asked_for(section, tmp_path):
    message = r"expected the weights of student in .*, found none; run the experiment that trains it"
    with pytest.raises(ValueError, match=message):
        cells.drive(comparison, section, final(section, "grpo"), cells.place(tmp_path / "table_main", "x"))


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
    assert comparison.switch_step(coordinates, records, changed(loop, steps=45)) == step


def test_a_summary_says_where_a_run_ended_how_fast_and_how_steadily(loop):
    """Windows of 10, 10 and 5 steps."""
    assert comparison.summary(CURVE, loop) == {
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
    summary = comparison.summary(CURVE, changed(loop, target=target))
    assert (summary["train/steps_to_target"], summary["train/tokens_to_target"]) == (steps, tokens)


def test_a_run_without_gradients_or_a_teacher_has_no_peak_and_no_change(loop):
    still = {name: values for name, values in CURVE.items() if name != "kd/kept"}
    norms = {name: [0.0, 0.0, 0.0] for name in ("optimiser/gradient_norm", "optimiser/gradient_norm_max")}
    summary = comparison.summary(still | norms, loop)
    assert (summary["train/norm_peak"], summary["kd/kept_change"]) == (0.0, 0.0)


def test_the_early_score_is_the_mean_over_the_first_quarter_of_the_steps(loop):
    scores = [0.125, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0]
    norms = ("optimiser/gradient_norm", "optimiser/gradient_norm_max")
    flat = dict.fromkeys((*norms, "rollout/reward", "rollout/tokens"), [1.0] * 8)
    summary = comparison.summary({"validation/accuracy": scores, **flat}, changed(loop, steps=80))
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
    assert comparison.read_arm(written) == arm


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
        comparison.read_arm(written)
