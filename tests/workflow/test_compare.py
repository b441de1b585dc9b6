"""Whether a tree has the published results: small trees of two records and an exhibit, committed and then changed."""

import json
import subprocess

import pytest

from limbeck import paths
from limbeck.workflow import compare

RECORD = "results/default/kdrl/table_main.jsonl"
EXHIBIT = "results/default/kdrl/table_main.json"


def git(*arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=paths.ROOT, check=True)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A committed tree; returns how its files are read and changed."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    runs = [
        {
            "cell": {"arm": "kd", "seed": seed},
            "hash": "a",
            "metrics": {"test/accuracy": 0.5},
            "curve": {"loss/kl": [0.25]},
        }
        | {"trainable_parameters": 7, "dtype": "float32", "params": {}}
        for seed in (0, 1)
    ]
    row = {"arm": "kd", "metric": "test/accuracy", "mean": 0.5, "low": 0.4, "high": 0.6, "level": 0.95, "count": 2}
    claim = {"id": "kd-first", "ours": 0.02, "interval": [-0.01, 0.05], "verdict": "inconclusive", "statement": "s"}
    write(RECORD, "".join(json.dumps(run) + "\n" for run in runs))
    write(EXHIBIT, json.dumps({"claims": [claim], "table": [row]}))
    write("results/bench/kdrl/table_cost.json", json.dumps({"claims": [], "table": [row]}))
    write("results/default/provenance/kdrl/table_main.json", json.dumps({"seconds": 3}))
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "published")


def write(name, text):
    file = paths.ROOT / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def change(name, *pairs):
    text = (paths.ROOT / name).read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new, 1)
    (paths.ROOT / name).write_text(text)


def said(capsys, *arguments):
    status = compare._main(list(arguments))
    return status, capsys.readouterr().out.splitlines()


def test_hashes_wording_provenance_and_what_was_timed_are_not_compared(published, capsys):
    change(RECORD, ('"hash": "a"', '"hash": "b"'))
    change(EXHIBIT, ('"statement": "s"', '"statement": "t", "role": "main"'))
    change("results/bench/kdrl/table_cost.json", ("0.5", "0.7"))
    change("results/default/provenance/kdrl/table_main.json", ("3", "4"))
    assert said(capsys) == (0, ["2 records, 1 exhibit: identical"])


def test_a_number_that_differs_in_its_last_digits_is_the_same(published, capsys):
    change(RECORD, ("0.25", "0.250001"))
    assert said(capsys) == (0, ["1 record, 1 exhibit: identical", "1 record: the same within a relative 1e-05"])
    change(RECORD, ("0.250001", "0.25001"))
    assert said(capsys) == (0, ["1 record, 1 exhibit: identical", "1 record: other numbers"])


@pytest.mark.parametrize("pair", [('"mean": 0.5', '"mean": 0.59'), ('"ours": 0.02', '"ours": -0.005')])
def test_an_estimate_may_move_within_its_published_interval(published, capsys, pair):
    change(EXHIBIT, pair)
    assert said(capsys) == (0, ["2 records: identical", f"1 exhibit: {compare.INSIDE}"])


@pytest.mark.parametrize("pair", [('"mean": 0.5', '"mean": 0.61'), ('"ours": 0.02', '"ours": -0.02')])
def test_an_estimate_outside_its_published_interval_is_told_apart(published, capsys, pair):
    change(EXHIBIT, pair)
    assert said(capsys) == (0, ["2 records: identical", f"1 exhibit: {compare.OUTSIDE}"])


def test_another_verdict_is_named_and_alone_fails(published, capsys):
    change(EXHIBIT, ("inconclusive", "disagrees"))
    line = "  default/kdrl/table_main, kd-first: disagrees; published: inconclusive"
    assert said(capsys) == (1, ["2 records: identical", "1 exhibit: another verdict", line])


def test_what_is_missing_or_new_is_counted(published, capsys):
    change(RECORD, ('"seed": 1', '"seed": 2'))
    (paths.ROOT / EXHIBIT).unlink()
    counts = [
        "1 record: identical",
        "1 record, 1 exhibit: published, and not here",
        "1 record: here, and not published",
    ]
    assert said(capsys) == (0, counts)


def test_another_commit_can_be_compared_with_and_an_unknown_one_is_an_error(published, capsys):
    change(EXHIBIT, ("inconclusive", "disagrees"))
    git("commit", "--quiet", "-a", "-m", "another verdict")
    assert said(capsys)[0] == 0
    assert said(capsys, "--against", "HEAD~1")[0] == 1
    with pytest.raises(SystemExit, match="2"):
        compare._main(["--against", "nowhere"])


def test_a_tree_without_git_has_nothing_to_compare_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    status, lines = said(capsys)
    assert status == 0
    assert "no git history" in lines[0]
