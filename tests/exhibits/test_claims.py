import json
import re

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from limbeck import paths, records
from limbeck.exhibits import claims

KL, SINKHORN = {"arm": "kl"}, {"arm": "sinkhorn"}
NOISE = np.array([0.3, -0.4, 0.1, 0.2, -0.2, 0.0])  # mean 0, standard deviation 0.2608
ACCURACY = "eval/accuracy"


def rule(kind="greater", **changes):
    base = {"kind": kind, "metric": ACCURACY, "left": SINKHORN, "right": KL}
    return {key: value for key, value in (base | changes).items() if value is not None}


def claim(name="a", **changes):
    return claims.Claim(name, "table_encoder", "SinKD is best", "paper, abstract", "primary", "main", rule(**changes))


def frame(seeds=6, **arms):
    """One row an arm and seed; a scalar is repeated over the seeds, an array is one value a seed."""
    rows = [
        {"arm": arm, "seed": seed, ACCURACY: value}
        for arm, values in arms.items()
        for seed, value in enumerate(np.broadcast_to(values, seeds))
    ]
    return pd.DataFrame(rows)


def shifted(by):
    """Sinkhorn ahead of KL by `by` on average, with noise in the difference and a large effect of the seed."""
    common = 10.0 * np.arange(6)
    return frame(kl=common, sinkhorn=common + by + NOISE)


def decide(data, **changes):
    return claims.decide([claim(**changes)], data)[0]


def word(data, **changes):
    return decide(data, **changes)["verdict"]


# The half width of the interval is t_{0.975, 5} * 0.2608 / sqrt(6) = 2.5706 * 0.10646 = 0.2737.
@pytest.mark.parametrize(
    ("kind", "shift", "changes", "expected"),
    [
        ("greater", 0.30, {}, "agrees in direction"),
        ("greater", 0.25, {}, "inconclusive"),
        ("greater", -0.25, {}, "inconclusive"),
        ("greater", -0.30, {}, "disagrees"),
        ("greater", 0.30, {"band": [0.2, 0.4]}, "agrees"),
        ("greater", 0.30, {"band": [0.4, 0.6]}, "agrees in direction"),
        ("greater", 0.25, {"band": [0.2, 0.4]}, "inconclusive"),
        ("less", -0.30, {}, "agrees in direction"),
        ("less", -0.25, {}, "inconclusive"),
        ("less", 0.30, {}, "disagrees"),
        ("less", -0.30, {"band": [-0.4, -0.2]}, "agrees"),
        ("less", -0.30, {"band": [-0.2, -0.1]}, "agrees in direction"),
        ("not_worse", 0.00, {"margin": 0.3}, "agrees"),
        ("not_worse", 5.00, {"margin": 0.3}, "agrees"),
        ("not_worse", 0.00, {"margin": 0.2}, "inconclusive"),
        ("not_worse", -0.60, {"margin": 0.3}, "disagrees"),
        ("equivalent", 0.00, {"margin": 0.3}, "agrees"),
        ("equivalent", 0.10, {"margin": 0.3}, "inconclusive"),
        ("equivalent", -0.10, {"margin": 0.3}, "inconclusive"),
        ("equivalent", 0.50, {"margin": 0.3}, "inconclusive"),
        ("equivalent", 0.60, {"margin": 0.3}, "disagrees"),
        ("equivalent", -0.60, {"margin": 0.3}, "disagrees"),
    ],
)
def test_verdicts_follow_the_place_of_the_interval(kind, shift, changes, expected):
    assert word(shifted(shift), kind=kind, **changes) == expected


def test_a_decision_holds_the_paired_interval_and_what_the_paper_says():
    data = shifted(0.3)
    decision = decide(data, band=[0.2, 0.4])
    oracle = stats.ttest_rel(data[data.arm == "sinkhorn"][ACCURACY], data[data.arm == "kl"][ACCURACY])
    bounds = oracle.confidence_interval(0.95)
    assert decision["interval"] == pytest.approx([bounds.low, bounds.high], abs=1e-10)
    assert decision["ours"] == pytest.approx(0.3)
    assert (decision["level"], decision["count"]) == (pytest.approx(0.95), 6)
    assert [decision[key] for key in ("id", "source", "reliability")] == ["a", "paper, abstract", "primary"]
    assert decision["rule"] == "eval/accuracy: arm=sinkhorn − arm=kl > 0, stated as 0.2 to 0.4, over seed"


