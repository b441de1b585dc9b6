"""Completions by vLLM, for policies too large for the built-in sampler; it needs `vllm` and a GPU.

The engine lives in this process, is built with weights that mean nothing, and gets the model's before every call, so it
follows a policy in training. Its log-probabilities are those that it sampled from, after the temperature; they differ
from the model's own by the kernels' rounding, which the ratio of policies then carries. Unlike the built-in sampler's,
its samples depend on the batch that a prompt stands in (by rounding) and on vLLM's version. It was held to a stand-in
with vLLM's interface, not to vLLM itself.
"""

import importlib.util
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from limbeck import seeding
from limbeck.sampling import Completions, Decoder, Tokens, ends, require_room, require_temperature

_MEMORY = 0.3  # share of the GPU for an engine: policy, teacher and optimiser lie beside it
_COLDEST = 0.01  # vLLM samples no colder; 0 takes the most probable token
_engines: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class VllmSampled:
    """A `Sampler` for one model. A token of `end` ends a completion, and is part of it.

    Raises ValueError where vllm is not installed, for temperature <= 0, or a model with an adapter.
    """

    model: Decoder
    end: int | Sequence[int]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        ends(self.end)
        require_temperature(self.temperature)
        if isinstance(self.model, PeftModel):
            raise ValueError("received a PeftModel, whose weights the engine has no names for; expected it merged")
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
        options |= {"stop_token_ids": list(ends(self.end)), "ignore_eos": True, "detokenize": False}
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
    rows = [torch.tensor(output.token_ids, dtype=torch.long) for output in outputs]
    logprobs = [
        torch.tensor(
            [top[token].logprob for token, top in zip(output.token_ids, output.logprobs, strict=True)],
            dtype=torch.float32,
        )
        for output in outputs
    ]
    mask = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
    padded = [pad_sequence(part, batch_first=True).to(where) for part in (rows, logprobs)]
    ended = torch.tensor([output.finish_reason == "stop" for output in outputs], device=where)
    return Completions(padded[0], mask.to(where), padded[1], ended)
