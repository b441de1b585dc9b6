import json

import pytest

from limbeck import paths, records
from limbeck.exhibits import readme

TEXT = "# limbeck\n\n<!-- claims:begin -->\nold\n<!-- claims:end -->\n\nafter\n"


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    path = tmp_path / "README.md"
    path.write_text(TEXT)
    return path


def decision(**changes):
    base = {"statement": "SinKD is best", "rule": "eval/accuracy: arm=sinkhorn − arm=kl > 0, over seed"}
    return base | {"ours": 0.03125, "interval": [0.01, 0.05], "verdict": "agrees in direction"} | changes


def exhibit(paper, name, profile, *decisions, picture=False):
    path = records.write_exhibit(paper, name, profile, claims=decisions or [decision()], table=[])
    if picture:
        path.with_suffix(".svg").write_text("<svg/>")
        cells = [{"source": ["# Title"]}, {"source": ["**Reading.** One doubt.\n", f"Another of {name}."]}]
        notebook = paths.NOTEBOOKS / paper / f"{name}.ipynb"
        notebook.parent.mkdir(parents=True, exist_ok=True)
        notebook.write_text(json.dumps({"cells": cells}))


def test_a_claim_becomes_a_row_with_a_link_to_its_notebook(page):
    exhibit("sinkd", "table_encoder", "default")
    readme.rewrite(page)
    assert (
        "### SinKD\n\n| exhibit | claim | ours | verdict | profile |\n|---|---|---|---|---|\n"
        "| [table_encoder](notebooks/sinkd/table_encoder.ipynb) | SinKD is best<br><sub>eval/accuracy: arm=sinkhorn − "
        "arm=kl > 0, over seed</sub> | 0.0312 [0.01, 0.05] | agrees in direction | default |\n"
    ) in page.read_text()


def test_the_text_around_the_markers_stays(page):
    exhibit("sinkd", "table_encoder", "default")
    readme.rewrite(page)
    text = page.read_text()
    assert text.startswith("# limbeck\n\n<!-- claims:begin -->\n\n### SinKD")
    assert text.endswith(" |\n\n<!-- claims:end -->\n\nafter\n")
    assert "old" not in text


def test_profiles_stand_in_order_and_smoke_never(page):
    for profile in ("smoke", "paper", "full", "default"):
        exhibit("sinkd", "table_encoder", profile)
    exhibit("nola", "table_cost", "smoke", picture=True)
    readme.rewrite(page)
    rows = [line for line in page.read_text().splitlines() if "table_encoder" in line]
    assert [row.split(" | ")[-1].rstrip(" |") for row in rows] == ["default", "full", "paper"]
    assert "smoke" not in page.read_text() and "NOLA" not in page.read_text()


def test_exhibits_stand_together_within_their_paper(page):
    exhibit("kdrl", "table_methods", "default")
    exhibit("sinkd", "fig_toy", "full", picture=True)
    exhibit("sinkd", "table_encoder", "default", picture=True)
    exhibit("sinkd", "fig_toy", "default", picture=True)
    readme.rewrite(page)
    text = page.read_text()
    assert text.index("### SinKD") < text.index("### KDRL")
    assert text.index("[fig_toy]") < text.index("[table_encoder]")
    assert text.count("![") == 2
    pictures = (
        "![sinkd, fig_toy](results/default/sinkd/fig_toy.svg)\n\n**fig_toy.** One doubt. Another of fig_toy.\n\n"
        "![sinkd, table_encoder](results/default/sinkd/table_encoder.svg)\n\n**table_encoder.** One doubt. Another of"
    )
    assert text.index("[table_encoder](notebooks") < text.index(pictures) < text.index("### KDRL")


def test_a_picture_of_the_full_profile_stands_in_where_default_has_none(page):
    exhibit("nola", "fig_rank", "default")
    exhibit("nola", "fig_rank", "full", picture=True)
    readme.rewrite(page)
    assert "![nola, fig_rank](results/full/nola/fig_rank.svg)" in page.read_text()


def test_missing_values_and_bars_do_not_break_the_table(page):
    rows = [decision(ours=None, interval=None, verdict="not tested"), decision(ours=2, interval=None)]
    exhibit("sinkd", "table_encoder", "default", *rows, decision(statement="|s - t|\nis  small"))
    readme.rewrite(page)
    lines = [line for line in page.read_text().splitlines() if line.startswith("| [")]
    assert [line.split(" | ")[2] for line in lines] == ["–", "2", "0.0312 [0.01, 0.05]"]
    assert r"\|s - t\| is small" in lines[2]


def test_writing_twice_changes_nothing_and_touches_nothing(page):
    exhibit("sinkd", "table_encoder", "default", picture=True)
    readme.rewrite(page)
    before, stamp = page.read_bytes(), page.stat()
    readme.rewrite(page)
    assert page.read_bytes() == before
    assert (page.stat().st_ino, page.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    assert sorted(file.name for file in page.parent.iterdir()) == ["README.md", "notebooks", "results"]


def test_without_exhibits_the_page_says_how_to_get_them(page):
    readme.rewrite(page)
    assert "`make reproduce`" in page.read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        readme.BEGIN,
        readme.END,
        f"{readme.END}{readme.BEGIN}",
        f"{readme.BEGIN}{readme.END}{readme.BEGIN}{readme.END}",
    ],
)
def test_a_page_without_its_markers_is_refused_and_kept(page, text):
    page.write_text(text)
    with pytest.raises(ValueError, match="expected <!-- claims:begin --> and then <!-- claims:end --> once"):
        readme.rewrite(page)
    assert page.read_text() == text
