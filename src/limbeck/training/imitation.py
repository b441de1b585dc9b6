"""Learning from given solutions, by maximum likelihood; and the weights that a model so trained leaves."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import models, sampling
from limbeck.losses import policy
from limbeck.sampling import Tokens
from limbeck.training.supervised import Terms


def loss_of(
    model: PreTrainedModel, prompts: Sequence[Tokens], solutions: Sequence[Tokens], dtype: torch.dtype
) -> Callable[[Tensor], Terms]:
    """The mean of -log p over the solutions' tokens of some rows, in nats."""

    def loss(rows: Tensor) -> Terms:
        asked, said = ([texts[row] for row in rows.tolist()] for texts in (prompts, solutions))
        with models.autocast(model.device, dtype):
            logits, kept = sampling.completion_logits(model, asked, said, temperature=1.0)
        logprobs = sampling.completion_logprobs(logits, kept, said)
        return {"loss/ce": -policy.weighted_sum(logprobs, policy.token_weights(kept))}

    return loss


def file_of(name: str) -> str:
    """The file of a model's weights."""
    return f"{name}.safetensors"


def restore(model: PreTrainedModel, folder: Path, name: str) -> PreTrainedModel:
    """Put the weights that were trained back into a model with the same trainable parameters, which it returns.

    Raises ValueError if there are none, or those of other parameters.
    """
    path, parameters = folder / file_of(name), models.trainable(model)
    if not path.is_file():
        raise ValueError(f"expected the weights of {name} in {folder}, found none; run the experiment that trains it")
    found = load_file(path)
    if found.keys() != parameters.keys():
        odd = min(found.keys() ^ parameters.keys())
        raise ValueError(f"received {len(found)} weights in {path}, expected {len(parameters)}; {odd} is in one alone")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(found[key])
    return model
