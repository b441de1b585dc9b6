import itertools
import json
import re
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from limbeck import assets
from limbeck.models import encoders
from limbeck.tasks import classification

COUNTS = {
    "multiwoz_acts": (17, 33_324),
    "vader_movie": (2, 10_070),
    "vader_tweets": (2, 3_372),
    "r52": (52, 8_993),
    "20ng": (20, 18_781),
}


@pytest.fixture
def tokenizer(tiny_bert):
    return encoders.load_tokenizer(tiny_bert)


@pytest.fixture
def encoded(tokenizer, tiny_texts):
    return classification.encode(classification.examples(tiny_texts), tokenizer, longest=9, classes=("x", "y", "z"))


def test_duplicates_are_kept_once_and_contradictions_dropped(tmp_path):
    rows = [("A b", "x"), ("a  B", "x"), ("c", "x"), ("c", "y"), ("d", "y")]
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert classification.examples(str(tmp_path)) == [("A b", "x", None), ("d", "y", None)]


def test_a_data_set_without_the_columns_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"sentence": "a", "label": 1}))
    with pytest.raises(ValueError, match=r"columns text and label; \['text'\] not in"):
        classification.examples(str(tmp_path))


@pytest.mark.parametrize(
    "content",
    ["", "\0\0", '{"text": "a", "label": "x"}\n{"text": "b", "la', '{"text": 3, "label": "x"}', '{"text": null}'],
)
def test_a_file_that_is_no_data_is_refused_with_its_folder(tmp_path, content):
    (tmp_path / "train.jsonl").write_text(content)
    with pytest.raises(ValueError, match=f"data set {tmp_path}"):
        classification.examples(str(tmp_path))


def test_hidden_files_of_a_folder_and_rows_without_a_label_are_left_out(tmp_path):
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": None}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in (".hidden.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": "c", "label": "x"}))
    assert classification.examples(str(tmp_path)) == [("a", "x", None)]


@pytest.mark.parametrize("name", COUNTS)
def test_our_tasks_have_their_classes_and_no_text_twice(name):
    examples = classification.examples(name)
    classes, texts = COUNTS[name]
    assert len(classification.class_names([examples])) == classes
    assert len({" ".join(example.text.lower().split()) for example in examples}) == len(examples) == texts
    assert all(example.text and example.second is None for example in examples)
    assert classification.metric(name) == "accuracy"


def test_splits_are_disjoint_random_and_of_the_asked_sizes(tiny_texts):
    whole = set(classification.examples(tiny_texts))
    parts = classification.splits(tiny_texts, (20, 10, 5), seed=0)
    assert [len(part) for part in parts] == [20, 10, 5]
    assert len(set().union(*parts)) == 35
    assert set().union(*parts) <= whole
    assert classification.splits(tiny_texts, (20, 10, 5), seed=0) == parts
    assert classification.splits(tiny_texts, (20, 10, 5), seed=1)[0] != parts[0]
    assert set().union(*classification.splits(tiny_texts, (-1, 10, 5), seed=0)) == whole


def test_splits_do_not_depend_on_the_global_generators(tiny_texts, global_generators):
    before = classification.splits(tiny_texts, (20, 10, 5), seed=0)
    state = global_generators()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert classification.splits(tiny_texts, (20, 10, 5), seed=0) == before
    assert global_generators() == state


@pytest.mark.parametrize("sizes", [(9, 1, 1), (-1, -1, 2), (-2, 1, 1), (8, 2, -1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(
        ValueError, match=rf"received splits of {re.escape(str(list(sizes)))}, expected parts of 10 rows"
    ):
        classification.draw(range(10), sizes, seed=0)


def test_a_size_of_minus_one_takes_all_that_is_left():
    parts = classification.draw(range(10), (2, -1, 3), seed=0)
    assert [len(part) for part in parts] == [2, 5, 3]
    assert sorted(itertools.chain(*parts)) == list(range(10))


def test_texts_are_cut_to_the_limit_and_keep_their_end_token(tokenizer):
    examples = [classification.Example("a b c d e f", "y"), classification.Example("a b", "x")]
    data = classification.encode(examples, tokenizer, longest=5, classes=("x", "y"))
    assert [tokenizer.convert_ids_to_tokens(row) for row in data.ids] == [
        ["[CLS]", "a", "b", "c", "[SEP]"],
        ["[CLS]", "a", "b", "[SEP]", "[PAD]"],
    ]
    assert data.lengths.tolist() == [5, 4]
    assert data.labels.tolist() == [1, 0]


def test_of_a_pair_the_longer_sentence_is_cut_first(tokenizer):
    examples = [classification.Example("a b c d e f", "x", "g h"), classification.Example("a", "x", "g")]
    data = classification.encode(examples, tokenizer, longest=8, classes=("x",))
    assert tokenizer.convert_ids_to_tokens(data.ids[0]) == ["[CLS]", "a", "b", "c", "[SEP]", "g", "h", "[SEP]"]
    assert data.lengths.tolist() == [8, 5]


def test_a_label_that_is_no_class_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"received the labels \['q'\], expected some of \['x'\]"):
        classification.encode([classification.Example("a", "q")], tokenizer, longest=5, classes=("x",))


@pytest.mark.parametrize("name", COUNTS)
def test_reading_only_the_start_of_a_text_changes_no_token(name):
    tokenizer = encoders.load_tokenizer("minilm")
    (examples,) = classification.draw(classification.examples(name), (500,), seed=0)
    data = classification.encode(examples, tokenizer, longest=24, classes=classification.class_names([examples]))
    whole = tokenizer([example.text for example in examples], truncation=True, max_length=24)["input_ids"]
    assert [row[:length].tolist() for row, length in zip(data.ids, data.lengths, strict=True)] == whole


def test_classes_are_the_labels_of_all_parts_in_order():
    parts = [
        [classification.Example("a", "z")],
        [],
        [classification.Example("b", "x"), classification.Example("c", "z")],
    ]
    assert classification.class_names(parts) == ("x", "z")


def test_an_epoch_visits_every_row_once_with_little_padding(encoded):
    batches = classification.batches(encoded.lengths, size=8, seed=0, epoch=0)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(encoded)))
    padded = sum(len(rows) * int(encoded.lengths[rows].max()) for rows in batches)
    shuffled = torch.split(torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0)), 8)
    assert padded < sum(len(rows) * int(encoded.lengths[rows].max()) for rows in shuffled)


