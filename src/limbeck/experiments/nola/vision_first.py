"""Before few shots: a drawn ViT learns to tell some classes apart from all of their images but a held-out part.

Images are shifted by a few pixels, anew in every step.
"""

from collections.abc import Generator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor, nn

from limbeck import models, seeding
from limbeck.experiments.nola import vision_section
from limbeck.experiments.nola.vision_section import Section
from limbeck.experiments.runs import Result, Workspace
from limbeck.models import vision
from limbeck.tasks import images
from limbeck.training import resume, supervised

FIRST_SEED = 0


def file_of(name: str) -> str:
    """The file of a model's weights."""
    return f"{vision_section.spelled(name)}.safetensors"


def shifted(
    pixels: Float[Tensor, "batch channel side side"], shifts: Int[Tensor, "batch 2"], most: int
) -> Float[Tensor, "batch channel side side"]:
    """Images moved down and right by their shifts, of at most `most` pixels either way; black comes in."""
    side = pixels.shape[-1]
    padded = F.pad(pixels, [most] * 4)
    lines = torch.arange(side) + most - shifts[:, :, None]
    batch = torch.arange(len(pixels))[:, None, None]
    return padded[batch, :, lines[:, 0, :, None], lines[:, 1, None, :]].permute(0, 3, 1, 2)


def _batches(among: Tensor, section: Section) -> list[Int[Tensor, "batch 3"]]:
    """Rows in a drawn order, epoch after epoch, each with how far it is shifted down and right."""
    source, rows = seeding.generator(FIRST_SEED, "order"), []
    needed = section.first_steps * section.first_batch
    while sum(map(len, rows)) < needed:
        rows.append(among[torch.randperm(len(among), generator=source)])
    width = 2 * section.first_shift + 1
    shifts = torch.randint(width, (needed, 2), generator=source) - section.first_shift
    return list(torch.cat([torch.cat(rows)[:needed, None], shifts], 1).split(section.first_batch))


def train(name: str, section: Section, place: Workspace) -> Generator[dict[str, float], None, Result]:
    """Train a shape's model on the first classes, leave its weights, and score it on images that it never saw."""
    found = vision_section.data(section.first_data, vision.SIDE, section.first_classes)
    source = seeding.generator(section.data_seed, "first")
    held = images.choose(found.labels, ~found.held, section.first_held, source)
    among = torch.ones(len(found), dtype=torch.bool)
    among[held] = False
    model = vision.load(name, classes=found.classes, seed=FIRST_SEED).to(place.device)

    def loss(rows: Tensor) -> supervised.Terms:
        moved = shifted(found.at(rows[:, 0]), rows[:, 1:], section.first_shift)
        seen = vision.prepared(name, moved, vision.SIDE).to(place.device)
        labels = found.labels[rows[:, 0]].to(place.device)
        return {"loss/ce": F.cross_entropy(vision.logits(model, seen), labels)}

    parameters = models.trainable(model)
    options = {"clip_norm": section.clip_norm, "state": place.state, "save_every": section.save_every}
    batches = _batches(torch.nonzero(among).flatten(), section)
    curve = yield from supervised.fit(parameters, loss, batches, learning_rate=section.first_rate, **options)
    resume.write_tensors(place.checkpoints / file_of(name), dict(model.named_parameters()))
    with torch.no_grad():
        seen = vision.prepared(name, found.at(held), vision.SIDE).to(place.device)
        guesses = vision.logits(model, seen).argmax(-1).cpu()
    accuracy = (guesses == found.labels[held]).double().mean().item()
    count = sum(parameter.numel() for parameter in parameters.values())
    return Result({"first/accuracy": accuracy}, curve, count)


def restore(model: nn.Module, folder: Path, name: str) -> None:
    """Put the weights back, but for the head's. Raises ValueError if there are none, or those of another model."""
    path, parameters = folder / file_of(name), dict(model.named_parameters())
    if not path.is_file():
        raise ValueError(f"expected the weights of {name} in {folder}, found none; run the cell that trains it")
    found = load_file(path)
    if found.keys() != parameters.keys():
        raise ValueError(f"received {len(found)} weights in {path}, expected the {len(parameters)} of {name}")
    head = set(map(id, vision.head_of(model).parameters()))
    with torch.no_grad():
        for key, parameter in parameters.items():
            if id(parameter) not in head:
                parameter.copy_(found[key])
