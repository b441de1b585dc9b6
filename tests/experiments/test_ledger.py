import json
import multiprocessing
import os
import signal
import sys
import time
import types
from dataclasses import dataclass

import pytest

from limbeck import digests, params, paths, records
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
    monkeypatch.setattr(digests, "experiments", lambda _: {"toy": module.__name__})
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


def lines():
    """The records as they lie in the file."""
    text = (paths.RESULTS / "default" / "p" / "toy.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_every_cell_runs_once_and_a_second_call_runs_nothing(experiment):
    ran, runs = experiment.go()
    assert ran == ALL
    assert [run["metrics"]["eval/value"] for run in runs] == [2.0, 4.0, 4.0]
    assert experiment.go() == ([], runs)
    assert runs == lines()


def test_in_a_notebook_run_by_hand_smoke_alone_is_trained_and_of_others_the_records_are_shown(
    experiment, monkeypatch, capsys
):
    runs = ledger.run("p", "toy", "default")
    experiment.ran.clear()
    experiment.rate = 3.0
    monkeypatch.setattr(paths, "by_hand", lambda: True)
    assert ledger.run("p", "toy", "default") == sorted(runs, key=lambda run: records.cell_name(run["cell"]))
    assert not experiment.ran
    assert "train.ipynb experiment=toy profile=default` trains them" in capsys.readouterr().out
    ledger.run("p", "toy", "smoke")
    assert len(experiment.ran) == 3


def test_an_added_seed_runs_alone_and_a_dropped_one_takes_its_record_along(experiment):
    experiment.go()
    experiment.seeds = (0, 1, 2)
    assert experiment.go()[0] == ["arm=a,seed=2"]
    experiment.seeds = (2,)
    ran, runs = experiment.go()
    assert ran == []
    assert [run["cell"] for run in runs] == [{"arm": "teacher"}, {"arm": "a", "seed": 2}]
    assert [line["cell"] for line in lines()] == [{"arm": "teacher"}, {"arm": "a", "seed": 2}]


def test_the_lines_lie_in_the_order_of_the_cells_whatever_ran_first(experiment):
    experiment.seeds = (3, 1)
    experiment.go()
    experiment.seeds = (3, 2, 1, 0)
    assert experiment.go()[0] == ["arm=a,seed=2", "arm=a,seed=0"]
    assert [line["cell"].get("seed") for line in lines()] == [None, 3, 2, 1, 0]
    experiment.seeds = (0, 1, 2, 3)
    assert experiment.go()[0] == []
    assert [line["cell"].get("seed") for line in lines()] == [None, 0, 1, 2, 3]


def test_until_all_is_done_the_records_that_the_parameters_no_longer_name_stay_behind_the_others(experiment):
    experiment.go()
    experiment.seeds, experiment.fail = (7, 1, 8), "arm=a,seed=8"
    with pytest.raises(KeyboardInterrupt):
        experiment.go()
    assert [line["cell"].get("seed") for line in lines()] == [None, 7, 1, 0]


def test_looking_for_stale_cells_reads_the_file_once(experiment, monkeypatch):
    experiment.seeds = tuple(range(20))
    experiment.go()
    reads = []
    read = records.read_by_cell
    monkeypatch.setattr(records, "read_by_cell", lambda file: reads.append(file) or read(file))
    assert ledger.Ledger("p", "toy", "default").stale() == []
    assert reads == [paths.RESULTS / "default" / "p" / "toy.jsonl"]


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


def test_a_record_cut_in_half_stops_everything_and_names_file_and_line(experiment):
    experiment.go()
    file = paths.RESULTS / "default" / "p" / "toy.jsonl"
    file.write_text(file.read_text()[:-30])
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"toy\.jsonl, line 3: "):
        experiment.go()
    assert experiment.ran == []
    assert file.read_bytes() == before


def in_children(count, work):
    """Run `work` in processes of their own, side by side; returns how each ended."""
    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


# Each cell is merged by two renames, of toy.jsonl and of settled.json; the kill comes just before or just after one.
@pytest.mark.parametrize(
    ("rename", "after", "recorded", "left"),
    [
        (1, False, 0, ALL),
        (1, True, 1, ALL),
        (2, False, 1, ALL),
        (2, True, 1, ALL[1:]),
        (3, False, 1, ALL[1:]),
        (3, True, 2, ALL[1:]),
        (4, True, 2, ALL[2:]),
    ],
)
def test_a_kill_at_any_moment_of_a_merge_costs_that_cell_at_most(experiment, rename, after, recorded, left):
    replace, renames = os.replace, []

    def killed():
        def replace_or_die(source, target):
            renames.append(target)
            if len(renames) == rename and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
            if len(renames) == rename:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace_or_die
        experiment.go()

    assert in_children(1, killed) == [-signal.SIGKILL]
    file = paths.RESULTS / "default" / "p" / "toy.jsonl"
    assert (len(lines()) if file.is_file() else 0) == recorded
    ran, _ = experiment.go()
    assert ran == left
    after_kill = file.read_bytes()
    file.unlink()
    assert experiment.go()[0] == ALL
    assert file.read_bytes() == after_kill, "a run that nobody kills gives the same bytes"


def test_two_processes_on_one_ledger_leave_the_bytes_of_one(experiment, tmp_path):
    experiment.seeds = tuple(range(12))
    run = experiment.run

    def slowly(cell, section, place):
        with (tmp_path / "ran").open("a") as file:
            file.write(f"{os.getpid()} {records.cell_name(cell.coordinates)}\n")
        time.sleep(0.02)
        return (yield from run(cell, section, place))

    experiment.run = slowly
    assert in_children(2, lambda: ledger.Ledger("p", "toy", "default").work()) == [0, 0]
    file = paths.RESULTS / "default" / "p" / "toy.jsonl"
    together = file.read_bytes()
    ran = [line.split() for line in (tmp_path / "ran").read_text().splitlines()]
    assert sorted(name for _, name in ran) == sorted(["arm=teacher", *(f"arm=a,seed={seed}" for seed in range(12))])
    assert len({process for process, _ in ran}) == 2
    assert experiment.go()[0] == []
    assert file.read_bytes() == together
    file.unlink()
    assert len(experiment.go()[0]) == 13
    assert file.read_bytes() == together


def test_an_unknown_experiment_is_refused(experiment):
    with pytest.raises(ValueError, match=r"received experiment 'other', expected one of p's: toy"):
        ledger.run("p", "other", "default")


def test_a_cell_that_another_process_holds_is_left_to_it(experiment):
    experiment.go()
    experiment.code = "other"
    one = ledger.Ledger("p", "toy", "default")
    lock = one.resume / f"{one.hash(one.cells[0])}.lock"
    with ledger.lock(lock, wait=False) as mine:
        assert mine
        assert not one._claim_and_run(one.cells[0])
    assert experiment.go()[0] == ALL


def test_a_helper_ends_when_the_process_that_it_helps_is_gone(experiment):
    with pytest.raises(SystemExit, match="is gone"):
        ledger.Ledger("p", "toy", "default").work(parent=-1)
    assert experiment.go()[0] == ALL


def test_an_experiment_whose_every_cell_was_run_awaits_nothing_any_more(experiment):
    paths.DATA.mkdir()
    (paths.DATA / "awaiting.yaml").write_text("default/p/toy: {commit: abc, reason: earlier code}\n")
    experiment.go()
    assert records.awaiting() == {}
    assert ledger.Ledger("p", "toy", "default").is_of_this_code()
    experiment.code = "other"
    assert not ledger.Ledger("p", "toy", "default").is_of_this_code()
