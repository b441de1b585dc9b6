"""The rank figure: algebra's numbers by hand, and the sampled ones against them."""

import dataclasses

import pytest
import torch

import cells
from limbeck import params
from limbeck.experiments.nola import rank


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "fig_rank", "smoke", rank.Params)


@pytest.mark.parametrize(
    ("arm", "r", "budget", "numbers"),  # of 12 x 12 matrices
    [
        ("nola", 1, 12, (36, 11)),
        ("nola", 4, 24, (144, 23)),
        ("nola", 2, 32, (144, 31)),
        ("nola", 1, 32, (144, 23)),  # rank 1 leaves 12 + 12 - 1
        ("pranc", 0, 24, (24, 24)),
        ("pranc", 0, 200, (144, 144)),
        ("lora", 1, 24, (144, 23)),
        ("lora", 4, 96, (144, 80)),
    ],
)
def test_the_formulas_give_the_values_known_for_twelve(arm, r, budget, numbers):
    assert rank.expected(arm, d=12, rank=r, budget=budget) == numbers


def test_the_dimension_of_the_matrices_of_a_rank_is_that_of_their_tangent_space():
    """At U V the tangent space is {X V + U Y}; its dimension by a numerical rank."""
    source = torch.Generator().manual_seed(0)
    u, v = (torch.randn(5, 2, generator=source, dtype=torch.float64) for _ in range(2))
    eye = torch.eye(10, dtype=torch.float64)
    tangent = torch.stack([(e.view(5, 2) @ v.T).flatten() for e in eye] + [(u @ e.view(2, 5)).flatten() for e in eye])
    assert torch.linalg.matrix_rank(tangent) == rank.expected("lora", d=5, rank=2, budget=20)[1] == 16


def test_what_is_sampled_is_what_algebra_says_on_every_draw(section, tmp_path):
    for cell in rank.cells(section, ()):
        result = cells.drive(rank, section, cell, cells.place(tmp_path, "x"))
        metrics, at = result.metrics, cell.coordinates
        assert result.trainable_parameters == at["budget"], at
        assert metrics["rank/span_excess"] == metrics["rank/jacobian_excess"] == [0] * section.draws
        assert metrics["rank/share"] == pytest.approx([span / 36 for span in metrics["rank/span"]])


def test_an_excess_is_what_was_measured_beyond_the_formula(section, tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "expected", lambda arm, **_: (1, 2))
    cell = rank.cells(section, ())[0]
    metrics = cells.drive(rank, section, cell, cells.place(tmp_path, "x")).metrics
    assert metrics["rank/span"] == [4] * section.draws
    assert metrics["rank/span_excess"] == [3] * section.draws
    assert metrics["rank/jacobian_excess"] == [1] * section.draws


def test_lora_has_the_numbers_of_its_rank_and_pranc_no_rank(section):
    found = [cell.coordinates for cell in rank.cells(section, ())]
    assert [at["budget"] for at in found if at["arm"] == "lora"] == [12, 24, 48]
    assert {at["rank"] for at in found if at["arm"] == "pranc"} == {0}
    assert len(found) == 3 * 2 + 2 + 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": (4, 5)}, r"budgets \(4, 5\), expected even ones"),
        ({"budgets": (0,)}, r"budgets \(0,\), expected even ones"),
        ({"ranks": (1, 0)}, "rank must be above 0, got 0"),
        ({"d": 0}, "d must be above 0, got 0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(section, **change)
