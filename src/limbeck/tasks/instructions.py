"""Instructions with their answers, and questions with a few answers to choose from, in words and in tokens.

Of meanings (`tasks.meanings`): the instruction names a meaning, the answer is what a person wrote for it. A question
has such a text and three that were written for other meanings of the same act, which have one slot exchanged for
another. Of each meaning that text is taken which makes the four most alike in words; none of the meanings is trained
on. Questions so made are no benchmark; they stand where the paper has MMLU.

Of `alpaca/<data set>`: instructions with answers; of `mmlu/<data set>`: questions of four answers, after five that are
answered, each asked for its letter. A data set is a hub name or a local folder.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from limbeck import seeding
from limbeck.tasks import classification, meanings
from limbeck.tasks.meanings import Meaning

ALPACA, MMLU = "alpaca/", "mmlu/"
WRONG = 3  # wrong answers to a question
_SHOTS, _LETTERS = 5, "ABCD"


class Asked(NamedTuple):
    """An instruction and its answer."""

    instruction: str
    text: str


class Question(NamedTuple):
    """What is asked, possible answers, and which is right; `plain`: the prompt stands as it is, no instruction."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    plain: bool = False


def load(
    data: str, questions: str, sizes: Sequence[int], *, train_texts: int, references: int, seed: int
) -> tuple[list[Asked], list[Asked], list[Question]]:
    """What is trained on, what the loss is measured on, and the questions.

    `sizes` count what the first and the second are drawn from, meanings or instructions, and the questions; of the
    first part `train_texts` texts are taken (-1: all), of each meaning of the second its first `references` texts.
    """
    if data.startswith(ALPACA):
        pool, held_out = classification.draw(_alpaca(data.removeprefix(ALPACA)), sizes[:2], seed=seed)
        (posed,) = classification.draw(_mmlu(questions.removeprefix(MMLU)), sizes[2:], seed=seed)
    else:
        train, validation, unseen = meanings.splits(data, [*sizes[:2], -1], seed=seed)
        pool = [Asked(instruction(meaning), text) for meaning in train for text in meaning.texts]
        held_out = [Asked(instruction(meaning), text) for meaning in validation for text in meaning.texts[:references]]
        posed = constructed(unseen, sizes[2], seed=seed)
    (drawn,) = classification.draw(pool, [train_texts], seed=seed)
    return drawn, held_out, posed


def require_pair(data: str, questions: str) -> None:
    """Raise ValueError unless questions are made of the same meanings, or are of MMLU after instructions of Alpaca."""
    expected = MMLU + "<data set>" if data.startswith(ALPACA) else data
    if not (questions.startswith(MMLU) if data.startswith(ALPACA) else questions == data):
        raise ValueError(f"received questions {questions!r} with data {data!r}, expected {expected!r}")


def instruction(meaning: Meaning) -> str:
    """The meaning as a request."""
    return f"Write the sentence for this meaning: {meanings.prompt(meaning).partition(chr(10))[0]}"


def near(one: Meaning, other: Meaning) -> bool:
    """Whether two meanings of an act differ in one slot, that stands in place of another."""
    more, less = set(one.slots) - set(other.slots), set(other.slots) - set(one.slots)
    return one.act == other.act and len(more) == len(less) == 1


def constructed(candidates: Sequence[Meaning], count: int, *, seed: int) -> list[Question]:
    """A question for each of the first `count` meanings that have three near ones among all that are given.

    Raises ValueError where there are fewer.
    """
    questions = []
    for meaning in candidates:
        others = [other for other in candidates if near(meaning, other)]
        if len(others) >= WRONG and len(questions) < count:
            questions.append(_question(meaning, others, seed))
    if len(questions) < count:
        raise ValueError(f"received {count} questions to make, expected at most {len(questions)} of these meanings")
    return questions


def _question(meaning: Meaning, others: Sequence[Meaning], seed: int) -> Question:
    source = seeding.generator(seed, "choices", meaning.act, *meaning.slots)
    chosen = [others[index] for index in torch.randperm(len(others), generator=source)[:WRONG].tolist()]
    nearest = [[min(other.texts, key=lambda text: _distance(text, gold)) for other in chosen] for gold in meaning.texts]
    totals = [sum(_distance(text, gold) for text in row) for row, gold in zip(nearest, meaning.texts, strict=True)]
    best = totals.index(min(totals))
    right_text, texts = meaning.texts[best], nearest[best]
    answer = int(torch.randint(WRONG + 1, (), generator=source))
    return Question(instruction(meaning), (*texts[:answer], right_text, *texts[answer:]), answer)


@functools.cache
def _words(text: str) -> Counter[str]:
    return Counter(text.lower().split())


def _distance(one: str, other: str) -> int:
    """How many words stand in one of two texts alone, each as often as it does."""
    words, others = _words(one), _words(other)
    return words.total() + others.total() - 2 * (words & others).total()


def _rows(name: str, split: str, columns: set[str], *options: str) -> list[dict[str, Any]]:
    dataset = classification.loaded(name, *options)
    if split not in dataset or not columns <= set(dataset[split].column_names):
        raise ValueError(f"data set {name}: expected a split {split} with {sorted(columns)}, received {dataset}")
    return dataset[split].to_list()


def _alpaca(name: str) -> list[Asked]:
    rows = _rows(name, "train", {"instruction", "input", "output"})
    pairs = (("\n\n".join(filter(None, (row["instruction"], row["input"]))), row["output"]) for row in rows)
    return [Asked(*row) for row in pairs if row[1]]


def _mmlu(name: str) -> list[Question]:
    columns, shots = {"question", "subject", "choices", "answer"}, {}
    local = Path(name).is_dir()  # there `datasets` calls the part of a file named dev "validation"
    options = () if local else ("all",)
    for row in _rows(name, "validation" if local else "dev", columns, *options):
        shots.setdefault(row["subject"], []).append(f"{_put(row)} {_LETTERS[row['answer']]}")
    return [_five_shot(row, shots) for row in _rows(name, "test", columns, *options)]


def _five_shot(row: dict[str, Any], shots: dict[str, list[str]]) -> Question:
    subject = row["subject"].replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {subject}."
    prompt = "\n\n".join([head, *shots.get(row["subject"], [])[:_SHOTS], _put(row)])
    return Question(prompt, tuple(_LETTERS), row["answer"], plain=True)


def _put(row: dict[str, Any]) -> str:
    options = (f"{letter}. {choice}" for letter, choice in zip(_LETTERS, row["choices"], strict=True))
    return "\n".join([row["question"], *options, "Answer:"])
