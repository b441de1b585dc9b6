"""How close texts come to what people wrote: corpus BLEU and ROUGE-L against several references each.

BLEU is sacrebleu's with its own defaults (13a tokens, case counts, exponential smoothing); ROUGE-L is the F of
rouge-score, without stemming.
"""

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in [0, 100]; texts may have unequal numbers of references.

    sacrebleu takes one stream per reference; where a text has fewer than another, None stands in its stream.
    """
    _check(texts, references)
    most = max(map(len, references))
    streams = [[group[index] if index < len(group) else None for group in references] for index in range(most)]
    return BLEU().corpus_score(list(texts), streams).score


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The F measure of the longest common subsequence with the best reference, mean over texts, in [0, 100]."""
    _check(texts, references)
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(reference, text)["rougeL"].fmeasure for reference in group)
        for text, group in zip(texts, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def overlaps(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU and ROUGE-L by name, as records have them."""
    return {"bleu": bleu(texts, references), "rouge_l": rouge_l(texts, references)}


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not texts or len(texts) != len(references) or not all(references):
        received = f"{len(texts)} texts and {[len(group) for group in references]} references"
        raise ValueError(f"received {received}, expected texts, and at least one reference for each")
