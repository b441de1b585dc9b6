"""The files of the tasks of our own, read; small ones written by hand, and the fetched ones counted."""

from collections import Counter

import pytest

from limbeck import assets
from limbeck.tasks import labelled_texts


def test_the_label_is_the_sign_of_the_mean_and_what_is_near_neutral_is_dropped(tmp_path, monkeypatch):
    lines = ["1\t0.5\tfine", "2\t-0.5\tpoor", "3\t0.49\tmeh", "4\t-0.49\tmeh too", "5\t-3.9\tawful \u2028 film"]
    (tmp_path / "movie.txt").write_bytes("\r\n".join(lines).encode())
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    assert labelled_texts.opinions("vader_movie") == [
        ("fine", "positive"),
        ("poor", "negative"),
        ("awful \u2028 film", "negative"),
    ]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vader_movie", {"negative": 5_076, "positive": 4_996}),
        ("vader_tweets", {"positive": 2_345, "negative": 1_087}),
    ],
)
def test_the_files_hold_as_many_clear_opinions_as_the_readme_says(name, counts):
    assert Counter(label for _, label in labelled_texts.opinions(name)) == counts


def test_an_obvious_review_has_its_label():
    (label,) = {
        label for text, label in labelled_texts.opinions("vader_movie") if text.startswith("The Rock is destined to be")
    }
    assert label == "positive"


def test_both_parts_are_read_without_header_and_lines_without_a_topic(tmp_path, monkeypatch):
    header = "Category\tText\nd\tstring\nclass\t\n"
    (tmp_path / "r52-train.tab").write_text(header + "\t\ncocoa\tbahia cocoa\tfell\n", encoding="utf-8")
    (tmp_path / "r52-test.tab").write_text(header + "trade\tasian exporters\n", encoding="utf-8")
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    assert labelled_texts.topics("r52") == [("bahia cocoa\tfell", "cocoa"), ("asian exporters", "trade")]


@pytest.mark.parametrize(("name", "texts", "classes"), [("r52", 6_532 + 2_568, 52), ("20ng", 11_293 + 7_528, 20)])
def test_the_collections_have_their_known_sizes(name, texts, classes):
    pairs = labelled_texts.topics(name)
    assert len(pairs) == texts
    assert len(Counter(topic for _, topic in pairs)) == classes
    assert all(text.strip() for text, _ in pairs)
