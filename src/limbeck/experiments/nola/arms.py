"""What an arm is: an adapter in the top layers of a frozen decoder, and what the ablations change of it once attached.

`nola` has the trainable parameters of LoRA of rank 1, `nola_half` and `nola_fifth` that share of them: k = l over all
matrices alike, whatever its rank. LoRA starts as its paper does, A Kaiming-uniform and B zero, VeRA as PEFT's; all are
drawn from a seed, and PEFT's own draws are discarded, the global generator left alone.

GPT-2's fused c_attn is taken apart into three linear layers first, so that all methods adapt its query and its value
alone, as LoRA's release does: PEFT's LoRA and VeRA cannot adapt a slice. Files of such adapters fit no stock GPT-2.

LoRA is rounded as NOLA is, so that bits are compared and not roundings: symmetric, to the levels of
`adapters.factor`, with one scale per vector. A vector is alpha or beta of a matrix in NOLA, a row of A [r, in] or
a column of B [out, r] in LoRA. In training the gradient passes the rounding straight.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck import adapters, models
from limbeck.adapters import NolaConfig
from limbeck.adapters.baselines import draw_start
from limbeck.adapters.basis import Stream
from limbeck.adapters.factor import Factor, quantised
from limbeck.adapters.layer import NolaLayer
from limbeck.models import language
from limbeck.params import positive

SHARES = {"nola": 1.0, "nola_half": 0.5, "nola_fifth": 0.2}  # of the parameters of LoRA of rank 1
ARMS = ("none", "full", "lora_4", "lora_1", "vera", *SHARES)
QUERY_AND_VALUE = ("q_proj", "v_proj")
NAME = "default"  # of the adapter
SCALE_BYTES = FLOAT_BYTES = 4
Model = PreTrainedModel | PeftModel
Targets = tuple[str, ...]


@dataclass(frozen=True)
class AdapterSettings:
    """What the methods are given; sources stand in params/nola.yaml. A scale is s = alpha / r."""

    lora_scale: float
    nola_rank: int
    nola_scale: float

    def __post_init__(self) -> None:
        positive(lora_scale=self.lora_scale, nola_rank=self.nola_rank, nola_scale=self.nola_scale)


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder."""
    inner = model.base_model
    return inner.layers if hasattr(inner, "layers") else inner.h


def last_layers(model: PreTrainedModel, layers: int) -> list[int]:
    """The indices of the last `layers` layers; of all with 0. Raises ValueError for more than the model has."""
    number = len(layers_of(model))
    if not 0 <= layers <= number:
        raise ValueError(f"received layers {layers}, expected 0, for all, to the model's {number}")
    return list(range(number - (layers or number), number))


class _Unfused(nn.Module):
    """Query, key and value from a layer each, side by side: what GPT-2's c_attn computes."""

    def __init__(self, fused: Conv1D) -> None:
        super().__init__()
        parts = zip(("q_proj", "k_proj", "v_proj"), fused.weight.chunk(3, 1), fused.bias.chunk(3), strict=True)
        for name, weight, bias in parts:
            layer = nn.utils.skip_init(nn.Linear, *weight.shape)
            layer.weight = nn.Parameter(weight.detach().t().contiguous())
            layer.bias = nn.Parameter(bias.detach().clone())
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def unfuse(model: PreTrainedModel) -> PreTrainedModel:
    """Take the fused projections of a GPT-2 apart, with the same outputs; other models stay. Returns the model."""
    for layer in layers_of(model):
        if isinstance(getattr(getattr(layer, "attn", None), "c_attn", None), Conv1D):
            layer.attn.c_attn = _Unfused(layer.attn.c_attn)
    return model


def shapes(model: PreTrainedModel, layers: Sequence[int], targets: Targets = QUERY_AND_VALUE) -> list[tuple[int, int]]:
    """(in, out) of every matrix that is adapted; the model is not fused."""
    named = (item for index in layers for item in layers_of(model)[index].named_modules())
    return [(layer.in_features, layer.out_features) for name, layer in named if name.endswith(targets)]


