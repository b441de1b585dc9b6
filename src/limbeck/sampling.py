"""Completions of prompts from a decoder, and the log-probability of each of their tokens.

Whoever samples for a training loop is a `Sampler`: `Sampled` is the one that is built in, on transformers' cache;
`vllm_sampling` has another. One uniform number decides a token, by inverse CDF, and depends only on (seed, prompt,
sample, position): so neither the batch that a prompt stands in, nor a restart, nor a sample that ended changes another
sample (up to rounding).

A prompt is read once, for all its completions; a completion that has ended leaves the batch and the cache. Sampling and
scoring share one temperature, and nothing is cut off (no top-p, no top-k): other log-probabilities than those sampled
from would make the ratio of policies wrong. The cache, and the head on some states alone, are shortcuts: each is
compared once per model with the model's own forward, which does the work where they differ. Sampling is in evaluation
mode, scoring in the mode that the model is in.
"""

import operator
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
_MANTISSA = 53  # bits of a float64
_TRIED, _SCORED = 3, 8  # tokens of a prompt, and of a row, on which the shortcuts are tried


class Completions(NamedTuple):
    """What was sampled, one row per completion, those of a prompt next to each other; padded on the right.

    `logprobs` are those of the sampler, 0 outside the mask; `ended` says which completions hold an end token (the
    others were cut).
    """

    tokens: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    logprobs: Float[Tensor, "batch time"]
    ended: Bool[Tensor, " batch"]

    def rows(self) -> list[Tokens]:
        """The completions without padding."""
        return [tuple(row[row_mask].tolist()) for row, row_mask in zip(self.tokens, self.mask.bool(), strict=True)]


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
    """The built-in `Sampler`. A token of `end` ends a completion, and is part of it (`language.end_tokens`)."""

    model: Decoder
    end: int | Sequence[int]
    temperature: float = 1.0
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        ends(self.end)
        require_temperature(self.temperature)

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


def ends(end: int | Sequence[int]) -> Tokens:
    """The tokens that end a completion, as a tuple. Raises ValueError for none, or for what is no token."""
    try:
        tokens = tuple(map(operator.index, end if isinstance(end, Sequence) else [end]))
    except TypeError:
        tokens = ()
    if not tokens or min(tokens) < 0:
        raise ValueError(f"received end {end!r}, expected a token or some, as `language.end_tokens` gives them")
    return tokens


def choose(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], temperature: float, *, step: int = 0
) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The token at which the CDF passes the uniform number, and its log-probability.

    Sums are in float64; a token of probability 0 is never chosen.
    Raises ValueError for logits of which some is NaN or infinite, or all are -inf; it names the row, and `step`.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    cdf = logprobs.double().exp().cumsum(-1)
    if not cdf[:, -1].isfinite().all():
        row = int(cdf[:, -1].isfinite().logical_not().nonzero()[0])
        received = f"{int(logits[row].isnan().sum())} NaN of {logits.shape[1]} logits, the largest {logits[row].max()}"
        raise ValueError(f"received {received}, in row {row} at step {step}; expected finite ones, or some at -inf")
    tokens = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:], right=True)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


@torch.no_grad()
def _decode(sampler: Sampled, prompts: Sequence[Tokens], uniforms: Tensor, group_size: int) -> Completions:
    """All completions, by the cache where it serves."""
    model = sampler.model
    with models.evaluating(model), models.autocast(model.device, sampler.dtype):
        reader = _Cached if _cache_serves(model, prompts[0]) else _Whole
        return _drawn(reader(model, prompts, group_size), uniforms, ends(sampler.end), sampler.temperature)


def _cache_serves(model: Decoder, prompt: Tokens) -> bool:
    """Whether decoding by the cache gives the log-probabilities of whole rows: with padding, and where rows leave.

    Compared up to the square root of the weights' rounding.
    """
    tried = min(_TRIED, (getattr(model.config, "max_position_embeddings", None) or 2 * _TRIED) // 2)
    uniforms = torch.linspace(0.1, 0.9, 4 * tried, dtype=torch.float64, device=model.device).view(4, tried)

    def logprobs(reader: "type[_Cached | _Whole]") -> Tensor:
        prompts = (prompt[-tried:], prompt[-1:])
        cut = _drawn(reader(model, prompts, 2), uniforms, (-1,), 1.0)
        some = _drawn(reader(model, prompts, 2), uniforms, tuple(cut.tokens[0, :1].tolist()), 1.0)
        return torch.cat([cut.logprobs.flatten(), some.logprobs.flatten()])

    with models.autocast(model.device, torch.float32):
        return models.agrees(
            model,
            "cache",
            lambda: logprobs(_Cached),
            lambda: logprobs(_Whole),
            tolerance=torch.finfo(model.dtype).eps ** 0.5,
        )


def _drawn(reader: "_Cached | _Whole", uniforms: Tensor, end: Tokens, temperature: float) -> Completions:
    """One token per step for all that have not ended."""
    device = uniforms.device
    tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=device)
    logprobs, mask = torch.zeros(uniforms.shape, device=device), torch.zeros_like(tokens, dtype=torch.bool)
    ended = torch.zeros(len(uniforms), dtype=torch.bool, device=device)
    last, alive = torch.tensor(end, device=device), torch.arange(len(uniforms), device=device)
    for position in range(uniforms.shape[1]):
        chosen, chosen_logprobs = choose(reader.logits, uniforms[alive, position], temperature, step=position)
        tokens[alive, position], logprobs[alive, position] = chosen, chosen_logprobs
        mask[alive, position] = True
        unfinished = (chosen[:, None] != last).all(1)
        ended[alive[~unfinished]] = True
        if not unfinished.any() or position + 1 == uniforms.shape[1]:
            break
        alive = alive[unfinished]
        reader.read(chosen, unfinished)
    longest = int(mask.sum(1).max())
    return Completions(tokens[:, :longest], mask[:, :longest], logprobs[:, :longest], ended)


