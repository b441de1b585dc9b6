"""Language models by name: decoders and encoder-decoders, whole, cut to their first layers, or small and untrained.

A name is an asset, a local folder, a hub name, or a shape: `llama-4x64` has 4 layers of width 64, `t5-2x64` as many in
each of its two stacks, both with weights drawn from a seed over the words of the texts at hand. SmolLM2 travels as
GGUF, which transformers reads slowly and cannot write; it is copied once to a plain float32 model in data/processed.

Left out: dropout, as in `models`; models come in evaluation mode.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import jinja2
import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from limbeck import assets, paths, seeding

END = "[EOS]"
_MARK = "MARK"
_QUANTISED, _SUMS = ("smollm2",), "sums.json"
_SHAPE = re.compile(r"(llama|t5)-(\d+)x(\d+)")
_HEAD_WIDTH, _INNER = 16, 4  # of the untrained ones: width of a head, and of the feed-forward part in widths
_STACKS = (("layers", "norm"), ("h", "ln_f"))  # Llama and its kin; GPT-Neo and its kin


def load_tokenizer(name: str, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a named model; of a shape, one whose tokens are the words that occur twice in `texts`.

    Raises ValueError for one without an end token, which no completion could ever reach.
    """
    if not _SHAPE.fullmatch(name):
        tokenizer = AutoTokenizer.from_pretrained(_source(name))
        if tokenizer.eos_token_id is None:
            raise ValueError(f"received the tokenizer of {name} without an end token, expected one: set its eos_token")
        return tokenizer
    words = Tokenizer(WordLevel(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    trainer = trainers.WordLevelTrainer(min_frequency=2, special_tokens=list(special.values()), show_progress=False)
    words.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def require_one_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless two tokenizers give every token the same number, and begin and pad with the same.

    What they end with may differ: that is what `rollouts.Run.teacher_ends` is for.
    """
    one, other = student.get_vocab(), teacher.get_vocab()
    if one != other:
        token = min(set(one.items()) ^ set(other.items()))[0]
        numbers = f"{token!r} is {one.get(token)} for the student and {other.get(token)} for the teacher"
        raise ValueError(f"received vocabularies of {len(one)} and {len(other)} tokens, expected equal ones; {numbers}")
    for name in ("bos_token", "pad_token"):
        left, right = getattr(student, name), getattr(teacher, name)
        if left != right:
            raise ValueError(f"received {name} {left!r} for the student and {right!r} for the teacher, expected one")


def end_tokens(
    tokenizer: PreTrainedTokenizerBase, *configs: PretrainedConfig | GenerationConfig | None
) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, those of the configs, that of a turn in the chat template.

    The tokenizer's own is first; `model.config` and `model.generation_config` are a model's.
    Raises ValueError where nobody knows one.
    """
    known = [getattr(owner, "eos_token_id", None) for owner in (tokenizer, *configs)] + [turn_end(tokenizer)]
    tokens = [token for each in known for token in (each if isinstance(each, list) else [each]) if token is not None]
    if not tokens:
        raise ValueError("received no end token from tokenizer, configs or chat template, expected tokenizer.eos_token")
    return tuple(dict.fromkeys(tokens))


def solution_end(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> int:
    """The token that ends a text to learn from: that of a turn if `chat`, or else the tokenizer's.

    Raises ValueError for a tokenizer without one.
    """
    token = turn_end(tokenizer) if chat else None
    token = tokenizer.eos_token_id if token is None else token
    if token is None:
        raise ValueError(f"received a {type(tokenizer).__name__} without eos_token, expected one: it ends a text")
    return token


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template ends an assistant's turn, if there is one."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:  # it takes no such turns
        return None
    _, mark, rest = text.rpartition(_MARK)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = (special | {*tokenizer.all_special_ids}) - {tokenizer.unk_token_id}
    tokens = tokenizer(rest, add_special_tokens=False)["input_ids"] if mark else []
    return next((token for token in tokens if token in special), None)


def generation_configs(name: str) -> list[PretrainedConfig | GenerationConfig]:
    """The configs of a named model that may know how its texts end; none of a shape."""
    if _SHAPE.fullmatch(name):
        return []
    source = _source(name)
    try:
        return [AutoConfig.from_pretrained(source), GenerationConfig.from_pretrained(source)]
    except OSError:  # a folder without one for generation
        return [AutoConfig.from_pretrained(source)]


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters: those of the alphabet, in its order, then the end.

    Raises ValueError for a repeated character.
    """
    if len(set(alphabet)) < len(alphabet):
        raise ValueError(f"received the alphabet {alphabet!r}, expected every character once")
    inner = Tokenizer(WordLevel({name: number for number, name in enumerate([*alphabet, END])}, unk_token=""))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)


def load(name: str, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """The named model in float32, or one of a shape, drawn by `seed` over the tokenizer's vocabulary."""
    if shape := _SHAPE.fullmatch(name):
        return _drawn(shape[1], int(shape[2]), int(shape[3]), tokenizer, seed)
    source = _source(name)
    seq2seq = AutoConfig.from_pretrained(source).is_encoder_decoder
    return (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(source, dtype=torch.float32)


def keep_first_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Cut a decoder to its first `layers` layers; embeddings, last norm and head stay. Returns the model.

    Raises ValueError unless 1 <= layers <= the model's.
    """
    stack, _ = _stack(model)
    if not 1 <= layers <= len(stack):
        raise ValueError(f"layers must be between 1 and the model's {len(stack)}, got {layers}")
    del stack[layers:]
    model.config.num_hidden_layers = layers
    return model


def train_last_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Freeze a decoder but for its last `layers` layers and its last norm. Returns the model.

    Raises ValueError unless 1 <= layers <= the model's.
    """
    stack, norm = _stack(model)
    if not 1 <= layers <= len(stack):
        raise ValueError(f"trained layers must be between 1 and the model's {len(stack)}, got {layers}")
    model.requires_grad_(False)
    for part in (*stack[-layers:], norm):
        part.requires_grad_(True)
    return model


def _stack(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    """The layers of a decoder, and the norm after them."""
    for layers, norm in _STACKS:
        if hasattr(model.base_model, layers):
            return getattr(model.base_model, layers), getattr(model.base_model, norm)
    raise ValueError(f"expected a decoder with its layers in .layers or .h, got {type(model).__name__}")


def _source(name: str) -> str:
    return str(_dequantised(name)) if name in _QUANTISED else assets.source(name)


def _dequantised(name: str) -> Path:
    """The folder with the float32 copy of an asset's GGUF; made where it is missing, whole or not at all.

    Raises ValueError for one whose files have changed since.
    """
    target = paths.DATA / "processed" / f"{name}-{assets.checksum(name)[:8]}"
    paths.clear(target.parent, name)
    if not target.is_dir():
        (file,) = paths.visible(assets.path(name), "*.gguf")
        with paths.scratch(target.parent, name) as temporary:
            finished = temporary / name
            _convert(file, finished)
            (finished / _SUMS).write_text(json.dumps(_sums(finished)), encoding="utf-8")
            try:
                finished.rename(target)
            except OSError:  # another process may have been faster
                if not target.is_dir():
                    raise
    if (target / _SUMS).is_file() and paths.read_json(target / _SUMS) != _sums(target):
        raise ValueError(
            f"received {target}, in which files have changed, expected them whole; delete it to make it anew"
        )
    return target


def _sums(folder: Path) -> dict[str, str]:
    """The sha256 of each file."""
    return {file.name: assets.file_sum(file) for file in paths.visible(folder) if file.name != _SUMS}


def _convert(file: Path, folder: Path) -> None:
    """Write a Llama in a GGUF file as a plain model in float32, with its tokenizer."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # else the copy would count as quantised, and could not be saved
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(quantised.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _drawn(kind: str, layers: int, width: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """An untrained model with tied embeddings; the library's own draw is discarded, the global generator left alone."""
    heads = width // _HEAD_WIDTH
    if not layers or not heads or width % _HEAD_WIDTH:
        raise ValueError(f"expected layers > 0 and a width divisible by {_HEAD_WIDTH}, got {kind}-{layers}x{width}")
    tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    common = tokens | {"vocab_size": len(tokenizer), "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):
        if kind == "t5":
            inner = {"d_model": width, "d_kv": _HEAD_WIDTH, "d_ff": _INNER * width, "num_heads": heads}
            start = {"num_layers": layers, "decoder_start_token_id": tokenizer.pad_token_id}
            model: PreTrainedModel = T5ForConditionalGeneration(T5Config(**common, **inner, **start))
        else:
            inner = {"hidden_size": width, "intermediate_size": _INNER * width, "num_attention_heads": heads}
            model = LlamaForCausalLM(LlamaConfig(**common, **inner, num_hidden_layers=layers))
    deviation = _t5_deviation(width) if kind == "t5" else lambda _: model.config.initializer_range
    generator = seeding.generator(seed, "weights")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, deviation(name), generator=generator)
    return model.eval()


def _t5_deviation(width: int) -> Callable[[str], float]:
    """T5's initial deviations: 1 for embeddings, else by fan-in; a query's stands in for attention's scale too."""
    special = {"shared": 1.0, "q": (width * _HEAD_WIDTH) ** -0.5, "wo": (_INNER * width) ** -0.5}
    return lambda name: special.get(name.split(".")[-2], width**-0.5)
