"""Few shots: which images are for what, each arm against a plain float64 loop, and the chain from first to final."""

import dataclasses

import pytest
import torch

import cells
from limbeck import models, params, paths
from limbeck.experiments.nola import few_shot, first_training
from limbeck.models import vision

PANEL = 0


@pytest.fixture(scope="module")
def section():
    committed = params.load("nola", "table_vision", "smoke", few_shot.Params)
    return cells.changed(
        committed,
        nola_rates=(1e-2, 1e-1),
        lora_rates=(1e-2, 1e-1),
        linear_rates=(1e-2, 1e-1),
        full_rates=(1e-4, 1e-3),
        subsets=(2,),
        epochs=(6,),
        shots=(3,),
        batch=8,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("vision")


@pytest.fixture(scope="module")
def found(section, folder):
    return cells.run_all(few_shot, section, folder, seeds=(0, 1))


def shots(section, phase, subset):
    return few_shot.shots(section, section.panels[PANEL], phase=phase, subset=subset)


def test_no_image_that_chooses_a_rate_trains_or_scores_a_final_run(section):
    chosen = [shots(section, "select", subset) for subset in range(3)]
    final = [shots(section, "final", subset) for subset in range(3)]
    reserved = {row for run in chosen for part in (run.train, run.scored) for row in part.tolist()}
    assert len(reserved) == section.reserved * 5
    for run in final:
        train, scored = set(run.train.tolist()), set(run.scored.tolist())
        assert not train & scored
        assert not reserved & (train | scored)
        assert reserved | train | scored == set(range(len(run.images))), "all other images score"
    for run in (*chosen, *final):
        assert run.images.labels[run.train].bincount().tolist() == [3] * 5
    assert len({tuple(run.train.tolist()) for run in (*chosen, *final)}) == 6


def test_new_classes_are_those_that_the_first_training_never_saw_and_elsewhere_all(section):
    whole = first_training.data("digits", 28)
    new = shots(section, "final", 0).images
    assert len(new) == int((whole.labels > 4).sum())
    first = first_training.data("digits", 28, section.first.first_classes)
    seen = {image.numpy().tobytes() for image in first.pixels}
    assert not any(image.numpy().tobytes() in seen for image in new.pixels)
    elsewhere = cells.changed(section, first_data="mnist")
    assert shots(elsewhere, "final", 0).images.classes == 10


def test_a_data_sets_own_test_part_scores_and_never_trains(section, monkeypatch):
    images = first_training.data("digits", 28)
    held = torch.arange(len(images)) % 2 == 0
    monkeypatch.setattr(first_training, "data", lambda *_: dataclasses.replace(images, held=held))
    elsewhere = cells.changed(section, first_data="mnist")
    run, choice = shots(elsewhere, "final", 0), shots(elsewhere, "select", 0)
    assert run.scored.tolist() == torch.nonzero(held).flatten().tolist()
    for rows in (run.train, choice.train, choice.scored):
        assert not held[rows].any()


def test_shifting_moves_every_image_by_its_own_steps_and_lets_black_in():
    pixels = torch.arange(1, 33, dtype=torch.float32).reshape(2, 1, 4, 4)
    shifts = torch.tensor([[1, -2], [0, 2]])
    expected = torch.zeros_like(pixels)
    for image, (down, right) in enumerate(shifts.tolist()):
        for y in range(4):
            for x in range(4):
                if 0 <= y - down < 4 and 0 <= x - right < 4:
                    expected[image, 0, y, x] = pixels[image, 0, y - down, x - right]
    assert torch.equal(first_training.shifted(pixels, shifts, 2), expected)


def test_the_first_training_sees_its_classes_but_the_held_out_part_and_leaves_all_but_the_head(section, folder, found):
    run = cells.pick(found, phase="first")
    assert run["checkpoint_files"] == ("vit-1x32x14.safetensors",)
    images = first_training.data("digits", 28, section.first.first_classes)
    seen = []
    real = vision.prepared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_training, "shifted", lambda pixels, shifts, most: seen.append((pixels, shifts)) or pixels)
        patch.setattr(vision, "prepared", lambda *args: seen.append(args[1]) or real(*args))
        cells.drive(few_shot, section, few_shot.cells(section, (0, 1))[0], cells.place(folder / "again", "first"))
    tested = {image.numpy().tobytes() for image in seen.pop()}
    trained = {image.numpy().tobytes() for part in seen if isinstance(part, tuple) for image in part[0]}
    assert len(tested) == section.first.first_held * 5
    assert not tested & trained
    assert trained < {image.numpy().tobytes() for image in images.select(torch.arange(len(images)))}
    assert {int(s) for part in seen if isinstance(part, tuple) for s in part[1].flatten()} == {-1, 0, 1}

    model, fresh = (vision.load("vit-1x32x14", classes=5, seed=3) for _ in range(2))
    first_training.restore(model, folder, "vit-1x32x14")
    same = {name for name, value in model.state_dict().items() if torch.equal(value, fresh.state_dict()[name])}
    assert same == {"classifier.weight", "classifier.bias"}


