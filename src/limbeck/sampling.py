"""Completions of prompts from a decoder, and the log-probability of each of their tokens.

Whoever samples for a training loop is a `Sampler`: `Sampled` is the one that is built in, on transformers' cache. One
uniform number decides a token, by inverse CDF, and depends only on (seed, prompt, sample, position): so neither the
batch that a prompt stands in, nor a restart, nor a sample that ended changes another sample (up to rounding).

A prompt is read once, for all its completions; a completion that has ended leaves the batch and the cache. Sampling and
scoring share one temperature, and nothing is cut off (no top-p, no top-k): other log-probabilities than those sampled
from would make the ratio of policies wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from limbeck import models, seeding

Tokens = tuple[int, ...]
Decoder = PreTrainedModel | PeftModel
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # Gemma 2, Cohere, Granite
_MANTISSA = 53  # bits of a float64


class Completions(NamedTuple):
    """What was sampled, one row per completion, those of a prompt next to each other; padded on the right.

    `logprobs` are those of the sampler, 0 outside the mask; `ended` says which completions hold the end token (the
    others were cut).
    """

    tokens: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]
    ended: Bool[Tensor, " batch"]

    def rows(self) -> list[Tokens]:
        """The completions without padding."""
        return [tuple(row[row_mask].tolist()) for row, row_mask in zip(self.tokens, self.mask, strict=True)]


@runtime_checkable
class Sampler(Protocol):
    """Anything that samples completions: a server of a larger model too, if it returns their log-probabilities."""

    temperature: float

    def __call__(
        self, prompts: Sequence[Tokens], names: Sequence[str | int], *, group_size: int, longest: int, seed: int
    ) -> Completions:
        """`group_size` completions of each prompt, of at most `longest` tokens; `names` tell prompts' streams apart."""


@dataclass(frozen=True)
class Sampled:
    """The built-in `Sampler`. `end` is the token that ends a completion, and is part of it."""

    model: Decoder
    end: int
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _require_temperature(self.temperature)

    def __call__(
        self, prompts: Sequence[Tokens], names: Sequence[str | int], *, group_size: int, longest: int, seed: int
    ) -> Completions:
        """Raises ValueError for an empty prompt, one too long for the model, a group or length below 1."""
        require_room(self.model, prompts, longest)
        if group_size < 1 or len(names) != len(prompts):
            received = f"group_size {group_size} and {len(names)} names of {len(prompts)} prompts"
            raise ValueError(f"received {received}, expected at least 1 and one name a prompt")
        uniforms = torch.stack([uniform(seed, name, i, longest) for name in names for i in range(group_size)])
        return _decode(self, prompts, uniforms.to(self.model.device), group_size)


def uniform(seed: int, name: str | int, sample: int, longest: int) -> Float[Tensor, " longest"]:
    """The numbers in [0, 1) that decide the tokens of one completion, in float64."""
    words = seeding.bits(seed, "rollout", name, sample, n=longest) >> (64 - _MANTISSA)
    return torch.from_numpy(words.astype("float64")) / 2**_MANTISSA


def choose(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], temperature: float
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The token at which the CDF passes the uniform number, and its log-probability.

    Sums are in float64; a token of probability 0 is never chosen.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


