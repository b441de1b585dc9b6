"""Before few shots: a drawn ViT learns to tell some classes apart from all of their images but a held-out part.

Images are shifted by a few pixels, anew in every step.
"""

import functools
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from limbeck import models, seeding
from limbeck.experiments.runs import Result, Workspace, result, spelled
from limbeck.models import vision
from limbeck.tasks import images
from limbeck.tasks.images import Images
from limbeck.training import resume, supervised

SEED = 0


@dataclass(frozen=True)
class FirstTraining:
    """What a drawn ViT learns first; sources stand in params/nola.yaml."""

    first_data: str
    first_classes: tuple[int, ...]
    first_held: int
    first_shift: int
    first_steps: int
    first_batch: int
    first_rate: float


@functools.lru_cache(maxsize=4)
def data(name: str, side: int, classes: tuple[int, ...] = ()) -> Images:
    """A data set, or some of its classes, read once."""
    whole = images.load(name, side)
    return whole.only(classes) if classes else whole


def file_of(name: str) -> str:
    """The file of a model's weights."""
    return f"{spelled(name)}.safetensors"


def shifted(
    pixels: Float[Tensor, "batch channel side side"], shifts: Int[Tensor, "batch 2"], most: int
) -> Float[Tensor, "batch channel side side"]:
    """Images moved down and right by their shifts, of at most `most` pixels either way; black comes in."""
    side = pixels.shape[-1]
    padded = F.pad(pixels, [most] * 4)
    lines = torch.arange(side) + most - shifts[:, :, None]
    batch = torch.arange(len(pixels))[:, None, None]
    return padded[batch, :, lines[:, 0, :, None], lines[:, 1, None, :]].permute(0, 3, 1, 2)


def _batches(among: Tensor, settings: FirstTraining) -> list[Int[Tensor, "batch 3"]]:
    """Rows in a drawn order, epoch after epoch, each with how far it is shifted down and right."""
    source, rows = seeding.generator(SEED, "order"), []
    needed = settings.first_steps * settings.first_batch
    while sum(map(len, rows)) < needed:
        rows.append(among[torch.randperm(len(among), generator=source)])
    shifts = torch.randint(2 * settings.first_shift + 1, (needed, 2), generator=source) - settings.first_shift
    return list(torch.cat([torch.cat(rows)[:needed, None], shifts], 1).split(settings.first_batch))


def train(
    name: str, settings: FirstTraining, workspace: Workspace, *, data_seed: int, clip_norm: float, save_every: int
) -> Generator[dict[str, float], None, Result]:
    """Train a shape's model on the first classes, leave its weights, and score it on images that it never saw."""
    known = data(settings.first_data, vision.SIDE, settings.first_classes)
    held = images.choose(known.labels, ~known.held, settings.first_held, seeding.generator(data_seed, "first"))
    among = torch.ones(len(known), dtype=torch.bool)
    among[held] = False
    model = vision.load(name, classes=known.classes, seed=SEED).to(workspace.device)

    def loss(rows: Tensor) -> supervised.Terms:
        moved = shifted(known.select(rows[:, 0]), rows[:, 1:], settings.first_shift)
        seen = vision.prepared(name, moved, vision.SIDE).to(workspace.device)
        labels = known.labels[rows[:, 0]].to(workspace.device)
        return {"loss/ce": F.cross_entropy(vision.logits(model, seen), labels)}

    parameters = models.trainable(model)
    batches = _batches(torch.nonzero(among).flatten(), settings)
    curve = yield from supervised.fit(
        parameters,
        loss,
        batches,
        learning_rate=settings.first_rate,
        clip_norm=clip_norm,
        state=workspace.state,
        save_every=save_every,
    )
    resume.write_tensors(workspace.checkpoints / file_of(name), dict(model.named_parameters()))
    with torch.no_grad():
        seen = vision.prepared(name, known.select(held), vision.SIDE).to(workspace.device)
        guesses = vision.logits(model, seen).argmax(-1).cpu()
    accuracy = (guesses == known.labels[held]).double().mean().item()
    return result({"first/accuracy": accuracy}, curve, weights=parameters)


def restore(model: nn.Module, folder: Path, name: str) -> None:
    """Put the weights back, but for the head's. Raises ValueError if there are none, or those of another model."""
    path, parameters = folder / file_of(name), dict(model.named_parameters())
    if not path.is_file():
        raise ValueError(f"expected the weights of {name} in {folder}, found none; run the cell that trains it")
    weights = resume.read_tensors(path)
    head = set(map(id, vision.head_of(model).parameters()))
    odd = [key for key in weights.keys() & parameters.keys() if weights[key].shape != parameters[key].shape]
    if weights.keys() != parameters.keys() or any(id(parameters[key]) not in head for key in odd):
        raise ValueError(f"received {len(weights)} weights in {path}, expected the {len(parameters)} of {name}")
    kept = {key: weight for key, weight in weights.items() if id(parameters[key]) not in head}
    model.load_state_dict(kept, strict=False)
