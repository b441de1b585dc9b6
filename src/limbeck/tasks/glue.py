"""GLUE's classification tasks: `glue/<task>` through the hub, `glue/<task>@<folder>` from your own copy.

A copy is a folder in which `datasets` can load <folder>/<task> with the hub's columns and splits. The labels of GLUE's
test split are secret: its validation split is the test here, and our validation is cut from its train split. `mnli` is
tested on the matched genres, `mnli_mm` on the others. Rows are kept as they come, so a text may occur twice.

Left out: stsb (a regression), wnli and ax, and the second of two metrics where GLUE has two.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = "glue/"
_HUB = "nyu-mll/glue"


class Task(NamedTuple):
    """The column or columns of the sentences, the metric, and the split that is the test."""

    columns: tuple[str, ...]
    metric: str = "accuracy"
    test: str = "validation"


TASKS = {
    "cola": Task(("sentence",), "matthews"),
    "sst2": Task(("sentence",)),
    "mrpc": Task(("sentence1", "sentence2"), "f1"),
    "qqp": Task(("question1", "question2")),
    "qnli": Task(("question", "sentence")),
    "rte": Task(("sentence1", "sentence2")),
    "mnli": Task(("premise", "hypothesis"), test="validation_matched"),
    "mnli_mm": Task(("premise", "hypothesis"), test="validation_mismatched"),
}


def task_and_folder(name: str, tasks: Collection[str]) -> tuple[str, str]:
    """The two parts of `suite/task@folder`; the folder is empty for the hub. Raises ValueError for an unknown task."""
    task, _, folder = name.partition("/")[2].partition("@")
    if task not in tasks:
        raise ValueError(f"data set {name}: received task {task!r}, expected one of {sorted(tasks)}")
    return task, folder


def load(hub: str, task: str, folder: str, columns: Sequence[str], test: str) -> list[list[dict[str, Any]]]:
    """The rows of the train split and of the one named `test`, without those that have no label (-1)."""
    from datasets import load_dataset  # noqa: PLC0415  (slow, and only needed here)

    if folder and not Path(folder, task).is_dir():
        raise ValueError(f"received {folder} as a copy of {hub}, expected the folder {Path(folder, task)} in it")
    dataset = load_dataset(str(Path(folder, task))) if folder else load_dataset(hub, task)
    parts = []
    for split in ("train", test):
        if split not in dataset or not {*columns, "label"} <= set(dataset[split].column_names):
            received = dataset[split].column_names if split in dataset else f"the splits {sorted(dataset)}"
            raise ValueError(f"{hub} {task}: expected a split {split} with {[*columns, 'label']}, received {received}")
        parts.append([row for row in dataset[split].to_list() if row["label"] != -1])
    return parts


def parts(name: str) -> list[list[tuple[str, str, str | None]]]:
    """(text, label, second text of a pair) of GLUE's train split and of our test."""
    task, folder = task_and_folder(name, TASKS)
    columns, _, test = TASKS[task]
    return [
        [(row[columns[0]], str(row["label"]), row[columns[1]] if len(columns) == 2 else None) for row in rows]
        for rows in load(_HUB, task.removesuffix("_mm"), folder, columns, test)
    ]


def metric(name: str) -> str:
    """The metric of a task, as `evaluation.classifier.score` names it."""
    return TASKS[task_and_folder(name, TASKS)[0]].metric
