import json

import pytest

from limbeck import assets
from limbeck.tasks import meanings
from limbeck.tasks.meanings import Meaning

GROUPS = {
    "Hotel-NoOffer": {
        "Area;Type;": [
            "no #HOTEL-NOOFFER-TYPE#  in the #HOTEL-NOOFFER-AREA# .",
            "no #HOTEL-NOOFFER-TYPE# in the #HOTEL-NOOFFER-AREA# .",
            "no #HOTEL-NOOFFER-TYPE# there .",
            "no #HOTEL-NOOFFER-TYPE# , no #HOTEL-NOOFFER-TYPE# in the #HOTEL-NOOFFER-AREA# .",
            "phone # #HOTEL-NOOFFER-AREA# , #HOTEL-NOOFFER-TYPE#",
            "no #HOTEL-NOOFFER-TYPE# in the #HOTEL-NOOFFER-AREA# #HOTEL-NOOFFER-STARS# .",
            "no #HOTEL-INFORM-TYPE# in the #HOTEL-NOOFFER-AREA# .",
        ],
        "Type;Type;": ["#HOTEL-NOOFFER-TYPE# or #HOTEL-NOOFFER-TYPE# ?"],
        "none;": ["no ."],
    },
    "inform": {"area;": ["#INFORM-AREA#"]},
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    (tmp_path / "auto_system_template_nlg_camrest.json").write_text(json.dumps(GROUPS))
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)


def test_kept_are_texts_that_name_each_slot_once_and_no_other(small):
    texts = ("no [type] in the [area] .", "phone # [area] , [type]")
    assert meanings.meanings("camrest_meanings") == [
        Meaning("Hotel-NoOffer", ("area", "type"), texts),
        Meaning("inform", ("area",), ("[area]",)),
    ]


@pytest.mark.parametrize(
    ("name", "number", "texts"), [("multiwoz_meanings", 966, 7_925), ("camrest_meanings", 99, 1_617)]
)
def test_the_data_sets_have_the_sizes_that_are_told_and_their_own_texts_no_error(name, number, texts):
    every = meanings.meanings(name)
    assert len({(meaning.act, meaning.slots) for meaning in every}) == len(every) == number
    assert sum(len(meaning.texts) for meaning in every) == texts
    assert not any(meanings.slot_errors(meaning, text) for meaning in every for text in meaning.texts)


def test_no_meaning_of_one_part_is_in_another_and_the_seed_draws_them():
    parts = meanings.splits("camrest_meanings", (-1, 20, 30), seed=0)
    assert [len(part) for part in parts] == [49, 20, 30]
    named = [{(meaning.act, meaning.slots) for meaning in part} for part in parts]
    assert not named[0] & named[1]
    assert not (named[0] | named[1]) & named[2]
    assert meanings.splits("camrest_meanings", (-1, 20, 30), seed=0) == parts
    assert meanings.splits("camrest_meanings", (-1, 20, 30), seed=1) != parts


def test_a_prompt_is_the_act_in_words_and_its_slots():
    assert meanings.prompt(Meaning("Hotel-NoOffer", ("area", "type"), ())) == "hotel no offer: [area], [type]\nText:"
    assert meanings.prompt(Meaning("name[The Mill]", (), ())) == "name[The Mill]\nText:"


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("[name] in the [area] .", 0),
        ("[name]in[area]", 0),
        ("in the [area]", 1),
        ("", 2),
        ("[name] [name] [area]", 1),
        ("[name] [phone] [phone] [area]", 2),
        ("[Name] in the [area]", 2),
        ("[name] [area", 1),
    ],
)
def test_slot_errors_are_what_is_missing_what_comes_again_and_what_was_not_asked(text, errors):
    assert meanings.slot_errors(Meaning("inform", ("area", "name"), ()), text) == errors


def test_a_folder_is_a_data_set_in_its_own_parts(tmp_path):
    for part, number in (("train", 3), ("validation", 2), ("test", 2)):
        rows = [{"meaning": f"{part} {i}", "texts": ["a", "b", "a"]} for i in range(number)]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, validation, test = meanings.splits(str(tmp_path), (-1, 1, 2), seed=0)
    assert [meaning.act for meaning in (*train, *validation)] == ["train 0", "train 1", "train 2", "validation 0"]
    assert test == [Meaning("test 0", (), ("a", "b")), Meaning("test 1", (), ("a", "b"))]


def test_an_unknown_data_set_is_refused():
    with pytest.raises(ValueError, match="received data 'e2e', expected a folder, or one of multiwoz_meanings"):
        meanings.splits("e2e", (-1, 1, 1), seed=0)
