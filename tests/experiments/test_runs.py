import dataclasses

import pytest
import torch

from limbeck.experiments.runs import Cell, Result, Workspace, execute

TEACHER, FIRST, SECOND, LAST = CELLS = [
    Cell({"arm": "teacher"}, {}),
    Cell({"arm": "a", "seed": 0}, {}, turn=1),
    Cell({"arm": "a", "seed": 1}, {}, turn=1),
    Cell({"arm": "final"}, {}, turn=2),
]


def record(cell):
    return {"cell": dict(reversed(cell.coordinates.items()))}


class Steps:
    """An experiment of two steps; it tells which records each cell saw."""

    def run(self, cell, section, place):
        for step in (1, 2):
            yield {"step": step, "steps": 2}
        self.seen = [run["cell"] for run in place.records]
        return Result({"eval/value": section})


@pytest.fixture
def place(tmp_path):
    return Workspace(tmp_path, tmp_path / "state", [], torch.device("cpu"), "float32")


def run(cell, place, experiment=None, on_step=lambda step: None, threads=None):
    threads = threads or torch.get_num_threads()
    return execute(experiment or Steps(), 7.0, CELLS, cell, place, threads=threads, on_step=on_step)


def test_a_run_goes_to_its_end_and_every_step_is_told(place):
    steps = []
    assert run(TEACHER, place, on_step=steps.append).metrics == {"eval/value": 7.0}
    assert steps == [{"step": 1, "steps": 2}, {"step": 2, "steps": 2}]


@pytest.mark.parametrize(
    ("cell", "seen"), [(TEACHER, []), (FIRST, [TEACHER]), (SECOND, [TEACHER]), (LAST, [TEACHER, FIRST, SECOND])]
)
def test_a_cell_sees_the_records_of_earlier_turns_in_the_order_of_the_cells(place, cell, seen):
    foreign = {"cell": {"arm": "dropped"}}
    known = dataclasses.replace(place, records=[record(LAST), foreign, *map(record, reversed(CELLS[:3]))])
    experiment = Steps()
    run(cell, known, experiment)
    assert experiment.seen == [other.coordinates for other in seen]


def test_a_convolution_in_single_precision_is_not_computed_in_less(place, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run(TEACHER, place)
    assert not torch.backends.cudnn.allow_tf32


def test_a_run_has_the_threads_that_are_asked_for(place, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run(TEACHER, place, threads=3)
    assert asked == [3]
