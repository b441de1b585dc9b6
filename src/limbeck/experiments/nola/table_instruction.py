"""The LLaMA table's pattern: no adapter, LoRA of rank 1 and a much smaller NOLA, on every linear layer but the head.

The states below the adapted layers come first. Then a run of one seed for each learning rate and method; of the same
number of rates each method gets that with the smallest validation loss. Then the arms by seed, which fixes the start
and the order of the texts. The questions are answered after the last step; they choose nothing.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from limbeck import assets
from limbeck.experiments.nola import adapting, instruction_bench, text_bench
from limbeck.experiments.nola.instruction_adapting import ARMS
from limbeck.experiments.nola.instruction_bench import Bench
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.params import one_of

_UNTRAINED = "none"


@dataclass(frozen=True)
class Params(instruction_bench.Section):
    """The section of params/nola.yaml; sources stand there. Of the seeds, the first `replicates` are used."""

    arms: tuple[str, ...]
    lora_rates: tuple[float, ...]
    nola_rates: tuple[float, ...]
    selection_seed: int
    replicates: int

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        for arm in self.arms:
            one_of("arm", arm, ARMS)
        if not 0 < len(self.lora_rates) == len(self.nola_rates):
            raise ValueError(f"received rates {self.lora_rates} and {self.nola_rates}, expected as many of each")

    def rates(self, arm: str) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return {_UNTRAINED: (0.0,), "lora_1": self.lora_rates}.get(arm, self.nola_rates)


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """The states, the choice of each arm's rate, then the arms by seed. Raises ValueError for too few seeds."""
    if len(seeds) < params.replicates:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.replicates}")
    inputs = {name: value for name, value in asdict(params).items() if name not in ("arms", "replicates")}
    inputs["assets"] = assets.checksums(params.model, params.data)
    found = text_bench.state_cells(params, inputs)
    for arm in params.arms:
        for rate in params.rates(arm):
            at = {"phase": "selection", "arm": arm, "learning_rate": rate, "seed": params.selection_seed}
            found.append(Cell(at, inputs, wave=1))
    for seed in seeds[: params.replicates]:
        found += [Cell({"phase": "final", "arm": arm, "seed": seed}, inputs, wave=2) for arm in params.arms]
    return found


def run(cell: Cell, params: Params, place: Workspace) -> Generator[dict[str, float], None, Result]:
    """Run one cell; yields once a step."""
    bench, at = Bench(params, place), cell.coordinates
    if at["phase"] == text_bench.STATES:
        return (yield from text_bench.write_states(cell, bench))
    arm, final = at["arm"], at["phase"] == "final"
    rate = chosen(arm, place) if final else at["learning_rate"]
    if arm == _UNTRAINED and final:  # the same for every seed: as measured once
        yield {"step": 1, "steps": 1}
        (record,) = _selection(arm, place)
        return Result(record["metrics"], {}, 0, record["dtype"])
    model, curve = bench.attach(arm, seed=at["seed"]), {}
    if arm == _UNTRAINED:
        yield {"step": 1, "steps": 1}
    else:
        curve = yield from bench.train(model, learning_rate=rate, seed=at["seed"])
    metrics = {"adapter/learning_rate": rate, "adapter/parameters": float(adapting.count(model))}
    metrics["validation/loss"] = bench.loss(model, "validation")
    if final or arm == _UNTRAINED:
        metrics |= {"train/loss": bench.loss(model, "train"), **bench.accuracies(model)}
        metrics["validation/gap"] = metrics["validation/loss"] - metrics["train/loss"]
    return Result(metrics, curve, adapting.count(model), str(bench.dtype(model)).removeprefix("torch."))


def chosen(arm: str, place: Workspace) -> float:
    """The learning rate with the smallest validation loss; of equals the smallest."""
    best = min(_selection(arm, place), key=lambda r: (r["metrics"]["validation/loss"], r["cell"]["learning_rate"]))
    return best["cell"]["learning_rate"]


def _selection(arm: str, place: Workspace) -> list[dict[str, Any]]:
    return [r for r in place.records if r["cell"]["phase"] == "selection" and r["cell"]["arm"] == arm]