def test_a_decision_holds_both_sides_of_its_difference():
    data = frame(kl=0.5 + NOISE, sinkhorn=0.75)
    assert decide(data)["sides"] == pytest.approx([0.75, 0.5])
    assert decide(data, right=0.7)["sides"] == pytest.approx([0.75, 0.7])
    assert decide(data, kind="report", right=None)["sides"] is None
    assert decide(data, right={"arm": "l1"})["sides"] is None


def test_pairs_are_matched_by_seed_whatever_the_order_of_the_rows():
    data = shifted(0.3)
    mixed = data.sample(frac=1, random_state=np.random.default_rng(0))
    assert decide(mixed) == decide(data)


def test_the_right_side_may_be_a_number():
    data = frame(sinkhorn=0.8 + NOISE / 10)
    assert word(data, right=0.7) == "agrees in direction"
    assert word(data, right=0.8) == "inconclusive"
    assert decide(data, right=0.7)["ours"] == pytest.approx(0.1)


def test_arms_that_are_equal_everywhere_are_inconclusive_and_equivalent():
    data = frame(kl=0.5, sinkhorn=0.5)
    assert word(data) == "inconclusive"
    assert word(data, kind="equivalent", margin=0.01) == "agrees"


def test_items_are_averaged_within_a_seed_before_the_test():
    tasks = [shifted(by).assign(task=task) for task, by in (("cola", 0.1), ("sst2", 0.5))]
    decision = decide(pd.concat(tasks))
    assert decision["ours"] == pytest.approx(0.3)
    assert decision["count"] == 6


@pytest.mark.parametrize("seeds", [1, 4])
def test_under_five_seeds_a_claim_with_a_test_is_inconclusive(seeds):
    for by in (5.0, -5.0):
        decision = decide(frame(seeds=seeds, kl=0.0, sinkhorn=by))
        assert decision["verdict"] == "inconclusive"
        assert decision["ours"] == by
        assert (decision["interval"] is None) == (seeds == 1)
    assert word(frame(seeds=5, kl=0.0, sinkhorn=5.0)) == "agrees in direction"


def test_an_arm_that_was_not_run_is_not_tested():
    decision = decide(frame(kl=0.5))
    assert (decision["verdict"], decision["ours"], decision["interval"]) == ("not tested", None, None)
    assert (decision["level"], decision["count"]) == (None, 0)


def test_a_metric_or_coordinate_that_is_no_column_is_an_error():
    with pytest.raises(ValueError, match="expected eval/f1 among the columns, got arm, seed, eval/accuracy"):
        decide(shifted(0.3), metric="eval/f1")
    with pytest.raises(ValueError, match="expected task among the columns"):
        decide(shifted(0.3), left={"arm": "sinkhorn", "task": "rte"})
    with pytest.raises(ValueError, match="expected start among the columns"):
        decide(shifted(0.3), replicate="start")


def test_sides_with_different_seeds_are_an_error():
    data = shifted(0.3)
    with pytest.raises(ValueError, match=r"same values of 'seed'.*\[0, 1, 2, 3, 4, 5\] and \[0, 1, 2, 3, 4\]"):
        decide(data[~((data.arm == "kl") & (data.seed == 5))])


def test_sides_on_different_tasks_are_an_error():
    data = pd.concat([shifted(0.3).assign(task="cola"), shifted(0.3).assign(task="sst2")])
    with pytest.raises(ValueError, match="cover the same task"):
        decide(data[~((data.arm == "kl") & (data.task == "cola"))])
    with pytest.raises(ValueError, match="cover the same task"):
        decide(data[~((data.seed == 3) & (data.task == "cola"))])


def test_sides_may_differ_in_the_coordinates_that_the_rule_names():
    data = pd.concat([frame(kl=0.0).assign(epsilon=np.nan), frame(sinkhorn=1.0 + NOISE).assign(epsilon=0.1)])
    with pytest.raises(ValueError, match="name in the rule the coordinates"):
        decide(data)
    assert word(data, left=SINKHORN | {"epsilon": 0.1}) == "agrees in direction"


