"""A cell is one run. What can change its numbers, but for its experiment's own code, stands here; the ledger does not.

So a cell's hash covers `execute`, and the ledger (which cells are stale, locks, files) can change without a retraining.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from limbeck import models

Coordinate = str | int | float


@dataclass(frozen=True)
class Cell:
    """One run: its coordinates, all that its numbers depend on but code, and the files that it leaves for later cells.

    Cells of one `wave` do not depend on each other; a wave begins when the one before has ended.
    """

    coordinates: dict[str, Coordinate]
    inputs: dict[str, Any]
    checkpoint_files: tuple[str, ...] = ()
    wave: int = 0


@dataclass(frozen=True)
class Workspace:
    """Where a cell may write, what earlier cells of the experiment measured, and the machine's part of the set-up."""

    checkpoints: Path
    state: Path
    records: list[dict[str, Any]]
    device: torch.device
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of matrix products here."""
        return models.precision(self.precision, self.device)


@dataclass(frozen=True)
class Result:
    """What a run measured: final metrics (a list has one number a replicate), and how they came about."""

    metrics: dict[str, float | list[float]]
    curve: dict[str, list[float]] = field(default_factory=dict)
    trainable_parameters: int = 0
    dtype: str = "float32"


def spelled(name: str) -> str:
    """A name as a coordinate or a file may hold it."""
    return "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in name)


def result(
    metrics: dict[str, float | list[float]],
    curve: dict[str, list[float]] | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Result:
    """A result: with the trained weights counted, and the dtype of the matrix products as records spell it."""
    count = sum(weight.numel() for weight in (weights or {}).values())
    return Result(metrics, curve or {}, count, str(dtype).removeprefix("torch."))


def best(
    records: Iterable[Mapping[str, Any]],
    where: Mapping[str, Coordinate],
    by: str,
    metrics: Sequence[str],
    *,
    highest: Sequence[bool],
) -> Coordinate:
    """The value of coordinate `by` that is best among the records whose cells are as `where` says.

    Each metric is averaged over what else the cells vary in; metrics are compared in their order, `highest` says for
    each whether more is better, and of equals the smallest value is taken. Raises ValueError if there are none.
    """
    scores: dict[Coordinate, list[tuple[float, ...]]] = {}
    for record in records:
        if where.items() <= record["cell"].items():
            values = (record["metrics"][name] for name in metrics)
            signed = tuple(value if more else -value for value, more in zip(values, highest, strict=True))
            scores.setdefault(record["cell"][by], []).append(signed)
    if not scores:
        raise ValueError(f"received no record with {dict(where)}, expected some to choose {by} from")
    means = {value: tuple(sum(part) / len(part) for part in zip(*rows, strict=True)) for value, rows in scores.items()}
    return min(sorted(means), key=lambda value: tuple(-mean for mean in means[value]))


def execute(
    experiment: Any,
    section: Any,
    cells: Sequence[Cell],
    cell: Cell,
    workspace: Workspace,
    *,
    threads: int,
    on_step: Callable[[dict[str, Any]], None],
) -> Result:
    """Run one of an experiment's cells to its end, calling `on_step` after each step with what the run says of it.

    `workspace.records` may hold any records in any order: the cell sees those of earlier waves, as `cells` orders them.
    """
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # else a convolution in float32 keeps 10 bits of its inputs
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    earlier = [other.coordinates for other in cells if other.wave < cell.wave]
    visible = [record for coordinates in earlier for record in workspace.records if record["cell"] == coordinates]
    steps = experiment.run(cell, section, replace(workspace, records=visible))
    while True:
        try:
            step = next(steps)
        except StopIteration as stop:
            return stop.value
        on_step(step)
