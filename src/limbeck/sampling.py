"""Completions of prompts from a decoder, and the log-probability of each of their tokens.

Whoever samples for a training loop is a `Sampler`: `Sampled` is the one that is built in, on transformers' cache. One
uniform number decides a token, by inverse CDF, and depends only on (seed, prompt, sample, position): so neither the
batch that a prompt stands in, nor a restart, nor a sample that ended changes another sample (up to rounding).

A prompt is read once, for all its completions; a completion that has ended leaves the batch and the cache. Sampling and
scoring share one temperature, and nothing is cut off (no top-p, no top-k): other log-probabilities than those sampled
from would make the ratio of policies wrong.

`VllmSampled` samples by vLLM, for policies too large for the built-in one; it needs `vllm` and a GPU. The engine lives
in this process, is built with weights that mean nothing, and gets the model's before every call, so it follows a policy
in training. Its log-probabilities are those that it sampled from, after the temperature; they differ from the model's
own by the kernels' rounding, which the ratio of policies then carries. Unlike the built-in sampler's, its samples
depend on the batch that a prompt stands in (by rounding) and on vLLM's version. It was held to a stand-in with vLLM's
interface, not to vLLM itself.
"""

import importlib.util
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

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


def _require_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"received temperature {temperature}, expected temperature > 0")


_MEMORY = 0.3  # share of the GPU for an engine: policy, teacher and optimiser lie beside it
_COLDEST = 0.01  # vLLM samples no colder; 0 takes the most probable token
_engines: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class VllmSampled:
    """A `Sampler` for one model. `end` is the token that ends a completion, and is part of it.

    Raises ValueError where vllm is not installed, or for temperature <= 0.
    """

    model: PreTrainedModel
    end: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"received temperature {self.temperature}, expected temperature > 0")
        if importlib.util.find_spec("vllm") is None:
            raise ValueError("received sampler vllm, expected it to be installed; `transformers` is the built-in one")

    def __call__(
        self, prompts: Sequence[Tokens], names: Sequence[str | int], *, group_size: int, longest: int, seed: int
    ) -> Completions:
        """Raises ValueError for an empty prompt or one too long for the model."""
        from vllm import SamplingParams  # noqa: PLC0415  (where it is installed)

        require_room(self.model, prompts, longest)
        warmth = self.temperature if self.temperature >= _COLDEST else 0.0
        options = {"n": group_size, "temperature": warmth, "max_tokens": longest, "logprobs": 0}
        options |= {"stop_token_ids": [self.end], "ignore_eos": True, "detokenize": False}
        draws = [
            SamplingParams(**options, seed=int(seeding.bits(seed, "rollout", name, n=1)[0] >> 1)) for name in names
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = _engine(self.model).generate(inputs, draws, use_tqdm=False)
        return _completions([output for answer in answers for output in answer.outputs], self.model.device)


def _engine(model: PreTrainedModel) -> Any:
    """The model's engine, with the weights that the model has now."""
    if model not in _engines:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else its weights are out of reach
        from vllm import LLM  # noqa: PLC0415  (where it is installed)

        _engines[model] = LLM(
            model=model.name_or_path,
            skip_tokenizer_init=True,
            load_format="dummy",
            hf_overrides={"vocab_size": model.config.vocab_size},
            gpu_memory_utilization=_MEMORY,
            logprobs_mode="processed_logprobs",
        )
    engine = _engines[model]
    worker = engine.llm_engine.model_executor.driver_worker.model_runner.model
    worker.load_weights((name, weight.detach()) for name, weight in model.named_parameters())
    engine.reset_prefix_cache()  # it holds keys and values of the weights before
    return engine


def _completions(outputs: list[Any], where: torch.device) -> Completions:
    rows = [torch.tensor(output.token_ids) for output in outputs]
    logprobs = [
        torch.tensor([top[token].logprob for token, top in zip(output.token_ids, output.logprobs, strict=True)])
        for output in outputs
    ]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    padded = [pad_sequence(part, batch_first=True).to(where) for part in (rows, logprobs)]
    ended = torch.tensor([output.finish_reason == "stop" for output in outputs], device=where)
    return Completions(padded[0], mask.to(where), padded[1], ended)
