"""What DVC shows of a profile: the verdicts, counted by hand here, and curves, averaged by hand."""

import pytest
import yaml

from limbeck import paths, records
from limbeck.workflow import metrics, stages


@pytest.mark.parametrize("profile", ["default", "full"])
def test_the_committed_metrics_and_curves_are_those_of_the_committed_exhibits_and_records(profile):
    for file, text in metrics.texts(profile).items():
        assert file.read_text() == text, "run `make pipeline`"


@pytest.fixture
def decided(tmp_path, monkeypatch):
    """One paper with two exhibits, and five claims in three roles; one says none."""
    monkeypatch.setattr(paths, "DATA", tmp_path / "data")
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(stages, "papers", lambda: ["kdrl"])
    roles = {"a": "main", "b": "exact", "c": "exploratory", "d": None, "e": "main"}
    claims = [{"id": name} | ({"role": role} if role else {}) for name, role in roles.items()]
    records.replace_text(paths.DATA / "claims" / "kdrl.yaml", yaml.safe_dump(claims))
    exhibits = {
        "table_main": [("a", 0.25, "disagrees"), ("b", 3, "agrees"), ("c", None, "not tested")],
        "fig_curves": [("d", 0.5, "not tested"), ("e", 0.125, "agrees")],
    }
    for exhibit, verdicts in exhibits.items():
        claims = [{"id": name, "ours": ours, "interval": None, "verdict": verdict} for name, ours, verdict in verdicts]
        records.write_exhibit("kdrl", exhibit, "smoke", claims=claims, table=[])


def test_main_claims_stand_with_number_and_verdict_and_every_verdict_is_counted_in_its_role(decided):
    assert metrics.summary("smoke") == {
        "kdrl": {"a": {"ours": 0.25, "verdict": "disagrees"}, "e": {"ours": 0.125, "verdict": "agrees"}},
        "counts": {
            "kdrl": {"main": {"disagrees": 1, "agrees": 1}, "exact": {"agrees": 1}, "exploratory": {"not tested": 2}}
        },
    }


def test_a_curve_is_the_mean_over_seeds_of_each_arm_in_each_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    kind = {"paper": "kdrl", "experiment": "toy", "profile": "smoke", "hash": "", "dtype": "float32"}
    kind |= {"trainable_parameters": 1, "params": {"save_every": 2, "steps": 4}, "metrics": {"test/accuracy": 1.0}}

    def run(seed, accuracy, phase="final", **cell):
        curve = {"rollout/tokens": [9.0, 9.0], "rollout/length": [3.0, 5.0], "validation/accuracy": accuracy}
        return kind | {"cell": {"phase": phase, "arm": "kd", "task": "sums", **cell, "seed": seed}, "curve": curve}

    start = run(0, [0.0, 0.0], kd_coef=0.3) | {"curve": {}}
    runs = [run(0, [0.5, 0.75], kd_coef=0.3), run(1, [0.25, 0.75], kd_coef=0.3), run(0, [0.125, 1.0])]
    selection = run(9, [1.0, 1.0], phase="selection", kd_coef=0.3)
    records.write(
        records.path("kdrl", "toy", "smoke"), [*runs, selection, start | {"cell": {"arm": "start", "seed": 0}}]
    )
    assert metrics.curves("kdrl", "toy", "smoke").splitlines() == [
        "setting,arm,step,validation/accuracy,rollout/length",
        ",kd,2,0.125,3",
        ",kd,4,1,5",
        "kd_coef 0.3,kd,2,0.375,3",
        "kd_coef 0.3,kd,4,0.75,5",
    ]