def monotone(**changes):
    order = [{"arm": "kl"}, {"arm": "js"}, {"arm": "sinkhorn"}]
    return {"kind": "monotone", "left": None, "right": None, "order": order} | changes


@pytest.mark.parametrize(
    ("values", "ours", "expected"),
    [
        ((0.1, 0.2, 0.3), 1.0, "agrees in direction"),
        ((0.3, 0.2, 0.1), -1.0, "disagrees"),
        ((0.2, 0.2, 0.2), 0.0, "inconclusive"),
    ],
)
def test_monotone_follows_the_sign_of_kendalls_tau(values, ours, expected):
    decision = decide(frame(**dict(zip(("kl", "js", "sinkhorn"), values, strict=True))), **monotone())
    assert (decision["ours"], decision["verdict"]) == (ours, expected)
    assert decision["rule"] == "eval/accuracy: arm=kl → arm=js → arm=sinkhorn rises (Kendall's tau > 0), over seed"


def test_monotone_takes_tau_within_each_seed():
    # Of the three pairs of arms 3, 3, 2, 3, 3 and 1 rise in the six seeds: tau = 1, 1, 1/3, 1, 1, -1/3.
    data = frame(kl=[1, 1, 1, 1, 1, 2], js=[2, 2, 3, 2, 2, 3], sinkhorn=[3, 3, 2, 3, 3, 1])
    decision = decide(data, **monotone())
    assert decision["ours"] == pytest.approx((1 + 1 + 1 / 3 + 1 + 1 - 1 / 3) / 6)


def exact(**changes):
    return {"kind": "exact", "right": None, "value": 0.5, "tolerance": 0.01} | changes


def test_exact_asks_every_replicate_and_needs_no_five():
    assert word(frame(seeds=1, sinkhorn=0.509), **exact()) == "agrees"
    assert word(frame(seeds=3, sinkhorn=[0.5, 0.5, 0.52]), **exact()) == "disagrees"


def test_exact_does_not_let_two_tasks_cancel():
    data = pd.concat([frame(sinkhorn=0.4).assign(task="cola"), frame(sinkhorn=0.6).assign(task="sst2")])
    assert word(data, **exact()) == "disagrees"


def test_report_shows_a_value_with_its_interval_and_tests_nothing():
    decision = decide(frame(sinkhorn=0.5 + NOISE), kind="report", right=None)
    assert decision["verdict"] == "not tested"
    assert decision["ours"] == pytest.approx(0.5)
    assert decision["interval"] == pytest.approx([0.5 - 0.2737, 0.5 + 0.2737], abs=1e-4)


def test_holm_runs_over_the_tested_claims_only():
    names = ["one", "two", "three", "absent", "shown", "fixed"]
    rows = [claim("one"), claim("two", kind="less"), claim("three", kind="equivalent", margin=10.0)]
    rows += [claim("absent", left={"arm": "l1"}), claim("shown", kind="report", right=None), claim("fixed", **exact())]
    decisions = claims.decide(rows, shifted(0.3))
    assert [decision["id"] for decision in decisions] == names
    # Ascending: `three` at 0.05 / 3; then `one` and `two`, p = 0.037, fail at 0.05 / 2.
    expected = [0.975, 0.975, 1 - 0.05 / 3, None, 0.95, 0.95]
    assert [decision["level"] for decision in decisions] == pytest.approx(expected)
    assert [decision["verdict"] for decision in decisions[:3]] == ["inconclusive", "inconclusive", "agrees"]


def test_a_claim_that_holds_alone_may_fail_among_others():
    data = shifted(0.3)
    assert word(data) == "agrees in direction"
    assert claims.decide([claim("a"), claim("b")], data)[0]["verdict"] == "inconclusive"


def test_an_equivalence_that_fails_at_its_nearer_margin_relaxes_no_neighbour():
    # At shift 0.3 and margin 0.5 p is 0.12 at the nearer margin and 0.0006 at the other; the neighbour's is 0.037.
    decisions = claims.decide([claim("a", kind="equivalent", margin=0.5), claim("b")], shifted(0.3))
    assert [decision["level"] for decision in decisions] == pytest.approx([0.975, 0.975])


