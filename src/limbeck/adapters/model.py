"""NOLA as a tuner of PEFT: which module becomes which layer, and what a checkpoint holds."""

import copy
import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, delete_adapter
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.adapters import checkpoint
from limbeck.adapters.basis import Bank
from limbeck.adapters.config import NolaConfig
from limbeck.adapters.factor import require_read_back
from limbeck.adapters.layer import NolaConv2d, NolaLayer, NolaLinear

_BY_ADAPTER = re.compile(rf"\.({checkpoint.COEFFICIENTS}|modules_to_save)\.")  # what follows is an adapter's name
_HEADS = {"classifier", "score", "qa_outputs"}  # PEFT itself adds these to modules_to_save, for hosts with one of them


def _layer_class(module: nn.Module, parent: nn.Module, key: str) -> type[NolaLayer]:
    """Raises ValueError for a module that a NOLA layer cannot stand beside."""
    # MultiheadAttention reads the weight of its out_proj and never calls it: an adapter there would do nothing. In
    # evaluation, TransformerEncoderLayer does the same with its two linear layers.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"received target {key}, the projection of a MultiheadAttention, expected a layer that is called"
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"received target {key} of a TransformerEncoderLayer, which evaluates without calling it, "
            "expected torch.backends.mha.set_fastpath_enabled(False)"
        )
    if isinstance(module, (nn.Linear, Conv1D)):
        require_read_back(module, key)
        return NolaLinear
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return NolaConv2d
    raise ValueError(f"received target {key}: {module}, expected nn.Linear, Conv1D, or nn.Conv2d with one group")


def _alternatives(pattern: str) -> dict[str, str]:
    """Name -> the pattern with it alone, for each name of a group (a|b) without groups in it, or of a|b as a whole."""
    groups = [] if re.search(r"[(\[]", pattern) or "|" not in pattern else [(0, "", pattern, "", len(pattern))]
    for group in re.finditer(r"(?<!\\)(\((?:\?:|\?P<\w+>)?)(?!\?)([^()\[\]|]+(?:\|[^()\[\]|]+)+)(\))", pattern):
        groups.append((group.start(), *group.groups(), group.end()))
    return {
        name: f"{pattern[:start]}{opening}{name}{closing}{pattern[end:]}"
        for start, opening, names, closing, end in groups
        for name in names.split("|")
    }


def _fitted(names: str | set[str], keys: list[str]) -> dict[str, list[str]]:
    """Each name, or the pattern and each of its alternatives -> the keys that it fits."""
    if isinstance(names, str):
        patterns = {names: names} | _alternatives(names)
        return {name: [key for key in keys if re.fullmatch(pattern, key)] for name, pattern in patterns.items()}
    return {name: [key for key in keys if f".{key}".endswith(f".{name}")] for name in sorted(names)}


def _require_fit(what: str, fitted: dict[str, list[str]]) -> None:
    lost = [name for name, keys in fitted.items() if not keys]
    if lost:
        matched = ", ".join(f"{name} ({keys[0]})" for name, keys in fitted.items() if keys) or "none"
        raise ValueError(
            f"received {what} {', '.join(map(repr, lost))} that fit no module, expected names among the model's "
            f"`named_modules()`; those that matched: {matched}. Leave the others out: fused experts are no modules"
        )


