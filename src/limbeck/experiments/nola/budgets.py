"""NOLA's and PRANC's coefficients, as many of each, on the same matrices of a small classifier of images.

`budget` counts the coefficients of one matrix: NOLA splits it into k and l, PRANC has one sum. `none` trains no matrix
and `full` the matrices themselves, with all else. What is free, the norms and the head, trains in every arm and is not
counted. Every arm and budget has the best of the same learning rates under a seed of its own, which draws data order,
start and bases alike: `by` the loss on the validation split or, to see how low each gets, on the training split. The
test split is read after the last step and chooses nothing.
"""

import functools
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from limbeck import assets, models, seeding
from limbeck.adapters import NolaConfig, attach_pranc
from limbeck.evaluation import classifier
from limbeck.experiments.runs import Cell, Result, Workspace, best, result
from limbeck.models import resnet
from limbeck.params import flat, one_of, positive
from limbeck.tasks import images
from limbeck.training import rollouts, supervised

SIZED = ("pranc", "nola")
ARMS = ("none", *SIZED, "full")
CRITERIA = ("train", "validation")
_NOT_INPUTS = ("arms", "budgets", "rates", "criteria")
Steps = Generator[dict[str, float], None, Result]


@dataclass(frozen=True)
class Settings:
    """What both comparisons share; sources stand in params/nola.yaml. Sizes are images of each class."""

    data: str
    data_seed: int
    train_size: int
    validation_size: int
    test_size: int
    pool: int
    arms: tuple[str, ...]
    budgets: tuple[int, ...]
    rates: tuple[float, ...]
    criteria: tuple[str, ...]
    selection_seed: int
    nola_rank: int
    nola_scale: float
    pranc_scale: float
    steps: int
    batch_size: int
    clip_norm: float
    save_every: int

    def __post_init__(self) -> None:
        for arm in self.arms:
            one_of("arm", arm, ARMS)
        for rate in self.rates:
            positive(rate=rate)
        for by in self.criteria:
            one_of("criterion", by, CRITERIA)
        if min(self.budgets) < 2:
            raise ValueError(f"received budgets {self.budgets}, expected at least 2 each: NOLA has two factors")


class Split(NamedTuple):
    """A split: images in [0, 1] and their classes."""

    images: Tensor
    labels: Tensor


class Work(NamedTuple):
    """A model, its data, the names of the layers to adapt, and which other parameters are free."""

    model: nn.Module
    data: dict[str, Split]
    targets: list[str]
    free: Callable[[str], bool]


def cells(params: Any, seeds: Sequence[int], *, first: int) -> list[Cell]:
    """The rates of every arm and budget in wave `first`, then what they chose by seed; of `params.shared`."""
    shared: Settings = params.shared
    inputs = {name: value for name, value in flat(params).items() if name not in _NOT_INPUTS}
    inputs |= {"assets": assets.checksums(shared.data)}
    points = [
        {"arm": arm, "budget": budget} for arm in shared.arms for budget in (shared.budgets if arm in SIZED else (0,))
    ]
    tried = [
        Cell({"phase": "selection", **point, "rate": rate, "seed": shared.selection_seed}, inputs, wave=first)
        for point in points
        for rate in shared.rates
    ]
    chosen = inputs | {"rates": shared.rates}
    return tried + [
        Cell({"phase": "final", **point, "by": by, "seed": seed}, chosen, wave=first + 1)
        for seed in seeds
        for point in points
        for by in shared.criteria
    ]


def rate_of(cell: Cell, records: Sequence[dict[str, Any]]) -> float:
    """The cell's own rate, or its arm's and budget's with the lowest loss by its criterion, the smallest of equals."""
    coordinates = cell.coordinates
    if "rate" in coordinates:
        return coordinates["rate"]
    where = {"phase": "selection", "arm": coordinates["arm"], "budget": coordinates["budget"]}
    return best(records, where, "rate", [f"{coordinates['by']}/loss"], highest=[False])


@functools.cache
def _loaded(name: str) -> images.Images:
    return images.load(name)


