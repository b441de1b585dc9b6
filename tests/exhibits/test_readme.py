import json

import pytest
import yaml

from limbeck import paths, records
from limbeck.exhibits import readme

TEXT = f"# limbeck\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n"
RULE = {"kind": "greater", "metric": "eval/accuracy", "left": {"arm": "sinkhorn"}, "right": {"arm": "kl"}}
ORDER = {"kind": "monotone", "metric": "eval/accuracy", "order": [{"arm": "kl"}, {"arm": "js"}, {"arm": "sinkhorn"}]}
WORDS = "eval/accuracy: arm=sinkhorn − arm=kl > 0, over seed"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("results", "notebooks", "data"):
        monkeypatch.setattr(paths, name.upper(), tmp_path / name)
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    (tmp_path / "data" / "claims").mkdir(parents=True)
    (tmp_path / "results").mkdir()
    for page in (tmp_path / "README.md", tmp_path / "results" / "README.md"):
        page.write_text(TEXT)
    state("sinkd", table_encoder=["main"])
    state("nola")
    state("kdrl")
    return tmp_path


def state(paper, *, rule=RULE, **exhibits):
    """Claims named table_encoder-0 and so on, of the roles that each exhibit lists, and a notebook of each exhibit."""
    base = {"statement": "SinKD is best", "source": "abstract", "reliability": "primary", "rule": rule}
    entries = [
        base | {"id": f"{name}-{i}", "exhibit": name, "role": role}
        for name, roles in exhibits.items()
        for i, role in enumerate(roles)
    ]
    (paths.DATA / "claims" / f"{paper}.yaml").write_text(yaml.safe_dump(entries))
    for name in exhibits:
        reading = {"source": ["**Reading.** One doubt.\n", f"Another of {name}."]}
        cells = [
            {"source": [f"# {readme.PAPERS[paper]}: many tasks\n", "Names"]},
            reading,
            {"source": ["# a cell to try"]},
        ]
        (paths.NOTEBOOKS / paper).mkdir(parents=True, exist_ok=True)
        (paths.NOTEBOOKS / paper / f"{name}.ipynb").write_text(json.dumps({"cells": cells}))


def decision(place="table_encoder-0", **changes):
    base = {"id": place, "statement": "SinKD is best", "rule": WORDS, "sides": [0.78125, 0.75]}
    return base | {"ours": 0.03125, "interval": [-0.01, 0.05], "verdict": "inconclusive"} | changes


def exhibit(*decisions, paper="sinkd", name="table_encoder", profile="default", picture=False):
    path = records.write_exhibit(paper, name, profile, claims=decisions or [decision()], table=[])
    if picture:
        path.with_suffix(".svg").write_text("<svg/>")


def page(tree, name="results/sinkd.md"):
    readme.write()
    return (tree / name).read_text()


def test_a_main_claim_stands_on_the_front_page_with_both_sides_of_its_difference(tree):
    exhibit()
    text = page(tree, "README.md")
    assert (
        "| [SinKD, many tasks](results/sinkd.md#table_encoder) | SinKD is best | 0.7812 − 0.75 = +0.0312 [−0.01, 0.05] "
        "| inconclusive |\n"
    ) in text
    assert "| [SinKD](results/sinkd.md) | 1 inconclusive | – | – |\n" in text


def test_the_text_around_the_markers_stays(tree):
    exhibit()
    for name in ("README.md", "results/README.md"):
        text = page(tree, name)
        assert text.startswith(f"# limbeck\n\n{readme.BEGIN}\n\n")
        assert text.endswith(f" |\n\n{readme.END}\n\nafter\n")
        assert "old" not in text


def test_the_scoreboard_counts_each_claim_once_by_the_first_profile_that_has_it(tree):
    state("sinkd", table_encoder=["main", "exact", "exact", "exploratory"])
    words = ["disagrees", "agrees", "agrees", "not tested"]
    exhibit(*(decision(f"table_encoder-{i}", verdict=word) for i, word in enumerate(words)))
    exhibit(*(decision(f"table_encoder-{i}", verdict="inconclusive") for i in range(4)), profile="full")
    exhibit(*(decision(f"table_encoder-{i}", verdict="inconclusive") for i in range(4)), profile="smoke")
    assert "| [SinKD](results/sinkd.md) | 1 disagrees | 2 agrees | 1 not tested |\n" in page(tree, "README.md")
    assert "| many tasks | default | 2 | – | – | 1 | 1 |\n" in page(tree, "results/README.md")
    text = page(tree)
    assert text.count("## table_encoder") == 1
    assert "<summary>The same by profile full</summary>\n\nProfile `full` · " in text
    assert "smoke" not in text


