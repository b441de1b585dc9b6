"""NOLA beside LoRA, VeRA and full fine-tuning on meanings and texts: arms by seed, of `table_text` and its two kin.

A seed fixes the order of the texts, the same for every arm, and what an adapter draws. Each arm takes the learning rate
of lowest validation loss after one run of `selection_seed`, from as many rates for each method; `none` has none to
take, and is decoded once. `train/loss` is the mean over the last `save_every` steps, before each. The test split is
read after the last step and chooses nothing.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass

import torch

from limbeck import assets, models
from limbeck.experiments.nola import arms, frozen_decoder, texts
from limbeck.experiments.nola.arms import Model
from limbeck.experiments.nola.frozen_decoder import FrozenDecoder
from limbeck.experiments.runs import Cell, Result, Workspace, best, result
from limbeck.params import one_of, positive

Steps = Generator[dict[str, float], None, Result]
_GRIDS = ("lora", "vera", "nola", "full")
_NOT_INPUTS = ("arms", "replicates", *(f"{method}_rates" for method in _GRIDS))


@dataclass(frozen=True)
class Params(frozen_decoder.Section):
    """The section of params/nola.yaml; sources stand there. Of the seeds, the first `replicates` are used."""

    vera_rank: int
    arms: tuple[str, ...]
    replicates: int
    steps: int
    batch_size: int
    smoothing: float
    beams: int
    selection_steps: int
    selection_seed: int
    lora_rates: tuple[float, ...]
    vera_rates: tuple[float, ...]
    nola_rates: tuple[float, ...]
    full_rates: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for arm in self.arms:
            one_of("arm", arm, arms.ARMS)
        sizes = {method: len(getattr(self, f"{method}_rates")) for method in _GRIDS}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ValueError(f"received {sizes} learning rates, expected as many for each method")
        positive(replicates=self.replicates, steps=self.steps, batch_size=self.batch_size)
        positive(selection_steps=self.selection_steps, vera_rank=self.vera_rank, beams=self.beams)
        frozen_decoder.require_smoothing(self.smoothing)

    def rates(self, arm: str) -> tuple[float, ...]:
        """What an arm's learning rate is chosen from."""
        return () if arm == "none" else getattr(self, f"{arm.partition('_')[0]}_rates")


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The states, a run for each arm and rate, then every arm by seed. Raises ValueError for too few seeds."""
    if len(seeds) < params.replicates:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.replicates}")
    inputs = {name: value for name, value in asdict(params).items() if name not in _NOT_INPUTS}
    inputs["assets"] = assets.checksums(params.model, params.data)
    planned = frozen_decoder.state_cells(params, inputs)
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
    coordinates, decoder = cell.coordinates, FrozenDecoder(params, workspace)
    if coordinates["phase"] == frozen_decoder.STATES:
        return (yield from frozen_decoder.write_states(cell, decoder))
    options = {"layers": params.layers, "vera_rank": params.vera_rank, "seed": coordinates["seed"]}
    model = arms.attach(coordinates["arm"], decoder.load(), params, **options)
    if coordinates["arm"] == "none":
        yield {"step": 1, "steps": 1}
        return result(_untrained(model, decoder, coordinates["seed"]), dtype=decoder.dtype(model))
    selecting = coordinates["phase"] == "selection"
    rate = coordinates["rate"] if selecting else _chosen_rate(coordinates["arm"], workspace)
    steps = params.selection_steps if selecting else params.steps
    curve = yield from decoder.fit(model, learning_rate=rate, steps=steps, seed=coordinates["seed"])
    metrics = {"train/loss": curve["loss/ce"][-1], "validation/loss": decoder.loss(model, "validation")}
    if not selecting:
        metrics |= {"chosen/rate": rate, **_size(model), **decoder.test_scores(model, params.beams)}
    return result(metrics, curve, weights=models.trainable(model), dtype=decoder.dtype(model))


def _chosen_rate(arm: str, workspace: Workspace) -> float:
    where = {"phase": "selection", "arm": arm}
    return best(workspace.records, where, "rate", ["validation/loss"], highest=[False])


def _untrained(model: Model, decoder: FrozenDecoder, seed: int) -> dict[str, float]:
    """What the model says without an adapter; only the texts of the last steps differ from seed to seed."""
    params, learned = decoder.section, decoder.texts["train"]
    drawn = frozen_decoder.batches(learned.pairs, size=params.batch_size, steps=params.steps, seed=seed)
    last = drawn[(params.steps - 1) // params.save_every * params.save_every :]
    loss = texts.loss_of(model, learned, decoder.dtype(model))
    with torch.no_grad():
        metrics = {"train/loss": sum(loss(rows)["loss/ce"].item() for rows in last) / len(last)}
    untrained = [record["metrics"] for record in decoder.workspace.records if record["cell"]["arm"] == "none"]
    if scored := [scores for scores in untrained if "validation/loss" in scores]:
        return metrics | {name: value for name, value in scored[0].items() if name != "train/loss"}
    test = decoder.test_scores(model, params.beams)
    return metrics | {"validation/loss": decoder.loss(model, "validation"), **_size(model), **test}


def _size(model: Model) -> dict[str, float]:
    parameters, taken = arms.trainable_count(model), arms.bytes_on_disk(model)
    return {"storage/parameters": float(parameters), "storage/bytes": float(taken)}
