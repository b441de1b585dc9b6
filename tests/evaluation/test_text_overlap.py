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


@pytest.mark.parametrize(
    "text",
    [
        "我喜欢我的猫",
        "猫が好きです。とても",
        "ฉันชอบแมวของฉัน",
        "я люблю свою кошку",
        "मुझे बिल्ली पसन्द है जी",
        "أنا أحب قطتي كثيرا",
        "나는 내 고양이를 좋아한다",
    ],
)
def test_equal_texts_of_any_script_score_100_and_others_of_it_less(text):
    other = "".join(reversed(text))
    assert text_overlap.overlaps([text], [[text]]) == {"bleu": pytest.approx(100), "rouge_l": pytest.approx(100)}
    assert text_overlap.rouge_l([other], [[text]]) < 60
    assert text_overlap.bleu([other], [[text]]) < 60


def test_a_character_of_chinese_is_a_word():
    """LCS of 4 in 5 and 6 characters: P 4/5, R 4/6."""
    assert text_overlap.rouge_l(["我喜欢猫吗"], [["我很喜欢猫。的"]]) == pytest.approx(
        100 * 2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6)
    )


def test_accents_and_vowel_signs_tell_words_apart_however_they_are_composed():
    assert text_overlap.rouge_l(["café"], [["cafe"]]) == 0.0
    assert text_overlap.rouge_l(["cafe\u0301"], [["caf\u00e9"]]) == pytest.approx(100)
    assert text_overlap.rouge_l(["की"], [["का"]]) == 0.0


def test_ascii_scores_as_with_rouge_scores_own_words():
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

    text, reference = "It's the [area]-hotel, No. 5's $3.50!\n_x_ a", "the hotel in [AREA] costs 3.50 -- it is no.5 x"
    own = RougeScorer(["rougeL"]).score(reference, text)["rougeL"].fmeasure
    assert text_overlap.rouge_l([text], [[reference]]) == 100 * own


@pytest.mark.parametrize("score", [text_overlap.bleu, text_overlap.rouge_l, text_overlap.overlaps])
@pytest.mark.parametrize(
    ("texts", "references", "message"),
    [
        (["a b"], ["a b"], r"received 'a b' as a text's references, expected a list; put a single one in brackets"),
        ("ab", [["a"], ["b"]], r"received 'ab' as texts, expected a list"),
        (["a", "b"], "ab", r"received 'ab' as references, expected a list"),
        (["a"], [["a", ""]], "received '' as a reference, expected at least one word: leave it out"),
        (["a", "b"], [["a"]], r"received 2 texts and \[1\] references"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(score, texts, references, message):
    with pytest.raises(ValueError, match=message):
        score(texts, references)


def test_a_text_that_says_nothing_scores_0():
    assert text_overlap.overlaps(["", "?!"], [["a b"], ["c"]]) == {"bleu": 0.0, "rouge_l": 0.0}