@pytest.mark.parametrize(
    ("kind", "changes"), [("greater", {}), ("not_worse", {"margin": 0.3}), ("equivalent", {"margin": 0.3})]
)
def test_true_boundaries_are_crossed_as_often_as_alpha_says(kind, changes):
    # At the boundary a verdict has probability 0.05: sigma over 200 is 0.0154; 3.5 sigma allowed.
    source, edge = np.random.default_rng(2), changes.get("margin", 0.0)
    sign = -1 if kind == "not_worse" else 1
    words = []
    for _ in range(200):
        noise = source.normal(sign * edge, 0.05, size=6)
        words.append(word(frame(kl=0.0, sinkhorn=noise), kind=kind, **changes))
    assert abs(np.mean([text != "inconclusive" for text in words]) - 0.05) < 3.5 * 0.0154


def test_decisions_are_json_and_fit_an_exhibit(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path)
    decisions = claims.decide([claim(), claim("b", left={"arm": "l1"})], shifted(0.3))
    path = records.write_exhibit("sinkd", "table_encoder", "default", claims=decisions, table=[])
    assert json.loads(path.read_text())["claims"] == decisions


def test_the_table_has_a_row_a_claim():
    shown = claims.table(claims.decide([claim(), claim("b")], shifted(0.3)))
    columns = ["statement", "rule", "ours", "interval", "level", "count", "verdict"]
    assert list(shown.style.data.index) == ["a", "b"]
    assert list(shown.style.data.columns) == list(claims.table([]).style.data.columns) == columns


def test_the_table_shows_whole_statements_and_coloured_verdicts_in_the_same_bytes_each_time():
    long = {"statement": "A statement that is longer than what pandas shows of a text, by " + "far " * 30}
    decisions = [decision | long for decision in claims.decide([claim()], shifted(0.3))]
    bundles = [claims.table(decisions)._repr_mimebundle_() for _ in range(2)]
    assert bundles[0] == bundles[1]
    assert all(long["statement"].strip() in text for text in bundles[0].values())
    colours = {}
    for verdict in ("agrees in direction", "disagrees", "smaller than stated", "inconclusive", "control failed"):
        html = claims.table([decisions[0] | {"verdict": verdict}])._repr_mimebundle_()["text/html"]
        colours[verdict] = re.search(r"background-color: (#\w+)", html)[1]
    assert len(set(colours.values())) == 4
    assert colours["inconclusive"] == colours["control failed"]


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("less", {"right": 0.5}, "eval/accuracy: arm=sinkhorn − 0.5 < 0, over seed"),
        ("not_worse", {"margin": 0.01}, "eval/accuracy: arm=sinkhorn − arm=kl > −0.01, over seed"),
        (
            "equivalent",
            {"margin": 0.01, "replicate": "start"},
            "eval/accuracy: arm=sinkhorn − arm=kl within ±0.01, over start",
        ),
        ("exact", {"right": None, "value": 2, "tolerance": 0}, "eval/accuracy: arm=sinkhorn = 2 ± 0, over seed"),
        ("report", {"right": None, "left": {"arm": "kl", "task": "rte"}}, "eval/accuracy: arm=kl, task=rte, over seed"),
    ],
)
def test_a_rule_reads_as_one_line(kind, changes, expected):
    data = frame(kl=0.5, sinkhorn=0.5).assign(task="rte").rename(columns={"seed": changes.get("replicate", "seed")})
    assert decide(data, kind=kind, **changes)["rule"] == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "better"}, "kind must be one of greater.*got 'better'"),
        ({"right": None}, r"greater needs \['left', 'metric', 'right'\]"),
        ({"margin": 0.1}, "greater needs"),
        ({"kind": "equivalent", "margin": 0.0}, "margin must be a number above 0; got 0.0"),
        ({"kind": "not_worse", "margin": "1e-2"}, "margin must be a number above 0; got '1e-2'"),
        ({"kind": "equivalent", "margin": 0.1, "band": [0, 1]}, "equivalent needs"),
        ({"metric": "accuracy"}, "metric must be a name with a namespace.*got 'accuracy'"),
        ({"left": "kl"}, "left must be coordinates.*got 'kl'"),
        ({"left": {}}, "left must be coordinates"),
        ({"right": True}, "right must be coordinates.*or a number; got True"),
        ({"right": float("nan")}, "right must be coordinates.*or a number; got nan"),
        ({"band": [0.4, 0.2]}, "band must be"),
        ({"band": [-0.4, -0.2]}, "no greater difference lies in the band"),
        ({"kind": "less", "band": [0.2, 0.4]}, "no less difference lies in the band"),
        (monotone(order=[{"arm": "kl"}]), "order must be a list of at least two"),
        (exact(tolerance=-1), "tolerance must be a number of at least 0; got -1"),
        ({"replicate": 3}, "replicate must be the name of a column"),
    ],
)
def test_a_rule_that_cannot_be_decided_names_its_claim(changes, message):
    with pytest.raises(ValueError, match=f"claim 'odd': .*{message}"):
        claim("odd", **changes)


