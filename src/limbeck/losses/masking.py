"""What every loss on rows checks and ends with: choices, masks, one mean over the rows that count, a finite number."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_mean(values: Float[Tensor, "*rows"], mask: Bool[Tensor, "*rows"] | None) -> Float[Tensor, ""]:
    """Mean of the values where the mask is True; of all values when the mask is None.

    Every selected value weighs the same: over tokens this is the token mean, not the mean of sequence means.
    Unselected values are indexed out, not multiplied by zero, so a NaN there reaches neither value nor gradient.
    Units: those of the values. Gradient: to the selected values.
    Raises ValueError if nothing is selected or the shapes differ.
    """
    if mask is not None:
        if mask.shape != values.shape:
            raise ValueError(f"received a mask of shape {tuple(mask.shape)}, expected {tuple(values.shape)}")
        values = values[mask]
    if values.numel() == 0:
        raise ValueError("received no selected row, expected at least one")
    return values.mean()


def require_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss itself; ValueError if it is NaN or infinite."""
    if not torch.isfinite(loss):
        raise ValueError(f"received inputs that give a loss of {loss.item()}, expected a finite loss")
    return loss


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"received {name} {value!r}, expected one of {', '.join(choices)}")


def require_mask(mask: Tensor, rows: Tensor) -> None:
    """Raise ValueError unless the mask has one element for each row."""
    if mask.shape != rows.shape:
        raise ValueError(f"received a mask of shape {tuple(mask.shape)}, expected {tuple(rows.shape)}")
