"""Texts for a frozen decoder, a prompt and what is said after it: the loss on them, and what the decoder says itself.

The loss is the mean of -log p over the target's tokens, the end token among them, over the whole vocabulary; the head
is computed at these positions alone. Where only the top layers are adapted, the states below them are computed once for
all texts (`states`) and a step begins there: exact for decoders that add nothing of a position to their input, Llama
and its kin, and refused for others.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from limbeck import models, sampling
from limbeck.experiments.nola.arms import Model
from limbeck.sampling import Tokens
from limbeck.training.supervised import Terms

_ROWS = 16  # texts that are read at once where nothing is learned


@dataclass(frozen=True)
class Pair:
    """A prompt and what is said after it, in tokens; the target ends in the end token unless it was cut."""

    prompt: Tokens
    target: Tokens

    @property
    def read(self) -> Tokens:
        """The tokens that the model reads: all but the last."""
        return (*self.prompt, *self.target)[:-1]


@dataclass(frozen=True)
class Texts:
    """Pairs, and what comes out below the last `layers` layers for each, [token, width]; without it, all layers run."""

    pairs: list[Pair]
    below: list[Tensor] | None = None
    layers: int = 0

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, chosen: Sequence[int]) -> "Texts":
        """Some of them."""
        below = None if self.below is None else [self.below[row] for row in chosen]
        return Texts([self.pairs[row] for row in chosen], below, self.layers)


@torch.no_grad()
def states(model: Model, pairs: Sequence[Pair], layers: int) -> list[Tensor]:
    """What comes out below the last `layers` layers for each text. Raises ValueError for another kind of decoder."""
    inner = _inner(model)
    if not hasattr(inner, "rotary_emb"):
        raise ValueError(f"received {type(inner).__name__} and layers {layers}, expected rotary positions, or layers 0")
    below, by_row = _view(inner, slice(0, -layers), last=False), {}
    for rows in by_length(pairs):
        ids, _ = sampling.padded([pairs[row].read for row in rows], model.device)
        hidden = below(input_ids=ids, use_cache=False).last_hidden_state
        by_row |= {row: hidden[index, : len(pairs[row].read)].clone() for index, row in enumerate(rows)}
    return [by_row[row] for row in range(len(pairs))]


def target_logits(model: Model, texts: Texts) -> tuple[Tensor, Tensor]:
    """The logits at each token of the targets, one text after another, and the tokens.

    Padding is on the right, where no token of a text sees it, so there is no mask.
    Raises ValueError for a model that changes its logits after the head.
    """
    inner = _inner(model)
    ids, _ = sampling.padded([pair.read for pair in texts.pairs], model.device)
    if not sampling.head_is_last(model, ids):
        raise ValueError(f"received a {type(base(model)).__name__}, expected a model whose logits are its head's")
    if texts.below is None:
        hidden = inner(input_ids=ids, use_cache=False).last_hidden_state
    else:
        above = _view(inner, slice(-texts.layers, None), last=True)
        hidden = above(inputs_embeds=pad_sequence(texts.below, batch_first=True), use_cache=False).last_hidden_state
    kept = [hidden[row, len(pair.prompt) - 1 : len(pair.read)] for row, pair in enumerate(texts.pairs)]
    tokens = torch.tensor([token for pair in texts.pairs for token in pair.target], device=hidden.device)
    return base(model).get_output_embeddings()(torch.cat(kept)).float(), tokens


def loss_of(model: Model, texts: Texts, dtype: torch.dtype, *, smoothing: float = 0.0) -> Callable[[Tensor], Terms]:
    """The mean of -log p over the targets' tokens of some rows, in nats; `smoothing` of it over all tokens alike."""

    def loss(rows: Tensor) -> Terms:
        with models.autocast(model.device, dtype):
            logits, tokens = target_logits(model, texts.rows(rows.tolist()))
        return {"loss/ce": F.cross_entropy(logits, tokens, label_smoothing=smoothing)}

    return loss


