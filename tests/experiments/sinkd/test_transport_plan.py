"""Costs and plans of a real batch, counted again by hand."""

import math

import numpy as np
import pytest

import cells
from limbeck.experiments.sinkd import distillation, transport_plan
from reference import transport

SHOWN = 9


@pytest.fixture(scope="module")
def section(tiny_bert, tiny_texts):
    return cells.section("fig_transport_plan", tiny_bert, task=tiny_texts, shown=SHOWN)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ran")
    return cells.run_all(transport_plan, section, folder), folder


@pytest.fixture(scope="module")
def shown(ran):
    """The record of the student's cell: its metrics, and the matrices of its curve."""
    run = cells.pick(ran[0], phase="plan")
    found = {name: np.array(values) for name, values in run["curve"].items() if name.startswith(("batch/", "sample/"))}
    square = {
        name: values if "label" in name else values.reshape(2 * [math.isqrt(len(values))])
        for name, values in found.items()
    }
    return run["metrics"], square


def test_the_plan_has_mass_1_and_uniform_columns(shown):
    _, found = shown
    assert found["batch/plan"].shape == (SHOWN, SHOWN)
    assert found["batch/plan"].sum() == pytest.approx(1, abs=1e-6)
    assert found["batch/plan"].sum(0) == pytest.approx(np.full(SHOWN, 1 / SHOWN), abs=1e-6)


def test_the_plan_is_the_twins_for_the_shown_cost(shown, section):
    _, found = shown
    expected = transport.plan(found["batch/cost"], section.setup.terms.epsilon, section.setup.terms.iterations) / SHOWN
    assert found["batch/plan"] == pytest.approx(expected, abs=1e-6)


def test_the_shares_of_mass_are_those_counted_by_hand(shown):
    metrics, found = shown
    labels, plan = found["batch/label"].tolist(), found["batch/plan"].tolist()
    assert labels == sorted(labels)
    assert len(set(labels)) > 1
    own = in_class = pairs = 0
    for i in range(SHOWN):
        own += plan[i][i]
        for j in range(SHOWN):
            if labels[i] == labels[j]:
                in_class += plan[i][j]
                pairs += 1
    assert metrics["plan/own"] == pytest.approx(own, abs=1e-6)
    assert metrics["plan/class"] == pytest.approx(in_class, abs=1e-6)
    assert metrics["plan/class_gain"] == pytest.approx(in_class - pairs / SHOWN**2, abs=1e-6)


def test_inside_one_sample_the_plan_moves_the_teachers_probabilities_to_the_students(shown, section, ran):
    """The sample is the one of the largest own distance, which is the L1 norm between the plan's marginals."""
    _, found = shown
    plan, cost = found["sample/plan"], found["sample/cost"]
    assert cost.tolist() == (1 - np.eye(3)).tolist()
    teacher, student = plan.sum(0), plan.sum(1)
    assert plan.sum() == pytest.approx(1, abs=1e-6)
    assert np.abs(teacher - student).sum() == pytest.approx(np.diag(found["batch/cost"]).max(), abs=1e-5)
    logits = distillation.read_outputs(cells.place(ran[1], "run"), section.task)["test"]
    answers = (logits / section.setup.terms.temperature).softmax(-1).numpy()
    assert np.abs(answers - teacher).max(1).min() < 1e-6
    expected = transport.marginal_plan(cost, teacher, student, section.setup.terms.epsilon, 2000).T
    assert plan == pytest.approx(expected, abs=1e-6)
