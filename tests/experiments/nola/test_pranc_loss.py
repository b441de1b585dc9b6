"""NOLA and PRANC on a perceptron: from the first network to the second half of the digits, on the smoke section."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import cells
from limbeck import params, seeding
from limbeck.experiments.nola import budgets, pranc_loss

HIDDEN = [f"{layer}.{part}" for layer in ("first", "second") for part in ("weight", "bias")]


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "fig_pranc_loss", "smoke", pranc_loss.Params)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    """The records of the smoke section, and the folder of its first networks."""
    folder = tmp_path_factory.mktemp("pranc_loss")
    return cells.run_all(pranc_loss, section, folder), folder


def twin(state, x):
    """Logits in float64."""
    state, x = {name: tensor.double() for name, tensor in state.items()}, x.double().flatten(1)
    for name in ("first", "second"):
        x = (x @ state[f"{name}.weight"].T + state[f"{name}.bias"]).clamp(min=0)
    return x @ state["head.weight"].T + state["head.bias"]


def test_the_smoke_section_runs_one_network_a_seed_and_every_arm_by_both_criteria(ran, section):
    found, folder = ran
    bases = [run for run in found if run["cell"]["phase"] == "base"]
    assert [run["cell"]["seed"] for run in bases] == [section.shared.selection_seed, 0]
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["base_0.safetensors", "base_100.safetensors"]
    assert [run["wave"] for run in bases] == [0, 0]
    final = [run for run in found if run["cell"]["phase"] == "final"]
    assert {run["cell"]["by"] for run in final} == {"train", "validation"}
    assert len(final) == 2 * 5
    for run in final:
        assert run["metrics"]["adapter/coefficients"] == 2 * run["cell"]["budget"]
        assert run["trainable_parameters"] == 2 * run["cell"]["budget"] + 8 * 5 + 5
        assert len(run["curve"]["loss/ce"]) == section.shared.steps


def test_the_first_network_learns_the_first_half_and_leaves_its_hidden_layers(section, tmp_path, monkeypatch):
    longer = cells.changed(section, width=32, base_steps=150, base_rate=1e-2, save_every=50)
    seen, parts = [], budgets.splits
    monkeypatch.setattr(
        budgets, "splits", lambda settings, classes: seen.append(tuple(classes)) or parts(settings, classes)
    )
    cell = pranc_loss.cells(longer, (0,))[1]
    result = cells.drive(pranc_loss, longer, cell, cells.place(tmp_path, "base"))
    assert seen == [(0, 1, 2, 3, 4)]
    assert result.metrics["train/accuracy"] > 0.9
    assert set(load_file(tmp_path / "base_0.safetensors")) == set(HIDDEN)
    start = pranc_loss.perceptron(49, 32, 5, 0).state_dict()
    left = load_file(tmp_path / "base_0.safetensors")
    assert all(not torch.equal(left[name], start[name]) for name in HIDDEN)


def test_every_arm_begins_with_its_seeds_network_and_one_fresh_head_on_the_second_half(ran, section):
    found, folder = ran
    fresh = pranc_loss.perceptron(49, section.width, 5, 0).state_dict()
    state = fresh | load_file(folder / "base_0.safetensors")
    train = budgets.splits(section.shared, range(5, 10))["train"]
    rows = torch.randperm(40, generator=seeding.generator(0, "order"))[: section.shared.batch_size]
    expected = F.cross_entropy(twin(state, train.images[rows]), train.labels[rows]).item()
    first = [run["curve"]["loss/ce"][0] for run in found if run["cell"]["phase"] == "final"]
    assert first == pytest.approx([expected] * 10, rel=1e-5)
    assert not torch.equal(fresh["first.weight"], state["first.weight"])


def test_the_hidden_layers_stay_frozen_under_every_arm(ran, section, monkeypatch, tmp_path):
    _, folder = ran
    left = load_file(folder / "base_100.safetensors")
    made, build = [], pranc_loss.perceptron

    def perceptron(*args):
        made.append(build(*args))
        return made[-1]

    monkeypatch.setattr(pranc_loss, "perceptron", perceptron)
    for arm, kept in {
        "none": "weight",
        "nola": "base_layer.weight",
        "pranc": "parametrizations.weight.original",
    }.items():
        cell = next(c for c in pranc_loss.cells(section, ()) if c.wave and c.coordinates["arm"] == arm)
        where = dataclasses.replace(cells.place(tmp_path, arm), checkpoints=folder)
        cells.drive(pranc_loss, section, cell, where)
        now = made[-1].state_dict()
        assert torch.equal(now[f"first.{kept}"], left["first.weight"])
        assert torch.equal(now[f"second.{kept}"], left["second.weight"])
        assert not torch.equal(now["head.weight"], build(49, section.width, 5, 100).state_dict()["head.weight"])


def test_a_perceptron_has_the_scale_that_keeps_a_signal(global_generators):
    before = global_generators()
    state = pranc_loss.perceptron(200, 300, 5, 0).state_dict()
    assert global_generators() == before
    for name, gain in {"first": 2, "second": 2, "head": 1}.items():
        weight = state[f"{name}.weight"]
        assert weight.std() == pytest.approx((gain / weight.shape[1]) ** 0.5, rel=0.05)
    assert not state["second.bias"].any()


@pytest.mark.parametrize("index", [1, -1], ids=["base", "nola"])
def test_a_killed_cell_goes_on_to_the_same_bits(ran, section, tmp_path, index):
    found, folder = ran
    longer = cells.changed(section, steps=4, base_steps=4)
    cell = pranc_loss.cells(longer, (0,))[index]
    places = [dataclasses.replace(cells.place(tmp_path, name, found)) for name in ("whole", "cut")]
    if index == -1:
        (tmp_path / "base_0.safetensors").write_bytes((folder / "base_0.safetensors").read_bytes())
    whole = cells.drive(pranc_loss, longer, cell, places[0])
    assert cells.drive(pranc_loss, longer, cell, places[1], kill_at=3) is None
    torch.rand(7)
    assert cells.drive(pranc_loss, longer, cell, places[1]) == whole


@pytest.mark.parametrize(("name", "value"), [("width", 0), ("base_steps", 0), ("base_rate", 0.0)])
def test_a_size_of_nothing_is_refused(section, name, value):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got {value}"):
        cells.changed(section, **{name: value})