@pytest.fixture
def write_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    (tmp_path / "claims").mkdir()

    def write(entries):
        (tmp_path / "claims" / "sinkd.yaml").write_text(yaml.safe_dump(entries))

    return write


def entry(**changes):
    base = {"id": "a", "exhibit": "table_encoder", "statement": "SinKD is best", "source": "abstract"}
    return base | {"reliability": "primary", "role": "main", "rule": rule()} | changes


def test_claims_load_in_the_order_of_their_file(write_claims):
    write_claims([entry(id="b"), entry(id="a")])
    loaded = claims.load("sinkd")
    assert [one.id for one in loaded] == ["b", "a"]
    assert loaded[0].rule == rule()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(), entry()], r"every id once, got \['a'\]"),
        ([entry(colour="red")], "exactly the keys id, exhibit.*red"),
        ([{"id": "a"}], "exactly the keys"),
        (["a"], "exactly the keys"),
        ({"a": entry()}, "must be a list of claims, got dict"),
        (None, "must be a list of claims, got NoneType"),
        ([entry(rule={"kind": "odd"})], "claim 'a': kind must be one of"),
        ([entry(rule="greater")], "rule must be a dict with content, got 'greater'"),
        ([entry(statement="")], "statement must be a str with content, got ''"),
        ([entry(id=3)], "id must be a str with content, got 3"),
        ([entry(role="primary")], "claim 'a': role must be one of main, exact, exploratory; got 'primary'"),
    ],
)
def test_a_claim_file_with_a_mistake_is_refused(write_claims, entries, message):
    write_claims(entries)
    with pytest.raises(ValueError, match=message):
        claims.load("sinkd")


def test_a_paper_without_claims_names_the_file_it_wants(write_claims):
    with pytest.raises(ValueError, match=r"claims/other\.yaml, found none"):
        claims.load("other")


@pytest.mark.parametrize(("middle", "expected"), [(0.5, "agrees in direction"), (-0.1, "inconclusive")])
def test_an_order_that_most_pairs_keep_but_the_means_break_is_inconclusive(middle, expected):
    """a < b < c < d < e is stated; with b below a, nine pairs of ten keep it and tau is 0.8 for every seed."""
    level = {"a": 0.0, "b": middle, "c": 1.0, "d": 2.0, "e": 3.0}
    frame = pd.DataFrame(
        [{"arm": arm, "seed": seed, "eval/x": x + seed} for arm, x in level.items() for seed in range(6)]
    )
    rule = {"kind": "monotone", "metric": "eval/x", "order": [{"arm": arm} for arm in "abcde"]}
    [decision] = claims.decide([claims.Claim("order", "e", "s", "s", "r", "exploratory", rule)], frame)
    assert decision["ours"] == pytest.approx(1.0 if middle > 0 else 0.8)
    assert decision["sides"] == pytest.approx([x + 2.5 for x in level.values()])  # seeds 0 to 5 add 2.5 in the mean
    assert decision["verdict"] == expected


def test_each_paper_has_two_to_four_main_claims_and_none_of_them_is_an_identity():
    for paper in ("kdrl", "nola", "sinkd"):
        loaded = claims.load(paper)
        main = [one for one in loaded if one.role == "main"]
        assert 2 <= len(main) <= 4
        assert {one.rule["kind"] for one in main}.isdisjoint({"exact", "report"})
        assert {one.role for one in loaded if one.rule["kind"] == "exact"} == {"exact"}
