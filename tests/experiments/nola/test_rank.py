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


@pytest.mark.parametrize("r", [1, 2, 4])
@pytest.mark.parametrize("k", [3, 6, 12, 16])
def test_nola_spans_the_product_of_its_numbers_and_pranc_only_their_sum(k, r):
    d = 12
    nola = rank.reach("nola", d=d, num_basis=(k, k), r=r)
    pranc = rank.reach("pranc", d=d, num_basis=(k, k), r=r)
    assert nola.numbers == pranc.numbers == 2 * k
    assert nola.span == min(min(k, d * r) ** 2, d * d)
    assert pranc.span == pranc.jacobian == 2 * k
    assert nola.jacobian == min(2 * k - 1, r * (2 * d - r))


def test_the_values_verified_for_the_specification():
    spans = {
        k: (rank.reach("nola", d=12, num_basis=(k, k), r=2).span, rank.reach("pranc", d=12, num_basis=(k, k), r=2).span)
        for k in (6, 12, 16)
    }
    assert spans == {6: (36, 12), 12: (144, 24), 16: (144, 32)}


@pytest.mark.parametrize("r", [1, 2, 4])
def test_lora_spans_everything_and_is_locally_the_manifold_of_its_rank(r):
    reached = rank.reach("lora", d=8, num_basis=(1, 1), r=r)
    assert (reached.numbers, reached.span, reached.jacobian) == (16 * r, 64, r * (16 - r))


def test_unequal_counts_and_another_seed():
    assert rank.reach("nola", d=6, num_basis=(2, 5), r=2, seed=1).span == 10
    assert rank.reach("nola", d=6, num_basis=(2, 5), r=2, seed=1).jacobian == 6
    assert rank.reach("nola", d=6, num_basis=(9, 1), r=1).span == 6  # k beyond d r is wasted


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="method must be one of nola, pranc, lora; got 'vera'"):
        rank.reach("vera", d=2, num_basis=(1, 1), r=1)
    with pytest.raises(ValueError, match="k must be above 0, got 0"):
        rank.reach("nola", d=2, num_basis=(0, 1), r=1)
