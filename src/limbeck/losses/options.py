"""Checks of what the losses on completions are given."""

from torch import Tensor


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"received {name} {value!r}, expected one of {', '.join(choices)}")


def require_mask(mask: Tensor, rows: Tensor) -> None:
    """Raise ValueError unless the mask has one element for each row."""
    if mask.shape != rows.shape:
        raise ValueError(f"received a mask of shape {tuple(mask.shape)}, expected {tuple(rows.shape)}")