def bases_for(model: PreTrainedModel, layers: Sequence[int], share: float, targets: Targets = QUERY_AND_VALUE) -> int:
    """k = l at which NOLA has `share` of the parameters of LoRA of rank 1: 2 k per matrix against in + out."""
    matrices = shapes(model, layers, targets)
    return max(1, int(share * sum(map(sum, matrices)) / (2 * len(matrices)) + 1e-9))


def attach_lora(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    rank: int,
    scale: float,
    seed: int,
    targets: Targets = QUERY_AND_VALUE,
) -> PeftModel:
    """PEFT's LoRA; `draw_start` draws A from the seed."""
    adapted = _attached(model, LoraConfig(r=rank, lora_alpha=scale * rank, **_where(layers, targets)))
    draw_start(adapted, seed)
    return adapted


def attach_vera(model: PreTrainedModel, layers: Sequence[int], *, rank: int, seed: int) -> PeftModel:
    """PEFT's VeRA; its shared pair comes from the seed and is not saved, as NOLA's bases are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a pair which is not saved has to be drawn again
        config = VeraConfig(r=rank, projection_prng_key=seed, save_projection=False, **_where(layers, QUERY_AND_VALUE))
    return _attached(model, config)


def attach_nola(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    rank: int,
    number: int | tuple[int, int],
    scale: float,
    seed: int,
    targets: Targets = QUERY_AND_VALUE,
    share_basis: bool = True,
    distribution: str = "uniform",
) -> PeftModel:
    """NOLA of `number` bases per factor, k = l or (k, l)."""
    size = {"r": rank, "num_basis": number, "nola_alpha": scale * rank}
    bases = {"basis_seed": seed, "share_basis": share_basis, "basis_distribution": distribution}
    return _attached(model, NolaConfig(**size, **bases, **_where(layers, targets)))


def attach(
    arm: str,
    model: PreTrainedModel,
    settings: AdapterSettings,
    *,
    layers: int,
    seed: int,
    vera_rank: int = 0,
    share: float = 1.0,
    targets: Targets = QUERY_AND_VALUE,
) -> Model:
    """The frozen model with the arm's adapter in its last `layers` layers, or in all with 0.

    `none` has nothing to train, `full` the layers and the last norm themselves; of all layers, every parameter. NOLA
    has `share` of the numbers that its arm says. Raises ValueError for an unknown arm.
    """
    model = unfuse(model).requires_grad_(False)
    chosen = last_layers(model, layers)
    if arm == "none":
        return model
    if arm == "full":
        return language.train_last_layers(model, layers) if layers else model.requires_grad_(True)
    if arm.startswith("lora_"):
        size = {"rank": int(arm.removeprefix("lora_")), "scale": settings.lora_scale}
        return attach_lora(model, chosen, **size, seed=seed, targets=targets)
    if arm == "vera":
        return attach_vera(model, chosen, rank=vera_rank, seed=seed)
    if arm not in SHARES:
        raise ValueError(f"received arm {arm!r}, expected one of {', '.join(ARMS)}")
    number = bases_for(model, chosen, share * SHARES[arm], targets)
    size = {"rank": settings.nola_rank, "number": number, "scale": settings.nola_scale}
    return attach_nola(model, chosen, **size, seed=seed, targets=targets)


def trainable_count(model: Model) -> int:
    """How many numbers train."""
    return sum(parameter.numel() for parameter in models.trainable(model).values())


def _where(layers: Sequence[int], targets: Targets) -> dict[str, Any]:
    return {"target_modules": list(targets), "layers_to_transform": list(layers)}


def _attached(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The model with an adapter, in evaluation mode; PEFT draws when it makes a layer, hence the fork.

    The adapter does not name its base: that may be a local path, of other length elsewhere. PEFT would fill in None.
    """
    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(model, config).eval()
    config.base_model_name_or_path = ""
    return adapted


def _nola_layers(model: PeftModel) -> list[NolaLayer]:
    return [module for module in model.modules() if isinstance(module, NolaLayer)]


