"""NOLA's ablations on one decoder: rank and number of bases, kinds of bases, bits, and the learning rate.

LoRA and NOLA each train at the rate with the lowest validation loss after one run of `selection_seed` at the centre
(LoRA of rank 1; NOLA of `nola_rank` and `basis`); no arm of an ablation has a rate of its own. A seed fixes the order
of the texts, the bases, and LoRA's start. Rounded after training are the adapters that the centre's runs left.
"""

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file

from limbeck import assets, models
from limbeck.adapters.basis import DISTRIBUTIONS
from limbeck.adapters.quantisation import require_bits
from limbeck.experiments.nola import ablations_variants as variants
from limbeck.experiments.nola import adapting, text_bench
from limbeck.experiments.nola.ablations_bench import Bench
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.params import one_of, positive
from limbeck.training import resume

Steps = Generator[dict[str, float], None, Result]
KINDS = (*DISTRIBUTIONS, "orthogonal")  # of bases
MODES = ("after", "training")  # when numbers are rounded
_WHICH = ("ranks", "bases", "kinds", "bits", "sweep_bases", "replicates")  # which cells there are, not what they are


@dataclass(frozen=True)
class Params(text_bench.Section):
    """The section of params/nola.yaml; sources stand there. Of the seeds, the first `replicates` are used."""

    basis: int
    ranks: tuple[int, ...]
    bases: tuple[int, ...]
    kinds: tuple[str, ...]
    bits: tuple[int, ...]
    sweep_bases: tuple[int, ...]
    log2_rates: tuple[float, ...]
    selection_seed: int
    replicates: int
    steps: int
    batch_size: int
    smoothing: float

    def __post_init__(self) -> None:
        """Check what no type can."""
        super().__post_init__()
        positive(steps=self.steps, batch_size=self.batch_size, replicates=self.replicates, basis=self.basis)
        text_bench.require_smoothing(self.smoothing)
        if not self.log2_rates:
            raise ValueError(f"received log2_rates {self.log2_rates}, expected some to choose from")
        for kind in self.kinds:
            one_of("kinds", kind, KINDS)
        for bits in self.bits:
            require_bits(bits)


def _point(arm: str, rank: int, basis: int) -> dict[str, Any]:
    return {"arm": arm, "rank": rank, "basis": basis}


def _centre(params: Params) -> list[dict[str, Any]]:
    """Where rates are chosen and bits are counted."""
    return [_point("lora_1", 1, 0), _point("nola", params.nola_rank, params.basis)]


def _points(params: Params) -> list[dict[str, Any]]:
    """What is trained at the chosen rates."""
    ranks = [_point("nola", rank, params.basis) for rank in params.ranks]
    bases = [_point("nola", params.nola_rank, basis) for basis in params.bases]
    others = [_point(arm, params.nola_rank, params.basis) for arm in ("nola_unique", *params.kinds)]
    found = [*_centre(params), _point("lora", params.nola_rank, 0), *ranks, *bases, *others]
    return [point for at, point in enumerate(found) if point not in found[:at]]


def _swept(params: Params) -> list[dict[str, Any]]:
    """What the whole grid of rates is run for."""
    arms = ("nola", "nola_unscaled")
    return [_centre(params)[0], *(_point(arm, params.nola_rank, k) for k in params.sweep_bases for arm in arms)]


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """States, then choices and sweeps, then every point by seed, then bits. Raises ValueError for too few seeds."""
    if len(seeds) < params.replicates:
        raise ValueError(f"received the seeds {tuple(seeds)}, expected at least {params.replicates}")
    inputs = {name: value for name, value in asdict(params).items() if name not in _WHICH}
    inputs["assets"] = assets.checksums(params.model, params.data)
    found = [*text_bench.state_cells(params, inputs), Cell({"phase": "before", "arm": "none"}, inputs, wave=1)]
    runs = [("choice", params.selection_seed, _centre(params))]
    runs += [("sweep", seed, _swept(params)) for seed in seeds[: params.replicates]]
    for phase, seed, points in runs:
        for point in points:
            at = {"phase": phase, **point, "seed": seed}
            found += [Cell(at | {"log2_rate": rate}, inputs, wave=1) for rate in params.log2_rates]
    for seed in seeds[: params.replicates]:
        for point in _points(params):
            left = (_file(point["arm"], seed),) if point in _centre(params) else ()
            found.append(Cell({"phase": "final", **point, "seed": seed}, inputs, left, wave=2))
        for point in _centre(params):
            at = {"phase": "bits", "arm": point["arm"], "seed": seed}
            pairs = [(mode, bits) for mode in MODES for bits in params.bits]
            found += [Cell(at | {"mode": mode, "bits": bits}, inputs, wave=3) for mode, bits in pairs]
    return sorted(found, key=lambda cell: cell.wave)