def test_weights_that_are_missing_or_of_another_model_are_refused(folder, found, tmp_path):
    model = vision.load("vit-2x32x14", classes=5, seed=0)
    with pytest.raises(ValueError, match=r"expected the weights of vit-2x32x14 in .*, found none"):
        first_training.restore(model, tmp_path, "vit-2x32x14")
    (tmp_path / "vit-2x32x14.safetensors").write_bytes((folder / "vit-1x32x14.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"vit-2x32x14.safetensors, which was written as vit-1x32x14.safetensors"):
        first_training.restore(model, tmp_path, "vit-2x32x14")


def trained_apart(section, folder, run, rate):
    """Accuracy, loss and last window's training loss of one run in float64: own loop, schedule, smoothing, scores."""
    at, few = run["cell"], shots(section, run["cell"]["phase"], run["cell"]["subset"])
    bench = few_shot.Learner(section, section.panels[PANEL], few, cells.place(folder, "apart"), at["seed"])
    vision.attach(bench.model, at["arm"], rank=section.rank, seed=at["seed"])
    model = bench.model.double()
    pixels = 2 * (few.images.pixels / 255).double() - 1
    weights, batches, losses = list(models.trainable(model).values()), bench.batches(), []
    optimiser = torch.optim.Adam(weights)
    for step, rows in enumerate(batches):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / len(batches))
        logprobs = model(pixels[rows]).logits.log_softmax(-1)
        right = logprobs[range(len(rows)), few.images.labels[rows]]
        loss = -(0.9 * right + 0.1 * logprobs.mean(-1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    with torch.no_grad():
        logprobs = model(pixels[few.scored]).logits.log_softmax(-1)
    labels = few.images.labels[few.scored]
    accuracy = (logprobs.argmax(-1) == labels).double().mean().item()
    test_loss = -logprobs[range(len(labels)), labels].mean().item()
    return accuracy, test_loss, sum(losses[-2:]) / 2  # a window has two steps


@pytest.mark.parametrize("arm", ["linear", "full", "lora_1", "nola", "nola_half"])
def test_an_arm_learns_and_scores_as_a_plain_loop_in_float64_does(section, folder, found, arm):
    run = cells.pick(found, phase="final", arm=arm, subset=1, seed=1)
    accuracy, test_loss, loss = trained_apart(section, folder, run, run["metrics"]["train/rate"])
    count = len(shots(section, "final", 1).scored)
    assert run["metrics"]["test/accuracy"] == pytest.approx(accuracy, abs=2.5 / count), "close calls"
    assert run["metrics"]["test/loss"] == pytest.approx(test_loss, rel=1e-4)
    assert run["metrics"]["train/loss"] == pytest.approx(loss, rel=1e-4)


def test_the_nearest_neighbour_is_that_of_a_loop_over_all_pairs(section, folder, found):
    few = shots(section, "final", 0)
    model = vision.load("vit-1x32x14", classes=5, seed=9)
    first_training.restore(model, folder, "vit-1x32x14")
    with torch.no_grad():
        tokens = model.double().vit(2 * (few.images.pixels / 255).double() - 1).last_hidden_state[:, 0]
    hits = []
    for row in few.scored.tolist():
        distances = [(tokens[row] - tokens[shot]).norm().item() for shot in few.train.tolist()]
        closest = few.train[distances.index(min(distances))]
        hits.append(bool(few.images.labels[closest] == few.images.labels[row]))
    runs = [cells.pick(found, phase="final", arm="nearest", subset=0, seed=seed) for seed in (0, 1)]
    for run in runs:
        assert run["metrics"]["test/accuracy"] == pytest.approx(sum(hits) / len(hits), abs=1.5 / len(hits))
        assert run["trainable_parameters"] == 0


def test_every_arm_takes_the_rate_of_the_best_validation_accuracy_and_has_as_many_to_choose_from(section, found):
    for arm in section.arms[1:]:
        tried = [run for run in found if run["cell"]["phase"] == "select" and run["cell"]["arm"] == arm]
        assert [run["cell"]["rate"] for run in tried] == list(section.rates(arm))
        best = max(tried, key=lambda r: (r["metrics"]["validation/accuracy"], -r["metrics"]["validation/loss"]))
        taken = {r["metrics"]["train/rate"] for r in found if r["cell"]["phase"] == "final" and r["cell"]["arm"] == arm}
        assert taken == {best["cell"]["rate"]}
    rates = {
        r["metrics"]["train/rate"] for r in found if r["cell"]["phase"] == "final" and "train/rate" in r["metrics"]
    }
    assert len(rates) > 1, "else the choice was not seen"


def test_a_choice_averages_over_subsets_and_breaks_a_tie_by_loss():
    at = {"phase": "final", "model": "m", "target": "t", "shots": 5, "arm": "nola"}

    def record(rate, subset, accuracy, loss, **changes):
        cell = at | {"phase": "select", "rate": rate, "subset": subset} | changes
        return {"cell": cell, "metrics": {"validation/accuracy": accuracy, "validation/loss": loss}}

    records = [
        record(0.1, 0, 0.9, 1.0),
        record(0.1, 1, 0.1, 1.0),
        record(0.2, 0, 0.6, 3.0),
        record(0.2, 1, 0.6, 3.0),
        record(0.3, 0, 0.6, 2.0),
        record(0.3, 1, 0.6, 2.0),
        record(0.4, 0, 1.0, 0.1, arm="lora_1"),
        record(0.5, 0, 1.0, 0.1, shots=10),
    ]
    assert few_shot._chosen_rate(at, dataclasses.replace(cells.place(paths.ROOT, "x"), records=records)) == 0.3


def test_a_run_that_was_left_goes_on_to_the_same_numbers(section, folder, found, global_generators):
    cell = next(
        c
        for c in few_shot.cells(section, (0, 1))
        if c.coordinates["phase"] == "final" and c.coordinates["arm"] == "nola"
    )
    where = cells.place(folder, "left", [run for run in found if run["wave"] < cell.wave])
    before = global_generators()
    assert cells.drive(few_shot, section, cell, where, kill_at=3) is None
    assert where.state.is_file()
    result = cells.drive(few_shot, section, cell, where)
    assert global_generators() == before
    assert result.metrics == cells.pick(found, **cell.coordinates)["metrics"]


def test_an_epoch_shows_each_shot_once_and_a_last_short_batch_is_dropped(section, folder, found):
    few = shots(section, "final", 0)
    bench = few_shot.Learner(section, section.panels[PANEL], few, cells.place(folder, "x"), 0)
    batches = bench.batches()
    assert [len(rows) for rows in batches] == [8] * section.epochs[0], "of 15 shots, 8 an epoch"
    assert len({tuple(rows.tolist()) for rows in batches}) == section.epochs[0], "every epoch has its own order"
    assert all(len(set(rows.tolist())) == 8 and set(rows.tolist()) <= set(few.train.tolist()) for rows in batches)
    whole = few_shot.Learner(cells.changed(section, batch=64), section.panels[PANEL], few, cells.place(folder, "x"), 0)
    assert [sorted(rows.tolist()) for rows in whole.batches()] == [sorted(few.train.tolist())] * section.epochs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shots": (5, 10)}, r"received shots \(5, 10\), expected one for each of"),
        ({"arms": ("nearest", "vera")}, "received arm 'vera', expected nearest, linear, full, lora_<r>"),
        ({"nola_rates": (0.1,)}, "expected one budget for all"),
        ({"epochs": (0,)}, "epochs must be above 0, got 0"),
        ({"batch": 0}, "batch must be above 0, got 0"),
        ({"reserved": 3}, "received reserved 3, expected more than 3 shots"),
        ({"smoothing": 1.0}, r"smoothing must lie in \[0, 1\), got 1.0"),
    ],
)
def test_a_section_that_cannot_be_run_is_refused(section, change, message):
    with pytest.raises(ValueError, match=message):
        cells.changed(section, **change)


def test_too_few_seeds_are_refused(section):
    with pytest.raises(ValueError, match=r"received the seeds \(0,\), expected at least 2"):
        few_shot.cells(section, (0,))


def test_the_models_own_training_depends_on_no_rate_or_panel(section):
    other = cells.changed(section, nola_rates=(1.0, 2.0), shots=(2,), reserved=5)
    assert few_shot.cells(section, (0, 1))[0] == few_shot.cells(other, (0, 1))[0]
