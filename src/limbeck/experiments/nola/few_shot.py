"""Few-shot classification of images: nearest neighbour, linear probe, full fine-tuning, LoRA and NOLA, by panel.

A model that knows other classes learns new ones from a few images of each. Every arm but the nearest neighbour trains
its head, which is drawn by the seed as the adapter is, and has its learning rate chosen on reserved images from as many
rates as the others; a choice is a panel's own. Adam, cross-entropy with smoothed labels, learning rate falling to 0.

A panel is a model on a data set at a number of shots. Of each class, some images are reserved: on them alone learning
rates are chosen. Every subset is drawn from the rest, and tested on all of the rest that it leaves, or on the data
set's own test part where it has one.

Left out: the paper's augmentations and its cosine; LoRA and NOLA on other layers than the paper's rows.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from limbeck import assets, models, seeding
from limbeck.experiments.nola import first_training
from limbeck.experiments.nola.first_training import FirstTraining
from limbeck.experiments.runs import Cell, Result, Workspace, best, result, spelled
from limbeck.models import vision
from limbeck.params import flat, positive
from limbeck.tasks import images
from limbeck.tasks.images import Images
from limbeck.training import supervised

Steps = Generator[dict[str, float], None, Result]
NEAREST = "nearest"  # the arm that trains nothing
_LISTS = ("models", "targets", "shots", "subsets", "epochs")
_NOT_INPUTS = (*_LISTS, "arms", "initialisations")
_FIRST = ("clip_norm", "data_seed", "save_every")  # what the first training has of the rest
_SCORED = 250  # images that are scored together


@dataclass(frozen=True)
class Panel:
    """One model on one data set at one number of shots."""

    model: str
    target: str
    shots: int
    subsets: int
    epochs: int

    @property
    def coordinates(self) -> dict[str, str | int]:
        """How a cell names it."""
        return {"model": spelled(self.model), "target": spelled(self.target), "shots": self.shots}


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there. `models` to `epochs` have one entry per panel."""

    models: tuple[str, ...]
    targets: tuple[str, ...]
    shots: tuple[int, ...]
    subsets: tuple[int, ...]
    epochs: tuple[int, ...]
    arms: tuple[str, ...]
    initialisations: int
    side: int
    rank: int
    first: FirstTraining
    reserved: int
    selection_subsets: int
    selection_seed: int
    linear_rates: tuple[float, ...]
    full_rates: tuple[float, ...]
    lora_rates: tuple[float, ...]
    nola_rates: tuple[float, ...]
    batch: int
    smoothing: float
    clip_norm: float
    data_seed: int
    save_every: int

    def __post_init__(self) -> None:
        for name in _LISTS:
            if len(getattr(self, name)) != len(self.models):
                raise ValueError(f"received {name} {getattr(self, name)}, expected one for each of {self.models}")
        if len({len(self.rates(arm)) for arm in self.arms if arm != NEAREST}) > 1:
            raise ValueError(f"received rates of other numbers for some of {self.arms}, expected one budget for all")
        positive(**{name: min(getattr(self, name)) for name in _LISTS[2:]})
        positive(**{name: getattr(self, name) for name in ("initialisations", "rank", "batch", "selection_subsets")})
        if self.reserved <= max(self.shots):
            raise ValueError(f"received reserved {self.reserved}, expected more than {max(self.shots)} shots")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}")

    @property
    def panels(self) -> list[Panel]:
        """In the order of the lists."""
        return [Panel(*row) for row in zip(*(getattr(self, name) for name in _LISTS), strict=True)]

    def rates(self, arm: str) -> tuple[float, ...]:
        """The learning rates to choose from. Raises ValueError for an arm that has none."""
        kind = arm.partition("_")[0]
        if kind not in ("linear", "full", "lora", "nola"):
            raise ValueError(f"received arm {arm!r}, expected {NEAREST}, linear, full, lora_<r>, nola or nola_half")
        return getattr(self, f"{kind}_rates")

    def side_of(self, model: str) -> int:
        """The side of the images that a model reads."""
        return vision.SIDE if vision.drawn(model) else self.side


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """First the models' own training, then the choice of rates, then every arm by panel, subset and seed.

    Raises ValueError for too few seeds.
    """
    if len(seeds) < params.initialisations:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.initialisations}")
    inputs = {name: value for name, value in flat(params).items() if name not in _NOT_INPUTS}
    first = {key: value for key, value in inputs.items() if key.startswith("first_") or key in _FIRST}
    first |= {"assets": assets.checksums(params.first.first_data)}
    drawn = filter(vision.drawn, dict.fromkeys(params.models))
    planned = [Cell({"phase": "first", "model": name}, first, (first_training.file_of(name),)) for name in drawn]
    for panel in params.panels:
        named = (panel.model, panel.target, params.first.first_data)
        own = inputs | {"epochs": panel.epochs, "assets": assets.checksums(*named)}
        for arm in params.arms:
            shared = {**panel.coordinates, "arm": arm}
            for rate in params.rates(arm) if arm != NEAREST else ():
                for subset in range(params.selection_subsets):
                    tried = {"phase": "select", **shared, "rate": rate, "subset": subset, "seed": params.selection_seed}
                    planned.append(Cell(tried, own, wave=1))
            for subset in range(panel.subsets):
                for seed in seeds[: params.initialisations]:
                    planned.append(Cell({"phase": "final", **shared, "subset": subset, "seed": seed}, own, wave=2))
    return sorted(planned, key=lambda cell: cell.wave)


