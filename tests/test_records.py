import errno
import json
import math
import os
import subprocess

import pandas as pd
import pytest

from limbeck import paths, records


def record(**changes):
    base = {
        "paper": "sinkd",
        "experiment": "table_encoder",
        "cell": {"arm": "kl", "seed": 0},
        "profile": "default",
        "hash": "9f2c",
        "params": {"rate": 1e-3, "layers": (2, 4), "warmup": None},
        "metrics": {"eval/accuracy": 0.75},
        "curve": {"loss/kl": [1.5, 0.5]},
        "trainable_parameters": 12,
        "dtype": "float32",
    }
    return base | changes


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    return tmp_path


def store(*runs):
    """Write the records of one experiment where it has its own; returns the file."""
    file = records.path(runs[0]["paper"], runs[0]["experiment"], runs[0]["profile"])
    records.write(file, runs)
    return file


def of_seeds(*seeds, **changes):
    return [record(cell={"arm": "kl", "seed": seed}, **changes) for seed in seeds]


def test_cell_name_keeps_the_order_of_the_coordinates():
    assert records.cell_name({"arm": "kl", "seed": 0, "epsilon": 0.1}) == "arm=kl,seed=0,epsilon=0.1"


def test_cell_name_keeps_the_sum_that_an_arm_may_be():
    assert records.cell_name({"arm": "ce+kl", "student": "first-2"}) == "arm=ce+kl,student=first-2"


@pytest.mark.parametrize(
    "cell", [{}, {"arm": "a/b"}, {"arm": "a,seed=1"}, {"arm": ""}, {"a b": 1}, {"arm": "é"}, {"x": math.nan, "y": None}]
)
def test_cell_name_refuses_what_it_cannot_tell_apart(cell):
    with pytest.raises(ValueError, match="coordinate"):
        records.cell_name(cell)


def test_a_file_has_a_line_of_sorted_json_for_each_record_in_the_order_given(results):
    file = store(*of_seeds(2, 0, 1))
    text = file.read_text()
    assert text.endswith("}\n")
    lines = text.removesuffix("\n").split("\n")
    assert [json.loads(line)["cell"]["seed"] for line in lines] == [2, 0, 1]
    assert all(list(json.loads(line)) == sorted(record()) for line in lines)
    assert all(json.dumps(json.loads(line), sort_keys=True) == line for line in lines)
    assert list(results.rglob("*.*")) == [file]


def test_the_coordinates_of_a_cell_keep_their_order_and_all_other_keys_are_sorted(results):
    file = store(record(cell={"phase": "final", "arm": "kl"}, params={"b": {"d": 1, "c": 2}, "a": 3}))
    assert file.read_text().startswith('{"cell": {"phase": "final", "arm": "kl"}, "curve": {"loss/kl": [1.5, 0.5]}, ')
    assert '"params": {"a": 3, "b": {"c": 2, "d": 1}}, "profile"' in file.read_text()


def test_a_changed_record_changes_one_line(results):
    before = store(*of_seeds(0, 1, 2)).read_text().splitlines()
    runs = of_seeds(0, 1, 2)
    runs[1]["metrics"] = {"eval/accuracy": 0.5}
    after = store(*runs).read_text().splitlines()
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_pandas_reads_a_file_by_lines(results):
    frame = pd.read_json(store(*of_seeds(2, 0, 1)), lines=True)
    assert sorted(frame.columns) == sorted(record())
    assert [cell["seed"] for cell in frame.cell] == [2, 0, 1]
    assert [metrics["eval/accuracy"] for metrics in frame.metrics] == [0.75] * 3


def test_a_text_of_any_kind_stays_in_its_line(results):
    strange = {"text": "a\nb\rc\u2028d\x85e\x0b é"}
    store(record(params=strange))
    (run,) = records.read("sinkd", "table_encoder", "default")
    assert run["params"] == strange


def test_written_records_are_read_back(results):
    store(record())
    assert records.read("sinkd", "table_encoder", "default") == [json.loads(json.dumps(record()))]


