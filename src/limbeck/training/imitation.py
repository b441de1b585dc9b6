"""Learning from given solutions, by maximum likelihood; and the weights that a model so trained leaves."""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import models, sampling
from limbeck.losses import policy
from limbeck.sampling import Tokens
from limbeck.training import resume, supervised
from limbeck.training.supervised import Curve, Terms


def fit(
    model: PreTrainedModel,
    prompts: Sequence[Tokens],
    solutions: Sequence[Tokens],
    batches: Sequence[Tensor],
    *,
    dtype: torch.dtype,
    learning_rate: float,
    clip_norm: float,
    state: Path | None,
    save_every: int,
) -> Generator[dict[str, float], None, Curve]:
    """`supervised.fit` of the model's trainable parameters on solutions, which end with the end token."""
    loss = solution_loss(model, prompts, solutions, dtype)
    return supervised.fit(
        models.trainable(model),
        loss,
        batches,
        learning_rate=learning_rate,
        clip_norm=clip_norm,
        state=state,
        save_every=save_every,
    )


def solution_loss(
    model: PreTrainedModel, prompts: Sequence[Tokens], solutions: Sequence[Tokens], dtype: torch.dtype
) -> Callable[[Tensor], Terms]:
    """The mean of -log p over the solutions' tokens of some rows, in nats."""

    def loss(rows: Tensor) -> Terms:
        questions = [prompts[row] for row in rows.tolist()]
        answers = [solutions[row] for row in rows.tolist()]
        with models.autocast(model.device, dtype):
            logits, kept = sampling.completion_logits(model, questions, answers, temperature=1.0)
        logprobs = sampling.completion_logprobs(logits, kept, answers)
        return {"loss/ce": -policy.weighted_sum(logprobs, policy.token_weights(kept))}

    return loss


def weights_file(name: str) -> str:
    """The name of the file with a model's weights."""
    return f"{name}.safetensors"


def save(model: PreTrainedModel, folder: Path, name: str) -> None:
    """Leave the trainable weights, whole or not at all."""
    resume.write_tensors(folder / weights_file(name), dict(models.trainable(model)))


def restore(model: PreTrainedModel, folder: Path, name: str) -> PreTrainedModel:
    """Put the weights that were trained back into a model with the same trainable parameters, which it returns.

    Raises ValueError if there are none, damaged ones, or those of other parameters.
    """
    path, parameters = folder / weights_file(name), models.trainable(model)
    if not path.is_file():
        raise ValueError(f"expected the weights of {name} in {folder}, found none; run the experiment that trains it")
    weights = resume.read_tensors(path, like=parameters)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    return model
