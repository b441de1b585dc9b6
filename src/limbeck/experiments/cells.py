"""The unit of work: a cell is one run, and its record is one file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Coordinate = str | int | float


@dataclass(frozen=True)
class Cell:
    """One run: its coordinates, all that its numbers depend on but code, and the files that later cells need of it.

    Cells of one `turn` do not depend on each other; a turn begins when the one before has ended.
    """

    coordinates: dict[str, Coordinate]
    inputs: dict[str, Any]
    leaves: tuple[str, ...] = ()
    turn: int = 0


@dataclass(frozen=True)
class Place:
    """Where a cell may write, what earlier cells of the experiment measured, and the machine's part of the set-up."""

    checkpoints: Path
    state: Path
    records: list[dict[str, Any]]
    device: torch.device
    precision: str


@dataclass(frozen=True)
class Result:
    """What a run measured: final metrics (a list has one number a replicate), and how they came about."""

    metrics: dict[str, float | list[float]]
    curve: dict[str, list[float]] = field(default_factory=dict)
    trainable_parameters: int = 0
    dtype: str = "float32"
