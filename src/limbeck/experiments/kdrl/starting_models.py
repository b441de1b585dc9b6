"""The models that KDRL's small experiments begin with: decoders of characters, trained from nothing on worked chains.

A teacher learns clean solutions. A student has the skill and samples badly: a second model of clean solutions goes on
with solutions of which some steps are wrong and some leave out their working. Every cell leaves its model's weights,
which the other experiments of the profile read.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.experiments.kdrl import chains
from limbeck.experiments.kdrl.chains import Chains
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.models import language
from limbeck.params import one_of, positive
from limbeck.sampling import Tokens
from limbeck.tasks import chain_sum
from limbeck.training import imitation, resume, supervised

_NOTHING = "nothing"
_BUCKETS = 16  # batches that are drawn together, so that each holds chains of like length
_LISTS = ("begins", "start_seeds", "start_steps", "rates", "mistakes", "terse")


@dataclass(frozen=True)
class Section(chains.Section):
    """The models, in lists of one length, each after the one that it `begins` with (`nothing` for a drawn one)."""

    shape: str
    scale: float
    names: tuple[str, ...]
    begins: tuple[str, ...]
    start_seeds: tuple[int, ...]
    start_steps: tuple[int, ...]
    rates: tuple[float, ...]
    mistakes: tuple[float, ...]
    terse: tuple[float, ...]
    start_batch: int
    start_clip_norm: float
    start_save_every: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        for name in _LISTS:
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"received {name} {getattr(self, name)}, expected one for each of {self.names}")
        for at, begin in enumerate(self.begins):
            one_of(f"begins of {self.names[at]}", begin, (_NOTHING, *self.names[:at]))
        positive(start_batch=self.start_batch, start_steps=min(self.start_steps))
        if sum(self.train_sizes) < self.start_batch:
            raise ValueError(f"received train_sizes {self.train_sizes}, expected at least {self.start_batch} in all")


Params = Section


def cells(params: Section, _seeds: Sequence[int]) -> list[Cell]:
    """A cell a model, in the turn after that of the model that it begins with."""
    turns = {_NOTHING: -1}
    for name, begin in zip(params.names, params.begins, strict=True):
        turns[name] = turns[begin] + 1
    inputs = asdict(params)
    return [
        Cell({"arm": name, "seed": 0}, inputs, (imitation.weights_file(name),), turns[name]) for name in params.names
    ]


def model_of(section: Section, data: Chains, folder: Path, name: str) -> PreTrainedModel:
    """A model that was trained here, from the folder where its weights lie."""
    return imitation.restore(_drawn(section, data, section.start_seeds[section.names.index(name)]), folder, name)


def _drawn(section: Section, data: Chains, seed: int) -> PreTrainedModel:
    """An untrained decoder. Its matrices are `scale` times what Llama draws, which suits wider models."""
    model = language.load(section.shape, data.tokenizer, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(section.scale)
    return model


def run(cell: Cell, params: Section, place: Workspace) -> Generator[dict[str, float], None, Result]:
    """Train one model on worked solutions, leave its weights, and score it."""
    at, data = params.names.index(cell.coordinates["arm"]), Chains(params)
    seed, begin = params.start_seeds[at], params.begins[at]
    untouched = begin == _NOTHING
    model = _drawn(params, data, seed) if untouched else model_of(params, data, place.checkpoints, begin)
    model = model.to(place.device)
    dtype = models.precision(place.precision, width=model.config.hidden_size, where=place.device)
    prompts, solutions = worked(params, data, at)
    lengths = torch.tensor([len(x) + len(y) for x, y in zip(prompts, solutions, strict=True)])
    batches = _batches(lengths, size=params.start_batch, steps=params.start_steps[at], seed=seed)
    loss = imitation.solution_loss(model, prompts, solutions, dtype)
    parameters = models.trainable(model)
    options = {"clip_norm": params.start_clip_norm, "state": place.state, "save_every": params.start_save_every}
    curve = yield from supervised.fit(parameters, loss, batches, learning_rate=params.rates[at], **options)
    metrics = data.test_scores(model, seed=0, dtype=dtype)
    resume.write_tensors(place.checkpoints / cell.checkpoint_files[0], dict(parameters))
    count = sum(parameter.numel() for parameter in parameters.values())
    return Result(metrics, curve, count, str(dtype).removeprefix("torch."))


def worked(section: Section, data: Chains, at: int) -> tuple[list[Tokens], list[Tokens]]:
    """What the model at a place of the lists learns from: prompts, and solutions with the end token."""
    prompts, solutions = [], []
    for example in (example for examples in data.train.values() for example in examples):
        style = {"terse": section.terse[at], "mistakes": section.mistakes[at], "seed": section.start_seeds[at]}
        prompts.append(data.problem(example).prompt)
        solutions.append((*data.tokens(chain_sum.solution(example, **style)), data.end))
    return prompts, solutions


def _batches(lengths: Tensor, *, size: int, steps: int, seed: int) -> list[Tensor]:
    """Rows in a drawn order, epoch after epoch, in batches of like length."""
    source, found = seeding.generator(seed, "order"), []
    while len(found) < steps:
        drawn = torch.randperm(len(lengths), generator=source).split(size * _BUCKETS)
        alike = [part[lengths[part].argsort(stable=True)].split(size) for part in drawn]
        epoch = [batch for part in alike for batch in part if len(batch) == size]
        found += [epoch[i] for i in torch.randperm(len(epoch), generator=source).tolist()]
    return found[:steps]