def test_what_is_read_and_written_again_has_the_same_bytes(results):
    numbers = {"rate": 1e-05, "third": 1 / 3, "zero": -0.0, "many": 10**20, "layers": (2, 4)}
    file = store(*of_seeds(0, 1, params=numbers))
    before = file.read_bytes()
    records.write(file, list(records.read_by_cell(file).values()))
    assert file.read_bytes() == before


def test_the_order_of_keys_does_not_change_the_bytes(tmp_path):
    records.write(tmp_path / "a.jsonl", [record()])
    records.write(
        tmp_path / "b.jsonl", [dict(reversed(record(params=dict(reversed(record()["params"].items()))).items()))]
    )
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"eval/accuracy": math.nan}}, r"record\.metrics\.eval/accuracy must be finite, got nan"),
        (
            {"metrics": {"eval/accuracy": [0.5, math.inf]}},
            r"record\.metrics\.eval/accuracy\[1\] must be finite, got inf",
        ),
        ({"params": {"a": {"b": [0.0, -math.inf]}}}, r"record\.params\.a\.b\[1\] must be finite, got -inf"),
        ({"curve": {"loss/kl": [math.nan]}}, r"record\.curve\.loss/kl\[0\] must be finite"),
        ({"metrics": {"accuracy": 0.5}}, "namespace.*'accuracy'"),
        ({"metrics": {"eval/accuracy": []}}, "number or a list of numbers, got \\[\\]"),
        ({"metrics": {"eval/accuracy": True}}, "number or a list of numbers, got True"),
        ({"metrics": {"eval/accuracy": "high"}}, "number or a list of numbers, got 'high'"),
        ({"metrics": {}}, "at least one metric"),
        ({"curve": {"loss/kl": 1.0}}, "list of numbers, got 1.0"),
        ({"cell": {"arm": "a/b"}}, "'a/b'"),
        ({"cell": {"arm": None}}, "string or a number, got 'arm': None"),
        ({"params": {"path": {1, 2}}}, r"record\.params\.path must be .* got set"),
        ({"params": {1: 2}}, "strings as keys, got 1"),
        ({"trainable_parameters": 1.5}, "trainable_parameters must be int, got 1.5"),
        ({"trainable_parameters": True}, "trainable_parameters must be int, got True"),
        ({"seconds": 3.0}, "exactly the keys .*seconds"),
    ],
)
def test_an_invalid_record_is_refused_and_nothing_is_written(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        records.write(tmp_path / "folder" / "a.jsonl", [record(), record(**changes)])
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_record_leaves_the_old_ones_alone(results):
    file = store(*of_seeds(0, 1))
    before = file.read_bytes()
    with pytest.raises(ValueError, match="finite"):
        records.write(file, [*of_seeds(0, 1), record(metrics={"eval/accuracy": math.nan})])
    assert file.read_bytes() == before


def test_a_write_that_is_stopped_leaves_the_old_records_and_no_temporary_file(results, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    file = store(*of_seeds(0, 1))
    before = file.read_bytes()
    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store(*of_seeds(0, 1, 2))
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("kept", "line"), [(0.9, 3), (0.5, 2)])
def test_a_file_that_was_cut_names_itself_the_line_and_the_remedy(results, kept, line):
    file = store(*of_seeds(0, 1, 2))
    text = file.read_text()
    file.write_text(text[: int(len(text) * kept)])
    with pytest.raises(ValueError, match=rf"table_encoder\.jsonl, line {line}: .*; delete it and run the experiment"):
        records.read("sinkd", "table_encoder", "default")


@pytest.mark.parametrize("line", ["", "3", "null", "[]", "{}", '{"paper": "sinkd"}', "\udcff", '{"cell":', "\0\0\0\0"])
def test_a_line_that_is_no_record_is_named_with_its_file(results, line):
    file = store(*of_seeds(0, 1))
    first, second = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, line.encode("utf-8", "surrogateescape"), second, b""]))
    with pytest.raises(ValueError, match=r"table_encoder\.jsonl, line 2: .*; delete it and run"):
        records.read("sinkd", "table_encoder", "default")


