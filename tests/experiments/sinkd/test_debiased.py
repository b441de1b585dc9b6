"""The entropic bias: where the student's scale is at the loss's minimum, and the sweep's cells beside it."""

import numpy as np
import pytest
import torch

import cells
from limbeck import params, seeding
from limbeck.experiments.sinkd import debiased, sweep
from reference import transport

SCALES = (0.05, 0.5, 0.9, 1.0, 1.1, 2.0)


@pytest.fixture(scope="module")
def section():
    committed = params.load("sinkd", "fig_debiased", "smoke", debiased.Params)
    changes = {"collapse_scales": SCALES, "collapse_draws": 3, "collapse_epsilons": (0.01, 10.0)}
    return cells.changed(committed, **changes)


@pytest.fixture
def minimisers(tmp_path):
    """A function that tells the steps and the minimisers of one cell."""

    def minimisers(section, epsilon, arm):
        at = {"axis": "collapse", "value": epsilon, "arm": arm}
        (cell,) = [cell for cell in debiased.cells(section, (0,)) if cell.coordinates == at]
        where = cells.place(tmp_path, "collapse")
        found = cells.drive(debiased, section, cell, where).metrics["collapse/minimiser"]
        return list(debiased.run(cell, section, where)), found

    return minimisers


@pytest.mark.parametrize("epsilon", [0.01, 10.0])
def test_a_debiased_distance_is_smallest_where_the_student_is_the_teacher(section, epsilon, minimisers):
    assert minimisers(section, epsilon, "debiased")[1] == [1.0] * 3


def test_the_raw_distance_is_smallest_at_the_teacher_for_a_small_epsilon_and_at_the_median_for_a_large_one(
    section, minimisers
):
    steps, found = minimisers(section, 0.01, "sinkhorn")
    assert found == [1.0] * 3
    assert [(step["step"], step["steps"]) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert max(minimisers(section, 10.0, "sinkhorn")[1]) < 1.0


def test_the_minimiser_is_that_of_the_twin_on_the_same_logits(section, minimisers):
    """At an epsilon at which it lies inside the grid, and at the temperature of the section."""
    scales = tuple(step / 10 for step in range(1, 21))
    section = cells.changed(section, collapse_epsilons=(1.1,), collapse_scales=scales)
    expected = []
    for draw in range(section.collapse_draws):
        shape = section.collapse_batch, section.collapse_classes
        logits = torch.randn(shape, generator=seeding.generator(draw, "collapse"), dtype=torch.float64)
        logits *= section.collapse_deviation / section.sweep.setup.terms.temperature
        teacher, *students = ((scale * logits).softmax(-1).numpy() for scale in (1.0, *scales))
        values = [
            transport.distance(student, teacher, 1.1, section.sweep.setup.terms.iterations) for student in students
        ]
        expected.append(scales[int(np.argmin(values))])
    assert minimisers(section, 1.1, "sinkhorn")[1] == expected
    assert all(0.1 < scale < 1 for scale in expected)


def test_the_other_cells_are_those_of_the_sweep_on_the_axis_epsilon(section):
    found = debiased.cells(section, (0, 1))
    trained = [cell for cell in found if cell.coordinates["axis"] != "collapse"]
    assert trained == sweep.cells(section.sweep, (0, 1))
    assert len(found) - len(trained) == 2 * len(section.collapse_epsilons)
    arms = {cell.coordinates["arm"] for cell in trained if cell.coordinates["axis"] == "epsilon"}
    assert arms == {"ce+sinkhorn", "ce+debiased"}
    assert {cell.coordinates["axis"] for cell in trained} == {"teacher", "centre", "epsilon"}


def test_a_cell_of_the_sweep_is_run_as_the_sweep_runs_it(section, tiny_bert, tiny_texts, tmp_path):
    section = cells.changed(section, model=tiny_bert, task=tiny_texts, **cells.SMALL)
    teacher, *_, cell = sweep.cells(section.sweep, (0,))
    assert cell.coordinates == {"axis": "epsilon", "value": 10.0, "arm": "ce+debiased", "seed": 0}
    cells.drive(debiased, section, teacher, cells.place(tmp_path, "teacher"))
    ours = cells.drive(debiased, section, cell, cells.place(tmp_path, "ours"))
    theirs = cells.drive(sweep, section.sweep, cell, cells.place(tmp_path, "theirs"))
    assert ours == theirs
    assert 0 <= ours.metrics["test/score"] <= 1
