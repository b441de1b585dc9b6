import json

import datasets
import pytest

from limbeck.tasks import classification, prompted

ROWS = {
    "boolq": {"passage": "Bees make honey.", "question": "do bees make honey", "label": 1},
    "cb": {"premise": "It rained.", "hypothesis": "It was wet.", "label": 2},
    "copa": {"premise": "He fell.", "choice1": "I slept.", "choice2": "It hurt.", "question": "effect", "label": 1},
    "rte": {"premise": "A cat sat.", "hypothesis": "A cat stood.", "label": 1},
    "wic": {"sentence1": "Go to bed.", "sentence2": "A river bed.", "word": "bed", "label": 0},
}
EXPECTED = {
    "boolq": ("Bees make honey.\nQuestion: do bees make honey?\nAnswer:", (" no", " yes"), 1),
    "cb": ("It rained.\nQuestion: It was wet. True, false or unknown?\nAnswer:", (" true", " false", " unknown"), 2),
    "copa": ("He fell.\nQuestion: What was the effect?\nAnswer:", (" I slept.", " It hurt."), 1),
    "rte": ("A cat sat.\nQuestion: A cat stood. True or false?\nAnswer:", (" true", " false"), 1),
    "wic": ('Go to bed.\nA river bed.\nQuestion: Does "bed" mean the same in both?\nAnswer:', (" no", " yes"), 0),
}


@pytest.mark.parametrize("task", prompted.SUPERGLUE)
def test_a_superglue_row_becomes_a_prompt_and_its_right_answer(tmp_path, task):
    (tmp_path / task).mkdir()
    for split, labels in {"train": (None, None, -1), "validation": (None,), "test": (-1,)}.items():
        lines = [ROWS[task] | ({} if label is None else {"label": label}) for label in labels]
        (tmp_path / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    parts = prompted.splits(f"superglue/{task}@{tmp_path}", (1, 1, -1), seed=0)
    assert parts == [[prompted.Prompted(*EXPECTED[task])]] * 3


def test_without_a_folder_the_hub_is_asked_for_the_configuration(monkeypatch):
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        whole = datasets.Dataset.from_list([ROWS["copa"]] * 4)
        return datasets.DatasetDict({"train": whole, "validation": whole})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompted.splits("superglue/copa", (2, 2, 2), seed=0)
    assert asked == [("aps/super_glue", "copa")]


@pytest.mark.parametrize(
    ("name", "end", "known"),
    [
        ("vader_movie", "\nSentiment:", {" positive", " negative"}),
        ("vader_tweets", "\nSentiment:", {" positive", " negative"}),
        ("multiwoz_acts", "\nAct:", {" hotel inform", " general thank", " train request"}),
        ("r52", "\nTopic:", {" earn", " money fx"}),
        ("20ng", "\nTopic:", {" alt atheism", " comp sys ibm pc hardware"}),
    ],
)
def test_our_tasks_ask_for_the_words_of_their_labels(name, end, known):
    sizes = (2000, 20, 20)
    parts = prompted.splits(name, sizes, seed=0)
    examples = classification.splits(name, sizes, seed=0)
    choices = parts[0][0].choices
    assert known <= set(choices)
    assert not any(one != other and f"{other} ".startswith(f"{one} ") for one in choices for other in choices)
    for received, expected in zip(parts[1], examples[1], strict=True):
        assert received.prompt.endswith(end)
        assert expected.text[:150] in received.prompt
        assert received.choices == choices
        assert choices[received.answer].split() == expected.label.lower().replace("-", " ").replace(".", " ").split()


def test_long_posts_are_cut_and_reviews_are_not():
    posts, reviews = (prompted.splits(name, (300, 1, 1), seed=0)[0] for name in ("20ng", "vader_movie"))
    assert max(len(example.prompt) for example in posts) == len("Post: ") + 200 + len("\nTopic:")
    assert max(len(example.prompt) for example in reviews) > 250


def test_texts_and_labels_of_your_own_have_a_plain_prompt(tiny_texts):
    (example,) = prompted.splits(tiny_texts, (100, 20, 1), seed=0)[2]
    (wanted,) = classification.splits(tiny_texts, (100, 20, 1), seed=0)[2]
    assert example == (f"Text: {wanted.text}\nLabel:", (" x", " y", " z"), "xyz".index(wanted.label))


def test_classes_that_no_words_tell_apart_and_glue_are_refused(tmp_path):
    lines = [{"text": "a", "label": "x-y"}, {"text": "b", "label": "X.Y"}, {"text": "c", "label": "x-y"}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=r"received classes \['X.Y', 'x-y'\], expected no two of the same words"):
        prompted.splits(str(tmp_path), (1, 1, 1), seed=0)
    with pytest.raises(ValueError, match="received glue/rte, expected a task of superglue/"):
        prompted.splits("glue/rte", (1, 1, 1), seed=0)