def splits(settings: Settings, classes: Sequence[int]) -> dict[str, Split]:
    """Train, validation and test: other images of the same classes, drawn by the data's own seed."""
    whole = _loaded(settings.data).only(classes)
    source, among, by_name = seeding.generator(settings.data_seed, "split"), ~whole.held, {}
    for name in ("train", "validation", "test"):
        rows = images.choose(whole.labels, among, getattr(settings, f"{name}_size"), source)
        among[rows] = False
        by_name[name] = Split(F.avg_pool2d(whole.select(rows), settings.pool), whole.labels[rows])
    return by_name


def attach(settings: Settings, work: Work, arm: str, budget: int, *, seed: int) -> dict[str, nn.Parameter]:
    """Freeze the model but for the arm's parameters and the free ones; returns those, by name."""
    model = work.model.requires_grad_(arm == "full")
    if arm == "nola":
        sizes = {"r": settings.nola_rank, "num_basis": (budget - budget // 2, budget // 2)}
        scale = {"nola_alpha": settings.nola_scale * settings.nola_rank, "basis_seed": seed, "share_basis": False}
        get_peft_model(model, NolaConfig(target_modules=work.targets, **sizes, **scale))
    if arm == "pranc":
        for name in work.targets:
            attach_pranc(model.get_submodule(name), num_basis=budget, seed=seed, key=name, scale=settings.pranc_scale)
    for name, parameter in model.named_parameters():
        if work.free(name):
            parameter.requires_grad_(True)
    return models.trainable(model)


def fit(
    settings: Settings,
    workspace: Workspace,
    model: nn.Module,
    train: Split,
    *,
    order: torch.Generator,
    steps: int,
    rate: float,
) -> Generator[dict[str, float], None, supervised.Curve]:
    """Train what is trainable of a model, by `supervised.fit`, on batches in the drawn order."""
    rows = rollouts.batches(len(train.labels), size=settings.batch_size, steps=steps, source=order)

    def loss(chosen: Tensor) -> dict[str, Tensor]:
        logits = model(train.images[chosen].to(workspace.device))
        return {"loss/ce": F.cross_entropy(logits, train.labels[chosen].to(workspace.device))}

    batches = [torch.tensor(chosen) for chosen in rows]
    return supervised.fit(
        models.trainable(model),
        loss,
        batches,
        learning_rate=rate,
        clip_norm=settings.clip_norm,
        state=workspace.state,
        save_every=settings.save_every,
    )


def run(cell: Cell, settings: Settings, workspace: Workspace, work: Work) -> Steps:
    """Train an arm at a rate and measure it; yields once per step."""
    coordinates, train = cell.coordinates, work.data["train"]
    rate, seed = rate_of(cell, workspace.records), coordinates["seed"]
    model = work.model.to(workspace.device)
    parameters = attach(settings, work, coordinates["arm"], coordinates["budget"], seed=seed)
    order = seeding.generator(seed, "order")
    curve = yield from fit(settings, workspace, model, train, order=order, steps=settings.steps, rate=rate)
    resnet.measure_statistics(model, train.images.to(workspace.device))
    counted = sum(parameter.numel() for name, parameter in parameters.items() if not work.free(name))
    metrics = {"adapter/coefficients": float(counted if coordinates["arm"] in SIZED else 0), "selection/rate": rate}
    metrics |= scores(model, work.data, workspace.device, test=coordinates["phase"] == "final")
    return result(metrics, curve, weights=parameters)


@torch.no_grad()
def scores(model: nn.Module, data: dict[str, Split], device: torch.device, *, test: bool) -> dict[str, float]:
    """Mean cross-entropy in nats and accuracy of every split; of the test split only where it is asked for."""
    by_name = {}
    for name, part in data.items():
        if name != "test" or test:
            logits = torch.cat([model(batch.to(device)).cpu() for batch in part.images.split(256)])
            by_name[f"{name}/loss"] = F.cross_entropy(logits, part.labels).item()
            by_name[f"{name}/accuracy"] = classifier.accuracy(logits, part.labels)
    return by_name
