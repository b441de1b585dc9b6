"""An adapter in other forms: as plain LoRA, which any server of LoRA can host, or at fewer bits."""

import re

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.adapters.checkpoint import PREFIX, ROOT, adapted
from limbeck.adapters.factor import quantised, require_bits
from limbeck.adapters.layer import NolaLayer


def _adapted(model: PeftModel, adapter_name: str) -> dict[str, NolaLayer]:
    layers = adapted(model, adapter_name)
    if not layers:
        raise ValueError(f"received adapter name {adapter_name!r}, expected one of {', '.join(model.peft_config)}")
    return layers


def _factors(layer: NolaLayer, adapter_name: str, key: str) -> tuple[Tensor, Tensor]:
    """lora_A [m r, ...] and lora_B [out, m r, ...] of the m matrices of a layer, one below the other."""
    a, b = layer.built(adapter_name)
    blank = torch.zeros_like(b)
    columns = [[b[i] if i == j else blank[i] for j in range(len(b))] for i in range(len(b))]
    stacked_b = torch.cat([layer.side_by_side(row, adapter_name) for row in columns])
    base = layer.get_base_layer()
    if not isinstance(base, nn.Conv2d):
        return a.transpose(1, 2).flatten(0, 1).contiguous(), stacked_b.t().contiguous()
    if base.padding_mode != "zeros" or set(base.dilation) != {1}:
        raise ValueError(f"received {key}: {base}, expected padding by zeros and no dilation, the only ones of LoRA")
    kernel = a[0].t().reshape(-1, *base.weight.shape[1:])
    return kernel.contiguous(), stacked_b.t()[:, :, None, None].contiguous()


def to_lora(model: PeftModel, adapter_name: str = "default") -> tuple[dict[str, Tensor], LoraConfig]:
    """The state dict and the config of a LoRA adapter with the same outputs: A and B themselves, no decomposition.

    s = lora_alpha / r as in NOLA; a fused projection of which m blocks are adapted has rank m r, and zeros in B.

    Raises ValueError for an unknown adapter, or a convolution that LoRA computes otherwise.
    """
    layers, config = _adapted(model, adapter_name), model.peft_config[adapter_name]
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    state = {key: value for key, value in saved.items() if not key.startswith(ROOT) and ".nola_" not in key}
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = _factors(layer, adapter_name, name)
        matrices, short = len(layer.coefficients(adapter_name)[0]), name.removeprefix(PREFIX)
        if matrices > 1:
            ranks[re.escape(short)], alphas[re.escape(short)] = matrices * config.r, matrices * config.nola_alpha
    return state, LoraConfig(
        r=config.r,
        lora_alpha=config.nola_alpha,
        target_modules="|".join(re.escape(name.removeprefix(PREFIX)) for name in layers),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
    )


@torch.no_grad()
def quantise(model: PeftModel, adapter_name: str = "default", *, bits: int) -> None:
    """Round the coefficients of a trained adapter to `bits` bits in place; it is then used and saved at these.

    Raises ValueError for an unknown adapter or a number of bits that is not offered.
    """
    require_bits(bits)
    for layer in _adapted(model, adapter_name).values():
        pairs = zip(layer.nola_factors[adapter_name], layer.coefficients(adapter_name), strict=True)
        for factor, coefficients in pairs:
            factor.bits = bits
            coefficients.copy_(quantised(coefficients, bits))
    model.peft_config[adapter_name].quant_bits = bits
