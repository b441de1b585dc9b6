"""A tokenizer whose tokens are single characters, for models that the pipeline trains from nothing."""

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

END = "[EOS]"


def tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token a character of the alphabet, in its order, then the end. Raises ValueError for a repeated character."""
    if len(set(alphabet)) < len(alphabet):
        raise ValueError(f"received the alphabet {alphabet!r}, expected every character once")
    inner = Tokenizer(WordLevel({name: number for number, name in enumerate([*alphabet, END])}, unk_token=""))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)
