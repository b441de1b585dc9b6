import json

import pytest
import torch

from limbeck import models
from limbeck.tasks import classification


@pytest.fixture
def encoded(tiny_bert, tiny_texts):
    found = classification.examples(tiny_texts)
    return classification.encode(found, models.load_tokenizer(tiny_bert), longest=9)[0]


def test_duplicates_are_kept_once_and_contradictions_dropped(tmp_path):
    rows = [("A b", "x"), ("a  B", "x"), ("c", "x"), ("c", "y"), ("d", "y")]
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert classification.examples(str(tmp_path)) == [("A b", "x"), ("d", "y")]


def test_a_data_set_without_the_columns_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"sentence": "a", "label": 1}))
    with pytest.raises(ValueError, match=r"columns text and label; \['text'\] not in"):
        classification.examples(str(tmp_path))


def test_user_acts_have_17_classes_and_no_text_twice():
    found = classification.examples("multiwoz_acts")
    assert len({example.label for example in found}) == 17
    assert len({" ".join(example.text.lower().split()) for example in found}) == len(found) == 33_324


def test_texts_over_the_limit_are_left_out_and_an_impossible_limit_refused(tiny_bert, tiny_texts):
    found, tokenizer = classification.examples(tiny_texts), models.load_tokenizer(tiny_bert)
    data, names = classification.encode(found, tokenizer, longest=6)
    assert names == ("x", "y", "z")
    assert data.lengths.max() <= 6
    assert len(data) == sum(len(example.text.split()) + 2 <= 6 for example in found)
    with pytest.raises(ValueError, match="no text has at most 2 tokens; the shortest has 5"):
        classification.encode(found, tokenizer, longest=2)


def test_splits_are_disjoint_random_and_of_the_asked_sizes(encoded):
    sizes = (20, 10, 5)
    parts = classification.split(encoded, sizes, seed=0)
    rows = [tuple(row) for part in parts for row in part.ids.tolist()]
    assert [len(part) for part in parts] == list(sizes)
    assert len(set(rows)) == sum(sizes)
    assert not torch.equal(classification.split(encoded, sizes, seed=1)[0].ids, parts[0].ids)
    with pytest.raises(ValueError, match="the data set has"):
        classification.split(encoded, (10**6,), seed=0)


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