def run(cell: Cell, params: Params, workspace: Workspace) -> Steps:
    """Train and score one cell; yields once per step."""
    coordinates: dict[str, Any] = cell.coordinates
    if coordinates["phase"] == "first":
        return (
            yield from first_training.train(
                coordinates["model"],
                params.first,
                workspace,
                data_seed=params.data_seed,
                clip_norm=params.clip_norm,
                save_every=params.save_every,
            )
        )
    panel = next(panel for panel in params.panels if panel.coordinates.items() <= coordinates.items())
    drawn = shots(params, panel, phase=coordinates["phase"], subset=coordinates["subset"])
    learner = Learner(params, panel, drawn, workspace, coordinates["seed"])
    prefix = "validation" if coordinates["phase"] == "select" else "test"
    if coordinates["arm"] == NEAREST:
        yield {"step": 1, "steps": 1}
        return Result({f"{prefix}/accuracy": learner.nearest(), "adapter/parameters": 0})
    added = vision.attach(learner.model, coordinates["arm"], rank=params.rank, seed=coordinates["seed"])
    rate = coordinates["rate"] if coordinates["phase"] == "select" else _chosen_rate(coordinates, workspace)
    parameters = models.trainable(learner.model.to(workspace.device))
    curve = yield from supervised.fit(
        parameters,
        learner.loss,
        learner.batches(),
        learning_rate=rate,
        clip_norm=params.clip_norm,
        state=workspace.state,
        save_every=params.save_every,
    )
    metrics = {f"{prefix}/{name}": value for name, value in learner.scores().items()}
    metrics |= {"train/loss": curve["loss/ce"][-1], "train/rate": rate, "adapter/parameters": added}
    return result(metrics, curve, weights=parameters, dtype=learner.dtype)


def _chosen_rate(coordinates: dict[str, Any], workspace: Workspace) -> float:
    """The rate of the highest validation accuracy, averaged over subsets; of equals the one of the lower loss."""
    where = {name: coordinates[name] for name in ("model", "target", "shots", "arm")} | {"phase": "select"}
    metrics = ["validation/accuracy", "validation/loss"]
    return best(workspace.records, where, "rate", metrics, highest=[True, False])


@dataclass(frozen=True)
class Shots:
    """A data set, the rows that one run learns from, and those that score it."""

    images: Images
    train: Int[Tensor, " shot"]
    scored: Int[Tensor, " image"]