def test_a_cell_that_has_two_lines_is_refused(results):
    file = store(*of_seeds(0, 1))
    with file.open("a") as lines:
        lines.write(json.dumps(record(cell={"seed": 0, "arm": "kl"}, dtype="bfloat16")) + "\n")
    with pytest.raises(ValueError, match=r"line 3: expected one line per cell, got seed=0,arm=kl again"):
        records.read("sinkd", "table_encoder", "default")


def test_read_returns_the_records_of_one_experiment_by_name_whatever_the_order_of_the_file(results):
    store(*of_seeds(2, 0, 1))
    store(*of_seeds(7, experiment="other"))
    store(*of_seeds(8, profile="smoke"))
    runs = records.read("sinkd", "table_encoder", "default")
    assert [run["cell"]["seed"] for run in runs] == [0, 1, 2]


def test_read_goes_by_the_names_that_the_order_of_the_coordinates_gives(results):
    cells = [{"phase": phase, "arm": arm} for phase, arm in (("final", "kl"), ("choice", "z"), ("final", "ce"))]
    store(*(record(cell=cell) for cell in cells))
    runs = records.read("sinkd", "table_encoder", "default")
    assert [list(run["cell"].items()) for run in runs] == [
        [("arm", "z"), ("phase", "choice")],
        [("arm", "ce"), ("phase", "final")],
        [("arm", "kl"), ("phase", "final")],
    ]


def test_read_without_records_names_the_file_and_the_command(results):
    with pytest.raises(ValueError, match=r"default/sinkd/table_encoder\.jsonl, got none; `make reproduce`"):
        records.read("sinkd", "table_encoder", "default")
    assert records.read_by_cell(records.path("sinkd", "table_encoder", "default")) == {}


def test_read_of_a_profile_that_no_make_target_trains_here_names_the_runner(results):
    with pytest.raises(ValueError, match=r"`python .*train.ipynb experiment=table_encoder profile=smoke` makes"):
        records.read("sinkd", "table_encoder", "smoke")


def test_read_of_a_misspelt_profile_lists_those_that_exist(results):
    with pytest.raises(ValueError, match=r"profile of table_encoder must be one of default, smoke, .*got 'defualt'"):
        records.read("sinkd", "table_encoder", "defualt")


@pytest.mark.parametrize("changes", [{"profile": "smoke"}, {"paper": "nola"}, {"experiment": "other"}])
def test_read_refuses_a_line_copied_from_elsewhere(results, changes):
    records.write(records.path("sinkd", "table_encoder", "default"), [record(), record(cell={"arm": "ce"}, **changes)])
    expected = "line 2: expected a record of default/sinkd/table_encoder, got one of .*(smoke|nola|other)"
    with pytest.raises(ValueError, match=expected):
        records.read("sinkd", "table_encoder", "default")


def test_frame_has_one_row_a_record():
    runs = [record(cell={"arm": arm, "seed": seed}) for arm in ("kl", "ce") for seed in (0, 1)]
    frame = records.frame(runs)
    assert list(frame.columns) == ["arm", "seed", "eval/accuracy"]
    assert frame.values.tolist() == [["kl", 0, 0.75], ["kl", 1, 0.75], ["ce", 0, 0.75], ["ce", 1, 0.75]]


def test_frame_gives_each_element_of_a_list_a_row_counted_by_the_replicate():
    runs = [record(cell={"arm": "kl"}, metrics={"toy/mass": [0.1, 0.2, 0.3], "toy/width": [1, 2, 3]})]
    frame = records.frame(runs, replicate="start")
    assert frame.to_dict("list") == {
        "arm": ["kl"] * 3,
        "start": [0, 1, 2],
        "toy/mass": [0.1, 0.2, 0.3],
        "toy/width": [1, 2, 3],
    }


