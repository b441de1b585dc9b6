"""NOLA's ablations on one decoder: rank and number of bases, kinds of bases, bits, and the learning rate.

LoRA and NOLA each train at the rate with the lowest validation loss after one run of `selection_seed` at the centre
(LoRA of rank 1; NOLA of `nola_rank` and `basis`); no arm of an ablation has a rate of its own. A seed fixes the order
of the texts, the bases, and LoRA's start. Rounded after training are the adapters that the centre's runs left.

Where layers are frozen, the softmax is over the tokens that occur in the targets alone: the whole vocabulary would take
three quarters of a step on two layers. The loss is then -log p of a token given that it is one of these, at most the
usual one.
"""

import functools
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from limbeck import models
from limbeck.adapters.basis import DISTRIBUTIONS
from limbeck.adapters.factor import require_bits
from limbeck.experiments.nola import arms, frozen_decoder
from limbeck.experiments.nola.arms import AdapterSettings
from limbeck.experiments.nola.frozen_decoder import FrozenDecoder, Loop, TextSettings
from limbeck.experiments.nola.texts import Pair, Texts
from limbeck.experiments.runs import Cell, Result, Workspace, best, result
from limbeck.params import one_of, positive
from limbeck.training import resume

Steps = Generator[dict[str, float], None, Result]
Point = dict[str, Any]  # coordinates of a cell
KINDS = (*DISTRIBUTIONS, "orthogonal")  # of bases
MODES = ("after", "training")  # when numbers are rounded
_WHICH = ("ranks", "bases", "kinds", "bits", "sweep_bases", "replicates")  # which cells there are, not what they are


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there. Of the seeds, the first `replicates` are used."""

    texts: TextSettings
    adapters: AdapterSettings
    loop: Loop
    basis: int
    ranks: tuple[int, ...]
    bases: tuple[int, ...]
    kinds: tuple[str, ...]
    bits: tuple[int, ...]
    sweep_bases: tuple[int, ...]
    log2_rates: tuple[float, ...]
    selection_seed: int
    replicates: int
    smoothing: float

    def __post_init__(self) -> None:
        positive(replicates=self.replicates, basis=self.basis)
        frozen_decoder.require_smoothing(self.smoothing)
        if not self.log2_rates:
            raise ValueError(f"received log2_rates {self.log2_rates}, expected some to choose from")
        for kind in self.kinds:
            one_of("kinds", kind, KINDS)
        for bits in self.bits:
            require_bits(bits)


@dataclass(frozen=True)
class SmallSoftmax(FrozenDecoder):
    """With `layers` 0, as it stands: the tokens of a target are then read from the whole vocabulary."""

    @functools.cached_property
    def kept(self) -> list[int]:
        """The tokens that occur in targets, to learn or to validate on."""
        return sorted({token for pair in self.all_pairs() for token in pair.target})

    def load(self) -> PreTrainedModel:
        """The model, frozen; its head has a row for each kept token."""
        model = super().load()
        if self.settings.layers:
            rows = model.get_output_embeddings().weight.detach()[self.kept]
            head = nn.utils.skip_init(nn.Linear, rows.shape[1], len(rows), bias=False)
            head.weight = nn.Parameter(rows, requires_grad=False)
            model.set_output_embeddings(head)
        return model

    @functools.cached_property
    def texts(self) -> dict[str, Texts]:
        """`train` and `validation`, with their states; targets count through the kept tokens."""
        parts = super().texts
        if not self.settings.layers:
            return parts
        numbers = {token: number for number, token in enumerate(self.kept)}
        return {
            name: replace(
                texts, pairs=[Pair(p.prompt, tuple(numbers[token] for token in p.target)) for p in texts.pairs]
            )
            for name, texts in parts.items()
        }


def _point(arm: str, rank: int, basis: int) -> Point:
    return {"arm": arm, "rank": rank, "basis": basis}


def _centre(params: Params) -> list[Point]:
    """Where rates are chosen and bits are counted."""
    return [_point("lora_1", 1, 0), _point("nola", params.adapters.nola_rank, params.basis)]


def _points(params: Params) -> list[Point]:
    """What is trained at the chosen rates."""
    ranks = [_point("nola", rank, params.basis) for rank in params.ranks]
    bases = [_point("nola", params.adapters.nola_rank, basis) for basis in params.bases]
    others = [_point(arm, params.adapters.nola_rank, params.basis) for arm in ("nola_unique", *params.kinds)]
    points = [*_centre(params), _point("lora", params.adapters.nola_rank, 0), *ranks, *bases, *others]
    return [point for index, point in enumerate(points) if point not in points[:index]]


def _swept(params: Params) -> list[Point]:
    """What the whole grid of rates is run for."""
    scales = ("nola", "nola_unscaled")
    return [
        _centre(params)[0],
        *(_point(arm, params.adapters.nola_rank, k) for k in params.sweep_bases for arm in scales),
    ]


def cells(params: Params, seeds: Sequence[int]) -> list[Cell]:
    """States, then choices and sweeps, then every point by seed, then bits. Raises ValueError for too few seeds."""
    inputs = frozen_decoder.shared_inputs(params, seeds, _WHICH)
    planned = [
        *frozen_decoder.state_cells(params.texts, inputs),
        Cell({"phase": "before", "arm": "none"}, inputs, wave=1),
    ]
    grids = [("choice", params.selection_seed, _centre(params))]
    grids += [("sweep", seed, _swept(params)) for seed in seeds[: params.replicates]]
    for phase, seed, points in grids:
        for point in points:
            coordinates = {"phase": phase, **point, "seed": seed}
            planned += [Cell(coordinates | {"log2_rate": rate}, inputs, wave=1) for rate in params.log2_rates]
    for seed in seeds[: params.replicates]:
        for point in _points(params):
            files = (_file(point["arm"], seed),) if point in _centre(params) else ()
            planned.append(Cell({"phase": "final", **point, "seed": seed}, inputs, files, wave=2))
        for point in _centre(params):
            coordinates = {"phase": "bits", "arm": point["arm"], "seed": seed}
            pairs = [(mode, bits) for mode in MODES for bits in params.bits]
            planned += [Cell(coordinates | {"mode": mode, "bits": bits}, inputs, wave=3) for mode, bits in pairs]
    return sorted(planned, key=lambda cell: cell.wave)


def _file(arm: str, seed: int) -> str:
    return f"{arm}-{seed}.safetensors"


def run(cell: Cell, params: Params, workspace: Workspace) -> Steps:
    """Train and measure one cell; yields once per step."""
    coordinates, decoder = cell.coordinates, SmallSoftmax(params.texts, workspace)
    if coordinates["phase"] == frozen_decoder.STATES:
        return (yield from frozen_decoder.write_states(cell, decoder))
    if coordinates["phase"] == "before":
        yield {"step": 1, "steps": 1}
        model = decoder.load()
        return _result(decoder, model, {"validation/loss": decoder.loss(model, "validation")})
    if coordinates["phase"] == "bits":
        return (yield from _rounded(coordinates, params, decoder))
    model = _attached(coordinates, params, decoder)
    rate = coordinates["log2_rate"] if "log2_rate" in coordinates else _chosen_rate(coordinates["arm"], workspace)
    curve = yield from _train(model, coordinates, params, decoder, rate)
    if cell.checkpoint_files:
        resume.write_tensors(workspace.checkpoints / cell.checkpoint_files[0], dict(models.trainable(model)))
    metrics = {"validation/loss": decoder.loss(model, "validation"), "rate/log2": float(rate)}
    return _result(decoder, model, metrics | {"adapter/bytes": float(arms.number_bytes(model, None))}, curve)


def _chosen_rate(arm: str, workspace: Workspace) -> float:
    """The logarithm of the rate of the arm's method."""
    where = {"phase": "choice", "arm": "lora_1" if arm.startswith("lora") else "nola"}
    return best(workspace.records, where, "log2_rate", ["validation/loss"], highest=[False])


