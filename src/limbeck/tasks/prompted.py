"""Classification as generation: a prompt, the words that may follow it, and which of them is right.

For our own tasks and data sets of texts and labels (classification.py), and for SuperGLUE's boolq, cb, copa, rte and
wic: `superglue/<task>` through the hub, `superglue/<task>@<folder>` from your own copy, split as GLUE is.

The templates are ours: the paper's prompts were not recovered. Every task counts accuracy; SuperGLUE's F1 of cb is
left out. R52's and 20NG's texts are cut to 200 characters, since whole ones are long; others are given whole.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from limbeck.tasks import classification

PREFIX = "superglue/"
_HUB = "aps/super_glue"
_TEMPLATES = {
    "vader_movie": "Review: {text}\nSentiment:",
    "vader_tweets": "Tweet: {text}\nSentiment:",
    "multiwoz_acts": "User: {text}\nAct:",
    "r52": "Article: {text:.200}\nTopic:",
    "20ng": "Post: {text:.200}\nTopic:",
}


class Prompted(NamedTuple):
    """`choices[answer]` is the right continuation; a choice starts with the space that parts it from the prompt."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


class Task(NamedTuple):
    """A template over a row's columns; the choices, in the order of the labels, are templates too."""

    columns: tuple[str, ...]
    template: str
    choices: tuple[str, ...]


SUPERGLUE = {
    "boolq": Task(("passage", "question"), "{passage}\nQuestion: {question}?\nAnswer:", (" no", " yes")),
    "cb": Task(
        ("premise", "hypothesis"),
        "{premise}\nQuestion: {hypothesis} True, false or unknown?\nAnswer:",
        (" true", " false", " unknown"),
    ),
    "copa": Task(
        ("premise", "choice1", "choice2", "question"),
        "{premise}\nQuestion: What was the {question}?\nAnswer:",
        (" {choice1}", " {choice2}"),
    ),
    "rte": Task(
        ("premise", "hypothesis"), "{premise}\nQuestion: {hypothesis} True or false?\nAnswer:", (" true", " false")
    ),
    "wic": Task(
        ("sentence1", "sentence2", "word"),
        '{sentence1}\n{sentence2}\nQuestion: Does "{word}" mean the same in both?\nAnswer:',
        (" no", " yes"),
    ),
}


def splits(name: str, sizes: Sequence[int], *, seed: int) -> list[list[Prompted]]:
    """Disjoint random prompts to train on, to validate on and to test on; sizes as in `classification.splits`."""
    if name.startswith(PREFIX):
        task, folder = classification.task_and_folder(name, SUPERGLUE)
        train, test = classification.load_suite(_HUB, task, folder, SUPERGLUE[task].columns, "validation")
        rows = classification.draw(train, sizes[:2], seed=seed) + classification.draw(test, sizes[2:], seed=seed)
        return [[_filled(SUPERGLUE[task], row) for row in part] for part in rows]
    if name.startswith(classification.GLUE):
        raise ValueError(f"received {name}, expected a task of superglue/: GLUE's labels are numbers, not words")
    parts = classification.splits(name, sizes, seed=seed)
    classes = classification.class_names(parts)
    choices = tuple(map(_words, classes))
    if len(set(choices)) < len(classes):
        raise ValueError(f"data set {name}: received classes {list(classes)}, expected no two of the same words")
    template = _TEMPLATES.get(name, "Text: {text}\nLabel:")
    return [
        [Prompted(template.format(text=example.text), choices, classes.index(example.label)) for example in part]
        for part in parts
    ]


def _words(label: str) -> str:
    """A class name as words that may follow a prompt: ` hotel inform` for Hotel-Inform."""
    return " " + re.sub(r"[-._]+", " ", label).strip().lower()


def _filled(task: Task, row: dict[str, Any]) -> Prompted:
    choices = tuple(choice.format(**row) for choice in task.choices)
    return Prompted(task.template.format(**row), choices, row["label"])
