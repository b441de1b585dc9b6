"""What `make reproduce` trains, and what it says of how far it is."""

import json
import shutil
import subprocess

import pytest

from limbeck import paths, records
from limbeck.workflow import progress, stages

SECONDS = {"kdrl-table_main-train": 600.0, "kdrl-table_main": 60.0, "sinkd-fig_permutation-train": 1200.0}


def running(stage):
    return [f"Running stage '{stage}':\n", f"> python -m limbeck {stage}\n"]


def told(lines, *, at):
    """What is said above the stages, where the clock shows these seconds in turn."""
    said = progress.report(lines, dict(SECONDS), now=iter(at).__next__)
    return [line.strip() for line in said if line.startswith("\nStage")]


def test_each_stage_says_its_number_and_what_is_to_go_by_the_published_seconds_at_this_machines_rate():
    lines = [*running("kdrl-table_main-train"), *running("kdrl-table_main"), *running("sinkd-fig_permutation-train")]
    assert told(lines, at=[0, 1200, 1200, 1320, 1320]) == [
        "Stage 1 of 3, kdrl-table_main-train: about 31 min to go",  # 600 + 60 + 1200 s
        "Stage 2 of 3, kdrl-table_main: about 42 min to go",  # 60 + 1200 s at twice as long
        "Stage 3 of 3, sinkd-fig_permutation-train: about 40 min to go",
    ]


def test_a_stage_that_is_skipped_counts_as_done_and_says_nothing():
    skipped = "Stage 'pipelines/full/dvc.yaml:kdrl-table_main' didn't change, skipping\n"
    lines = [*running("kdrl-table_main-train"), skipped, *running("sinkd-fig_permutation-train")]
    assert told(lines, at=[0, 300, 300])[1] == "Stage 3 of 3, sinkd-fig_permutation-train: about 10 min to go"
    assert skipped not in list(progress.report(lines, dict(SECONDS)))


def test_a_stage_that_nobody_expected_is_one_more():
    lines = [*running("metrics"), *running("kdrl-table_main-train")]
    assert told(lines, at=[0, 3, 3]) == [
        "Stage 1 of 4, metrics: about 31 min to go",
        "Stage 2 of 4, kdrl-table_main-train: about 31 min to go",
    ]


def test_a_training_may_be_followed_by_the_exhibits_that_read_its_records():
    expected = {"kdrl-table_main-train", "kdrl-table_main", "kdrl-fig_learning_curves", "kdrl-table_out_of_domain"}
    assert set(progress.planned({"kdrl-table_main-train"}, "default")) == expected
    provenance = paths.RESULTS / "default" / "provenance" / "kdrl" / "table_main-train.json"
    seconds = json.loads(provenance.read_text())["seconds"]
    assert progress.planned({"kdrl-table_main-train"}, "default")["kdrl-table_main-train"] == seconds


@pytest.mark.parametrize("trained", [True, False])
def test_what_was_not_trained_here_is_trained_again(tmp_path, monkeypatch, trained):
    expected = {name for name in stages.stages("default") if name.endswith("-train")}
    monkeypatch.setattr(paths, "DATA", tmp_path)
    assert set(progress.untrained("default")) == expected
    runs = records.read_by_cell(records.path("kdrl", "table_main", "default")).values()
    hashes = [run["hash"] for run in runs] if trained else [run["hash"] for run in runs][1:]
    settled = tmp_path / "checkpoints" / "default" / "kdrl" / "table_main" / "settled.json"
    records.replace_text(settled, json.dumps(hashes))
    assert set(progress.untrained("default")) == expected - ({"kdrl-table_main-train"} if trained else set())


@pytest.mark.parametrize("git", [True, False])
def test_make_tells_dvc_where_there_is_no_git(tmp_path, git):
    (tmp_path / ".dvc").mkdir()
    if git:
        (tmp_path / ".git").write_text("gitdir: elsewhere")
    shutil.copy(paths.ROOT / "Makefile", tmp_path)
    subprocess.run(["make", "help"], cwd=tmp_path, capture_output=True, check=True)
    told = tmp_path / ".dvc" / "config.local"
    assert told.is_file() != git
    assert git or told.read_text() == "[core]\n    no_scm = true\n"


def test_a_run_plans_what_dvc_calls_changed(monkeypatch):
    answers = {"status": ['{"pipelines/full/dvc.yaml:kdrl-fig_real_model-train": []}\n']}
    answers["repro"] = running("pipelines/full/dvc.yaml:kdrl-fig_real_model-train")
    asked = []

    def dvc(*arguments):
        asked.append(arguments)
        yield from answers[arguments[0]] if arguments[-1].endswith("dvc.yaml") else ()

    monkeypatch.setattr(progress, "_dvc", dvc)
    said = [line for line in progress.repro("full") if line.startswith("\nStage")]
    assert said[0].startswith("\nStage 1 of 2, kdrl-fig_real_model-train: about ")
    assert [arguments[-1] for arguments in asked] == ["pipelines/full/dvc.yaml", "digests", "pipelines/full/dvc.yaml"]


def test_where_dvc_fails_so_does_this():
    with pytest.raises(SystemExit) as stopped:
        list(progress._dvc("repro", "no-such-stage"))
    assert stopped.value.code > 0
