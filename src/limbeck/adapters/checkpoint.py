"""What the file of an adapter holds: its coefficients, and from which bases they are counted; never the bases.

For each adapted module [alpha, beta], one row per matrix (`nola_coefficients`; packed into bytes with `nola_scales` if
quantised), and of the whole adapter the seed, the generator and a checksum of its bases. Loading is strict:
a key, a shape or a base that differs is an error, since PEFT itself would go on with coefficients of other bases.

An adapter in other forms: as plain LoRA (`to_lora`), which any server of LoRA can host, or at fewer bits (`quantise`).
"""

import re
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.adapters.basis import GENERATOR, Bank, Stream
from limbeck.adapters.config import NolaConfig
from limbeck.adapters.factor import dequantised, levels, packed, quantised, require_bits, unpacked, wide
from limbeck.adapters.layer import NolaLayer

PREFIX = "base_model.model."  # of a PeftModel's keys; a model with injected layers alone has none
ROOT = "base_model.nola_"


def adapted(model: nn.Module, adapter_name: str) -> dict[str, NolaLayer]:
    """Name -> layer of the modules that have this adapter."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, NolaLayer))
    return {name: layer for name, layer in layers if adapter_name in layer.nola_factors}


def _streams(layers: dict[str, NolaLayer], adapter_name: str) -> dict[str, tuple[Stream, int]]:
    """Key in the file -> a stream of the adapter, and how many of its bases count."""
    streams_by_key = {}
    for factor in (factor for layer in layers.values() for factor in layer.nola_factors[adapter_name]):
        for number, streams in ((factor.number, factor.streams), (1, factor.fixed)):
            streams_by_key |= {f"{ROOT}basis.{stream.key}.{stream.factor}": (stream, number) for stream in streams}
    return streams_by_key


def _bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def _require(name: str, received: object, expected: object) -> None:
    if received != expected:
        raise ValueError(f"received an adapter with the {name} {received}, expected {expected}")


def to_file(
    model: nn.Module, config: NolaConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The entries of the file; `state_dict` is the model's."""
    layers = adapted(model, adapter_name)
    bank = next(iter(layers.values())).nola_factors[adapter_name][0].bank
    entries, scales = {}, []
    for name in sorted(layers):
        parts = [state_dict[f"{name}.{part}.{adapter_name}"] for part in NolaLayer.adapter_layer_names]
        if config.quant_bits:
            pairs = [levels(part.detach(), config.quant_bits) for part in parts]
            parts = [packed(numbers, config.quant_bits) for numbers, _ in pairs]
            scales.append(torch.stack([scale.cpu() for _, scale in pairs], 1))
        entries[f"{name}.nola_coefficients"] = torch.cat(parts, 1)
    streams = _streams(layers, adapter_name)
    if config.quant_bits:
        entries[f"{ROOT}scales"] = torch.cat(scales)
    if config.save_basis:
        entries |= {key: bank.draw(stream, 0, number) for key, (stream, number) in streams.items()}
    return entries | {
        f"{ROOT}seed": torch.tensor([config.basis_seed]),
        f"{ROOT}generator": _bytes(GENERATOR.encode()),
        f"{ROOT}checksum": _bytes(bank.checksum(stream for stream, _ in streams.values())),
    }


