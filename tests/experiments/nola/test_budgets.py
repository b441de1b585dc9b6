"""What the comparisons at equal budgets share: splits, selection, and what trains in which arm."""

import pytest
import torch

import cells
from limbeck import params
from limbeck.experiments.nola import budgets, convolution
from limbeck.experiments.runs import Cell
from limbeck.tasks.images import Images


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "fig_convolution", "smoke", convolution.Params)


def attached(section, arm, budget=4, seed=0):
    work = convolution.work(section, seed)
    return work, budgets.attach(section.shared, work, arm, budget, seed=seed)


def test_parts_are_other_images_of_the_classes_and_the_same_for_all_seeds(section, monkeypatch):
    numbers = torch.arange(60, dtype=torch.uint8)
    images = Images(numbers[:, None, None, None].repeat(1, 1, 4, 4), torch.arange(60) % 5, numbers >= 50)
    monkeypatch.setattr(budgets, "_loaded", lambda name: images)
    small = cells.changed(section, train_size=4, validation_size=3, test_size=2, pool=2)
    made = budgets.splits(small.shared, (3, 1))
    rows = {name: (part.images[:, 0, 0, 0] * 255).round().int().tolist() for name, part in made.items()}
    assert {name: len(found) for name, found in rows.items()} == {"train": 8, "validation": 6, "test": 4}
    assert len({row for found in rows.values() for row in found}) == 18, "an image lies in two parts"
    for name, part in made.items():
        assert [(3, 1)[label] for label in part.labels.tolist()] == [row % 5 for row in rows[name]]
        assert part.images.shape[1:] == (1, 2, 2)
    assert max(max(found) for found in rows.values()) < 50, "held images are not drawn"
    again = budgets.splits(small.shared, (3, 1))
    assert all(torch.equal(made[name].images, again[name].images) for name in made)


def record(arm, budget, rate, train, validation):
    cell = {"phase": "selection", "arm": arm, "budget": budget, "rate": rate, "seed": 100}
    return {"cell": cell, "metrics": {"train/loss": train, "validation/loss": validation}}


@pytest.mark.parametrize(("by", "rate"), [("validation", 0.1), ("train", 0.3)])
def test_the_rate_is_the_arms_own_best_by_its_criterion(by, rate):
    found = [record("nola", 4, 0.2, 0.5, 0.4), record("nola", 4, 0.1, 0.5, 0.4), record("nola", 4, 0.3, 0.1, 0.9)]
    found += [record("nola", 3, 0.7, 0.0, 0.0), record("pranc", 4, 0.8, 0.0, 0.0)]
    final = Cell({"phase": "final", "arm": "nola", "budget": 4, "by": by, "seed": 0}, {})
    assert budgets.rate_of(final, found) == rate
    assert budgets.rate_of(Cell(found[0]["cell"], {}), found) == 0.2


@pytest.mark.parametrize("arm", ["pranc", "nola"])
@pytest.mark.parametrize("budget", [3, 4])
def test_coefficients_are_the_budget_a_matrix_and_leave_the_start_as_it_is(section, arm, budget):
    work, parameters = attached(section, arm, budget)
    adapted = {name: p.numel() for name, p in parameters.items() if not work.free(name)}
    assert sum(adapted.values()) == budget * 6
    x = work.data["train"].images
    base = convolution.work(section, 0).model
    assert torch.equal(work.model.eval()(x), base.eval()(x)), "an update that is 0 must add nothing"


def test_only_the_arms_parameters_and_the_free_ones_train(section):
    names = {arm: set(attached(section, arm)[1]) for arm in budgets.ARMS}
    whole = dict(convolution.work(section, 0).model.named_parameters())
    free = {name for name in whole if "norm" in name or name.startswith("head")}
    assert names["none"] == free
    assert names["full"] == set(whole)
    for arm, part in {"nola": "nola_coefficients", "pranc": "parametrizations.weight.0.coefficients"}.items():
        rest = names[arm] - {name for name in names[arm] if part in name}
        assert rest == free
        assert len(names[arm] - rest) == 6 * (2 if arm == "nola" else 1)


def deltas(section, arm, seed=0):
    """Delta W of two layers of one shape, all coefficients at 1."""
    work, parameters = attached(section, arm, seed=seed)
    for name, parameter in parameters.items():
        if not work.free(name):
            parameter.data.fill_(1.0)
    layers = [work.model.get_submodule(f"blocks.0.{name}") for name in ("first", "second")]
    if arm == "nola":
        return [layer.get_delta_weight("default").detach() for layer in layers]
    return [(layer.weight - layer.parametrizations.weight.original).detach() for layer in layers]


@pytest.mark.parametrize("arm", ["pranc", "nola"])
def test_updates_have_their_scale_and_bases_of_their_own_by_layer_and_seed(section, arm):
    first, second = deltas(section, arm)
    larger = {f"{arm}_scale": 3 * getattr(section.shared, f"{arm}_scale")}
    torch.testing.assert_close(deltas(cells.changed(section, **larger), arm)[0], 3 * first)
    assert not torch.allclose(first, second)
    assert not torch.allclose(first, deltas(section, arm, seed=1)[0])


def test_cells_come_in_two_turns_and_an_added_seed_changes_none(section):
    one, two = budgets.cells(section, (5,), first=1), budgets.cells(section, (5, 6), first=1)
    assert [cell for cell in two if cell.coordinates["seed"] != 6] == one
    tried, final = ([cell for cell in one if cell.coordinates["phase"] == phase] for phase in ("selection", "final"))
    assert {cell.wave for cell in tried} == {1}
    assert {cell.wave for cell in final} == {2}
    assert len(tried) == 6 * len(section.shared.rates)
    assert len(final) == 6
    more = cells.changed(section, rates=(*section.shared.rates, 0.5))
    assert [cell for cell in budgets.cells(more, (5,), first=1) if cell in final] == [], "a rate was added unseen"
    assert [cell for cell in budgets.cells(more, (5,), first=1) if cell in tried] == tried


def test_the_digits_that_are_read_are_part_of_what_a_cell_depends_on():
    whole = params.load("nola", "fig_convolution", "full", convolution.Params)
    assert all(len(cell.inputs["assets"]) == 1 for cell in convolution.cells(whole, range(5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("nola", "lora")}, "arm must be one of none, pranc, nola, full; got 'lora'"),
        ({"rates": (0.1, 0.0)}, "rate must be above 0, got 0.0"),
        ({"criteria": ("test",)}, "criterion must be one of train, validation; got 'test'"),
        ({"budgets": (1, 4)}, r"budgets \(1, 4\), expected at least 2 each"),
        ({"width": 0}, "width must be above 0, got 0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)
