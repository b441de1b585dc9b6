import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from torch import nn

import tree
from limbeck import paths, records
from limbeck.experiments.ledger import Ledger
from limbeck.training import resume, supervised
from limbeck.workflow import probe, reseal, trees


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """A small committed experiment in temporary folders; its records are of older code."""
    committed = records.read_by_cell(records.path("sinkd", "fig_gradient_shift", "default"))
    for constant in ("RESULTS", "DATA"):
        monkeypatch.setattr(paths, constant, tmp_path / constant.lower())
    ledger = Ledger("sinkd", "fig_gradient_shift", "default")
    records.write(ledger.file, [run | {"hash": f"old {number}"} for number, run in enumerate(committed.values())])
    return reseal.Sealed("sinkd", "fig_gradient_shift", "default", ledger, reseal.read_records(ledger))


def changed(sealed, name, **values):
    """The same with something else in one record."""
    return dataclasses.replace(sealed, records=sealed.records | {name: sealed.records[name] | values})


def first(sealed):
    return next(iter(sealed.records))


def fitted(tmp_path, fit, measured):
    """A curve of 25 steps on one number, and the state that is left."""
    weights, state = {"w": nn.Parameter(torch.zeros(1))}, tmp_path / "state.safetensors"

    def measure():
        measured.append(weights["w"].item())
        return {"validation/w": weights["w"].item()}

    steps = fit(
        weights,
        lambda rows: {"loss/square": (weights["w"] - rows).square().sum()},
        list(torch.arange(25.0)),
        learning_rate=0.1,
        clip_norm=1.0,
        state=state,
        save_every=4,
        measure=measure,
    )
    count = 0
    while True:
        try:
            next(steps)
            count += 1
        except StopIteration as stop:
            return count, stop.value, probe.content(state)


def test_a_shortened_loop_takes_its_first_steps_measures_once_and_leaves_all_moments(tmp_path):
    measured = []
    count, curve, state = fitted(tmp_path, probe.shortened(supervised.fit, 10), measured)
    assert (count, len(measured)) == (10, 1)
    assert curve["validation/w"] == measured * 7  # as many windows of 4 as 25 steps have
    assert set(state) == {"parameter/w", "exp_avg/w", "exp_avg_sq/w", "step/w"}


def test_of_a_section_only_the_samples_of_an_evaluation_are_fewer():
    @dataclasses.dataclass(frozen=True)
    class Part:
        test_samples: int
        test_size: int

    @dataclasses.dataclass(frozen=True)
    class Section:
        part: Part
        validation_samples: int
        steps: int

    assert probe.capped(Section(Part(8, 500), 4, 60)) == Section(Part(1, 500), 1, 60)


def test_a_loop_that_is_short_runs_whole(tmp_path):
    measured, whole = [], []
    short = fitted(tmp_path / "short", probe.shortened(supervised.fit, 25), measured)
    assert short == fitted(tmp_path / "whole", supervised.fit, whole)
    assert len(measured) == 7


def test_a_shortened_loop_finds_its_window_in_the_settings_of_a_run():
    @dataclasses.dataclass(frozen=True)
    class Settings:
        save_every: int

    @dataclasses.dataclass(frozen=True)
    class Run:
        settings: Settings

    def fit(run, parameters, problems, objective, *, state, measure=None):
        yield {"step": 1}
        return {"taken": [len(problems)], "window": [run.settings.save_every]}

    steps = probe.shortened(fit, 10)(Run(Settings(5)), {}, list(range(60)), None, state=None)
    next(steps)
    with pytest.raises(StopIteration) as stop:
        next(steps)
    assert stop.value.value == {"taken": [10] * 12, "window": [10] * 12}


def test_the_content_of_a_file_of_tensors_is_its_tensors_to_the_bit(tmp_path):
    low, high = tmp_path / "low.safetensors", tmp_path / "high.safetensors"
    resume.write_tensors(low, {"a": torch.ones(3), "b": torch.zeros(2, dtype=torch.bfloat16)}, {"state": "1"})
    resume.write_tensors(high, {"b": torch.zeros(2, dtype=torch.bfloat16), "a": torch.ones(3)}, {"state": "2"})
    assert probe.content(low) == probe.content(high)
    resume.write_tensors(high, {"b": -torch.zeros(2, dtype=torch.bfloat16), "a": torch.ones(3)})
    assert [name for name in "ab" if probe.content(low)[name] != probe.content(high)[name]] == ["b"]


