"""A cell is one run. What can change its numbers, but for its experiment's own code, stands here; the ledger does not.

So a cell's hash covers `execute`, and the ledger (which cells are stale, locks, files) can change without a retraining.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

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
class Workspace:
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


def execute(
    experiment: Any,
    section: Any,
    cells: Sequence[Cell],
    cell: Cell,
    place: Workspace,
    *,
    threads: int,
    on_step: Callable[[dict[str, Any]], None],
) -> Result:
    """Run one of an experiment's cells to its end, calling `on_step` after each step with what the run says of it.

    `place.records` may hold any records in any order: the cell sees those of earlier turns, in the order of `cells`.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # else a convolution in float32 keeps 10 bits of its inputs
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    earlier = [other.coordinates for other in cells if other.turn < cell.turn]
    visible = [record for coordinates in earlier for record in place.records if record["cell"] == coordinates]
    steps = experiment.run(cell, section, replace(place, records=visible))
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value
        on_step(step)
