"""How close texts come to what people wrote: corpus BLEU and ROUGE-L against several references each.

BLEU is sacrebleu's with its own defaults (13a tokens, case counts, exponential smoothing): 0 for a corpus without four
tokens in a row. ROUGE-L is the F of rouge-score, without stemming. Both know the words of spaced scripts alone, and
ROUGE-L those of ASCII; here a word has letters, digits and marks of any script, and a character of a script without
spaces (Chinese, Japanese, Thai and their neighbours) is a word.
"""

import re
import unicodedata
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff])"
)


class _Words:
    """What RougeScorer calls to cut a text; of ASCII it makes what rouge-score's own makes."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in _spaced(text)).split()


def _spaced(text: str) -> str:
    """A text in composed characters, those of scripts without spaces parted."""
    return _UNSPACED.sub(r" \1 ", unicodedata.normalize("NFC", text))


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in [0, 100]; texts may have unequal numbers of references.

    sacrebleu takes one stream per reference; where a text has fewer than another, None stands in its stream.
    Raises ValueError as `rouge_l`.
    """
    _check(texts, references)
    most = max(map(len, references))
    spaced = [[_spaced(reference) for reference in group] for group in references]
    streams = [[group[index] if index < len(group) else None for group in spaced] for index in range(most)]
    return BLEU().corpus_score(list(map(_spaced, texts)), streams).score


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The F measure of the longest common subsequence with the best reference, mean over texts, in [0, 100].

    A text without a word scores 0. Raises ValueError for a reference without one, for no texts or a text without
    references, and for a string where a list of strings is expected.
    """
    _check(texts, references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words)
    best = [
        max(scorer.score(reference.lower(), text.lower())["rougeL"].fmeasure for reference in group)
        for text, group in zip(texts, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def overlaps(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L by name, as records have them."""
    return {"bleu": bleu(texts, references), "rouge_l": rouge_l(texts, references)}


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    for name, group in (
        ("texts", texts),
        ("references", references),
        *(("a text's references", g) for g in references),
    ):
        if isinstance(group, str):
            raise ValueError(f"received {group!r} as {name}, expected a list; put a single one in brackets")
    if not len(texts) or len(texts) != len(references) or not all(map(len, references)):
        received = f"{len(texts)} texts and {[len(group) for group in references]} references"
        raise ValueError(f"received {received}, expected texts, and at least one reference for each")
    if empty := [reference for group in references for reference in group if not _Words.tokenize(reference)]:
        raise ValueError(f"received {empty[0]!r} as a reference, expected at least one word: leave it out")
