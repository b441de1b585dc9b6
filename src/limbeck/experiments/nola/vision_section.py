"""What NOLA's few-shot experiments on images share: their parameters, and which images are for what.

A panel is a model on a data set at a number of shots. Of each class, some images are reserved: on them alone learning
rates are chosen. Every subset is drawn from the rest, and tested on all of the rest that it leaves, or on the data
set's own test part where it has one.
"""

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from limbeck import seeding
from limbeck.models import vision
from limbeck.params import positive
from limbeck.tasks import images
from limbeck.tasks.images import Images

NEAREST = "nearest"  # the arm that trains nothing
_LISTS = ("models", "targets", "shots", "subsets", "epochs")


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
class Section:
    """The section of params/nola.yaml; sources stand there. `models` to `epochs` have one entry a panel."""

    models: tuple[str, ...]
    targets: tuple[str, ...]
    shots: tuple[int, ...]
    subsets: tuple[int, ...]
    epochs: tuple[int, ...]
    arms: tuple[str, ...]
    initialisations: int
    side: int
    rank: int
    first_data: str
    first_classes: tuple[int, ...]
    first_held: int
    first_shift: int
    first_steps: int
    first_batch: int
    first_rate: float
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
        """Check what no type can."""
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


@dataclass(frozen=True)
class Shots:
    """A data set, the rows that one run learns from, and those that score it."""

    images: Images
    train: Int[Tensor, " shot"]
    scored: Int[Tensor, " image"]


def spelled(name: str) -> str:
    """A name as a coordinate or a file may hold it."""
    return "".join(letter if letter.isalnum() or letter in "_.-" else "-" for letter in name)


@functools.lru_cache(maxsize=4)
def data(name: str, side: int, classes: tuple[int, ...] = ()) -> Images:
    """A data set, or some of its classes, read once."""
    whole = images.load(name, side)
    return whole.of(classes) if classes else whole


def target(section: Section, panel: Panel) -> Images:
    """The images to adapt to: of the data that models first learn from, the other classes; else all."""
    found = data(panel.target, section.side_of(panel.model))
    if panel.target != section.first_data:
        return found
    held = tuple(sorted(set(found.labels.tolist()) - set(section.first_classes)))
    return data(panel.target, section.side_of(panel.model), held)


def shots(section: Section, panel: Panel, *, phase: str, subset: int) -> Shots:
    """The images of one run: `select` learns from and is scored on reserved images, `final` on others."""
    found = target(section, panel)
    source = seeding.generator(section.data_seed, "reserved")
    reserved = torch.zeros(len(found), dtype=torch.bool)
    reserved[images.choose(found.labels, ~found.held, section.reserved, source)] = True
    among = reserved if phase == "select" else ~reserved & ~found.held
    train = images.choose(
        found.labels, among, panel.shots, seeding.generator(section.data_seed, phase, panel.shots, subset)
    )
    scored = found.held.clone() if phase != "select" and found.held.any() else among.clone()
    scored[train] = False
    return Shots(found, train, torch.nonzero(scored).flatten())
