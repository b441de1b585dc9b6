"""Adapters on every linear layer of the top layers of a frozen decoder but the head, as in the paper's LLaMA runs.

LoRA has rank 1. NOLA has the share of its parameters that the arm or the section says: k = l over all matrices alike.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from limbeck import models, seeding
from limbeck.adapters import NolaConfig
from limbeck.experiments.nola import adapting
from limbeck.experiments.nola.adapting import Model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ARMS = ("none", "lora_1", "nola", "nola_fifth")


def attach(
    arm: str, model: PreTrainedModel, settings: adapting.Settings, *, layers: int, share: float, seed: int
) -> Model:
    """The frozen model with the arm's adapter in its last `layers` layers, all with 0; `share` is that of `nola`."""
    if arm == "none":
        return model
    chosen = adapting.top(model, layers)
    where = {"target_modules": list(TARGETS), "layers_to_transform": chosen}
    if arm == "lora_1":
        return _attached(model, LoraConfig(r=1, lora_alpha=settings.lora_scale, **where), seed)
    number = bases(model, chosen, share if arm == "nola" else adapting.SHARES[arm])
    options = {"r": settings.nola_rank, "nola_alpha": settings.nola_scale * settings.nola_rank, "basis_seed": seed}
    return _attached(model, NolaConfig(num_basis=number, **options, **where), seed)


def bases(model: PreTrainedModel, layers: Sequence[int], share: float) -> int:
    """k = l at which NOLA has `share` of the parameters of LoRA of rank 1 on the same layers."""
    every = (layer for index in layers for layer in adapting.stack(model)[index].modules())
    sizes = [layer.in_features + layer.out_features for layer in every if isinstance(layer, nn.Linear)]
    return max(1, int(share * sum(sizes) / (2 * len(sizes))))


def _attached(model: PreTrainedModel, config: PeftConfig, seed: int) -> PeftModel:
    """The model with an adapter; PEFT draws LoRA's A when it makes a layer, hence the fork, and then the seed does."""
    with torch.random.fork_rng(devices=[]):
        attached = get_peft_model(model, config).eval()
    for name, weight in models.trainable(attached).items():
        if ".lora_A." in name:
            bound = weight.shape[1] ** -0.5
            weight.data.uniform_(-bound, bound, generator=seeding.generator(seed, "lora", name))
    return attached