def test_frame_does_not_multiply_a_number_that_stands_beside_a_list():
    frame = records.frame([record(cell={"arm": "kl"}, metrics={"toy/mass": [0.1, 0.2], "toy/best": 0.9})])
    assert frame["toy/best"].dropna().tolist() == [0.9]


def test_frame_joins_records_with_different_coordinates_and_metrics():
    runs = [record(), record(cell={"arm": "sinkhorn", "seed": 0, "epsilon": 0.1}, metrics={"loss/sinkhorn": 2.0})]
    frame = records.frame(runs)
    assert frame["epsilon"].isna().tolist() == [True, False]
    assert frame["eval/accuracy"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (record(cell={"arm": "kl"}, metrics={"a/b": [1, 2], "a/c": [1, 2, 3]}), "lengths {'a/b': 2, 'a/c': 3}"),
        (record(metrics={"a/b": [1, 2]}), "no 'seed'"),
    ],
)
def test_frame_refuses_lists_that_cannot_be_counted(run, message):
    with pytest.raises(ValueError, match=message):
        records.frame([run])


def test_frame_refuses_no_records():
    with pytest.raises(ValueError, match="at least one record"):
        records.frame([])


def test_an_exhibit_is_written_beside_the_records_of_its_paper(results):
    path = records.write_exhibit(
        "sinkd", "table_encoder", "default", claims=[{"id": "a", "ours": None}], table=[{"arm": "kl", "n": 5}]
    )
    assert path == results / "default" / "sinkd" / "table_encoder.json"
    assert json.loads(path.read_text()) == {
        "paper": "sinkd",
        "exhibit": "table_encoder",
        "profile": "default",
        "claims": [{"id": "a", "ours": None}],
        "table": [{"arm": "kl", "n": 5}],
    }


def test_an_exhibit_with_a_nan_is_refused_and_nothing_is_written(results):
    with pytest.raises(ValueError, match=r"table_encoder\.table\[0\]\.low must be finite, got nan"):
        records.write_exhibit("sinkd", "table_encoder", "default", claims=[], table=[{"low": math.nan}])
    assert list(results.iterdir()) == []


def looped(seed, tokens, scores):
    curve = {"rollout/tokens": tokens, "validation/accuracy": scores, "kd/kept": [1.0]}
    return record(cell={"arm": "kd", "seed": seed}, params={"save_every": 2, "steps": 5}, curve=curve)


def test_curves_have_a_row_a_window_with_steps_and_tokens_at_its_end():
    frame = records.curves([looped(0, [10.0, 20.0, 30.0], [0.1, 0.2, 0.3]), record(curve={})])
    assert frame.step.tolist() == [2, 4, 5]
    assert frame.tokens.tolist() == [20.0, 60.0, 90.0], "mean tokens a step times steps of the window, summed"
    assert frame["validation/accuracy"].tolist() == [0.1, 0.2, 0.3]
    assert "kd/kept" not in frame, "not measured in every window"
    assert set(frame.arm) == {"kd"}


def test_what_killed_processes_left_beside_a_file_goes_and_what_living_ones_write_stays(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    folder = tmp_path / f".a.json.{gone.pid}.x"
    folder.mkdir()
    left = [tmp_path / f".a.json.{gone.pid}.tmp", tmp_path / f".a.json.{gone.pid}", folder / "part"]
    kept = [tmp_path / f".a.json.{os.getppid()}.tmp", tmp_path / f".b.json.{gone.pid}.tmp", tmp_path / ".a.json"]
    for path in [*left, *kept]:
        path.write_text("half")
    records.replace_text(tmp_path / "a.json", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", *(path.name for path in kept)}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_named_with_the_file_and_leaves_what_was_there(tmp_path, monkeypatch, number):
    file = tmp_path / "a.json"
    records.replace_text(file, "old")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="nothing was changed; make room") as error:
        records.replace_text(file, "new")
    assert (error.value.errno, error.value.filename) == (number, str(file))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "old")]
