"""NOLA in PEFT's own tables, so that whatever PEFT does with a method it does with NOLA: `import limbeck.adapters`."""

import functools
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import mixed
from peft.utils import hotswap
from torch import Tensor, nn

from limbeck.adapters import checkpoint
from limbeck.adapters.config import NolaConfig, NolaType
from limbeck.adapters.layer import NolaLayer
from limbeck.adapters.model import NolaModel


def register() -> None:
    """Enter the config, the tuner and the prefix of its parameters in PEFT's tables.

    `register_peft_method` refuses names outside PEFT's own enum, so the entries go where it would put them. PEFT reads
    the tables by key, and of the key its `value`; `tests/adapters/test_register.py` fails where a release changes that.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[NolaType.NOLA] = NolaConfig
    PEFT_TYPE_TO_TUNER_MAPPING[NolaType.NOLA] = NolaModel
    PEFT_TYPE_TO_PREFIX_MAPPING[NolaType.NOLA] = NolaModel.prefix
    if NolaType.NOLA not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING:
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING[NolaType.NOLA] = NolaModel
        _enter_mixed_models()
        _enter_hotswapping()


def _enter_mixed_models() -> None:
    """Let NOLA lie over and under the methods that PEFT mixes in one model, whose names are its module's constants."""
    for module in (mixed, mixed.model):
        module.COMPATIBLE_TUNER_TYPES += (NolaType.NOLA,)
    mixed.model.PREFIXES.append(NolaModel.prefix)
    mixed.model.Layers += (NolaLayer,)
    mixed.model.Configs |= NolaConfig
    create = mixed.MixedModel._create_and_replace

    def create_and_replace(self: mixed.MixedModel, config: PeftConfig, *args: Any, current_key: str) -> None:
        if isinstance(config, NolaConfig):  # a second adapter's key has PEFT's prefix, which names no bases
            NolaModel._create_and_replace(self, config, *args, current_key.removeprefix(checkpoint.PREFIX))
        else:
            create(self, config, *args, current_key=current_key)

    mixed.MixedModel._create_and_replace = create_and_replace


def _enter_hotswapping() -> None:
    """Let `hotswap_adapter`, which knows LoRA alone, put one NOLA adapter in the place of another."""
    hotswap.CONFIG_KEYS_TO_CHECK[NolaType.NOLA] = ["modules_to_save", "save_basis"]  # all else is swapped or checked
    swap = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(swap)
    def swap_any(model: nn.Module, state_dict: dict, adapter_name: str, config: PeftConfig, **options: Any) -> None:
        if isinstance(config, NolaConfig):
            _swap(model, state_dict, adapter_name, config)
        else:
            swap(model, state_dict, adapter_name, config, **options)

    hotswap.hotswap_adapter_from_state_dict = swap_any


@torch.no_grad()
def _swap(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str, config: NolaConfig) -> None:
    """Take the numbers of a file for those of an adapter, and its bases, rank and scale with them.

    Raises ValueError, and leaves the adapter as it was, where the file is of other modules or damaged, or the adapter
    is merged.
    """
    layers = checkpoint.adapted(model, adapter_name)
    if merged := [key for key, layer in layers.items() if adapter_name in layer.merged_adapters]:
        raise ValueError(f"received {adapter_name!r}, which is merged into {merged[0]}, expected it unmerged before")
    held = [(layer.nola_factors, layer.nola_coefficients, layer.scaling, layer.blocks) for layer in layers.values()]
    before = [[part[adapter_name] for part in parts] for parts in held]
    state = {key.replace(f".{adapter_name}", "", 1) if "nola_" in key else key: x for key, x in state_dict.items()}
    try:
        for key, layer in layers.items():
            bank, old = layer.nola_factors[adapter_name][0].bank, layer.coefficients(adapter_name)[0]
            layer.update_layer(adapter_name, config, key.removeprefix(checkpoint.PREFIX), bank)
            layer.nola_coefficients[adapter_name].to(old.dtype).requires_grad_(old.requires_grad)
        loaded = checkpoint.from_file(model, config, adapter_name, state)
        for key, layer in layers.items():
            for part, own in zip("ab", layer.coefficients(adapter_name), strict=True):
                own.copy_(loaded[f"{key}.{checkpoint.COEFFICIENTS}.{adapter_name}.{part}"])
    except Exception:
        for parts, values in zip(held, before, strict=True):
            for part, value in zip(parts, values, strict=True):
                part[adapter_name] = value
        raise
    if hasattr(model, "peft_config"):
        model.peft_config[adapter_name] = config
