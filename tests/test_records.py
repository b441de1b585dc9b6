import json
import math

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


def store(results, **changes):
    run = record(**changes)
    folder = results / run["profile"] / run["paper"] / run["experiment"]
    records.write(folder / f"{records.cell_name(run['cell'])}.json", run)
    return folder


def test_cell_name_keeps_the_order_of_the_coordinates():
    assert records.cell_name({"arm": "kl", "seed": 0, "epsilon": 0.1}) == "arm=kl,seed=0,epsilon=0.1"


def test_cell_name_keeps_the_sum_that_an_arm_may_be():
    assert records.cell_name({"arm": "ce+kl", "student": "first-2"}) == "arm=ce+kl,student=first-2"


@pytest.mark.parametrize(
    "cell", [{}, {"arm": "a/b"}, {"arm": "a,seed=1"}, {"arm": ""}, {"a b": 1}, {"arm": "é"}, {"x": math.nan, "y": None}]
)
def test_cell_name_refuses_what_a_file_name_cannot_hold(cell):
    with pytest.raises(ValueError, match="coordinate"):
        records.cell_name(cell)


def test_a_record_on_disk_is_sorted_indented_json_with_a_newline(tmp_path):
    path = tmp_path / "deep" / "arm=kl,seed=0.json"
    records.write(path, record())
    text = path.read_text()
    keys = [line.split('"')[1] for line in text.splitlines() if line.startswith(' "')]
    assert keys == sorted(record())
    assert text.startswith('{\n "cell": {\n  "arm": "kl"') and text.endswith("}\n")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_written_record_is_read_back(tmp_path):
    path = tmp_path / "a.json"
    records.write(path, record())
    assert records.read_one(path) == json.loads(json.dumps(record()))


def test_the_order_of_keys_does_not_change_the_bytes(tmp_path):
    records.write(tmp_path / "a.json", record())
    records.write(tmp_path / "b.json", dict(reversed(record().items())))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


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
        records.write(tmp_path / "folder" / "a.json", record(**changes))
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_record_leaves_the_old_one_alone(tmp_path):
    path = tmp_path / "a.json"
    records.write(path, record())
    before = path.read_bytes()
    with pytest.raises(ValueError, match="finite"):
        records.write(path, record(metrics={"eval/accuracy": math.nan}))
    assert path.read_bytes() == before


def test_a_write_that_is_stopped_leaves_the_old_record_and_no_temporary_file(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    path = tmp_path / "a.json"
    records.write(path, record())
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        records.write(path, record(dtype="bfloat16"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_record_cut_in_half_names_its_file_and_the_remedy(tmp_path):
    path = tmp_path / "arm=kl,seed=0.json"
    records.write(path, record())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"arm=kl,seed=0\.json.*delete it and run"):
        records.read_one(path)


@pytest.mark.parametrize("text", ["", "3", "null", "[]", "{}", '{"paper": "sinkd"}', "\udcff"])
def test_a_file_that_is_no_record_names_itself_and_the_remedy(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=r"odd\.json.*delete it and run"):
        records.read_one(path)


def test_read_returns_the_records_of_one_experiment_by_name(results):
    for seed in (2, 0, 1):
        store(results, cell={"arm": "kl", "seed": seed})
    store(results, experiment="other")
    store(results, profile="smoke")
    runs = records.read("sinkd", "table_encoder", "default")
    assert [run["cell"]["seed"] for run in runs] == [0, 1, 2]


def test_read_without_records_names_the_folder_and_the_command(results):
    with pytest.raises(ValueError, match=r"default/sinkd/table_encoder.*make reproduce"):
        records.read("sinkd", "table_encoder", "default")


def test_read_refuses_a_record_copied_from_another_profile(results):
    folder = store(results, profile="smoke")
    folder.rename((results / "default" / "sinkd").mkdir(parents=True) or results / "default" / "sinkd" / folder.name)
    with pytest.raises(ValueError, match="holds a record of smoke/sinkd/table_encoder"):
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


def test_an_exhibit_is_written_beside_the_folders_of_its_paper(results):
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
