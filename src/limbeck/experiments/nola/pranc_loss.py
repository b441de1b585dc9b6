"""Training loss of NOLA and of PRANC on the same matrices, with as many coefficients (NOLA, Sec. 3.4).

A perceptron of two hidden layers learns one half of the digits whole; then its hidden matrices are frozen, and each arm
adapts them to the other half, with a fresh head that trains in every arm. A seed has its own first network.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from limbeck import seeding
from limbeck.experiments.nola import budgets
from limbeck.experiments.runs import Cell, Workspace, result
from limbeck.params import positive
from limbeck.training import resume

BEFORE, AFTER = range(5), range(5, 10)
HIDDEN = ("first", "second")


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there."""

    shared: budgets.Settings
    width: int
    base_steps: int
    base_rate: float

    def __post_init__(self) -> None:
        positive(width=self.width, base_steps=self.base_steps, base_rate=self.base_rate)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The first network of every seed, selection of each rate, then every arm and budget by seed."""
    rest = budgets.cells(params, seeds, first=1)
    bases = [
        Cell({"phase": "base", "arm": "full", "budget": 0, "seed": seed}, rest[0].inputs, (_file(seed),))
        for seed in (params.shared.selection_seed, *seeds)
    ]
    return bases + rest


def _file(seed: int) -> str:
    return f"base_{seed}.safetensors"


def perceptron(inputs: int, width: int, classes: int, seed: int) -> nn.Sequential:
    """Weights N(0, 2 / inputs), those of the head N(0, 1 / inputs), no bias to begin with."""
    with torch.device("meta"):
        first, second, head = nn.Linear(inputs, width), nn.Linear(width, width), nn.Linear(width, classes)
    parts = {"flat": nn.Flatten(), "first": first, "bend": nn.ReLU(), "second": second, "again": nn.ReLU()}
    model, source = nn.Sequential(OrderedDict(parts | {"head": head})), seeding.generator(seed, "perceptron")
    state = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in (*HIDDEN, "head"):
        weight = state[f"{name}.weight"]
        weight.normal_(0, math.sqrt((1 if name == "head" else 2) / weight.shape[1]), generator=source)
    model.load_state_dict(state, assign=True)
    return model


def run(cell: Cell, params: Params, workspace: Workspace) -> budgets.Steps:
    """Train and score one cell; yields once per step."""
    coordinates, base = cell.coordinates, cell.coordinates["phase"] == "base"
    data = budgets.splits(params.shared, BEFORE if base else AFTER)
    model = perceptron(data["train"].images[0].numel(), params.width, len(AFTER), coordinates["seed"])
    if base:
        return (yield from _pretrain(params, model, data, workspace, coordinates["seed"]))
    hidden = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(HIDDEN)}
    left = resume.read_tensors(workspace.checkpoints / _file(coordinates["seed"]), like=hidden)
    model.load_state_dict(left, strict=False)  # not the head
    work = budgets.Work(model, data, list(HIDDEN), lambda name: name.startswith("head"))
    return (yield from budgets.run(cell, params.shared, workspace, work))


def _pretrain(
    params: Params, model: nn.Module, data: dict[str, budgets.Split], workspace: Workspace, seed: int
) -> budgets.Steps:
    """Train the whole network and leave its hidden layers."""
    model, order = model.to(workspace.device), seeding.generator(seed, "base order")
    steps, rate = params.base_steps, params.base_rate
    curve = yield from budgets.fit(params.shared, workspace, model, data["train"], order=order, steps=steps, rate=rate)
    hidden = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(HIDDEN)}
    resume.write_tensors(workspace.checkpoints / _file(seed), hidden)
    scores = budgets.scores(model, data, workspace.device, test=False)
    return result(scores, curve, weights=dict(model.named_parameters()))