class NolaModel(BaseTuner):
    """A model whose targeted layers have NOLA adapters; all of them draw their bases from one bank."""

    prefix = "nola_"
    tuner_layer_cls = NolaLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: NolaConfig | dict[str, NolaConfig], *args: Any, **kwargs: Any):
        """Raises ValueError for an adapter of the first layout, before anything is injected, where it can't be read.

        A PeftModel, which can, passes a dict; `inject_adapter_in_model`, and with it transformers, the config.
        """
        if getattr(peft_config, "first_layout", False):
            raise ValueError(
                "received an adapter of the first layout, which only `PeftModel.from_pretrained` reads, expected one "
                "of this layout: load it so, and save it again"
            )
        super().__init__(model, peft_config, *args, **kwargs)

    def _pre_injection_hook(self, model: nn.Module, config: NolaConfig, adapter_name: str) -> None:
        self.bank = Bank()

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Raises ValueError, and leaves the model as it was, for an impossible name, targets or slices that fit no
        module, and bases other than those that a loaded config was saved with.
        """
        self._require_name(model, adapter_name)
        if kwargs.get("state_dict") is None:  # which else tells the modules by its keys
            self._require_matches(model, self.peft_config[adapter_name])
        trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            layers = checkpoint.adapted(model, adapter_name)
            for module in self.peft_config[adapter_name].fused_slices or {}:
                if not any(f".{key}".endswith(f".{module}") for key in layers):
                    raise ValueError(f"received fused_slices of {module}, expected some of {', '.join(layers)}")
            checkpoint.require_bases(layers, self.peft_config[adapter_name], adapter_name)
        except Exception:
            _withdraw(model, adapter_name)
            for parameter, required in trains:
                parameter.requires_grad_(required)
            raise

    def _require_name(self, model: nn.Module, adapter_name: str) -> None:
        if not adapter_name.isprintable() or re.search(r"[/\\]", adapter_name):
            raise ValueError(f"received adapter name {adapter_name!r}, expected one of a folder, which it is saved in")
        # Of two adapters, PEFT takes keys with the name of one out of what it saves of the other's modules_to_save.
        keys = [key for key, _ in model.named_modules(prefix="base_model.model") if not _BY_ADAPTER.search(key)]
        parts = {part for key in keys for part in key.split(".")}
        confused = parts if any(config.modules_to_save for config in self.peft_config.values()) else ()
        for name in (adapter_name, *self.peft_config):
            if not name or "." in name or hasattr(nn.ModuleDict(), name) or name in confused:
                raise ValueError(
                    f"received adapter name {name!r}, expected no dot, no attribute of nn.ModuleDict, and with "
                    "modules_to_save no part of a module's name"
                )

    def _require_matches(self, model: nn.Module, config: NolaConfig) -> None:
        """Raise ValueError for a target, an exclusion or a layer that fits no module; narrow PEFT's own targets."""
        keys = [key for key, _ in model.named_modules() if key]
        if config.exclude_modules:
            _require_fit("exclude_modules", _fitted(config.exclude_modules, keys))
        saved = set(config.modules_to_save or ()) - _HEADS
        _require_fit("modules_to_save", {name: [key for key in keys if key.endswith(name)] for name in sorted(saved)})
        targets = config.target_modules
        if targets is None:
            self._prepare_adapter_config(config, self.get_model_config(model))
            if isinstance(config.target_modules, set):
                fitted = _fitted(config.target_modules, keys)
                config.target_modules = {name for name in fitted if fitted[name]} or config.target_modules
        elif not isinstance(targets, str) or targets.lower() not in ("all-linear", DUMMY_TARGET_MODULES):
            _require_fit("target_modules", _fitted(targets, keys))
        layers = config.layers_to_transform
        if layers is not None:
            one = copy.copy(config)
            one.exclude_modules = one.modules_to_save = None
            fitted = {}
            for layer in [layers] if isinstance(layers, int) else layers:
                one.layers_to_transform = [layer]
                fitted[str(layer)] = [key for key in keys if self._check_target_module_exists(one, key)]
            _require_fit("layers_to_transform", fitted)

    def _create_and_replace(
        self,
        peft_config: NolaConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        key, bank = checkpoint.bare(current_key), self.__dict__.setdefault("bank", Bank())
        if isinstance(target, NolaLayer):
            target.update_layer(adapter_name, peft_config, key, bank)
            return
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = _layer_class(base, parent, key)(target, adapter_name)
        layer.update_layer(adapter_name, peft_config, key, bank)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete it, and let go of bases that only it may have used."""
        super().delete_adapter(adapter_name)
        self.bank.kept.clear()

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refused with a ValueError: an update is a product of two sums, so coefficients do not add."""
        raise ValueError(
            "received add_weighted_adapter for NOLA, expected LoRA: convert each with `to_lora`, add there"
        )

    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> AbstractContextManager:
        """PEFT offers a batch with an adapter for each row to LoRA alone, and would else ignore the names."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("received adapter_names for NOLA, expected none: `set_adapter`, or LoRA by `to_lora`")
        return nullcontext()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """To float32 or wider, where the layer starts it; without autocast to the dtype of the layer's weight."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in checkpoint.adapted(self.model, adapter_name).values() if not autocast_adapter_dtype else ():
            dtype = layer.get_base_layer().weight.dtype
            if dtype.is_floating_point and dtype.itemsize > 1:
                layer.nola_coefficients[adapter_name].to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "NolaModel":
        for module in self.modules():
            if isinstance(module, NolaLayer):
                module.release_bases()  # they are for the device or the dtype that the model now leaves
        return super()._apply(fn, recurse)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: NolaConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        return checkpoint.to_file(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: NolaConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return checkpoint.from_file(model, config, adapter_name, state_dict)


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off, and the layers that then have none."""
    delete_adapter(model, adapter_name, NolaModel.prefix, NolaLayer)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, NolaLayer) and not layer.nola_factors:
            model.set_submodule(name, layer.base_layer)