def _attached(point: Point, params: Params, decoder: FrozenDecoder) -> PeftModel:
    """The frozen model with a point's adapter, untrained."""
    model, arm, seed = arms.unfuse(decoder.load()), point["arm"], point["seed"]
    layers = arms.last_layers(model, params.texts.layers)
    if arm.startswith("lora"):
        return arms.attach_lora(model, layers, rank=point["rank"], scale=params.adapters.lora_scale, seed=seed)
    size = {"rank": point["rank"], "number": point["basis"], "scale": params.adapters.nola_scale}
    kind = {"share_basis": arm != "nola_unique", "distribution": arm if arm in DISTRIBUTIONS else "uniform"}
    model = arms.attach_nola(model, layers, **size, **kind, seed=seed)
    if arm == "orthogonal":
        arms.orthogonalise(model)
    return model


def _train(
    model: PeftModel, point: Point, params: Params, decoder: SmallSoftmax, log2_rate: float
) -> Generator[dict[str, float], None, dict[str, list[float]]]:
    """The steps of one cell; an arm that leaves out the scale has its own way of them."""
    rate = 2.0**log2_rate * (arms.unscale(model) if point["arm"] == "nola_unscaled" else 1.0)
    loss = decoder.train_loss(model, smoothing=params.smoothing)
    return (yield from decoder.fit(model, loss, params.loop, learning_rate=rate, seed=point["seed"]))


