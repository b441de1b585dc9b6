import math

import pytest

from limbeck.evaluation import text_overlap


def test_bleu_of_copies_is_100_and_of_other_words_0():
    texts = ["there are two hotels in town", "no trains leave today at all"]
    assert text_overlap.bleu(texts, [[text] for text in texts]) == pytest.approx(100)
    assert text_overlap.bleu(["x y z w v"], [["a b c d e"]]) == pytest.approx(0, abs=5)


def test_bleu_is_the_geometric_mean_of_clipped_precisions_over_the_corpus():
    """By hand: 4-, 3-, 2- and 1-grams that some reference holds, over all; no shorter than the nearest reference."""
    texts = ["a b c d e", "a b c x d"]
    references = [["a b c d q", "z z z d e"], ["a b c d d"]]
    matches, totals = [(5 + 4), (4 + 2), (2 + 1), (1 + 0)], [10, 8, 6, 4]
    expected = 100 * math.exp(sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / 4)
    assert text_overlap.bleu(texts, references) == pytest.approx(expected)


def test_the_brevity_penalty_takes_the_reference_of_nearest_length():
    texts, near, far = ["a b c d"], "a b c d e", "a b c d e f g h i j"
    assert text_overlap.bleu(texts, [[far, near]]) == pytest.approx(100 * math.exp(1 - 5 / 4))


def test_unequal_numbers_of_references_belong_to_their_own_texts():
    """The second text has one reference; those of the first do not count for it."""
    first, second = "a b c d e f", "g h i j k l"
    mixed = text_overlap.bleu([first, second], [["q q q", first, second], ["a b c d e f"]])
    assert mixed == pytest.approx(text_overlap.bleu([first, second], [[first], [first]]))
    assert mixed < 60


def test_rouge_l_is_the_best_f_of_the_longest_common_subsequence():
    """LCS a c d of 4 and 5 words: P 3/4, R 3/5, F 2/3; the other reference shares one word."""
    expected = 100 * (2 * 0.75 * 0.6 / 1.35 + 1) / 2
    score = text_overlap.rouge_l(["a c d x", "one two"], [["q q a", "a b c d e"], ["one two"]])
    assert score == pytest.approx(expected)
    assert text_overlap.overlaps(["one two"], [["one two"]])["rouge_l"] == pytest.approx(100)


@pytest.mark.parametrize(("texts", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a"], [["a"], ["b"]])])
def test_texts_without_references_are_refused(texts, references):
    for score in (text_overlap.bleu, text_overlap.rouge_l):
        with pytest.raises(ValueError, match="expected texts, and at least one reference for each"):
            score(texts, references)
