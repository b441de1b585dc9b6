import json
import sys
import types
from dataclasses import dataclass

import pytest

from limbeck import definitions, digests, params, paths, records
from limbeck.experiments import ledger
from limbeck.experiments.runs import Cell, Result


@dataclass(frozen=True)
class Params:
    rate: float


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """An experiment `toy` of paper `p`: a teacher that leaves a file, then a cell a seed; it tells what it ran."""
    module = types.ModuleType("limbeck.experiments.p.toy")
    module.Params, module.ran, module.code, module.seeds, module.profile = Params, [], "code", (0, 1), "default"
    module.precision = "float32"

    def cells(section, seeds):
        inputs = {"rate": section.rate}
        return [
            Cell({"arm": "teacher"}, inputs, ("weights",)),
            *(Cell({"arm": "a", "seed": s}, inputs, wave=1) for s in seeds),
        ]

    def run(cell, section, place):
        module.ran.append(records.cell_name(cell.coordinates))
        for step in range(2):
            if module.fail == module.ran[-1]:
                place.state.parent.mkdir(parents=True, exist_ok=True)
                place.state.write_text("half")
                raise KeyboardInterrupt
            yield {"step": step + 1, "steps": 2}
        for leaf in cell.checkpoint_files:
            place.checkpoints.mkdir(parents=True, exist_ok=True)
            (place.checkpoints / leaf).write_text("weights")
        return Result({"eval/value": section.rate * (1 + len(place.records))}, {"loss/total": [1.0]}, 3)

    module.cells, module.run, module.fail = cells, run, ""
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(definitions, "module_file", lambda name: tmp_path if name == module.__name__ else None)
    monkeypatch.setattr(digests, "of_experiment", lambda *_: module.code)
    monkeypatch.setattr(params, "load", lambda *_: Params(module.rate))
    settings = params.settings()
    monkeypatch.setattr(
        params, "settings", lambda: params.Settings("default", 1, 1, settings.device, module.precision, module.seeds)
    )
    for constant in ("RESULTS", "DATA"):
        monkeypatch.setattr(paths, constant, tmp_path / constant.lower())
    module.rate = 2.0

    def go():
        module.ran.clear()
        runs = ledger.run("p", "toy", module.profile)
        return list(module.ran), runs

    module.go = go
    return module


ALL = ["arm=teacher", "arm=a,seed=0", "arm=a,seed=1"]


def test_every_cell_runs_once_and_a_second_call_runs_nothing(experiment):
    ran, runs = experiment.go()
    assert ran == ALL
    assert [run["metrics"]["eval/value"] for run in runs] == [2.0, 4.0, 4.0]
    assert experiment.go() == ([], runs)


def test_an_added_seed_runs_alone_and_a_dropped_one_takes_its_record_along(experiment):
    experiment.go()
    experiment.seeds = (0, 1, 2)
    assert experiment.go()[0] == ["arm=a,seed=2"]
    experiment.seeds = (2,)
    ran, runs = experiment.go()
    assert ran == []
    assert [run["cell"] for run in runs] == [{"arm": "teacher"}, {"arm": "a", "seed": 2}]
    assert len(list((paths.RESULTS / "default" / "p" / "toy").iterdir())) == 2


@pytest.mark.parametrize("change", [{"rate": 3.0}, {"code": "other"}, {"precision": "bfloat16"}])
def test_another_parameter_precision_or_other_code_makes_every_cell_stale(experiment, change):
    experiment.go()
    vars(experiment).update(change)
    assert experiment.go()[0] == ALL


def test_an_interrupted_experiment_goes_on_with_the_cell_that_was_cut(experiment):
    experiment.fail = "arm=a,seed=0"
    with pytest.raises(KeyboardInterrupt):
        experiment.go()
    assert list((paths.DATA / "resume").rglob("state*"))
    experiment.fail = ""
    assert experiment.go()[0] == ALL[1:]
    assert not list((paths.DATA / "resume").rglob("state*"))


def test_records_without_checkpoints_are_made_again_but_those_of_full_are_taken(experiment):
    _, runs = experiment.go()
    for file in sorted((paths.DATA / "checkpoints").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    assert experiment.go() == (ALL, runs)
    experiment.profile = "full"
    experiment.go()
    for file in (paths.DATA / "checkpoints" / "full").rglob("*"):
        if file.is_file():
            file.unlink()
    assert experiment.go()[0] == []
    experiment.seeds = (0, 1, 2)
    assert experiment.go()[0] == ["arm=teacher", "arm=a,seed=2"]


def test_a_record_cut_in_half_stops_everything_and_names_the_file(experiment):
    experiment.go()
    path = paths.RESULTS / "default" / "p" / "toy" / "arm=a,seed=1.json"
    path.write_text(path.read_text()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"seed=1\.json is not a whole record"):
        experiment.go()
    assert experiment.ran == []


def test_a_kill_between_record_and_list_leaves_the_cell_to_be_run_again(experiment):
    experiment.go()
    settled = next((paths.DATA / "checkpoints").rglob("settled.json"))
    hashes = json.loads(settled.read_text())
    last = records.read_one(paths.RESULTS / "default" / "p" / "toy" / "arm=a,seed=1.json")["hash"]
    settled.write_text(json.dumps([h for h in hashes if h != last]))
    assert experiment.go()[0] == ["arm=a,seed=1"]


def test_an_unknown_experiment_is_refused(experiment):
    with pytest.raises(ValueError, match=r"expected an experiment of p .* got 'other'"):
        ledger.run("p", "other", "default")


def test_a_cell_that_another_process_holds_is_left_to_it(experiment):
    experiment.go()
    experiment.code = "other"
    one = ledger.Ledger("p", "toy", "default")
    lock = one.resume / f"{one.hash(one.cells[0])}.lock"
    with ledger._lock(lock, wait=False) as mine:
        assert mine
        assert not one._claim_and_run(one.cells[0])
    assert experiment.go()[0] == ALL


def test_a_helper_ends_when_the_process_that_it_helps_is_gone(experiment):
    with pytest.raises(SystemExit, match="is gone"):
        ledger.Ledger("p", "toy", "default").work(parent=-1)
    assert experiment.go()[0] == ALL
