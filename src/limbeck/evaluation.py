"""What a classifier says, and how often it is right."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.tasks.classification import Encoded

_BATCH = 128


def forward(
    model: PreTrainedModel, data: Encoded, rows: Int[Tensor, " batch"], dtype: torch.dtype
) -> Float[Tensor, "batch classes"]:
    """Logits of some rows in float32; matrix products in `dtype` (autocast where it is not float32)."""
    ids, mask = (x.to(model.device) for x in data.rows(rows))
    with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
        return model(input_ids=ids, attention_mask=mask).logits.float()


@torch.inference_mode()
def logits(model: PreTrainedModel, data: Encoded, dtype: torch.dtype) -> Float[Tensor, "row classes"]:
    """Logits of every row, on the CPU; batches are of like length, so that little is padding."""
    order = torch.argsort(data.lengths, stable=True)
    found = torch.cat([forward(model, data, rows, dtype).cpu() for rows in torch.split(order, _BATCH)])
    return torch.empty_like(found).index_copy_(0, order, found)


def accuracy(found: Float[Tensor, "row classes"], labels: Int[Tensor, " row"]) -> float:
    """The share of rows whose largest logit is the label's, in [0, 1]."""
    return (found.argmax(-1) == labels).double().mean().item()
