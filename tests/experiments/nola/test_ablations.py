"""The ablations of NOLA, whole, on a tiny decoder."""

import json

import pytest
import torch
from safetensors.torch import load_file

import cells
from limbeck import models, params, records
from limbeck.experiments.nola import ablations, arms
from limbeck.experiments.nola.ablations import SmallSoftmax
from limbeck.experiments.nola.frozen_decoder import FrozenDecoder


@pytest.fixture(scope="module")
def section():
    return params.load("nola", "ablations", "smoke", ablations.Params)


@pytest.fixture(scope="module")
def ran(section, tmp_path_factory):
    """The records of the smoke section, at rates that change something, and its folder."""
    section = cells.changed(section, log2_rates=(-4.0, -2.0), clip_norm=1e9)
    folder = tmp_path_factory.mktemp("ablations")
    return cells.run_all(ablations, section, folder, seeds=(0, 1)), folder, section


def nearest(vector, bits):
    """The nearest level of each value, by looking at all of them."""
    top = 2 ** (bits - 1) - 1
    levels = [step * max(map(abs, vector)) / top for step in range(-top, top + 1)]
    return [min(levels, key=lambda level: abs(level - value)) for value in vector]


def bench(section, folder, found=()):
    return SmallSoftmax(section.texts, cells.place(folder, "x", found))


def whole_loss(made, model, kept):
    """-log p of a target's token among the kept ones: the model whole, text by text, without any state."""
    said = []
    for pair in made.data.pairs["validation"]:
        ids = torch.tensor([[*pair.prompt, *pair.target]])
        logprobs = model(input_ids=ids).logits[0, len(pair.prompt) - 1 : -1][:, kept].log_softmax(-1)
        said += [-logprobs[at, kept.index(token)].item() for at, token in enumerate(pair.target)]
    return sum(said) / len(said)


def held(made, section, folder, point, seed):
    """A whole model with the adapter that a run of the centre left, and its numbers."""
    model = ablations._attached(point | {"seed": seed}, section, FrozenDecoder(section.texts, made.workspace))
    weights = load_file(folder / f"{point['arm']}-{seed}.safetensors")
    assert list(weights) == sorted(models.trainable(model))
    return model, weights


NOLA = {"arm": "nola", "rank": 2, "basis": 16}
LORA = {"arm": "lora_1", "rank": 1, "basis": 0}


@pytest.mark.parametrize("point", [LORA, NOLA])
def test_losses_are_those_of_whole_models_over_the_tokens_that_occur_in_targets(ran, point):
    """In full precision and, each vector at its nearest levels by enumeration, at 2 bits after training."""
    found, folder, section = ran
    made = bench(section, folder)
    model, weights = held(made, section, folder, point, 1)
    kept = sorted({token for pairs in made.data.pairs.values() for pair in pairs for token in pair.target})
    assert len(kept) < len(made.data.tokenizer)
    before = cells.pick(found, phase="before")["metrics"]["validation/loss"]
    assert whole_loss(made, model, kept) == pytest.approx(before, rel=1e-5)
    losses = []
    for change in (lambda vector: vector, lambda vector: nearest(vector, 2)):
        for name, weight in models.trainable(model).items():
            vectors = weights[name].T if "lora_B" in name else weights[name]
            rounded = torch.tensor([change(vector) for vector in vectors.tolist()])
            weight.data.copy_(rounded.T if "lora_B" in name else rounded)
        losses.append(whole_loss(made, model, kept))
    full, few = (
        cells.pick(found, phase="final", seed=1, **point)["metrics"],
        cells.pick(found, phase="bits", arm=point["arm"], mode="after", bits=2, seed=1)["metrics"],
    )
    assert [full["validation/loss"], few["validation/loss"]] == pytest.approx(losses, rel=1e-5)
    assert abs(losses[0] - before) > 1e-3, "nothing was learned"
    assert few["bits/increase"] == pytest.approx(few["validation/loss"] - full["validation/loss"], abs=1e-12)
    assert few["bits/share"] == pytest.approx(few["bits/increase"] / (before - full["validation/loss"]), rel=1e-9)


@pytest.mark.parametrize("point", [LORA, NOLA])
def test_rounded_in_training_steps_differ_from_full_precisions_the_more_the_fewer_bits(ran, point):
    found, _, section = ran
    full = cells.pick(found, phase="final", seed=0, **point)["curve"]["loss/ce"]
    gaps = []
    for bits in section.bits:
        run = cells.pick(found, phase="bits", arm=point["arm"], mode="training", bits=bits, seed=0)
        gaps.append(max(abs(one - other) for one, other in zip(run["curve"]["loss/ce"], full, strict=True)))
    assert section.bits == (8, 2)
    assert 0 < 4 * gaps[0] < gaps[1]


