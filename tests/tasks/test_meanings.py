import json
import re

import pytest

from limbeck.tasks import meanings
from limbeck.tasks.meanings import Meaning

COLUMNS = ("mr", "said")
HOTEL = Meaning("hotel inform", ("area", "name"))


def found_in(templates, monkeypatch):
    monkeypatch.setattr(meanings, "_read", lambda name: templates)
    return meanings.sentences("multiwoz_meanings", COLUMNS)


def test_a_sentence_must_say_each_slot_of_its_meaning_once_and_no_other(monkeypatch):
    texts = [
        "#HOTEL-INFORM-NAME# is in  the #HOTEL-INFORM-AREA# .",
        "#HOTEL-INFORM-NAME# is nice .",
        "#HOTEL-INFORM-NAME# , #HOTEL-INFORM-NAME# in the #HOTEL-INFORM-AREA# .",
        "#HOTEL-INFORM-NAME# in the #HOTEL-INFORM-AREA# , phone #HOTEL-INFORM-PHONE# .",
        "the ref # is #HOTEL-INFORM-NAME# , #HOTEL-INFORM-AREA#",
    ]
    expected = ["[name] is in the [area] .", "the ref # is [name] , [area]"]
    assert found_in({"Hotel-Inform": {"Name;Area;": texts}}, monkeypatch) == {HOTEL: expected}


def test_meanings_without_a_slot_or_with_one_twice_are_left_out(monkeypatch):
    groups = {
        "none;": ["Hello ."],
        "Name;Name;": ["#X-Y-NAME# or #X-Y-NAME# ?", "#X-Y-NAME# ."],
        "Name;": ["#X-Y-NAME# ."],
    }
    assert found_in({"X-Y": groups}, monkeypatch) == {Meaning("x y", ("name",)): ["[name] ."]}


def test_what_is_said_twice_comes_once_and_what_is_said_for_two_meanings_not_at_all(monkeypatch):
    templates = {
        "A": {"Ref;": ["The ref is #A-REF# .", "the  REF is #A-REF# .", "Done : #A-REF# ."]},
        "B": {"Ref;": ["The ref is #B-REF# ."]},
    }
    assert found_in(templates, monkeypatch) == {Meaning("a", ("ref",)): ["Done : [ref] ."]}


@pytest.mark.parametrize(
    ("name", "texts", "count", "most"),
    [("multiwoz_meanings", 7_448, 961, 9), ("camrest_meanings", 1_617, 99, 7)],
)
def test_the_collections_have_their_known_sizes_and_all_slots_are_said(name, texts, count, most):
    found = meanings.sentences(name, COLUMNS)
    assert (sum(map(len, found.values())), len(found)) == (texts, count)
    assert max(len(meaning.slots) for meaning in found) == most
    for meaning, said in found.items():
        assert all(sorted(re.findall(r"\[(\w+)\]", text)) == list(meaning.slots) != [] for text in said)
    keys = [" ".join(text.lower().split()) for said in found.values() for text in said]
    assert len(set(keys)) == len(keys)


def test_no_meaning_and_no_sentence_is_in_two_splits_and_each_meaning_has_all_its_sentences(global_generators):
    before = global_generators()
    parts = meanings.splits("camrest_meanings", (-1, 10, 20), columns=COLUMNS, seed=1)
    assert global_generators() == before
    assert [len(part) for part in parts] == [69, 10, 20]
    whole = meanings.sentences("camrest_meanings", COLUMNS)
    assert {meaning: said for part in parts for meaning, said in part.items()} == whole
    again = meanings.splits("camrest_meanings", (-1, 10, 20), columns=COLUMNS, seed=1)
    assert [list(part) for part in again] == [list(part) for part in parts]
    other = meanings.splits("camrest_meanings", (-1, 10, 20), columns=COLUMNS, seed=2)
    assert set(other[2]) != set(parts[2])


def test_neighbours_differ_in_one_slot():
    slots = [(), ("a",), ("b",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c"), ("a", "b", "d"), ("c", "d")]
    others = [Meaning(act, some) for act in ("x", "y") for some in slots]

    def near(one, other):
        """By the size of what is in one alone: 1, or 2 between as many slots."""
        apart = len(set(one) ^ set(other))
        return apart == 1 or (apart == 2 and len(one) == len(other))

    for some in slots:
        expected = [Meaning("x", other) for other in slots if near(some, other)]
        assert meanings.neighbours(Meaning("x", some), others) == expected


def test_a_meaning_is_written_as_its_act_and_slots():
    assert str(HOTEL) == "hotel inform: area, name"
    assert str(Meaning("name[Blue Spice]")) == "name[Blue Spice]"


def test_your_own_data_set_has_a_column_of_meanings_as_text_or_triples_and_one_of_sentences(tmp_path):
    rows = [
        {"mr": "name[Zizzi]", "said": "Zizzi ."},
        {"mr": "name[Zizzi]", "said": "It is Zizzi ."},
        {"mr": "name[Alimentum]", "said": "Go there ."},
    ]
    triples = [{"mr": [["A", "in", "B"], ["A", "is", "C"]], "said": "A , a C , is in B ."}]
    for folder, some in (("flat", rows), ("triples", triples)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_text("\n".join(map(json.dumps, some)))
    found = meanings.sentences(str(tmp_path / "flat"), COLUMNS)
    assert found == {Meaning("name[Alimentum]"): ["Go there ."], Meaning("name[Zizzi]"): ["It is Zizzi .", "Zizzi ."]}
    found = meanings.sentences(str(tmp_path / "triples"), COLUMNS)
    assert found == {Meaning("A : in : B | A : is : C"): ["A , a C , is in B ."]}
    with pytest.raises(ValueError, match=r"expected \['text'\] among them"):
        meanings.sentences(str(tmp_path / "flat"), ("mr", "text"))
