"""Adapters by arm on some projections of the top layers of a frozen decoder: unless told, its queries and values.

`nola` has the trainable parameters of LoRA of rank 1, `nola_half` and `nola_fifth` that share of them: k = l over all
matrices alike, whatever its rank. LoRA starts as its paper does, A Kaiming-uniform and B zero, VeRA as PEFT's; all are
drawn from a seed, and PEFT's own draws are discarded, the global generator left alone.

GPT-2's fused c_attn is taken apart into three linear layers first, so that all methods adapt its query and its value
alone, as LoRA's release does: PEFT's LoRA and VeRA cannot adapt a slice. Files of such adapters fit no stock GPT-2.
"""

import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck import models
from limbeck.adapters import NolaConfig
from limbeck.adapters.baselines import draw_start
from limbeck.models import language
from limbeck.params import positive
from limbeck.training import resume

SHARES = {"nola": 1.0, "nola_half": 0.5, "nola_fifth": 0.2}  # of the parameters of LoRA of rank 1
ARMS = ("none", "full", "lora_4", "lora_1", "vera", *SHARES)
TARGETS = ("q_proj", "v_proj")
Model = PreTrainedModel | PeftModel
Targets = tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """What the methods are given; sources stand in params/nola.yaml. A scale is s = alpha / r."""

    lora_scale: float
    nola_rank: int
    nola_scale: float

    def __post_init__(self) -> None:
        """Check what no type can."""
        positive(lora_scale=self.lora_scale, nola_scale=self.nola_scale)
        positive(nola_rank=self.nola_rank)


def stack(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder."""
    inner = model.base_model
    return inner.layers if hasattr(inner, "layers") else inner.h


def top(model: PreTrainedModel, layers: int) -> list[int]:
    """The indices of the last `layers` layers; of all with 0. Raises ValueError for more than the model has."""
    number = len(stack(model))
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
            layer.weight, layer.bias = (
                nn.Parameter(weight.detach().t().contiguous()),
                nn.Parameter(bias.detach().clone()),
            )
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def unfuse(model: PreTrainedModel) -> PreTrainedModel:
    """Take the fused projections of a GPT-2 apart, with the same outputs; other models stay. Returns the model."""
    for layer in stack(model):
        if isinstance(getattr(getattr(layer, "attn", None), "c_attn", None), Conv1D):
            layer.attn.c_attn = _Unfused(layer.attn.c_attn)
    return model


def shapes(model: PreTrainedModel, layers: Sequence[int], targets: Targets = TARGETS) -> list[tuple[int, int]]:
    """(in, out) of every matrix that is adapted; the model is not fused."""
    named = (item for index in layers for item in stack(model)[index].named_modules())
    return [(layer.in_features, layer.out_features) for name, layer in named if name.endswith(targets)]


def bases(model: PreTrainedModel, layers: Sequence[int], share: float = 1.0, targets: Targets = TARGETS) -> int:
    """k = l at which NOLA has `share` of the parameters of LoRA of rank 1: 2 k a matrix against in + out."""
    found = shapes(model, layers, targets)
    return max(1, int(share * sum(map(sum, found)) / (2 * len(found)) + 1e-9))


def lora(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    rank: int,
    scale: float,
    seed: int,
    targets: Targets = TARGETS,
) -> PeftModel:
    """PEFT's LoRA; `draw_start` draws A from the seed."""
    attached = _attached(model, LoraConfig(r=rank, lora_alpha=scale * rank, **_where(layers, targets)))
    draw_start(attached, seed)
    return attached


def vera(model: PreTrainedModel, layers: Sequence[int], *, rank: int, seed: int) -> PeftModel:
    """PEFT's VeRA; its shared pair comes from the seed and is not saved, as NOLA's bases are not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a pair which is not saved has to be drawn again
        config = VeraConfig(r=rank, projection_prng_key=seed, save_projection=False, **_where(layers, TARGETS))
    return _attached(model, config)


def nola(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    rank: int,
    number: int | tuple[int, int],
    scale: float,
    seed: int,
    targets: Targets = TARGETS,
    **more: Any,
) -> PeftModel:
    """NOLA of `number` bases a factor, k = l or (k, l); `more` are further fields of NolaConfig."""
    size = {"r": rank, "num_basis": number, "nola_alpha": scale * rank}
    return _attached(model, NolaConfig(basis_seed=seed, **size, **_where(layers, targets), **more))


def attach(arm: str, model: PreTrainedModel, settings: Settings, *, layers: int, vera_rank: int, seed: int) -> Model:
    """The frozen model with the arm's adapter in its last `layers` layers, or in all with 0.

    `none` has nothing to train, `full` the layers and the last norm themselves; of all layers, every parameter.
    Raises ValueError for an unknown arm.
    """
    model, chosen = unfuse(model).requires_grad_(False), top(model, layers)
    if arm == "none":
        return model
    if arm == "full":
        return language.train_last_layers(model, layers) if layers else model.requires_grad_(True)
    if arm.startswith("lora_"):
        return lora(model, chosen, rank=int(arm.removeprefix("lora_")), scale=settings.lora_scale, seed=seed)
    if arm == "vera":
        return vera(model, chosen, rank=vera_rank, seed=seed)
    if arm not in SHARES:
        raise ValueError(f"received arm {arm!r}, expected one of {', '.join(ARMS)}")
    number = bases(model, chosen, SHARES[arm])
    return nola(model, chosen, rank=settings.nola_rank, number=number, scale=settings.nola_scale, seed=seed)


def count(model: Model) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in models.trainable(model).values())


def bytes_on_disk(model: Model) -> int:
    """What a task takes: the adapter as PEFT saves it, weights and config; without one, the trained weights."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, PeftModel):
            model.save_pretrained(folder, save_embedding_layers=False)
            (Path(folder) / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        elif trained := models.trainable(model):
            resume.write_tensors(Path(folder) / "model.safetensors", dict(trained))
        return sum(os.path.getsize(file) for file in Path(folder).rglob("*") if file.is_file())


def _where(layers: Sequence[int], targets: Targets) -> dict[str, Any]:
    return {"target_modules": list(targets), "layers_to_transform": list(layers)}


def _attached(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The model with an adapter, in evaluation mode; PEFT draws when it makes a layer, hence the fork.

    The adapter does not name its base: that may be a local path, of other length elsewhere. PEFT would fill in None.
    """
    with torch.random.fork_rng(devices=[]):
        attached = get_peft_model(model, config).eval()
    config.base_model_name_or_path = ""
    return attached