def test_with_all_layers_adapted_the_softmax_is_over_the_whole_vocabulary(section, tmp_path):
    whole = cells.changed(section, layers=0)
    found = ablations.cells(whole, (0, 1))
    assert found[0].coordinates == {"phase": "before", "arm": "none"}
    loss = cells.drive(ablations, whole, found[0], cells.place(tmp_path, "x")).metrics["validation/loss"]
    made = bench(whole, tmp_path)
    kept = list(range(len(made.data.tokenizer)))
    assert loss == pytest.approx(whole_loss(made, made.load(), kept), rel=1e-5)


def test_every_arm_has_the_numbers_that_its_point_says(ran):
    """Two matrices of 32 x 32."""
    found, _, section = ran
    final = [run for run in found if run["cell"]["phase"] == "final" and run["cell"]["seed"] == 0]
    counts = {tuple(run["cell"][key] for key in ("arm", "rank", "basis")): run for run in final}
    points = [("nola", 2, 16), ("nola", 1, 16), ("nola", 2, 4)]
    points += [(arm, 2, 16) for arm in ("nola_unique", "normal", "rademacher", "orthogonal")]
    expected = {("lora_1", 1, 0): 128, ("lora", 2, 0): 256} | {point: 4 * point[2] for point in points}
    assert {point: run["trainable_parameters"] for point, run in counts.items()} == expected
    assert all(run["metrics"]["adapter/bytes"] == 4 * run["trainable_parameters"] for run in final)
    curves = [json.dumps(run["curve"]) for run in final]
    assert len(set(curves)) == len(curves), "two arms took the same steps"
    for run in final:
        assert run["metrics"]["train/loss"] == run["curve"]["loss/ce"][section.loop.steps - 1]


def test_before_the_first_step_all_arms_of_a_seed_have_one_loss_and_seeds_meet_other_texts(ran):
    found, _, _ = ran
    first = {}
    for run in found:
        if run["curve"]:
            first.setdefault(run["cell"]["seed"], []).append(run["curve"]["loss/ce"][0])
    assert set(first) == {0, 1, 100}
    for losses in first.values():
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    assert len({round(losses[0], 4) for losses in first.values()}) == 3


def test_a_point_trains_at_its_methods_chosen_rate_as_the_sweep_did(ran):
    found, _, _ = ran
    for point in (LORA, NOLA):
        final = cells.pick(found, phase="final", seed=1, **point)
        swept = cells.pick(found, phase="sweep", seed=1, log2_rate=final["metrics"]["rate/log2"], **point)
        assert final["metrics"] == swept["metrics"]
        tried = [run["metrics"] for run in found if {"phase": "choice", **point}.items() <= run["cell"].items()]
        best = min(tried, key=lambda metrics: metrics["validation/loss"])
        assert final["metrics"]["rate/log2"] == best["rate/log2"]
    rates = {}
    for run in found:
        if run["cell"]["phase"] == "final":
            rates.setdefault(run["cell"]["arm"].startswith("lora"), set()).add(run["metrics"]["rate/log2"])
    assert [len(chosen) for chosen in rates.values()] == [1, 1]


@pytest.mark.parametrize(("arm", "rate"), [("lora", -9.0), ("nola_unique", -5.0)])
def test_of_equal_losses_the_smallest_rate_is_chosen_and_another_method_does_not_count(tmp_path, arm, rate):
    losses = {("lora_1", -5.0): 2.0, ("lora_1", -9.0): 1.5, ("lora_1", -7.0): 1.5, ("nola", -5.0): 1.7}
    found = [
        {"cell": {"phase": "choice", "arm": name, "log2_rate": tried}, "metrics": {"validation/loss": loss}}
        for (name, tried), loss in losses.items()
    ]
    found.append({"cell": {"phase": "sweep", "arm": "nola", "log2_rate": -1.0}, "metrics": {"validation/loss": 0.1}})
    assert ablations._chosen_rate(arm, cells.place(tmp_path, "x", found)) == rate


def test_without_the_scale_sixteen_bases_take_a_rate_that_is_four_times_smaller(ran):
    """Adam's steps do not depend on the gradient's size where nothing is clipped."""
    found, _, _ = ran
    for seed in (0, 1):
        scaled = cells.pick(found, phase="sweep", arm="nola", basis=16, log2_rate=-2.0, seed=seed)
        bare = cells.pick(found, phase="sweep", arm="nola_unscaled", basis=16, log2_rate=-4.0, seed=seed)
        assert bare["curve"]["loss/ce"] == pytest.approx(scaled["curve"]["loss/ce"], rel=1e-5)
        assert bare["metrics"]["validation/loss"] == pytest.approx(scaled["metrics"]["validation/loss"], rel=1e-5)
        other = cells.pick(found, phase="sweep", arm="nola", basis=16, log2_rate=-4.0, seed=seed)
        assert bare["curve"]["loss/ce"][1:] != pytest.approx(other["curve"]["loss/ce"][1:], rel=1e-5)


