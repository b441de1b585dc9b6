"""NOLA on convolutions: a ResNet whose kernels of 3 x 3 are W0 + s A B with a random frozen W0, against PRANC.

A kernel is the matrix [c_in h w, c_out]. All of the blocks are adapted; the stem stays as it was drawn but in `full`.
Batch norm's scales and shifts and the head train in every arm, `none` has nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from limbeck.experiments.nola import budgets
from limbeck.experiments.runs import Cell, Workspace
from limbeck.models import resnet
from limbeck.params import positive

CLASSES = range(10)


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there."""

    shared: budgets.Settings
    width: int
    blocks: int

    def __post_init__(self) -> None:
        positive(width=self.width, blocks=self.blocks)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """Selection of each rate, then every arm and budget by seed."""
    return budgets.cells(params, seeds, first=0)


def work(params: Params, seed: int) -> budgets.Work:
    """The network as it is drawn, and what of it is adapted and free."""
    data = budgets.splits(params.shared, CLASSES)
    channels = data["train"].images.shape[1]
    model = resnet.draw(channels=channels, width=params.width, blocks=params.blocks, classes=len(CLASSES), seed=seed)
    targets = [f"blocks.{name}" for name, part in model.blocks.named_modules() if isinstance(part, nn.Conv2d)]
    return budgets.Work(model.train(), data, targets, lambda name: "norm" in name or name.startswith("head"))


def run(cell: Cell, params: Params, workspace: Workspace) -> budgets.Steps:
    """Train and score one cell; yields once per step."""
    return (yield from budgets.run(cell, params.shared, workspace, work(params, cell.coordinates["seed"])))