def _factors(model: PeftModel) -> Iterator[Factor]:
    for layer in _nola_layers(model):
        yield from layer.nola_factors[NAME]


def _lora_halves(model: PeftModel) -> list[tuple[nn.Linear, bool]]:
    """The two halves of every LoRA layer, and whether its vectors are the columns of its weight."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [half for layer in layers for half in ((layer.lora_A[NAME], False), (layer.lora_B[NAME], True))]


def unscale(model: PeftModel) -> float:
    """Train NOLA's coefficients as if A were A0 + sum_i alpha_i A_i, without the 1 / sqrt(k); returns sqrt(k).

    With c = sqrt(k) alpha, the coefficient that the layer holds, dL/dalpha = sqrt(k) dL/dc: a hook gives c that
    gradient, so that clipping and Adam see alpha's; the caller multiplies the learning rate by sqrt(k), as a step of
    alpha is sqrt(k) times as long in c. Exact, Adam's epsilon included, for a start at 0.

    Raises ValueError unless k = l everywhere: one rate serves all coefficients.
    """
    numbers = {factor.number for factor in _factors(model)}
    if len(numbers) != 1:
        raise ValueError(f"received k and l among {sorted(numbers)}, expected one number")
    root = math.sqrt(numbers.pop())
    for layer in _nola_layers(model):
        for coefficients in layer.coefficients(NAME):
            coefficients.register_hook(lambda gradient: gradient * root)
    return root


def orthogonalise(model: PeftModel) -> None:
    """Make the bases of every factor orthogonal to each other, in order, with entries of variance 1/3 as before.

    Raises ValueError where there are more bases than a basis has entries.
    """
    for factor in _factors(model):
        for stream in set(factor.streams) - set(factor.bank.given):
            factor.bank.given[stream] = _orthogonal(stream, factor.number)
        factor.bank.kept.clear()


def _orthogonal(stream: Stream, number: int) -> Float[Tensor, "number size"]:
    if number > stream.size:
        raise ValueError(f"received {number} bases of {stream.size} entries, expected no more bases than entries")
    directions, triangle = torch.linalg.qr(stream.draw(0, number).double().T)
    return (directions * triangle.diagonal().sign() * math.sqrt(stream.size / 3)).T.float().contiguous()


class _Rounded(nn.Module):
    """A weight at its nearest levels; the gradient passes straight."""

    def __init__(self, bits: int, columns: bool):
        super().__init__()
        self.bits, self.columns = bits, columns

    def forward(self, weight: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        return weight + (_nearest(weight, self.bits, self.columns) - weight).detach()


def _nearest(weight: Tensor, bits: int, columns: bool) -> Tensor:
    return quantised(weight.T, bits).T if columns else quantised(weight, bits)


def round_in_training(model: PeftModel, bits: int) -> None:
    """From now on, use the adapter's numbers at their nearest levels and train what is behind them."""
    for factor in _factors(model):
        factor.bits = bits
    for half, columns in _lora_halves(model):
        parametrize.register_parametrization(half, "weight", _Rounded(bits, columns))


@torch.no_grad()
def round_after(model: PeftModel, bits: int) -> None:
    """Round a trained adapter's numbers in place."""
    if _nola_layers(model):
        adapters.quantise(model, NAME, bits=bits)
    for half, columns in _lora_halves(model):
        half.weight.copy_(_nearest(half.weight, bits, columns))


def number_bytes(model: PeftModel, bits: int | None) -> int:
    """Bytes of the adapter's numbers in float32, or packed to `bits` with one float32 scale per vector.

    Without the seed and what a file needs besides, which is the same at any number of bits.
    """
    halves = [half.weight.T if columns else half.weight for half, columns in _lora_halves(model)]
    coefficients = [vectors for layer in _nola_layers(model) for vectors in layer.coefficients(NAME)]
    lengths = [len(vector) for vectors in (*coefficients, *halves) for vector in vectors]
    if bits is None:
        return FLOAT_BYTES * sum(lengths)
    return sum(math.ceil(length * bits / 8) + SCALE_BYTES for length in lengths)
