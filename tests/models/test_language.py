import os

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from limbeck import assets, models, paths
from limbeck.models import language

TEXTS = ["book a hotel", "book a taxi", "Book a hotel please"]


@pytest.fixture(scope="module")
def tokenizer():
    return language.load_tokenizer("t5-1x16", TEXTS)


def test_the_words_of_a_shape_are_those_that_occur_twice(tokenizer):
    assert set(tokenizer.get_vocab()) == {"[PAD]", "[EOS]", "[UNK]", "book", "a", "hotel"}
    assert tokenizer.decode(tokenizer("BOOK a taxi")["input_ids"]) == "book a [UNK]"
    again = language.load_tokenizer("t5-1x16", iter(TEXTS))
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "ends")
    assert language.load_tokenizer(str(tmp_path / "ends"), ()).eos_token == "[EOS]"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match=r"tokenizer of .*endless without an end token, expected one"):
        language.load_tokenizer(str(tmp_path / "endless"), ())


@pytest.mark.parametrize("name", ["llama-2x32", "t5-2x32"])
def test_a_shape_is_drawn_from_the_seed_and_leaves_the_global_state(name, tokenizer, global_generators):
    before = global_generators()
    first = language.load(name, tokenizer, seed=1).state_dict()
    assert global_generators() == before
    torch.rand(5)
    again, other = (language.load(name, tokenizer, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if first[key].ndim > 1)


@pytest.mark.parametrize("name", ["llama-2x64", "t5-2x64"])
def test_the_deviation_of_every_matrix_is_the_librarys_to_five_sigma(name, tokenizer):
    ours = language.load(name, tokenizer, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = type(ours)(ours.config)
    for (key, left), right in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if left.ndim > 1:  # both are estimates
            assert left.std().item() == pytest.approx(right.std().item(), rel=5 / left.numel() ** 0.5), key
        else:
            assert torch.equal(left, right), key


@pytest.mark.parametrize("name", ["llama-0x32", "t5-2x30", "t5-2x8"])
def test_a_shape_without_layers_or_whole_heads_is_refused(name, tokenizer):
    with pytest.raises(ValueError, match=f"divisible by 16, got {name}"):
        language.load(name, tokenizer, seed=0)


def test_the_first_layers_compute_what_they_computed_in_the_whole(tokenizer):
    whole = language.load("llama-3x32", tokenizer, seed=0)
    ids = torch.tensor([[3, 4, 5, 3]])
    states = whole(ids, output_hidden_states=True).hidden_states[2]
    student = language.keep_first_layers(whole, 2)
    expected = student.lm_head(student.model.norm(states))
    torch.testing.assert_close(student(ids).logits, expected)


@pytest.mark.parametrize("layers", [0, 4])
def test_more_layers_than_there_are_is_refused(layers, tokenizer):
    for cut in (language.keep_first_layers, language.train_last_layers):
        with pytest.raises(ValueError, match=f"between 1 and the model's 3, got {layers}"):
            cut(language.load("llama-3x32", tokenizer, seed=0), layers)
    with pytest.raises(ValueError, match=r"expected a decoder .* got T5"):
        language.keep_first_layers(language.load("t5-1x16", tokenizer, seed=0), 1)


def test_only_the_last_layers_and_the_norm_after_them_are_trained(tokenizer):
    model = language.train_last_layers(language.load("llama-3x32", tokenizer, seed=0), 1)
    names = set(models.trainable(model))
    assert names
    assert {name for name in names if not name.startswith("model.layers.2.")} == {"model.norm.weight"}


@pytest.mark.slow
@pytest.mark.skipif(not (paths.DATA / "raw" / "smollm2").is_dir(), reason="not fetched")
def test_smollm2_is_copied_once_and_knows_a_capital(tmp_path, monkeypatch):
    source = assets.path("smollm2")
    monkeypatch.setattr(paths, "DATA", tmp_path)
    (tmp_path / "raw").mkdir()
    os.symlink(source, tmp_path / "raw" / "smollm2")
    (tmp_path / "assets.yaml").write_text((paths.ROOT / "data" / "assets.yaml").read_text())
    tokenizer = language.load_tokenizer("smollm2", [])
    (folder,) = (tmp_path / "processed").iterdir()
    stamp = folder.stat().st_mtime_ns
    model = language.load("smollm2", tokenizer, seed=0)
    assert (folder.stat().st_mtime_ns, model.dtype) == (stamp, torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    with pytest.raises(ValueError, match=rf"received {folder}, in which files have changed, .* delete it to make it"):
        language.load("smollm2", tokenizer, seed=0)


TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ '[TURN]' }} \n{% endfor %}"


@pytest.mark.parametrize(
    ("eos", "config", "generation", "template", "expected"),
    [
        ("[EOS]", None, None, None, ["[EOS]"]),
        (None, "[A]", ["[B]", "[A]"], None, ["[A]", "[B]"]),
        ("[EOS]", "[A]", ["[A]", "[EOS]"], TURNS, ["[EOS]", "[A]", "[TURN]"]),
        (None, None, None, TURNS, ["[TURN]"]),
        ("[EOS]", None, None, TURNS.replace("[TURN]", "end of turn"), ["[EOS]"]),
        ("[EOS]", None, None, "{{ raise_exception('no such turns') }}", ["[EOS]"]),
        ("[EOS]", None, None, "{{ messages[0]['content'] }}[TURN]", ["[EOS]"]),
    ],
)
def test_every_end_that_tokenizer_configs_and_template_know(eos, config, generation, template, expected):
    words = Tokenizer(WordLevel({name: n for n, name in enumerate(["?", "[EOS]", "[A]", "[B]"])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token=eos)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[TURN]"]})
    tokenizer.chat_template = template
    number = tokenizer.convert_tokens_to_ids
    generation = generation and GenerationConfig(eos_token_id=[number(token) for token in generation])
    config = config and LlamaConfig(eos_token_id=number(config))
    assert language.end_tokens(tokenizer, config, generation) == tuple(map(number, expected))
    if eos is None and template is None:
        with pytest.raises(ValueError, match="received no end token from tokenizer, configs or chat template"):
            language.end_tokens(tokenizer, None)
        with pytest.raises(ValueError, match="without eos_token, expected one"):
            language.solution_end(tokenizer, chat=True)


def test_the_ends_of_a_named_model_are_read_from_its_folder(tmp_path, tokenizer):
    model = language.load("llama-1x16", tokenizer, seed=0)
    model.generation_config.eos_token_id = [1, 4]
    model.save_pretrained(tmp_path)
    configs = language.generation_configs(str(tmp_path))
    assert language.end_tokens(tokenizer, *configs) == (tokenizer.eos_token_id, 4)
    (tmp_path / "generation_config.json").unlink()
    assert language.end_tokens(tokenizer, *language.generation_configs(str(tmp_path))) == (tokenizer.eos_token_id,)
    assert language.generation_configs("llama-1x16") == []