def test_what_is_open_is_folded_unless_it_is_a_main_claim(tree):
    state("sinkd", table_encoder=["main", "exploratory", "exploratory", "exploratory"])
    words = ["inconclusive", "disagrees", "inconclusive", "not tested"]
    exhibit(*(decision(f"table_encoder-{i}", verdict=word, statement=f"Claim {i}") for i, word in enumerate(words)))
    shown, _, folded = page(tree).partition(
        "<details>\n<summary>Explored, not decided: 1 inconclusive, 1 not tested</summary>\n\n|"
    )
    assert [f"Claim {i}" in shown for i in range(4)] == [True, True, False, False]
    assert "| **Claim 0**<br><sub>eval/accuracy: " in shown
    assert [f"Claim {i}" in folded for i in range(4)] == [False, False, True, True]
    assert " | exploratory |\n\n</details>\n\n**Reading.** One doubt. Another of table_encoder.\n" in folded


def test_each_exhibit_has_its_links_and_its_picture_of_the_first_profile(tree):
    exhibit(picture=True)
    exhibit(profile="full", picture=True)
    text = page(tree)
    assert (
        "## table_encoder\n\n**Many tasks.** Profile `default` · [notebook](../notebooks/sinkd/table_encoder.ipynb) · "
        "[executed](default/executed/sinkd/table_encoder.ipynb) · [numbers](default/sinkd/table_encoder.json)\n\n"
        "![table_encoder: many tasks](default/sinkd/table_encoder.svg)\n\n| claim |"
    ) in text
    assert text.count("![") == 1


def test_exhibits_stand_in_the_order_of_their_claims(tree):
    state("sinkd", table_last=["exact"], fig_first=["exact"])
    exhibit(decision("fig_first-0"), name="fig_first")
    exhibit(decision("table_last-0"), name="table_last")
    text = page(tree)
    assert text.index("## table_last") < text.index("## fig_first")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ours": None, "interval": None, "sides": None, "verdict": "not tested"}, "–"),
        ({"ours": 2, "interval": None, "sides": None}, "2"),
        ({"ours": -13682.8, "interval": [-22424.8, -4940.8], "sides": None}, "−13683 [−22425, −4941]"),
        ({"ours": -0.25, "sides": [0.5, 0.75]}, "0.5 − 0.75 = −0.25 [−0.01, 0.05]"),
        ({"ours": 4.44e-5, "sides": [0.70066, 0.70062]}, "0.7007 − 0.7006 = +0.00004 [−0.01, 0.05]"),
        ({"ours": 2.5e-15, "interval": None, "sides": None}, "2.5e−15"),
    ],
)
def test_numbers_read_as_numbers(tree, changes, expected):
    exhibit(decision(**changes))
    assert f"</sub> | {expected} | " in page(tree)


def test_an_order_shows_its_means_and_kendalls_tau(tree):
    state("sinkd", rule=ORDER, table_encoder=["exploratory"])
    exhibit(decision(sides=[0.1, 0.2, 0.3], ours=1.0, interval=[1.0, 1.0], verdict="agrees in direction"))
    assert "| 0.1 → 0.2 → 0.3; τ = 1 [1, 1] |" in page(tree)


def test_an_exhibit_of_before_has_no_sides_to_show(tree):
    old = decision()
    del old["sides"]
    exhibit(old)
    assert "</sub> | 0.0312 [−0.01, 0.05] | inconclusive | main |" in page(tree)


def test_bars_and_breaks_do_not_break_a_table(tree):
    exhibit(decision(statement="|s - t|\nis  small"))
    assert r"| **\|s - t\| is small**<br>" in page(tree)


def test_writing_twice_touches_nothing(tree):
    exhibit(picture=True)
    readme.write()
    before = {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in tree.rglob("*.md")}
    readme.write()
    assert before == {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in tree.rglob("*.md")}
    assert sorted(file.name for file in tree.rglob("*.md")) == ["README.md", "README.md", "sinkd.md"]


def test_an_exhibit_with_a_claim_that_nobody_states_is_refused(tree):
    exhibit(decision("other"))
    with pytest.raises(ValueError, match=r"expected claims of data/claims/sinkd\.yaml, got \['other'\]; draw it again"):
        readme.write()
    assert (tree / "README.md").read_text() == TEXT


@pytest.mark.parametrize("text", ["", readme.BEGIN, readme.END, f"{readme.END}{readme.BEGIN}", f"{TEXT}{TEXT}"])
def test_a_page_without_its_markers_is_refused_and_all_are_kept(tree, text):
    (tree / "results" / "README.md").write_text(text)
    with pytest.raises(ValueError, match="expected <!-- generated:begin --> and then <!-- generated:end --> once"):
        readme.write()
    assert (tree / "README.md").read_text() == TEXT
