"""What every loss checks and ends with: dtypes, choices, masks, a mean over the rows that count, a finite number.

Numbers of any real dtype are computed in float32 or wider, so that a half-precision sum never decides. What counts for
nothing (a probability or a weight of 0, a row outside the mask) is taken out before it is multiplied: 0 times infinity
is 0 here, and so is its gradient.
"""

import math

import torch
from jaxtyping import AbstractDtype, Bool, Float, Integer, Real
from torch import Tensor


class Number(AbstractDtype):
    """Real numbers of any precision, integers and booleans too."""

    dtypes = (*Real.dtypes, *Bool.dtypes)


class Mask(AbstractDtype):
    """True where a row counts: booleans, or the numbers 0 and 1, as tokenizers give them."""

    dtypes = Number.dtypes


def masked_mean(values: Number[Tensor, "*rows"], mask: Mask[Tensor, "*rows"] | None) -> Float[Tensor, ""]:
    """Mean of the values where the mask is True; of all values when the mask is None.

    Every selected value weighs the same: over tokens this is the token mean, not the mean of sequence means.
    Unselected values are indexed out, not multiplied by zero, so a NaN there reaches neither value nor gradient.
    Units: those of the values. Gradient: to the selected values.
    Raises ValueError if nothing is selected or the shapes differ.
    """
    (values,) = wide(values)
    if mask is not None:
        values = values[require_mask(mask, values.shape)]
    if values.numel() == 0:
        raise ValueError("received no selected row, expected at least one")
    return values.mean()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Their common dtype, float32 or wider. Raises ValueError for complex numbers, and floats of 8 bits."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
            raise ValueError(f"received {tensor.dtype}, expected real numbers of at least 16 bits; convert them before")
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def wide(*tensors: Tensor) -> list[Tensor]:
    """All of them in their `wide_dtype`."""
    dtype = wide_dtype(*tensors)
    return [tensor.to(dtype) for tensor in tensors]


def probability_times(logprobs: Tensor, values: Tensor) -> Tensor:
    """p x element by element, p the exponential: where p is 0, the product and its gradient are 0, whatever x is."""
    probs = logprobs.exp()
    return probs * values.masked_fill(probs == 0, 0)


def logsumexp(logits: Tensor) -> Tensor:
    """log sum exp over the last axis; of nothing but -inf it is -inf, with gradient 0 where torch's is NaN."""
    nothing = logits.detach().amax(-1) == -torch.inf
    return logits.masked_fill(nothing[..., None], 0).logsumexp(-1).masked_fill(nothing, -torch.inf)


def require_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss itself; ValueError if it is NaN or infinite."""
    if not torch.isfinite(loss):
        raise ValueError(f"received inputs that give a loss of {loss.item()}, expected a finite loss")
    return loss


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"received {name} {value!r}, expected one of {', '.join(choices)}")


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless it is above 0 and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"received temperature {temperature}, expected temperature > 0 and finite")


def require_mask(mask: Tensor, shape: torch.Size, name: str = "mask") -> Bool[Tensor, "..."]:
    """The mask as booleans. Raises ValueError for another shape, or a value that is neither 0 nor 1."""
    if mask.shape != shape:
        raise ValueError(f"received a {name} of shape {tuple(mask.shape)}, expected {tuple(shape)}")
    chosen = mask != 0
    if mask.dtype != torch.bool and (odd := mask != chosen).any():
        raise ValueError(f"received a {name} that holds {mask[odd][0].item()}, expected booleans, or 0 and 1 alone")
    return mask if mask.dtype == torch.bool else chosen


def require_axes(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless the tensor has as many axes as `axes` names."""
    if tensor.ndim != len(axes.split()):
        raise ValueError(f"received {name} of shape {tuple(tensor.shape)}, expected the axes {axes!r}")


def require_labels(labels: Integer[Tensor, " batch"], logits: Tensor) -> Integer[Tensor, " batch"]:
    """The labels in int64. Raises ValueError unless there is one class for each row of the logits, and at least one."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"received labels of {labels.dtype}, expected integers")
    if labels.shape != logits.shape[:1] or not len(labels):
        shapes = f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)}"
        raise ValueError(f"received {shapes}, expected one label for each row, and at least one")
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < logits.shape[-1]:
        raise ValueError(f"received labels from {low} to {high}, expected 0 to {logits.shape[-1] - 1}")
    return labels.long()
