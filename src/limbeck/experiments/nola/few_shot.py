"""Few-shot classification of images: nearest neighbour, linear probe, full fine-tuning, LoRA and NOLA, by panel.

A model that knows other classes learns new ones from a few images of each. Every arm but the nearest neighbour trains
its head, which is drawn by the seed as the adapter is, and has its learning rate chosen on reserved images from as many
rates as the others; a choice is a panel's own. Adam, cross-entropy with smoothed labels, learning rate falling to 0.

Left out: the paper's augmentations and its cosine; LoRA and NOLA on other layers than the paper's rows.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck import assets, models, seeding
from limbeck.experiments.nola import vision_first, vision_section
from limbeck.experiments.nola.vision_section import NEAREST, Panel, Section, Shots
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.models import vision
from limbeck.training import supervised

Steps = Generator[dict[str, float], None, Result]
_NOT_INPUTS = ("models", "targets", "shots", "subsets", "epochs", "arms", "initialisations")
_FIRST = ("clip_norm", "data_seed", "save_every")  # what the first training has of the rest
_SCORED = 250  # images that are scored together


def cells(params: Section, seeds: Sequence[int]) -> list[Cell]:
    """First the models' own training, then the choice of rates, then every arm by panel, subset and seed.

    Raises ValueError for too few seeds.
    """
    if len(seeds) < params.initialisations:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.initialisations}")
    inputs = {name: value for name, value in asdict(params).items() if name not in _NOT_INPUTS}
    found = []
    for name in filter(vision.drawn, dict.fromkeys(params.models)):
        own = {key: value for key, value in inputs.items() if key.startswith("first_") or key in _FIRST}
        own |= {"assets": assets.checksums(params.first_data)}
        found.append(Cell({"phase": "first", "model": name}, own, (vision_first.file_of(name),)))
    for panel in params.panels:
        named = (panel.model, panel.target, params.first_data)
        own = inputs | {"epochs": panel.epochs, "assets": assets.checksums(*named)}
        for arm in params.arms:
            at = {**panel.coordinates, "arm": arm}
            for rate in params.rates(arm) if arm != NEAREST else ():
                for subset in range(params.selection_subsets):
                    chosen = {"phase": "select", **at, "rate": rate, "subset": subset, "seed": params.selection_seed}
                    found.append(Cell(chosen, own, wave=1))
            for subset in range(panel.subsets):
                for seed in seeds[: params.initialisations]:
                    found.append(Cell({"phase": "final", **at, "subset": subset, "seed": seed}, own, wave=2))
    return sorted(found, key=lambda cell: cell.wave)


def run(cell: Cell, params: Section, place: Workspace) -> Steps:
    """Train and score one cell; yields once a step."""
    at: dict[str, Any] = cell.coordinates
    if at["phase"] == "first":
        return (yield from vision_first.train(at["model"], params, place))
    panel = next(panel for panel in params.panels if panel.coordinates.items() <= at.items())
    shots = vision_section.shots(params, panel, phase=at["phase"], subset=at["subset"])
    bench = Bench(params, panel, shots, place, at["seed"])
    prefix = "validation" if at["phase"] == "select" else "test"
    if at["arm"] == NEAREST:
        yield {"step": 1, "steps": 1}
        return Result({f"{prefix}/accuracy": bench.nearest(), "adapter/parameters": 0})
    added = vision.attach(bench.model, at["arm"], rank=params.rank, seed=at["seed"])
    rate = at["rate"] if at["phase"] == "select" else _chosen(at, place)
    parameters = models.trainable(bench.model.to(place.device))
    options = {"clip_norm": params.clip_norm, "state": place.state, "save_every": params.save_every}
    curve = yield from supervised.fit(parameters, bench.loss, bench.batches(), learning_rate=rate, **options)
    metrics = {f"{prefix}/{name}": value for name, value in bench.scores().items()}
    metrics |= {"train/loss": curve["loss/ce"][-1], "train/rate": rate, "adapter/parameters": added}
    count = sum(parameter.numel() for parameter in parameters.values())
    return Result(metrics, curve, count, str(bench.dtype).removeprefix("torch."))


def _chosen(at: dict[str, Any], place: Workspace) -> float:
    """The rate of the highest validation accuracy, averaged over subsets; of equals the one of the lower loss."""
    wanted = {name: at[name] for name in ("model", "target", "shots", "arm")} | {"phase": "select"}
    found: dict[float, list[tuple[float, float]]] = {}
    for record in place.records:
        if wanted.items() <= record["cell"].items():
            scores = record["metrics"]["validation/accuracy"], -record["metrics"]["validation/loss"]
            found.setdefault(record["cell"]["rate"], []).append(scores)
    return max(found, key=lambda rate: tuple(sum(part) / len(part) for part in zip(*found[rate], strict=True)))


class Bench:
    """A model before adaptation, and how it is taught and scored on one run's images."""

    def __init__(self, section: Section, panel: Panel, shots: Shots, place: Workspace, seed: int) -> None:
        self.section, self.panel, self.shots, self.seed = section, panel, shots, seed
        self.side, self.device = section.side_of(panel.model), place.device
        self.model = vision.load(panel.model, classes=shots.images.classes, seed=seed).to(place.device)
        if vision.drawn(panel.model):
            vision_first.restore(self.model, place.checkpoints, panel.model)
        width = vision.head_of(self.model).in_features
        self.dtype = models.precision(place.precision, width=width, where=place.device)

    def batches(self) -> list[Tensor]:
        """Row indices: every epoch in a new order, a last short batch dropped; one batch of all where it holds them."""
        size, found = min(self.section.batch, len(self.shots.train)), []
        for epoch in range(self.panel.epochs):
            order = torch.randperm(len(self.shots.train), generator=seeding.generator(self.seed, "order", epoch))
            found += [rows for rows in self.shots.train[order].split(size) if len(rows) == size]
        return found

    def loss(self, rows: Tensor) -> supervised.Terms:
        """Cross-entropy with smoothed labels, in nats."""
        found, labels = self._logits(rows), self.shots.images.labels[rows].to(self.device)
        return {"loss/ce": F.cross_entropy(found, labels, label_smoothing=self.section.smoothing)}

    def scores(self) -> dict[str, float]:
        """Accuracy and cross-entropy, in nats, on the scored images."""
        with torch.no_grad():
            found = torch.cat([self._logits(rows) for rows in self.shots.scored.split(_SCORED)]).cpu().double()
        labels = self.shots.images.labels[self.shots.scored]
        accuracy = (found.argmax(-1) == labels).double().mean().item()
        return {"accuracy": accuracy, "loss": F.cross_entropy(found, labels).item()}

    def nearest(self) -> float:
        """Accuracy where an image has the class of the nearest shot, by Euclidean distance of the head's inputs."""
        kept, labels = self._features(self.shots.train), self.shots.images.labels
        hits = 0
        for rows in self.shots.scored.split(_SCORED):
            closest = torch.cdist(self._features(rows), kept).argmin(-1).cpu()
            hits += int((labels[self.shots.train][closest] == labels[rows]).sum())
        return hits / len(self.shots.scored)

    def _seen(self, rows: Tensor) -> Tensor:
        return vision.prepared(self.panel.model, self.shots.images.at(rows).to(self.device), self.side)

    def _logits(self, rows: Tensor) -> Tensor:
        with models.autocast(self.device, self.dtype):
            return vision.logits(self.model, self._seen(rows)).float()

    def _features(self, rows: Tensor) -> Tensor:
        return vision.features(self.model, self._seen(rows)).float()