def _rounded(coordinates: Point, params: Params, decoder: SmallSoftmax) -> Steps:
    """The centre's adapter rounded, or trained anew with rounded numbers; what either loses against full precision."""
    (point,) = (point for point in _centre(params) if point["arm"] == coordinates["arm"])
    model, curve = _attached(coordinates | point, params, decoder), {}
    if coordinates["mode"] == "training":
        arms.round_in_training(model, coordinates["bits"])
        curve = yield from _train(
            model, coordinates, params, decoder, _chosen_rate(coordinates["arm"], decoder.workspace)
        )
    else:
        yield {"step": 1, "steps": 1}
        trained = models.trainable(model)
        path = decoder.workspace.checkpoints / _file(coordinates["arm"], coordinates["seed"])
        weights = resume.read_tensors(path, like=trained, device=decoder.workspace.device)
        for name, weight in trained.items():
            weight.data.copy_(weights[name])
        arms.round_after(model, coordinates["bits"])
    before = _validation_loss(decoder, {"phase": "before"})
    whole = _validation_loss(decoder, {"phase": "final", "seed": coordinates["seed"], **point})
    loss = decoder.loss(model, "validation")
    metrics = {"validation/loss": loss, "bits/increase": loss - whole, "bits/share": (loss - whole) / (before - whole)}
    size = {"adapter/bytes": float(arms.number_bytes(model, coordinates["bits"]))}
    return _result(decoder, model, metrics | size, curve)


def _validation_loss(decoder: SmallSoftmax, where: Point) -> float:
    """Of the earlier cell that is as `where` says."""
    (record,) = (record for record in decoder.workspace.records if where.items() <= record["cell"].items())
    return record["metrics"]["validation/loss"]


def _result(
    decoder: SmallSoftmax, model: arms.Model, metrics: dict[str, float], curve: dict[str, list[float]] | None = None
) -> Result:
    weights = models.trainable(model)
    if curve:
        numbers = sum(weight.numel() for weight in weights.values())
        metrics |= {"adapter/parameters": float(numbers), "train/loss": curve["loss/ce"][-1]}
    return result(metrics, curve, weights=weights, dtype=decoder.workspace.dtype)
