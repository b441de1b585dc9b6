"""The models that KDRL's small experiments begin with: decoders of characters, trained from nothing on worked chains.

A teacher learns clean solutions. A student has the skill and samples badly: a second model of clean solutions goes on
with solutions of which some steps are wrong and some leave out their working. Every cell leaves its model's weights,
which the other experiments of the profile read.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.experiments import runs
from limbeck.experiments.kdrl.problems import ChainParams, Chains
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.models import language
from limbeck.params import flat, one_of, positive
from limbeck.sampling import Tokens
from limbeck.tasks import chain_sum
from limbeck.training import imitation

_NOTHING = "nothing"
_BUCKETS = 16  # batches that are drawn together, so that each holds chains of like length


@dataclass(frozen=True)
class Params:
    """The models, in lists of one length, each after the one that it `begins` with (`nothing` for a drawn one)."""

    chains: ChainParams
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
        for name in ("begins", "start_seeds", "start_steps", "rates", "mistakes", "terse"):
            if len(getattr(self, name)) != len(self.names):
                raise ValueError(f"received {name} {getattr(self, name)}, expected one for each of {self.names}")
        for index, begin in enumerate(self.begins):
            one_of(f"begins of {self.names[index]}", begin, (_NOTHING, *self.names[:index]))
        positive(start_batch=self.start_batch, start_steps=min(self.start_steps))
        sizes = self.chains.train_sizes
        if sum(sizes) < self.start_batch:
            raise ValueError(f"received train_sizes {sizes}, expected at least {self.start_batch} in all")


def cells(params: Params, _seeds: Sequence[int]) -> list[Cell]:
    """One cell per model, in the wave after that of the model that it begins with."""
    waves = {_NOTHING: -1}
    for name, begin in zip(params.names, params.begins, strict=True):
        waves[name] = waves[begin] + 1
    inputs = flat(params)
    return [
        Cell({"arm": name, "seed": 0}, inputs, (imitation.weights_file(name),), waves[name]) for name in params.names
    ]


def run(cell: Cell, params: Params, workspace: Workspace) -> Generator[dict[str, float], None, Result]:
    """Train one model on worked solutions, leave its weights, and score it."""
    index, problems = params.names.index(cell.coordinates["arm"]), Chains(params.chains)
    seed, begin = params.start_seeds[index], params.begins[index]
    untrained = begin == _NOTHING
    model = drawn(params, problems, seed) if untrained else trained(params, problems, workspace.checkpoints, begin)
    model = model.to(workspace.device)
    dtype = workspace.dtype
    prompts, solutions = worked(params, problems, index)
    lengths = torch.tensor([len(x) + len(y) for x, y in zip(prompts, solutions, strict=True)])
    rows = batches(lengths, size=params.start_batch, steps=params.start_steps[index], seed=seed)
    curve = yield from imitation.fit(
        model,
        prompts,
        solutions,
        rows,
        dtype=dtype,
        learning_rate=params.rates[index],
        clip_norm=params.start_clip_norm,
        state=workspace.state,
        save_every=params.start_save_every,
    )
    metrics = problems.test_scores(model, seed=0, dtype=dtype)
    imitation.save(model, workspace.checkpoints, cell.coordinates["arm"])
    return runs.result(metrics, curve, weights=models.trainable(model), dtype=dtype)


def trained(params: Params, problems: Chains, folder: Path, name: str) -> PreTrainedModel:
    """A model that was trained here, from the folder where its weights lie."""
    return imitation.restore(drawn(params, problems, params.start_seeds[params.names.index(name)]), folder, name)


def drawn(params: Params, problems: Chains, seed: int) -> PreTrainedModel:
    """An untrained decoder. Its matrices are `scale` times what Llama draws, which suits wider models."""
    model = language.load(params.shape, problems.tokenizer, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(params.scale)
    return model


def worked(params: Params, problems: Chains, index: int) -> tuple[list[Tokens], list[Tokens]]:
    """What the model at an index of the lists learns from: prompts, and solutions with the end token."""
    terse, mistakes, seed = params.terse[index], params.mistakes[index], params.start_seeds[index]
    examples = [example for family in problems.family_train.values() for example in family]
    texts = [chain_sum.solution(example, terse=terse, mistakes=mistakes, seed=seed) for example in examples]
    solutions = [(*problems.tokens(text), problems.end) for text in texts]
    return [problems.prompt(example) for example in examples], solutions


def batches(lengths: Tensor, *, size: int, steps: int, seed: int) -> list[Tensor]:
    """Rows in a drawn order, epoch after epoch, in batches of like length."""
    source = seeding.generator(seed, "order")
    rows: list[Tensor] = []
    while len(rows) < steps:
        buckets = torch.randperm(len(lengths), generator=source).split(size * _BUCKETS)
        alike = [part[lengths[part].argsort(stable=True)].split(size) for part in buckets]
        epoch = [batch for part in alike for batch in part if len(batch) == size]
        rows += [epoch[i] for i in torch.randperm(len(epoch), generator=source).tolist()]
    return rows[:steps]