def _file(arm: str, seed: int) -> str:
    return f"{arm}-{seed}.safetensors"


def run(cell: Cell, params: Params, place: Workspace) -> Steps:
    """Train and measure one cell; yields once a step."""
    at, bench = cell.coordinates, Bench(params, place)
    if at["phase"] == text_bench.STATES:
        return (yield from text_bench.write_states(cell, bench))
    if at["phase"] == "before":
        yield {"step": 1, "steps": 1}
        model = bench.decoder()
        return _result(bench, model, {"validation/loss": bench.validation_loss(model)})
    if at["phase"] == "bits":
        return (yield from _at_bits(at, params, bench))
    model = _attached(at, params, bench)
    rate = at["log2_rate"] if "log2_rate" in at else _chosen(at["arm"], place)
    curve = yield from _train(model, at, params, bench, rate)
    if cell.checkpoint_files:
        resume.write_tensors(place.checkpoints / cell.checkpoint_files[0], dict(models.trainable(model)))
    metrics = {"validation/loss": bench.validation_loss(model), "rate/log2": float(rate)}
    return _result(bench, model, metrics | {"adapter/bytes": float(variants.size(model, None))}, curve)


def _chosen(arm: str, place: Workspace) -> float:
    """The logarithm of the rate of the arm's method; of equals the smallest."""
    method = "lora_1" if arm.startswith("lora") else "nola"
    tried = [run for run in place.records if {"phase": "choice", "arm": method}.items() <= run["cell"].items()]
    best = min(tried, key=lambda run: (run["metrics"]["validation/loss"], run["cell"]["log2_rate"]))
    return best["cell"]["log2_rate"]


def _attached(at: dict[str, Any], params: Params, bench: text_bench.Bench) -> PeftModel:
    """The frozen model with a point's adapter, untrained."""
    model, arm, seed = adapting.unfuse(bench.decoder()), at["arm"], at["seed"]
    layers = adapting.top(model, params.layers)
    if arm.startswith("lora"):
        return adapting.lora(model, layers, rank=at["rank"], scale=params.lora_scale, seed=seed)
    kind = {"basis_distribution": arm} if arm in DISTRIBUTIONS else {}
    options = {"rank": at["rank"], "number": at["basis"], "scale": params.nola_scale, "seed": seed}
    model = adapting.nola(model, layers, **options, share_basis=arm != "nola_unique", **kind)
    if arm == "orthogonal":
        variants.orthogonalise(model)
    return model


def _train(
    model: PeftModel, at: dict[str, Any], params: Params, bench: Bench, log2_rate: float
) -> Generator[dict[str, float], None, dict[str, list[float]]]:
    """The steps of one cell; an arm that leaves out the scale has its own way of them."""
    rate = 2.0**log2_rate * (variants.unscale(model) if at["arm"] == "nola_unscaled" else 1.0)
    options = {"size": params.batch_size, "steps": params.steps, "smoothing": params.smoothing, "seed": at["seed"]}
    return (yield from bench.fit(model, learning_rate=rate, **options))


def _at_bits(at: dict[str, Any], params: Params, bench: Bench) -> Steps:
    """The centre's adapter rounded, or trained anew with rounded numbers; what either loses against full precision."""
    (point,) = (point for point in _centre(params) if point["arm"] == at["arm"])
    model, curve = _attached(at | point, params, bench), {}
    if at["mode"] == "training":
        variants.round_in_training(model, at["bits"])
        curve = yield from _train(model, at, params, bench, _chosen(at["arm"], bench.place))
    else:
        yield {"step": 1, "steps": 1}
        weights = load_file(bench.place.checkpoints / _file(at["arm"], at["seed"]), device=str(bench.place.device))
        for name, weight in models.trainable(model).items():
            weight.data.copy_(weights[name])
        variants.round_after(model, at["bits"])
    records = [run for run in bench.place.records if run["cell"]["phase"] in ("before", "final")]
    before, whole = (
        next(run["metrics"]["validation/loss"] for run in records if wanted.items() <= run["cell"].items())
        for wanted in ({"phase": "before"}, {"phase": "final", "seed": at["seed"], **point})
    )
    loss = bench.validation_loss(model)
    metrics = {"validation/loss": loss, "bits/increase": loss - whole, "bits/share": (loss - whole) / (before - whole)}
    return _result(bench, model, metrics | {"adapter/bytes": float(variants.size(model, at["bits"]))}, curve)


def _result(
    bench: Bench, model: adapting.Model, metrics: dict[str, float], curve: dict[str, list[float]] | None = None
) -> Result:
    count, dtype = adapting.count(model), str(bench.dtype(model)).removeprefix("torch.")
    trained = {"adapter/parameters": float(count), "train/loss": curve["loss/ce"][-1]} if curve else {}
    return Result(metrics | trained, curve or {}, count, dtype)