class _Cached:
    """The next token's `logits` of all rows: prompts on the left of a common edge, then token by token."""

    def __init__(self, model: Decoder, prompts: Sequence[Tokens], group_size: int) -> None:
        ids, seen = padded(prompts, model.device, left=True)
        self.model, self.cache = model, DynamicCache(config=model.config)
        self.logits = self._next(ids, seen, (seen.cumsum(1) - 1).clamp_min(0)).repeat_interleave(group_size, 0)
        self.cache.batch_repeat_interleave(group_size)
        self.seen = seen.repeat_interleave(group_size, 0)

    def read(self, chosen: Tensor, unfinished: Tensor) -> None:
        """One more token of each row that goes on; the others leave."""
        if not unfinished.all():
            chosen, self.seen = chosen[unfinished], self.seen[unfinished]
            self.cache.batch_select_indices(unfinished.nonzero()[:, 0])
        self.seen = torch.cat([self.seen, self.seen.new_ones(len(self.seen), 1)], 1)
        self.logits = self._next(chosen[:, None], self.seen, self.seen.sum(1, keepdim=True) - 1)

    def _next(self, ids: Tensor, seen: Tensor, positions: Tensor) -> Tensor:
        """The logits after the last token; a mask of ones is left out, which spares attention its mask."""
        inputs = {"attention_mask": None if bool(seen.all()) else seen, "position_ids": positions}
        return self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1, **inputs).logits[:, -1]


class _Whole:
    """The same by whole rows, each token anew: what every decoder can, at the price of reading all again."""

    def __init__(self, model: Decoder, prompts: Sequence[Tokens], group_size: int) -> None:
        self.model, self.rows = model, list(prompts)
        self.logits = self._next().repeat_interleave(group_size, 0)
        self.rows = [prompt for prompt in prompts for _ in range(group_size)]

    def read(self, chosen: Tensor, unfinished: Tensor) -> None:
        """One more token of each row that goes on; the others leave."""
        rows = zip(self.rows, chosen.tolist(), unfinished.tolist(), strict=True)
        self.rows = [(*row, token) for row, token, going in rows if going]
        self.logits = self._next()

    def _next(self) -> Tensor:
        ids, seen = padded(self.rows, self.model.device)
        return _own_logits(self.model, ids, seen)[torch.arange(len(ids), device=ids.device), seen.sum(1) - 1]


def _own_logits(model: Decoder, ids: Tensor, seen: Tensor) -> Tensor:
    """What the model's own forward says after every token; of a prompt that an adapter puts before, nothing."""
    mask = None if bool(seen.all()) else seen
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -ids.shape[1] :]


def padded(rows: Sequence[Tokens], device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids, padded with 0, and the mask of what is not padding, both int64 [row, longest]."""
    tensors = [torch.tensor([row, [1] * len(row)], dtype=torch.long).T for row in rows]
    ids_and_mask = pad_sequence(tensors, batch_first=True, padding_side="left" if left else "right").to(device)
    return ids_and_mask[..., 0], ids_and_mask[..., 1]


def completion_logits(
    model: Decoder, prompts: Sequence[Tokens], completions: Sequence[Tokens], *, temperature: float
) -> tuple[Float[Tensor, "token vocab"], Bool[Tensor, "batch time"]]:
    """What the model says at each token of the completions, logits / temperature, and the mask that says whose it is.

    The head is computed there only, not on prompts, not on padding, if that gives the model's own logits to the bit (it
    does not where a model changes them after the head); else everywhere. A PEFT adapter is part of the model. The
    model's mode is left as it is: with dropout, log-probabilities are not those sampled from.
    Gradient: to the model's parameters.
    Raises ValueError for temperature <= 0.
    """
    require_temperature(temperature)
    rows = [(*prompt, *completion[:-1]) for prompt, completion in zip(prompts, completions, strict=True)]
    mask = padded(completions, model.device)[1].bool()
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts], device=model.device)
    owners, steps = mask.nonzero().T
    places = (owners, starts[owners] + steps)
    ids, seen = padded(rows, model.device)
    if head_is_last(model, ids[:, : len(rows[0])]):
        return model.get_output_embeddings()(_states(model, ids, seen)[places]).float() / temperature, mask
    return _own_logits(model, ids, seen)[places].float() / temperature, mask


def head_is_last(model: Decoder, ids: Int[Tensor, "row time"]) -> bool:
    """Whether the head on the states gives the model's own logits to the bit, tried once on the first row's first."""
    ids = ids[:1, :_SCORED]
    seen = torch.ones_like(ids)
    return models.agrees(
        model,
        "head",
        lambda: model.get_output_embeddings()(_states(model, ids, seen)),
        lambda: _own_logits(model, ids, seen),
    )


def _states(model: Decoder, ids: Tensor, seen: Tensor) -> Tensor:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return inner.base_model(input_ids=ids, attention_mask=None if bool(seen.all()) else seen).last_hidden_state


def completion_logprobs(
    logits: Float[Tensor, "token vocab"],
    kept: Bool[Tensor, "batch time"] | Int[Tensor, "batch time"],
    completions: Sequence[Tokens],
) -> Float[Tensor, "batch time"]:
    """log softmax of `completion_logits` at the completions' tokens, padded with 0: what `Completions` would hold."""
    kept = kept.bool()
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


def require_temperature(temperature: float) -> None:
    """Raise ValueError for a temperature that is not above 0."""
    if not temperature > 0:
        raise ValueError(f"received temperature {temperature}, expected temperature > 0")
