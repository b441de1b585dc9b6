import dataclasses

import pytest
import torch

from limbeck.experiments import runs
from limbeck.experiments.runs import Cell, Result, Workspace, execute

TEACHER, FIRST, SECOND, LAST = CELLS = [
    Cell({"arm": "teacher"}, {}),
    Cell({"arm": "a", "seed": 0}, {}, wave=1),
    Cell({"arm": "a", "seed": 1}, {}, wave=1),
    Cell({"arm": "final"}, {}, wave=2),
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


def tried(rate, seed, accuracy, loss, arm="a"):
    cell = {"arm": arm, "rate": rate, "seed": seed}
    return {"cell": cell, "metrics": {"validation/accuracy": accuracy, "validation/loss": loss}}


METRICS = ("validation/accuracy", "validation/loss")


def best(records, metrics=METRICS, highest=(True, False)):
    return runs.best(records, {"arm": "a"}, "rate", metrics, highest=highest)


def test_the_best_of_a_grid_is_that_of_the_highest_mean_over_what_else_varies():
    grid = [tried(0.1, 0, 0.9, 1.0), tried(0.1, 1, 0.1, 1.0), tried(0.2, 0, 0.6, 9.0), tried(0.2, 1, 0.5, 9.0)]
    assert best([*grid, tried(0.3, 0, 1.0, 0.0, arm="b")]) == 0.2
    assert best(grid, METRICS[1:], (False,)) == 0.1


def test_of_equals_the_next_metric_decides_and_then_the_smallest_value():
    grid = [tried(0.4, 0, 0.5, 2.0), tried(0.3, 0, 0.5, 1.0), tried(0.2, 0, 0.5, 1.0), tried(0.1, 0, 0.4, 0.0)]
    assert best(grid) == best(grid[::-1]) == 0.2
    assert best(grid, METRICS[:1], (True,)) == 0.2


def test_a_choice_from_nothing_is_refused_and_says_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no record with \{'arm': 'a'\}, expected some to choose rate from"):
        best([])


def test_a_result_counts_the_weights_and_spells_the_dtype():
    made = runs.result({"eval/x": 1.0}, weights={"a": torch.zeros(2, 3), "b": torch.zeros(4)}, dtype=torch.bfloat16)
    assert made == runs.Result({"eval/x": 1.0}, {}, 10, "bfloat16")
    assert runs.result({"eval/x": 1.0}) == runs.Result({"eval/x": 1.0})


def test_a_spelled_name_is_one_that_a_coordinate_may_hold():
    assert runs.spelled("org/model:v1.5_x-y") == "org-model-v1.5_x-y"


@pytest.mark.parametrize(("name", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_workspace_says_in_which_dtype_products_are_computed_there(tmp_path, name, expected):
    assert Workspace(tmp_path, tmp_path / "state", [], torch.device("cpu"), name).dtype is expected
