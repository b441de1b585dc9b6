import math
import random
from collections import Counter

import pytest

from limbeck import text_scores

WORDS = ("the", "ref", "is", "booked", ",", ".", "[name]", "[area]", "Yes")


@pytest.fixture
def corpus():
    """Texts and references that share some words: of the texts' own words, one to four each."""
    source = random.Random(0)
    texts = [" ".join(source.choices(WORDS, k=source.randint(4, 12))) for _ in range(30)]
    references = []
    for text in texts:
        words = text.split()
        some = [
            [w if source.random() < 0.8 else source.choice(WORDS) for w in words] for _ in range(source.randint(1, 4))
        ]
        references.append([" ".join(kept[source.randint(0, 1) :]) for kept in some])
    return texts, references


def grams(words, n):
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def corpus_bleu(texts, references):
    """Papineni et al. 2002, without smoothing: clipped counts, the closest reference length (of equals the shorter)."""
    hits, totals, said, meant = [0] * 4, [0] * 4, 0, 0
    for text, some in zip(texts, references, strict=True):
        words, others = text.split(), [reference.split() for reference in some]
        said += len(words)
        meant += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, 5):
            most = Counter()
            for other in others:
                most |= grams(other, n)
            hits[n - 1] += (grams(words, n) & most).total()
            totals[n - 1] += grams(words, n).total()
    penalty = min(1.0, math.exp(1 - meant / said))
    return 100 * penalty * math.exp(sum(math.log(hit / total) for hit, total in zip(hits, totals, strict=True)) / 4)


def subsequence(one, other):
    """The length of the longest common subsequence, by recursion on the first words."""
    table = {}

    def longest(i, j):
        if (i, j) not in table:
            if i == len(one) or j == len(other):
                table[i, j] = 0
            elif one[i] == other[j]:
                table[i, j] = 1 + longest(i + 1, j + 1)
            else:
                table[i, j] = max(longest(i + 1, j), longest(i, j + 1))
        return table[i, j]

    return longest(0, 0)


def test_bleu_is_the_corpus_formula_with_a_placeholder_as_one_word(corpus):
    pytest.importorskip("sacrebleu")
    assert text_scores.bleu(*corpus) == pytest.approx(corpus_bleu(*corpus), rel=1e-9)
    assert text_scores.bleu(["a b [c] d e"], [["x y z", "a b [c] d e"]]) == pytest.approx(100)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_of_the_best_reference(corpus):
    pytest.importorskip("rouge_score")
    texts, references = corpus
    expected = []
    for text, some in zip(texts, references, strict=True):
        scores = []
        for reference in some:
            one, other = ([w.lower() for w in x.split() if w not in ",."] for x in (text, reference))
            common = subsequence(one, other)
            scores.append(2 * common / (len(one) + len(other)))
        expected.append(max(scores))
    assert text_scores.rouge_l(texts, references) == pytest.approx(100 * sum(expected) / len(expected), rel=1e-9)


@pytest.mark.parametrize("score", [text_scores.bleu, text_scores.rouge_l])
@pytest.mark.parametrize("references", [[], [["a"]], [["a"], []]])
def test_every_text_needs_a_reference(score, references):
    pytest.importorskip("sacrebleu" if score is text_scores.bleu else "rouge_score")
    with pytest.raises(ValueError, match="expected at least one text and one each"):
        score(["a", "b"], references)


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("[name] is in the [area]", 0),
        ("[Area] : [ name ]", 0),
        ("[name]", 1),
        ("name area", 2),
        ("[name] [name] [area]", 1),
        ("[name] [area] [phone] [post]", 2),
        ("[phone]", 3),
        ("", 2),
    ],
)
def test_slot_errors_are_those_missed_and_those_invented(text, errors):
    assert text_scores.slot_error_rate([text], [("area", "name")]) == errors / 2
    assert text_scores.slot_error_rate([text, "[ref]"], [("area", "name"), ("ref",)]) == errors / 3


def test_meanings_without_slots_have_no_slot_errors():
    with pytest.raises(ValueError, match="expected at least one slot"):
        text_scores.slot_error_rate(["a"], [()])