@torch.no_grad()
def _decode(sampler: Sampled, prompts: Sequence[Tokens], uniforms: Tensor, group_size: int) -> Completions:
    """Prompts on the left of a common edge, then one token per step for all that have not ended."""
    model, device = sampler.model, sampler.model.device
    tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
    logprobs, mask = torch.zeros(uniforms.shape, device=device), torch.zeros_like(tokens, dtype=torch.bool)
    ended = torch.zeros(len(uniforms), dtype=torch.bool, device=device)
    ids, seen = padded(prompts, device, left=True)
    cache = DynamicCache(config=model.config)
    with models.autocast(device, sampler.dtype):
        positions = (seen.cumsum(1) - 1).clamp_min(0)
        logits = _next(model, ids, seen, positions, cache).repeat_interleave(group_size, 0)
        cache.batch_repeat_interleave(group_size)
        seen, alive = seen.repeat_interleave(group_size, 0), torch.arange(len(uniforms), device=device)
        for position in range(uniforms.shape[1]):
            chosen, chosen_logprobs = choose(logits, uniforms[alive, position], sampler.temperature)
            tokens[alive, position], logprobs[alive, position] = chosen, chosen_logprobs
            mask[alive, position] = True
            unfinished = chosen != sampler.end
            ended[alive[~unfinished]] = True
            if not unfinished.any() or position + 1 == uniforms.shape[1]:
                break
            if not unfinished.all():
                alive, chosen, seen = alive[unfinished], chosen[unfinished], seen[unfinished]
                cache.batch_select_indices(unfinished.nonzero()[:, 0])
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            logits = _next(model, chosen[:, None], seen, seen.sum(1, keepdim=True) - 1, cache)
    longest = int(mask.sum(1).max())
    return Completions(tokens[:, :longest], mask[:, :longest], logprobs[:, :longest], ended)


def _next(model: Decoder, ids: Tensor, seen: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
    """The logits after the last token; a mask of ones is left out, which spares attention its mask."""
    inputs = {"attention_mask": None if bool(seen.all()) else seen, "position_ids": positions}
    return model(input_ids=ids, past_key_values=cache, logits_to_keep=1, **inputs).logits[:, -1]


def padded(rows: Sequence[Tokens], device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids, padded with 0, and the mask of what is not padding, both int64 [row, longest]."""
    tensors = [torch.tensor([row, [1] * len(row)], dtype=torch.long).T for row in rows]
    ids_and_mask = pad_sequence(tensors, batch_first=True, padding_side="left" if left else "right").to(device)
    return ids_and_mask[..., 0], ids_and_mask[..., 1]


def completion_logits(
    model: Decoder, prompts: Sequence[Tokens], completions: Sequence[Tokens], *, temperature: float
) -> tuple[Float[Tensor, "token vocab"], Bool[Tensor, "batch time"]]:
    """What the model says at each token of the completions, logits / temperature, and the mask that says whose it is.

    The head is computed there only: not on prompts, not on padding. A PEFT adapter inside the layers is part of the
    model; one that lengthens the prompt is not supported. Gradient: to the model's parameters.
    Raises ValueError for temperature <= 0, or a model that changes its logits after the head.
    """
    _require_temperature(temperature)
    for name in _AFTER_HEAD:
        if getattr(model.config, name, None) not in (None, 1):
            raise ValueError(
                f"received a model with {name}={getattr(model.config, name)}, expected logits as the head says"
            )
    rows = [(*prompt, *completion[:-1]) for prompt, completion in zip(prompts, completions, strict=True)]
    ids, seen = padded(rows, model.device)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    states = inner.base_model(input_ids=ids, attention_mask=None if bool(seen.all()) else seen).last_hidden_state
    mask = padded(completions, model.device)[1].bool()
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    owners, steps = mask.nonzero().T
    return model.get_output_embeddings()(states[owners, starts[owners] + steps]).float() / temperature, mask


def completion_logprobs(
    logits: Float[Tensor, "token vocab"], kept: Bool[Tensor, "batch time"], completions: Sequence[Tokens]
) -> Float[Tensor, "batch time"]:
    """log softmax of `completion_logits` at the completions' tokens, padded with 0: what `Completions` would hold."""
    tokens = padded(completions, logits.device)[0][kept]
    values = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
    return values.new_zeros(kept.shape).masked_scatter(kept, values)


def require_room(model: Decoder, prompts: Sequence[Tokens], longest: int) -> None:
    """Raise ValueError for an empty prompt, or one that leaves the model no room for `longest` tokens."""
    room = getattr(model.config, "max_position_embeddings", None)
    for prompt in prompts:
        received = f"received a prompt of {len(prompt)} tokens and longest={longest}"
        if not prompt or longest < 1:
            raise ValueError(f"{received}, expected both above 0")
        if room is not None and len(prompt) + longest > room:
            raise ValueError(f"{received}, expected at most the {room} together that the model takes")


def _require_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"received temperature {temperature}, expected temperature > 0")