def test_a_last_bit_a_sign_of_zero_and_a_missing_cell_are_differences():
    report = {"metrics": {"eval/x": 0.1, "eval/y": [0.0, float("nan")]}, "files": {}}
    one, same = ({"e/a": json.loads(json.dumps(report))} for _ in range(2))
    assert trees.differences(one, same) == []
    for values in ({"eval/x": 0.1 + 2e-17}, {"eval/y": [-0.0, float("nan")]}):
        other = {"e/a": report | {"metrics": report["metrics"] | values}}
        (difference,) = trees.differences(one, other)
        assert difference.startswith("e/a differs in 1: metrics eval/")
    assert "there is no such cell" in trees.differences(one, {})[0]


def test_tensors_under_other_names_are_no_difference_if_all_are_there_in_their_file_and_group():
    def report(group="exp_avg/", **tensors):
        named = {f"{group}{name}": f"torch.float32 [1] {content}" for name, content in tensors.items()}
        return {"cell": {"files": {"state": named}}}

    one = report(a=1, b=2, c=2)
    assert trees.differences(one, report(a=1, d=2, e=2)) == []
    assert trees.differences(report("", a=1, b=2), report("", a=1, c=2)) == []
    for other in (report(a=1, d=2, e=3), report(a=1, d=2), report(a=2, b=1, c=2), report(a=1, d=2, e=2, f=2)):
        assert len(trees.differences(one, other)) == 1
    assert len(trees.differences(one, report("exp_avg_sq/", a=1, b=2, c=2))) == 1


def test_a_cell_that_fails_alike_in_both_trees_is_not_equal():
    report = {"e/a": {"error": "ValueError: no data"}}
    assert "no data" in trees.differences(report, report)[0]


def test_of_each_phase_one_cell_is_compared_the_one_whose_curve_tells_most(sealed):
    names = list(sealed.records)
    assert reseal.chosen_cells(sealed) == names  # without phases: one for each arm
    alike = [dataclasses.replace(c, coordinates={"phase": "p", **c.coordinates}) for c in sealed.ledger.cells]
    sealed.ledger.cells = alike
    curves = [{}, {"loss/a": [1.0]}, {"loss/a": [1.0], "loss/b": [1.0]}, {"loss/a": [1.0], "loss/b": [1.0]}]
    parts = zip(alike, sealed.records.values(), curves, strict=True)
    held = {probe.spelled(cell.coordinates): record | {"curve": curve} for cell, record, curve in parts}
    chosen = reseal.chosen_cells(dataclasses.replace(sealed, records=held))
    assert chosen == [next(iter(held)), list(held)[2]]  # nothing to train, and the most told of what was trained


def test_a_text_that_neither_a_phase_nor_the_smoke_section_has_is_compared_too(sealed):
    cells = [
        dataclasses.replace(cell, coordinates={"phase": "p", **cell.coordinates, "model": model})
        for cell in sealed.ledger.cells
        for model in ("small", "large", "huge")
    ]
    sealed.ledger.cells = cells
    record = next(iter(sealed.records.values()))
    chosen = reseal.chosen_cells(dataclasses.replace(sealed, records=dict.fromkeys(map(spelled, cells), record)))
    assert [cells[n].coordinates["model"] for n in range(3)] == ["small", "large", "huge"]
    assert chosen == [spelled(cell) for cell in cells[:3]]


def spelled(cell):
    return probe.spelled(cell.coordinates)


def test_a_renewal_in_a_clone_without_checkpoints_makes_no_folder_of_them(sealed):
    sealed.ledger.renew({"old 0": "new"})
    assert not sealed.ledger.checkpoints.exists()
    assert [record["hash"] for record in sealed.ledger.measured().values()][:2] == ["new", "old 1"]


def test_a_cell_is_shown_the_committed_records_of_the_waves_before_its_own(tmp_path):
    ledger = Ledger("sinkd", "table_encoder", "smoke")
    cell = ledger.cells[-1]
    kept = [{"cell": dict(sorted(other.coordinates.items())), "number": n} for n, other in enumerate(ledger.cells)]
    names = {"paper": "sinkd", "experiment": "table_encoder", "profile": "smoke"}
    asked = probe.Probe({**names, "folder": str(tmp_path), "records": kept})
    shown = [record["number"] for record in asked._earlier("table_encoder", cell)]
    assert shown == [n for n, other in enumerate(ledger.cells) if other.wave < cell.wave] != []