def shots(section: Params, panel: Panel, *, phase: str, subset: int) -> Shots:
    """The images of one run: `select` learns from and is scored on reserved images, `final` on others.

    Of the data that models first learn from they are of the other classes, else of all.
    """
    whole = first_training.data(panel.target, section.side_of(panel.model))
    if panel.target == section.first.first_data:
        others = tuple(sorted(set(whole.labels.tolist()) - set(section.first.first_classes)))
        whole = first_training.data(panel.target, section.side_of(panel.model), others)
    source = seeding.generator(section.data_seed, "reserved")
    reserved = torch.zeros(len(whole), dtype=torch.bool)
    reserved[images.choose(whole.labels, ~whole.held, section.reserved, source)] = True
    among = reserved if phase == "select" else ~reserved & ~whole.held
    source = seeding.generator(section.data_seed, phase, panel.shots, subset)
    train = images.choose(whole.labels, among, panel.shots, source)
    scored = whole.held.clone() if phase != "select" and whole.held.any() else among.clone()
    scored[train] = False
    return Shots(whole, train, torch.nonzero(scored).flatten())


class Learner:
    """A model before adaptation, and how it learns and is scored on one run's images."""

    def __init__(self, section: Params, panel: Panel, shots: Shots, workspace: Workspace, seed: int) -> None:
        self.section, self.panel, self.shots, self.seed = section, panel, shots, seed
        self.side, self.device = section.side_of(panel.model), workspace.device
        self.model = vision.load(panel.model, classes=shots.images.classes, seed=seed).to(workspace.device)
        if vision.drawn(panel.model):
            first_training.restore(self.model, workspace.checkpoints, panel.model)
        self.dtype = workspace.dtype

    def batches(self) -> list[Tensor]:
        """Row indices: every epoch in a new order, a last short batch dropped; one batch of all where it holds them."""
        size, drawn = min(self.section.batch, len(self.shots.train)), []
        for epoch in range(self.panel.epochs):
            order = torch.randperm(len(self.shots.train), generator=seeding.generator(self.seed, "order", epoch))
            drawn += [rows for rows in self.shots.train[order].split(size) if len(rows) == size]
        return drawn

    def loss(self, rows: Tensor) -> supervised.Terms:
        """Cross-entropy with smoothed labels, in nats."""
        logits, labels = self._logits(rows), self.shots.images.labels[rows].to(self.device)
        return {"loss/ce": F.cross_entropy(logits, labels, label_smoothing=self.section.smoothing)}

    def scores(self) -> dict[str, float]:
        """Accuracy and cross-entropy, in nats, on the scored images."""
        with torch.no_grad():
            logits = torch.cat([self._logits(rows) for rows in self.shots.scored.split(_SCORED)]).cpu().double()
        labels = self.shots.images.labels[self.shots.scored]
        accuracy = (logits.argmax(-1) == labels).double().mean().item()
        return {"accuracy": accuracy, "loss": F.cross_entropy(logits, labels).item()}

    def nearest(self) -> float:
        """Accuracy where an image has the class of the nearest shot, by Euclidean distance of the head's inputs."""
        kept, labels = self._features(self.shots.train), self.shots.images.labels
        hits = 0
        for rows in self.shots.scored.split(_SCORED):
            closest = torch.cdist(self._features(rows), kept).argmin(-1).cpu()
            hits += int((labels[self.shots.train][closest] == labels[rows]).sum())
        return hits / len(self.shots.scored)

    def _seen(self, rows: Tensor) -> Tensor:
        return vision.prepared(self.panel.model, self.shots.images.select(rows).to(self.device), self.side)

    def _logits(self, rows: Tensor) -> Tensor:
        with models.autocast(self.device, self.dtype):
            return vision.logits(self.model, self._seen(rows)).float()

    def _features(self, rows: Tensor) -> Tensor:
        return vision.features(self.model, self._seen(rows)).float()