def test_arms_have_the_bases_that_they_are_named_after(section, tmp_path):
    made, kinds, keys, given = bench(section, tmp_path), {}, {}, {}
    for arm in ("nola", "nola_unique", "normal", "rademacher", "orthogonal"):
        model = ablations._attached({"arm": arm, "rank": 2, "basis": 16, "seed": 5}, section, made)
        streams = [stream for factor in arms._factors(model) for stream in factor.streams]
        kinds[arm] = {(stream.distribution, stream.seed) for stream in streams}
        keys[arm], given[arm] = len(set(streams)), len(model.base_model.bank.given)
    assert kinds == {
        "nola": {("uniform", 5)},
        "nola_unique": {("uniform", 5)},
        "normal": {("normal", 5)},
        "rademacher": {("rademacher", 5)},
        "orthogonal": {("uniform", 5)},
    }
    assert keys == dict.fromkeys(kinds, 2) | {"nola_unique": 4}
    assert given == dict.fromkeys(kinds, 0) | {"orthogonal": 2}


@pytest.mark.parametrize(
    "wanted",
    [
        {"phase": "sweep", "arm": "nola_unscaled", "basis": 4, "log2_rate": -2.0},
        {"phase": "bits", "arm": "lora_1", "mode": "training", "bits": 2},
        {"phase": "bits", "arm": "nola", "mode": "training", "bits": 2},
        {"phase": "final", "arm": "orthogonal"},
    ],
    ids=lambda wanted: wanted["arm"],
)
def test_a_killed_cell_goes_on_to_the_same_bits(ran, wanted, global_generators):
    found, folder, section = ran
    whole = cells.pick(found, seed=0, **wanted)
    (cell,) = [c for c in ablations.cells(section, (0, 1)) if c.coordinates == whole["cell"]]
    where = cells.place(folder, f"cut-{wanted['arm']}", [run for run in found if run["wave"] < cell.wave])
    assert cells.drive(ablations, section, cell, where, kill_at=2) is None
    torch.rand(7)
    before = global_generators()
    assert vars(cells.drive(ablations, section, cell, where)).items() <= whole.items()
    assert global_generators() == before


def test_labels_are_smoothed_as_the_section_says(section, tmp_path, monkeypatch):
    values, train_loss = [], FrozenDecoder.train_loss
    monkeypatch.setattr(FrozenDecoder, "train_loss", lambda *a, **kw: values.append(kw) or train_loss(*a, **kw))
    smoothed = cells.changed(section, smoothing=0.25, layers=0)
    cell = next(cell for cell in ablations.cells(smoothed, (0, 1)) if cell.coordinates["phase"] == "choice")
    cells.drive(ablations, smoothed, cell, cells.place(tmp_path, "x"))
    assert values == [{"smoothing": 0.25}]


def test_an_added_seed_and_an_added_point_change_no_other_cell(section):
    def by_name(section, seeds=(0, 1)):
        return {records.cell_name(cell.coordinates): cell for cell in ablations.cells(section, seeds)}

    one = by_name(section)
    more = cells.changed(section, ranks=(1, 2, 4), bits=(8, 3, 2), replicates=3)
    many = by_name(more, (0, 1, 2))
    assert one == {name: many[name] for name in one}
    assert len(many) > len(one)
    with pytest.raises(ValueError, match=r"received the seeds \(5,\), expected at least 2"):
        ablations.cells(section, (5,))


def test_the_claims_name_points_that_the_full_section_has():
    """And its sweep's centre is where rates are chosen."""
    section = params.load("nola", "ablations", "full", ablations.Params)
    assert {16, 64, 256, 480, 1024} == set(section.bases)
    assert {1, 8, 16} <= set(section.ranks)
    assert (section.adapters.nola_rank, section.basis, set(section.sweep_bases)) == (8, 480, {16, 480})
    assert 4 * section.basis == (576 + 576) + (576 + 192), "LoRA of rank 1 on SmolLM2's query and value"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kinds": ("cauchy",)}, "kinds must be one of uniform, normal, rademacher, orthogonal; got 'cauchy'"),
        ({"bits": (8, 5)}, "received 5 bits a coefficient"),
        ({"log2_rates": ()}, r"received log2_rates \(\), expected some to choose from"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"replicates": 0}, "replicates must be above 0, got 0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)
