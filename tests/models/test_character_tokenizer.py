import pytest

from limbeck.models import language

ALPHABET = "0123456789+-=; .,'"


def test_a_text_is_one_token_a_character_in_the_alphabets_order_and_comes_back_whole():
    tokenizer = language.character_tokenizer(ALPHABET)
    for text in (ALPHABET, "12-5=7;7+0=7", "", " 1 , 2 .", "===='."):
        tokens = tokenizer(text)["input_ids"]
        assert tokens == [ALPHABET.index(character) for character in text]
        assert tokenizer.decode(tokens) == text


def test_the_end_is_the_last_token_and_no_text_of_the_alphabet_holds_it():
    tokenizer = language.character_tokenizer(ALPHABET)
    assert len(tokenizer) == len(ALPHABET) + 1
    assert tokenizer.eos_token_id == len(ALPHABET)
    assert tokenizer.eos_token_id not in tokenizer(ALPHABET)["input_ids"]
    assert tokenizer.decode([0, tokenizer.eos_token_id]) == "0" + language.END


@pytest.mark.parametrize("text", ["a", "1a", "\n", "é", "１"])
def test_an_unknown_character_raises(text):
    with pytest.raises(Exception, match=r"Missing \[UNK\] token"):
        language.character_tokenizer(ALPHABET)(text)


def test_a_repeated_character_is_refused():
    with pytest.raises(ValueError, match="received the alphabet '0120', expected every character once"):
        language.character_tokenizer("0120")
