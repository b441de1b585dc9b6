import json

import datasets
import pytest

from limbeck.tasks import classification

CONFIGURATIONS = {"cola", "sst2", "mrpc", "qqp", "qnli", "rte", "mnli"}  # the hub's, without those left out


def write(folder, files):
    """A copy of a task that `datasets` loads, {split: rows}; the part number in a name keeps the split's name whole."""
    (folder / "data").mkdir(parents=True)
    for split, rows in files.items():
        file = folder / "data" / f"{split}-00000-of-00001.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))


def rows(task, words, *, labels=(0, 1), first=0):
    columns = classification.GLUE_TASKS[task].columns
    return [
        {column: f"{words} {column} {number}" for column in columns}
        | {"label": labels[number % len(labels)], "idx": number}
        for number in range(first, first + 12)
    ]


@pytest.fixture
def copy(tmp_path):
    """A copy of every task, with unlabelled rows in train and a secret test split."""
    for task in CONFIGURATIONS - {"mnli"}:
        secret = rows(task, "secret", labels=(-1,))
        write(
            tmp_path / task, {"train": rows(task, "train") + secret, "validation": rows(task, "held"), "test": secret}
        )
    held = {f"validation_{genre}": rows("mnli", genre, labels=(0, 1, 2)) for genre in ("matched", "mismatched")}
    write(tmp_path / "mnli", {"train": rows("mnli", "train", labels=(0, 1, 2))} | held)
    return tmp_path


@pytest.mark.parametrize("task", classification.GLUE_TASKS)
def test_the_test_is_the_validation_split_and_validation_is_cut_from_train(copy, task):
    train, validation, test = classification.splits(f"glue/{task}@{copy}", (-1, 4, 5), seed=0)
    held = {"mnli": "matched", "mnli_mm": "mismatched"}.get(task, "held")
    columns = classification.GLUE_TASKS[task].columns
    assert [len(part) for part in (train, validation, test)] == [8, 4, 5]
    assert {example.text for example in train + validation} == {f"train {columns[0]} {n}" for n in range(12)}
    assert {example.text for example in test} < {f"{held} {columns[0]} {n}" for n in range(12)}
    if len(columns) == 2:
        assert all(example.second == example.text.replace(columns[0], columns[1]) for example in train + test)
    else:
        assert all(example.second is None for example in train + test)
    classes = 3 if task.startswith("mnli") else 2
    assert all(int(example.label) == int(example.text.split()[-1]) % classes for example in train + test)


def test_all_of_the_validation_split_may_be_the_test(copy):
    assert len(classification.splits(f"glue/rte@{copy}", (2, 2, -1), seed=0)[2]) == 12


def test_metrics_are_those_of_glue():
    other = {"cola": "matthews", "mrpc": "f1"}
    tasks = classification.GLUE_TASKS
    assert all(classification.metric(f"glue/{task}@x") == other.get(task, "accuracy") for task in tasks)


def test_without_a_folder_the_hub_is_asked_for_the_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        dataset = rows("mnli", "any")
        splits = ("train", "validation_matched", "validation_mismatched")
        return datasets.DatasetDict({split: datasets.Dataset.from_list(dataset) for split in splits})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    classification.splits("glue/mnli_mm", (4, 4, 4), seed=0)
    assert asked == [("nyu-mll/glue", "mnli")]


def test_what_is_no_copy_of_a_task_is_refused_with_what_was_found(copy, tmp_path):
    with pytest.raises(ValueError, match=r"received task 'stsb', expected one of \['cola'"):
        classification.glue_parts("glue/stsb")
    with pytest.raises(
        ValueError, match=r"received nowhere as a copy of nyu-mll/glue, expected the folder nowhere/rte"
    ):
        classification.glue_parts("glue/rte@nowhere")
    write(tmp_path / "one" / "rte", {"train": rows("rte", "a")})
    with pytest.raises(ValueError, match=r"expected a split validation .*, received the splits \['train'\]"):
        classification.glue_parts(f"glue/rte@{tmp_path / 'one'}")
    write(tmp_path / "two" / "rte", {"train": rows("sst2", "a"), "validation": rows("sst2", "a")})
    with pytest.raises(
        ValueError, match=r"expected a split train with \['sentence1', 'sentence2', 'label'\], received"
    ):
        classification.glue_parts(f"glue/rte@{tmp_path / 'two'}")