def test_epochs_and_seeds_order_the_rows_differently(encoded):
    orders = [
        torch.cat(classification.batches(encoded.lengths, size=8, seed=seed, epoch=epoch)).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(order) for order in orders}) == 3


def test_rows_are_cut_to_the_longest_of_them_and_masked_after_their_end(encoded):
    rows = torch.tensor([0, 1, 2])
    ids, mask = encoded.rows(rows)
    assert ids.shape == mask.shape == (3, int(encoded.lengths[rows].max()))
    assert torch.equal(mask.sum(1), encoded.lengths[rows])
    assert (ids[mask == 0] == 0).all()


def test_the_label_is_the_sign_of_the_mean_and_what_is_near_neutral_is_dropped(tmp_path, monkeypatch):
    lines = ["1\t0.5\tfine", "2\t-0.5\tpoor", "3\t0.49\tmeh", "4\t-0.49\tmeh too", "5\t-3.9\tawful \u2028 film"]
    (tmp_path / "movie.txt").write_bytes("\r\n".join(lines).encode())
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    assert classification.opinions("vader_movie") == [
        ("fine", "positive"),
        ("poor", "negative"),
        ("awful \u2028 film", "negative"),
    ]


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("vader_movie", {"negative": 5_076, "positive": 4_996}),
        ("vader_tweets", {"positive": 2_345, "negative": 1_087}),
    ],
)
def test_the_files_hold_as_many_clear_opinions_as_the_readme_says(name, counts):
    assert Counter(label for _, label in classification.opinions(name)) == counts


def test_an_obvious_review_has_its_label():
    (label,) = {
        label for text, label in classification.opinions("vader_movie") if text.startswith("The Rock is destined to be")
    }
    assert label == "positive"


def test_both_parts_are_read_without_header_and_lines_without_a_topic(tmp_path, monkeypatch):
    header = "Category\tText\nd\tstring\nclass\t\n"
    (tmp_path / "r52-train.tab").write_text(header + "\t\ncocoa\tbahia cocoa\tfell\n", encoding="utf-8")
    (tmp_path / "r52-test.tab").write_text(header + "trade\tasian exporters\n", encoding="utf-8")
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    assert classification.topics("r52") == [("bahia cocoa\tfell", "cocoa"), ("asian exporters", "trade")]


@pytest.mark.parametrize(("name", "texts", "classes"), [("r52", 6_532 + 2_568, 52), ("20ng", 11_293 + 7_528, 20)])
def test_the_collections_have_their_known_sizes(name, texts, classes):
    pairs = classification.topics(name)
    assert len(pairs) == texts
    assert len(Counter(topic for _, topic in pairs)) == classes
    assert all(text.strip() for text, _ in pairs)


def words(*, special=True, **options):
    """A tokenizer of four letters, as few as it can be."""
    inner = Tokenizer(
        WordLevel({w: n for n, w in enumerate(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "a", "b", "c", "d"])}, "[UNK]")
    )
    inner.pre_tokenizer = Whitespace()
    if special:
        marks = [("[CLS]", 2), ("[SEP]", 3)]
        inner.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **options)


def encode(texts, tokenizer, longest=9):
    items = [classification.Example(text, "x", *second) for text, *second in texts]
    return classification.encode(items, tokenizer, longest=longest, classes=("x",))


def test_padding_is_on_the_right_whatever_the_tokenizer_would_do_itself():
    left = words(pad_token="[PAD]", padding_side="left")
    left.backend_tokenizer.enable_padding(length=12)
    left.backend_tokenizer.enable_truncation(2)
    rows = encode([("a b c",), ("d",)], left, longest=6)
    assert rows.ids.tolist() == [[2, 4, 5, 6, 3, 1], [2, 7, 3, 1, 1, 1]]
    assert rows.rows(torch.tensor([0, 1]))[1].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("texts", "options", "longest", "message"),
    [
        ([("a",)], {}, 9, r"received .* without a pad token, expected one that has it; set its pad_token"),
        ([("a",), ("",)], {"special": False, "pad_token": "[PAD]"}, 9, "received the text '', expected one of at"),
        ([("a",)], {"pad_token": "[PAD]"}, 2, "received longest 2, expected 3 to"),
        ([("a", "b")], {"pad_token": "[PAD]"}, 3, "received longest 3, expected 4 to"),
        ([("a",)], {"pad_token": "[PAD]", "model_max_length": 8}, 9, "received longest 9, expected 3 to 8 tokens"),
        ([("a", "b"), ("c",)], {"pad_token": "[PAD]"}, 9, "received 2 texts and 1 second ones"),
        ([], {"pad_token": "[PAD]"}, 9, "received 0 texts"),
    ],
)
def test_what_cannot_be_encoded_is_refused(texts, options, longest, message):
    with pytest.raises(ValueError, match=message):
        encode(texts, words(**options), longest)
