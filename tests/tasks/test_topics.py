from collections import Counter

import pytest

from limbeck import assets
from limbeck.tasks import topics


def test_both_parts_are_read_without_header_and_lines_without_a_topic(tmp_path, monkeypatch):
    header = "Category\tText\nd\tstring\nclass\t\n"
    (tmp_path / "r52-train.tab").write_text(header + "\t\ncocoa\tbahia cocoa\tfell\n", encoding="utf-8")
    (tmp_path / "r52-test.tab").write_text(header + "trade\tasian exporters\n", encoding="utf-8")
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    assert topics.pairs("r52") == [("bahia cocoa\tfell", "cocoa"), ("asian exporters", "trade")]


@pytest.mark.parametrize(("name", "texts", "classes"), [("r52", 6_532 + 2_568, 52), ("20ng", 11_293 + 7_528, 20)])
def test_the_collections_have_their_known_sizes(name, texts, classes):
    pairs = topics.pairs(name)
    assert len(pairs) == texts
    assert len(Counter(topic for _, topic in pairs)) == classes
    assert all(text.strip() for text, _ in pairs)
