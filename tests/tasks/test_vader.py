from collections import Counter

import pytest

from limbeck import assets
from limbeck.tasks import vader


def test_the_label_is_the_sign_of_the_mean_and_what_is_near_neutral_is_dropped(tmp_path, monkeypatch):
    lines = ["1\t0.5\tfine", "2\t-0.5\tpoor", "3\t0.49\tmeh", "4\t-0.49\tmeh too", "5\t-3.9\tawful \u2028 film"]
    (tmp_path / "movie.txt").write_bytes("\r\n".join(lines).encode())
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    assert vader.pairs("vader_movie") == [
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
    assert Counter(label for _, label in vader.pairs(name)) == counts


def test_an_obvious_review_has_its_label():
    (label,) = {label for text, label in vader.pairs("vader_movie") if text.startswith("The Rock is destined to be")}
    assert label == "positive"
