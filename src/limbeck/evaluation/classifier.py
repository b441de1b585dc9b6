"""What a classifier says, and how often it is right."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import models
from limbeck.tasks.classification import Encoded

_BATCH = 128


class Outputs(NamedTuple):
    """What a classifier says of a batch: logits in float32 and, where asked for, the first token after every layer."""

    logits: Float[Tensor, "batch classes"]
    states: Float[Tensor, "layers batch width"] | None = None


def forward(
    model: PreTrainedModel, data: Encoded, rows: Int[Tensor, " batch"], dtype: torch.dtype, *, states: bool = False
) -> Outputs:
    """The outputs of some rows; matrix products in `dtype` (autocast where it is not float32)."""
    ids, mask = (x.to(model.device) for x in data.rows(rows))
    with models.autocast(model.device, dtype):
        outputs = model(input_ids=ids, attention_mask=mask, output_hidden_states=states)
    firsts = torch.stack([layer[:, 0].float() for layer in outputs.hidden_states[1:]]) if states else None
    return Outputs(outputs.logits.float(), firsts)


@torch.inference_mode()
def all_rows(model: PreTrainedModel, data: Encoded, dtype: torch.dtype, *, states: bool = False) -> Outputs:
    """The outputs of every row, on the CPU; batches are of like length, so that little is padding."""
    order = torch.argsort(data.lengths, stable=True)
    with models.evaluating(model):
        outputs = [forward(model, data, rows, dtype, states=states) for rows in torch.split(order, _BATCH)]
    back = torch.argsort(order)
    logits = torch.cat([part.logits.cpu() for part in outputs])[back]
    return Outputs(logits, torch.cat([part.states.cpu() for part in outputs], 1)[:, back] if states else None)


def accuracy(class_logits: Float[Tensor, "row classes"], labels: Int[Tensor, " row"]) -> float:
    """The share of rows whose largest logit is the label's, in [0, 1]."""
    return (models.likeliest(class_logits) == labels).double().mean().item()


def score(metric: str, class_logits: Float[Tensor, "row classes"], labels: Int[Tensor, " row"]) -> float:
    """How right the largest logits are: accuracy, Matthews correlation in [-1, 1], or F1 of class 1 of two classes."""
    if metric == "accuracy":
        return accuracy(class_logits, labels)
    from sklearn.metrics import f1_score, matthews_corrcoef  # noqa: PLC0415  (a second to import, for two GLUE tasks)

    scores = {"matthews": matthews_corrcoef, "f1": f1_score}
    if metric not in scores:
        raise ValueError(f"received metric {metric!r}, expected accuracy or one of {sorted(scores)}")
    return float(scores[metric](labels.numpy(), models.likeliest(class_logits).numpy()))