@torch.no_grad()
def mean_loss(model: Model, texts: Texts, dtype: torch.dtype) -> float:
    """The mean of -log p over all targets' tokens, in nats."""
    loss, total = loss_of(model, texts, dtype), 0.0
    with models.evaluating(model):
        for rows in by_length(texts.pairs):
            total += loss(torch.tensor(rows))["loss/ce"].item() * sum(len(texts.pairs[row].target) for row in rows)
    return total / sum(len(pair.target) for pair in texts.pairs)


def by_length(pairs: Sequence[Pair]) -> list[list[int]]:
    """All rows in batches of like length."""
    order = sorted(range(len(pairs)), key=lambda row: len(pairs[row].read))
    return [order[start : start + _ROWS] for start in range(0, len(order), _ROWS)]


@torch.no_grad()
def greedy_completions(
    model: Model, prompts: Sequence[Tokens], *, ends: Tokens, longest: int, dtype: torch.dtype
) -> list[tuple[int, ...]]:
    """The most probable token at each step after each prompt, until one of `ends`, left out, or `longest` tokens.

    An adapter is not merged: it is built once, and costs two thin products per layer.
    """
    completions: list[list[int]] = [[] for _ in prompts]
    alive, cache = list(range(len(prompts))), DynamicCache(config=model.config)
    ids, seen = sampling.padded(prompts, model.device, left=True)
    positions, last = (seen.cumsum(1) - 1).clamp_min(0), torch.tensor(ends, device=model.device)
    for _ in range(longest):
        inputs = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache, "logits_to_keep": 1}
        with models.autocast(model.device, dtype):
            chosen = models.likeliest(model(input_ids=ids, **inputs).logits[:, -1])
        going = (chosen[:, None] != last).all(1).nonzero()[:, 0]
        alive = [alive[index] for index in going.tolist()]
        for row, token in zip(alive, chosen[going].tolist(), strict=True):
            completions[row].append(token)
        if not alive:
            break
        cache.batch_select_indices(going)
        ids, seen = chosen[going, None], torch.cat([seen[going], seen.new_ones(len(going), 1)], 1)
        positions = seen.sum(1, keepdim=True) - 1
    return [tuple(tokens) for tokens in completions]


@torch.no_grad()
def beam_completions(
    model: Model, prompts: Sequence[Tokens], *, ends: Tokens, longest: int, dtype: torch.dtype, beams: int
) -> list[tuple[int, ...]]:
    """The same by the beam search of transformers: of the finished texts that with the largest log p / length^0.8.

    No four tokens occur twice in a row, the prompt's among them. Both numbers are of LoRA's release for GPT-2.
    """
    options = {"num_beams": beams, "length_penalty": 0.8, "no_repeat_ngram_size": 4, "max_new_tokens": longest}
    options |= {"do_sample": False, "repetition_penalty": 1.0, "eos_token_id": list(ends), "pad_token_id": ends[0]}
    completions: list[tuple[int, ...]] = []
    for start in range(0, len(prompts), _ROWS):
        ids, seen = sampling.padded(prompts[start : start + _ROWS], model.device, left=True)
        with models.autocast(model.device, dtype):
            texts = model.generate(input_ids=ids, attention_mask=seen, **options)[:, ids.shape[1] :].tolist()
        completions += [tuple(itertools.takewhile(lambda token: token not in ends, text)) for text in texts]
    return completions


def base(model: Model) -> PreTrainedModel:
    """The model without the wrapper of an adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _inner(model: Model) -> PreTrainedModel:
    return base(model).base_model


def _view(inner: PreTrainedModel, part: slice, *, last: bool) -> PreTrainedModel:
    """The decoder with some of its own layers alone, with or without the norm after the last; weights are shared."""
    view = copy.copy(inner)
    view._modules = dict(inner._modules, layers=inner.layers[part])
    if not last:
        view._modules["norm"] = nn.Identity()
    return view
