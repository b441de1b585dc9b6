import dataclasses

import jaxtyping
import pytest
import torch
import yaml

from limbeck import assets, models, params, paths, records
from limbeck.experiments.cells import Place
from limbeck.experiments.sinkd import encoder
from limbeck.experiments.sinkd import table_divergences as table
from limbeck.training import supervised


@pytest.fixture
def section(tiny_bert, tiny_texts):
    """The committed default section on a tiny model and data set from folders, as a hub name would be used."""
    small = {"model": tiny_bert, "data": tiny_texts, "longest": 12, "split_sizes": (96, 24, 24), "selection_texts": 48}
    committed = params.load("sinkd", "table_divergences", "default", table.Params)
    return dataclasses.replace(
        committed, **small, batch_size=16, multiples=(1.0, 3.0), matching_batches=2, save_every=2, layers=1
    )


def drive(cell, section, tmp_path, found=()):
    place = Place(tmp_path, tmp_path / records.cell_name(cell.coordinates), list(found), torch.device("cpu"), "float32")
    steps = table.run(cell, section, place)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def run_all(section, tmp_path, seeds=(0,)):
    found = []
    for cell in table.cells(section, seeds):
        result = drive(cell, section, tmp_path, found)
        found.append({"cell": cell.coordinates, "metrics": result.metrics, "curve": result.curve})
    return found


def test_the_whole_experiment_runs_on_a_model_and_data_from_a_folder(section, tmp_path):
    found = run_all(section, tmp_path)
    assert len(found) == 1 + 6 * 2 + 7
    assert {path.name for path in tmp_path.iterdir() if path.suffix} >= {encoder.LOGITS, encoder.WEIGHTS}
    for run in found:
        assert all(0 <= value <= 1 for name, value in run["metrics"].items() if not name.startswith("loss/"))
    final = {run["cell"]["arm"]: run for run in found if run["cell"]["phase"] == "final"}
    for arm, run in final.items():
        chosen = [r for r in found if r["cell"]["phase"] == "selection" and r["cell"]["arm"] == arm]
        assert run["metrics"]["loss/weight"] in [r["metrics"]["loss/weight"] for r in chosen] or arm == "ce"
    losses = [tuple(run["curve"]["loss/ce"]) for run in final.values()]
    assert len(set(losses)) == len(table.ARMS), "two arms took the same steps"


def test_a_cell_run_twice_is_the_same_to_the_bit_whatever_the_global_generators_hold(section, tmp_path):
    teacher, *_ = cells = table.cells(section, (0, 1))
    first = drive(teacher, section, tmp_path / "a")
    torch.rand(11)
    second = drive(teacher, section, tmp_path / "b")
    assert first == second
    assert (tmp_path / "a" / encoder.LOGITS).read_bytes() == (tmp_path / "b" / encoder.LOGITS).read_bytes()
    plain = [cell for cell in cells if cell.coordinates["phase"] == "final" and cell.coordinates["arm"] == "ce"]
    zero, one = (drive(cell, section, tmp_path / "a") for cell in plain)
    (tmp_path / "a" / records.cell_name(plain[0].coordinates)).unlink()
    torch.rand(3)
    assert drive(plain[0], section, tmp_path / "a") == zero
    assert one.curve != zero.curve


def test_the_matched_weight_makes_both_gradients_equally_long(section):
    model = models.load_encoder(section.model, classes=3, seed=0)
    parameters = models.trainable(model)
    term, teacher = encoder.added_term("js", section), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))

    def pair(rows):
        logits = model(rows).logits
        return logits.logsumexp(-1).mean(), term(logits, teacher)

    batches = [torch.arange(5, 23).reshape(6, 3)]
    weight = encoder.matched_weight(parameters, pair, batches)
    ce, extra = pair(batches[0])
    norm = supervised.gradient_norm(parameters, weight * extra)
    assert norm == pytest.approx(supervised.gradient_norm(parameters, ce), rel=1e-5)


def test_the_choice_is_the_best_on_validation_and_of_equals_the_smallest_multiple():
    scores = {0.3: 0.5, 1.0: 0.7, 3.0: 0.7, 10.0: 0.6}
    found = [
        {"cell": {"phase": phase, "arm": arm, "multiple": m}, "metrics": {"validation/accuracy": score + bonus}}
        for phase, arm, bonus in (("selection", "kl", 0), ("selection", "js", 0.2))
        for m, score in scores.items()
    ]
    assert table.choose(found, "kl")["cell"] == {"phase": "selection", "arm": "kl", "multiple": 1.0}


@pytest.mark.parametrize("arm", table.ARMS[1:])
def test_a_teacher_with_another_number_of_classes_is_refused(section, arm, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the annotations would catch them first
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        encoder.added_term(arm, section)(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_seed_changes_no_other_cell_and_the_grid_only_what_was_chosen_from_it(section):
    def inputs(section, seeds):
        return {records.cell_name(c.coordinates): c.inputs for c in table.cells(section, seeds)}

    one, two = inputs(section, (0,)), inputs(section, (0, 1))
    assert one == {name: two[name] for name in one}
    wider = inputs(dataclasses.replace(section, multiples=(1.0, 3.0, 9.0)), (0,))
    assert {name for name in one if wider[name] != one[name]} == {name for name in one if "final" in name}


def test_the_checksums_of_the_assets_are_part_of_what_a_cell_depends_on():
    committed = params.load("sinkd", "table_divergences", "default", table.Params)
    manifest = yaml.safe_load((paths.DATA / "assets.yaml").read_text())
    sums = [manifest[name]["sha256"] for name in ("minilm", "multiwoz_acts")]
    assert all(cell.inputs["assets"] == sums for cell in table.cells(committed, (0,)))
    assert set(sums) == {assets.checksum(name) for name in ("minilm", "multiwoz_acts")}
