import pytest

from limbeck import digests, params, paths, records
from limbeck.experiments.ledger import Ledger


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes data/awaiting.yaml."""
    monkeypatch.setattr(paths, "DATA", tmp_path)
    return (tmp_path / "awaiting.yaml").write_text


def test_without_a_file_nothing_awaits(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "DATA", tmp_path)
    assert records.awaiting() == {}
    assert records.awaiting_line("kdrl", "table_main", "default") == ""


def test_an_entry_is_told_in_one_line_for_its_own_profile_alone(write):
    write("default/kdrl/table_main: {commit: abc, reason: a fault}\n")
    assert records.awaiting_line("kdrl", "table_main", "full") == ""
    line = records.awaiting_line("kdrl", "table_main", "default")
    assert line == "The records of table_main are of earlier code (commit abc): a fault.\n"


def test_a_training_takes_its_own_entry_off_and_leaves_the_others_and_the_head(write, tmp_path):
    entry = "{commit: c, reason: r}"
    write(f"# Head.\ndefault/p/one: {entry}\nfull/p/one: {entry}\n")
    records.end_awaiting("default/p/other")
    assert set(records.awaiting()) == {"default/p/one", "full/p/one"}
    records.end_awaiting("default/p/one")
    assert records.awaiting() == {"full/p/one": {"commit": "c", "reason": "r"}}
    assert (tmp_path / "awaiting.yaml").read_text().startswith("# Head.\n")
    records.end_awaiting("full/p/one")
    assert records.awaiting() == {}


@pytest.mark.parametrize("text", ["a/b: {commit: c, reason: r}", "a/b/c: {commit: c}", "a/b/c: c"])
def test_an_entry_of_another_form_is_named(write, text):
    write(text)
    with pytest.raises(ValueError, match="expected profile/paper/experiment with commit and reason, got a/b"):
        records.awaiting()


@pytest.mark.slow
def test_the_records_that_do_not_stand_by_their_hash_are_exactly_those_that_are_listed():
    stale = set()
    for profile in ("default", "full"):
        for paper in ("kdrl", "nola", "sinkd"):
            for experiment in set(digests.experiments(paper)) & set(params.experiments(paper)):
                if profile in params.experiments(paper)[experiment]:
                    ledger = Ledger(paper, experiment, profile)
                    hashes = {records.cell_key(cell.coordinates): ledger.hash(cell) for cell in ledger.cells}
                    held = {key: record["hash"] for key, record in ledger.measured().items()}
                    stale |= {f"{profile}/{paper}/{experiment}"} if held != hashes else set()
    assert stale == set(records.awaiting())