def _split(
    entries: dict[str, Tensor], keys: dict[str, str], layers: dict[str, NolaLayer], adapter_name: str, bits: int | None
) -> Iterator[tuple[str, Tensor]]:
    """(key in the model, coefficients) from the entries of each module."""
    scales = entries.get(f"{ROOT}scales")
    if bits:
        matrices = sum(len(layer.coefficients(adapter_name)[0]) for layer in layers.values())
        _require(f"shape of {ROOT}scales", tuple(scales.shape), (matrices, 2))
    for name in sorted(layers):
        layer, row = layers[name], entries[keys[name]]
        expected_shapes = [tuple(coefficients.shape) for coefficients in layer.coefficients(adapter_name)]
        widths = [-(-number * bits // 8) if bits else number for _, number in expected_shapes]
        _require(f"shape of {keys[name]}", tuple(row.shape), (expected_shapes[0][0], sum(widths)))
        parts = row.split(widths, 1)
        if bits:
            row_scales, scales = scales[: len(row)], scales[len(row) :]
            dtype = wide(layer.nola_coefficients_a[adapter_name].dtype)
            parts = [
                dequantised(unpacked(part, bits, number), scale.cpu(), bits, dtype)
                for part, (_, number), scale in zip(parts, expected_shapes, row_scales.unbind(1), strict=True)
            ]
        for part, coefficients in zip(NolaLayer.adapter_layer_names, parts, strict=True):
            yield f"{name}.{part}.{adapter_name}", coefficients


def _verified(
    entries: dict[str, Tensor], config: NolaConfig, streams: dict[str, tuple[Stream, int]]
) -> dict[Stream, Tensor]:
    """The bases of the file, if it has to have them; either way those that its coefficients were counted from."""
    given = {stream: entries[key].cpu() for key, (stream, _) in streams.items()} if config.save_basis else {}
    for key, (stream, number) in streams.items() if given else ():
        _require(f"shape of {key}", tuple(given[stream].shape), (number, stream.size))
    for name, dtype in {"seed": torch.int64, "generator": torch.uint8, "checksum": torch.uint8}.items():
        entry = entries[f"{ROOT}{name}"]
        _require(f"dtype and axes of the {name}", (entry.dtype, entry.dim()), (dtype, 1))
    seeds = entries[f"{ROOT}seed"].tolist()
    _require("seed", *(seeds if len(seeds) == 1 else [seeds]), config.basis_seed)
    if not given:
        _require("generator", bytes(entries[f"{ROOT}generator"].tolist()).decode(errors="replace"), GENERATOR)
    checksum = Bank(given).checksum(stream for stream, _ in streams.values())
    _require("checksum of its bases", bytes(entries[f"{ROOT}checksum"].tolist()).hex(), checksum.hex())
    return given


def from_file(
    model: nn.Module, config: NolaConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The entries for the model: the coefficients under its keys, all other entries as they are.

    Raises ValueError for missing or unexpected keys, or another seed, generator, checksum or shape than the model's.
    """
    layers = adapted(model, adapter_name)
    streams = _streams(layers, adapter_name)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state_dict) else ""
    bare = {key: key.removeprefix(PREFIX) for key in state_dict}  # transformers puts the prefix before our own keys
    state_dict = {bare[key] if bare[key].startswith(ROOT) else key: value for key, value in state_dict.items()}
    keys = {name: f"{prefix}{name.removeprefix(PREFIX)}.nola_coefficients" for name in layers}
    expected_keys = {*keys.values(), *(f"{ROOT}{name}" for name in ("seed", "generator", "checksum"))}
    expected_keys |= {f"{ROOT}scales"} if config.quant_bits else set()
    expected_keys |= set(streams) if config.save_basis else set()
    model_keys = {key.removeprefix(PREFIX) for key in model.state_dict()}
    other_entries = {key: value for key, value in state_dict.items() if key not in expected_keys}
    unexpected = sorted(key for key in other_entries if key.removeprefix(PREFIX) not in model_keys)
    if unexpected or expected_keys - set(state_dict):
        missing = sorted(expected_keys - set(state_dict))
        raise ValueError(f"received an adapter without {missing} and with {unexpected}, expected just the model's keys")
    given = _verified(state_dict, config, streams)
    coefficients = dict(_split(state_dict, keys, layers, adapter_name, config.quant_bits))
    if given:
        bank = Bank(given)  # other adapters of the model go on with the bases of their seeds
        for factor in (factor for layer in layers.values() for factor in layer.nola_factors[adapter_name]):
            factor.take_from(bank)
    return other_entries | coefficients


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
