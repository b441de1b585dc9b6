"""NOLA beside LoRA, VeRA and full fine-tuning on meanings and texts: arms by seed, of `table_text` and its two kin.

A seed fixes the order of the texts, the same for every arm, and what an adapter draws. Each arm takes the learning rate
of lowest validation loss after one run of `selection_seed`, from as many rates for each method; `none` has none to
take, and is decoded once. `train/loss` is the mean over the last `save_every` steps, before each. The test split is
read after the last step and chooses nothing.
"""

import os
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file

from limbeck import models
from limbeck.experiments.nola import arms, frozen_decoder
from limbeck.experiments.nola.arms import AdapterSettings, Model
from limbeck.experiments.nola.frozen_decoder import FrozenDecoder, Loop, TextSettings
from limbeck.experiments.runs import Cell, Result, Workspace, best, result
from limbeck.params import one_of, positive

Steps = Generator[dict[str, float], None, Result]
_GRIDS = ("lora", "vera", "nola", "full")
_NOT_INPUTS = ("arms", "replicates", *(f"{method}_rates" for method in _GRIDS))


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there. Of the seeds, the first `replicates` are used."""

    texts: TextSettings
    adapters: AdapterSettings
    loop: Loop
    vera_rank: int
    arms: tuple[str, ...]
    replicates: int
    smoothing: float
    beams: int
    selection_steps: int
    selection_seed: int
    lora_rates: tuple[float, ...]
    vera_rates: tuple[float, ...]
    nola_rates: tuple[float, ...]
    full_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        for arm in self.arms:
            one_of("arm", arm, arms.ARMS)
        sizes = {method: len(getattr(self, f"{method}_rates")) for method in _GRIDS}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(f"received {sizes} learning rates, expected as many for each method")
        positive(replicates=self.replicates, vera_rank=self.vera_rank)
        positive(selection_steps=self.selection_steps, beams=self.beams)
        frozen_decoder.require_smoothing(self.smoothing)

    def rates(self, arm: str) -> tuple[float, ...]:
        """What an arm's learning rate is chosen from."""
        return () if arm == "none" else getattr(self, f"{arm.partition('_')[0]}_rates")


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The states, a run for each arm and rate, then every arm by seed. Raises ValueError for too few seeds."""
    inputs = frozen_decoder.shared_inputs(params, seeds, _NOT_INPUTS)
    planned = frozen_decoder.state_cells(params.texts, inputs)
    for arm in params.arms:
        for rate in params.rates(arm):
            coordinates = {"phase": "selection", "arm": arm, "rate": rate, "seed": params.selection_seed}
            planned.append(Cell(coordinates, inputs, wave=1))
    for seed in seeds[: params.replicates]:
        for arm in params.arms:
            coordinates = {"phase": "final", "arm": arm, "seed": seed}
            again = arm == "none" and seed != seeds[0]
            planned.append(Cell(coordinates, inputs | {"rates": params.rates(arm)}, wave=2 + again))
    return sorted(planned, key=lambda cell: cell.wave)


def run(cell: Cell, params: Params, workspace: Workspace) -> Steps:
    """Train and score one cell; yields once per step."""
    coordinates, decoder = cell.coordinates, FrozenDecoder(params.texts, workspace)
    if coordinates["phase"] == frozen_decoder.STATES:
        return (yield from frozen_decoder.write_states(cell, decoder))
    arm, seed = coordinates["arm"], coordinates["seed"]
    layers, vera_rank = params.texts.layers, params.vera_rank
    model = arms.attach(arm, decoder.load(), params.adapters, layers=layers, vera_rank=vera_rank, seed=seed)
    if coordinates["arm"] == "none":
        yield {"step": 1, "steps": 1}
        return result(_untrained(model, decoder, params, coordinates["seed"]), dtype=decoder.workspace.dtype)
    selecting = coordinates["phase"] == "selection"
    rate = coordinates["rate"] if selecting else _chosen_rate(coordinates["arm"], workspace)
    loss = decoder.train_loss(model, smoothing=params.smoothing)
    loop = replace(params.loop, steps=params.selection_steps) if selecting else params.loop
    curve = yield from decoder.fit(model, loss, loop, learning_rate=rate, seed=coordinates["seed"])
    metrics = {"train/loss": curve["loss/ce"][-1], "validation/loss": decoder.loss(model, "validation")}
    if not selecting:
        metrics |= {"chosen/rate": rate, **_size(model), **decoder.test_scores(model, params.beams)}
    return result(metrics, curve, weights=models.trainable(model), dtype=decoder.workspace.dtype)


def _chosen_rate(arm: str, workspace: Workspace) -> float:
    where = {"phase": "selection", "arm": arm}
    return best(workspace.records, where, "rate", ["validation/loss"], highest=[False])


def _untrained(model: Model, decoder: FrozenDecoder, params: Params, seed: int) -> dict[str, float]:
    """What the model says without an adapter; only the texts of the last steps differ from seed to seed."""
    loop = params.loop
    pairs = decoder.texts["train"].pairs
    drawn = frozen_decoder.batches(pairs, size=loop.batch_size, steps=loop.steps, seed=seed)
    last = drawn[(loop.steps - 1) // loop.save_every * loop.save_every :]
    loss = decoder.train_loss(model)
    with torch.no_grad():
        metrics = {"train/loss": sum(loss(rows)["loss/ce"].item() for rows in last) / len(last)}
    untrained = [record["metrics"] for record in decoder.workspace.records if record["cell"]["arm"] == "none"]
    if scored := [scores for scores in untrained if "validation/loss" in scores]:
        return metrics | {name: value for name, value in scored[0].items() if name != "train/loss"}
    test = decoder.test_scores(model, params.beams)
    return metrics | {"validation/loss": decoder.loss(model, "validation"), **_size(model), **test}


def _size(model: Model) -> dict[str, float]:
    return {
        "storage/parameters": float(arms.trainable_count(model)),
        "storage/bytes": float(bytes_on_disk(model)),
    }


def bytes_on_disk(model: Model) -> int:
    """What a task takes: the adapter as PEFT saves it, weights and config; without one, the trained weights."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder, save_embedding_layers=False)
            (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        elif trained := models.trainable(model):
            weights = {name: weight.detach().contiguous().cpu() for name, weight in trained.items()}
            save_file(weights, Path(folder) / "model.safetensors")
        return sum(os.path.getsize(file) for file in Path(folder).rglob("*") if file.is_file())