def test_records_whose_parameters_changed_are_named_and_not_compared(sealed):
    assert reseal.changed_parameters(sealed) == []
    name = first(sealed)
    other = changed(sealed, name, params=sealed.records[name]["params"] | {"bins": 3})
    assert reseal.changed_parameters(other) == [f"{name}: its parameters changed"]


def test_a_cell_that_would_be_multiplied_in_another_dtype_than_its_record_is_named(sealed):
    name = first(sealed)
    today = {f"fig_gradient_shift/{name}": {"dtype": "float64"}}
    assert reseal.other_dtypes(sealed, today) == []
    (line,) = reseal.other_dtypes(changed(sealed, name, dtype="bfloat16"), today)
    assert line == f"{name}: bfloat16 in its record, float64 today"


def test_older_code_runs_in_float32_unless_a_record_is_of_bfloat16(sealed):
    assert reseal.requests(sealed)["smoke"]["precision"] == {"then": "float32", "today": None}
    low = reseal.requests(changed(sealed, first(sealed), dtype="bfloat16"))
    assert low["real"]["precision"] == {"then": None, "today": None}


def test_a_renewal_changes_hashes_alone_lists_them_as_settled_and_says_so_once(sealed, monkeypatch):
    monkeypatch.setattr(trees, "git", lambda *_: "now")
    settled, cells = sealed.ledger.checkpoints / "settled.json", {"smoke": ["e/a"], "real": ["e/b"]}
    records.replace_text(settled, json.dumps(["gone", "old 0", "old 1"]))
    today = {probe.spelled(cell.coordinates): sealed.ledger.hash(cell) for cell in sealed.ledger.cells}
    for _ in range(2):
        reseal._renew(sealed, "then", cells)
    renewed = reseal.read_records(sealed.ledger)
    assert renewed == {name: record | {"hash": today[name]} for name, record in sealed.records.items()}
    assert dataclasses.replace(sealed, records=renewed).renewed == {}
    assert set(json.loads(settled.read_text())) == {"gone", *list(today.values())[:2]}
    (entry,) = reseal._provenance(sealed)["resealed"]
    assert entry["records"] == "then" and entry["cells"] == cells and entry["today"] == "now"


def test_an_experiment_that_awaits_a_training_is_skipped(sealed, capsys):
    named = ["sinkd/fig_gradient_shift"]
    assert [str(one) for one in reseal._sealed(named)] == ["default/sinkd/fig_gradient_shift"]
    listed = {"default/sinkd/fig_gradient_shift": {"commit": "abc", "reason": "a fault"}}
    records.replace_text(paths.DATA / "awaiting.yaml", yaml.safe_dump(listed))
    assert list(reseal._sealed(named)) == []
    assert "awaits a training" in capsys.readouterr().out


def test_an_unknown_experiment_is_named(sealed):
    with pytest.raises(ValueError, match="sinkd/fig_gradient"):
        list(reseal._sealed(["sinkd/fig_gradient"]))


@pytest.mark.slow
def test_a_renamed_local_renews_and_a_changed_constant_is_named_and_renews_nothing(tmp_path):
    root = tree.copy(tmp_path / "copy")
    code = root / "src" / "limbeck" / "experiments" / "sinkd" / "toy_divergences.py"
    identity = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}

    def call(*command):
        environment = tree.environment(root) | identity
        return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)

    def commit():
        call("git", "add", ".")
        assert call("git", "commit", "--quiet", "--message", "step").returncode == 0

    def reseal_it():
        return call(sys.executable, "-m", "limbeck.workflow.reseal", "sinkd/fig_gradient_shift")

    commit()
    code.write_text(code.read_text().replace("student.exp(),", "torch.exp(student),"))
    refused = reseal_it()
    assert "in no commit" in refused.stderr and refused.returncode == 1
    commit()
    renewed = reseal_it()
    assert "equal, renewed" in renewed.stdout and renewed.returncode == 0, renewed
    kept = call("git", "diff", "--stat").stdout
    assert "fig_gradient_shift-train.json" in kept and "2 files changed" in kept

    commit()
    code.write_text(code.read_text().replace("HALF_WIDTH = 10.0", "HALF_WIDTH = 11.0"))
    commit()
    named = reseal_it()
    assert "arm=kl,epsilon=0.0 differs in" in named.stdout and "nothing renewed" in named.stdout, named
    assert named.returncode == 1 and call("git", "status", "--porcelain", "results").stdout == ""
    assert os.listdir(root / "data" / "resume" / "reseal")
