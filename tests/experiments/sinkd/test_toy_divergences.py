import numpy as np
import pytest
import torch
from scipy import stats

import cells
from limbeck import params
from limbeck.experiments.runs import Workspace
from limbeck.experiments.sinkd import toy_divergences as toy


@pytest.fixture
def section():
    return params.load("sinkd", "fig_toy_divergences", "default", toy.Params)


def drive(coordinates, section, folder):
    cell = next(cell for cell in toy.cells(section, ()) if cell.coordinates == coordinates)
    steps = toy.run(cell, section, Workspace(folder, folder / "state", [], torch.device("cpu"), "auto"))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def place(arm, components=1, minor=0.3, epsilon=0.0):
    return {"arm": arm, "epsilon": epsilon, "minor_weight": minor, "components": components}


def test_the_teacher_is_the_mixture_it_is_said_to_be():
    grid = np.linspace(-10, 10, 401)
    log_weights, means = torch.tensor([0.7, 0.3]).log(), torch.tensor([-3.0, 3.0])
    found = toy.log_mixture(torch.tensor(grid, dtype=torch.float32), log_weights, means, torch.full((2,), 0.8)).exp()
    density = 0.7 * stats.norm.pdf(grid, -3, 0.8) + 0.3 * stats.norm.pdf(grid, 3, 0.8)
    np.testing.assert_allclose(found.numpy(), density / density.sum(), atol=1e-6)


def test_a_gaussian_under_kl_reaches_the_teachers_moments_from_every_start(section, tmp_path):
    """The minimiser of KL(teacher || Gaussian) has the teacher's mean -1.2 and variance 0.64 + 0.7 0.3 36."""
    result = drive(place("kl"), section, tmp_path)  # in 300 steps; the farthest start is 0.021 off
    assert result.metrics["fit/mean"] == pytest.approx([-1.2] * section.starts, abs=0.02)
    assert result.metrics["fit/deviation"] == pytest.approx([(0.64 + 0.21 * 36) ** 0.5] * section.starts, abs=0.03)


def test_the_measures_are_exact_on_a_student_that_equals_the_teacher_and_on_a_shifted_one():
    grid = torch.linspace(-10, 10, 101)
    teacher = torch.zeros(101)
    teacher[35] = teacher[65] = 0.5
    measured = toy._measure(torch.stack([teacher, teacher.roll(5)]), teacher, grid)
    assert measured["fit/wasserstein"].tolist() == pytest.approx([0.0, 1.0], abs=1e-5)
    assert measured["fit/mean"].tolist() == pytest.approx([0.0, 1.0], abs=1e-5)
    assert measured["fit/deviation"].tolist() == pytest.approx([3.0, 3.0], abs=1e-5)


def test_the_best_start_is_drawn_and_the_best_of_those_at_the_other_mode():
    students = torch.eye(4)
    drawn = toy._drawn(students, torch.tensor([3.0, 1.0, 2.0, 0.5]), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert torch.equal(drawn["student"], students[3])
    assert torch.equal(drawn["other"], students[1])
    assert "other" not in toy._drawn(students, torch.arange(4.0), torch.zeros(4))


def test_every_arm_begins_at_the_same_starts(section, tmp_path):
    still = cells.changed(section, steps=1, learning_rate=1e-30, epsilons=(0.05,), iterations=1)
    places = [place(arm, epsilon=0.05 if arm == "sinkhorn" else 0.0) for arm in toy.ARMS]
    found = [drive(where, still, tmp_path / where["arm"]).metrics for where in places]
    assert all(metrics["fit/mean"] == found[0]["fit/mean"] for metrics in found)
    assert len(set(found[0]["fit/mean"])) == section.starts
    assert toy._starts(section, 1)["mean"].abs().max() <= 8


def test_a_start_does_not_touch_another(section, tmp_path, monkeypatch):
    few = cells.changed(section, steps=20, starts=4)
    whole = drive(place("js"), few, tmp_path / "whole").metrics["fit/mean"]
    starts = toy._starts
    monkeypatch.setattr(
        toy, "_starts", lambda *args: {k: torch.nn.Parameter(v.detach()[1:].clone()) for k, v in starts(*args).items()}
    )
    assert drive(place("js"), few, tmp_path / "part").metrics["fit/mean"] == pytest.approx(whole[1:], abs=1e-5)


@pytest.mark.slow
def test_sinkhorn_runs_twice_to_the_same_bits(section, tmp_path):
    few = cells.changed(section, steps=10)
    runs = [drive(place("sinkhorn", epsilon=0.01), few, tmp_path / name) for name in "ab"]
    assert runs[0] == runs[1]
