"""The comparison on convolutions, whole, on its smoke section."""

import pytest
import torch
import torch.nn.functional as F

import cells
from limbeck import params
from limbeck.experiments.nola import convolution


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "fig_convolution", "smoke", convolution.Params)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    return cells.run_all(convolution, section, tmp_path_factory.mktemp("convolution"))


def cell_of(section, **coordinates):
    found = convolution.cells(section, (0,))
    (cell,) = [cell for cell in found if coordinates.items() <= cell.coordinates.items()]
    return cell


def test_the_smoke_section_runs_and_reads_the_test_split_in_the_end_alone(ran, section):
    for run in ran:
        final = run["cell"]["phase"] == "final"
        assert ("test/accuracy" in run["metrics"]) == final
        assert len(run["curve"]["loss/ce"]) == section.shared.steps
        assert all(0 <= run["metrics"][f"{part}/accuracy"] <= 1 for part in ("train", "validation"))
        sized = run["cell"]["budget"] * 6
        assert run["metrics"]["adapter/coefficients"] == sized
        if run["cell"]["arm"] != "full":
            # scales and shifts of seven norms (2, 2, 2, 4, 4, 8, 8 channels), and a head from 8 to 10
            assert run["trainable_parameters"] == sized + 2 * 30 + 90
    rates = {run["metrics"]["selection/rate"] for run in ran if run["cell"]["phase"] == "final"}
    assert rates <= set(section.shared.rates)


def test_all_arms_of_a_seed_begin_at_the_same_loss_and_then_part(ran):
    final = [run["curve"]["loss/ce"] for run in ran if run["cell"]["phase"] == "final"]
    assert len({round(curve[0], 5) for curve in final}) == 1
    assert len({curve[1] for curve in final}) == len(final)


def test_the_first_loss_is_that_of_the_drawn_network_on_the_first_batch(ran, section):
    work = convolution.work(section, 0)
    source = convolution.budgets.seeding.generator(0, "order")
    rows = torch.randperm(80, generator=source)[: section.shared.batch_size]
    loss = F.cross_entropy(work.model.train()(work.data["train"].images[rows]), work.data["train"].labels[rows])
    assert cells.pick(ran, phase="final", arm="none")["curve"]["loss/ce"][0] == pytest.approx(loss.item(), rel=1e-6)


def test_the_frozen_kernels_stay_as_they_were_drawn(section, tmp_path, monkeypatch):
    made, build = [], convolution.work

    def work(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(convolution, "work", work)
    start = build(section, section.shared.selection_seed).model.state_dict()
    for arm in ("none", "pranc", "nola", "full"):
        budget = 4 if arm in ("pranc", "nola") else 0
        cell = cell_of(section, arm=arm, budget=budget, rate=0.1)
        cells.drive(convolution, section, cell, cells.place(tmp_path, arm))
        now = made[-1].model.state_dict()
        kept = {"nola": "base_layer.weight", "pranc": "parametrizations.weight.original"}.get(arm, "weight")
        same = [
            torch.equal(now[f"blocks.{i}.{part}.{kept}"], start[f"blocks.{i}.{part}.weight"])
            for i in range(3)
            for part in ("first", "second")
        ]
        assert same == [arm != "full"] * 6
        assert torch.equal(now["stem.weight"], start["stem.weight"]) == (arm != "full")
        assert not torch.equal(now["norm.bias"], start["norm.bias"])
        assert not torch.equal(now["head.weight"], start["head.weight"])


@pytest.mark.parametrize("arm", ["pranc", "nola"])
def test_a_killed_cell_goes_on_to_the_same_bits(section, tmp_path, arm, global_generators):
    before = global_generators()
    longer = cells.changed(section, steps=4)
    cell = cell_of(longer, arm=arm, budget=3, rate=0.1)
    whole = cells.drive(convolution, longer, cell, cells.place(tmp_path, "whole"))
    assert global_generators() == before
    assert cells.drive(convolution, longer, cell, cells.place(tmp_path, "cut"), kill_at=3) is None
    torch.rand(7)
    assert cells.drive(convolution, longer, cell, cells.place(tmp_path, "cut")) == whole
