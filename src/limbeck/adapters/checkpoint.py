"""What the file of an adapter holds: its coefficients, and from which bases they are counted; never the bases.

For each adapted module [alpha, beta], one row per matrix (`nola_coefficients`; packed into bytes with `nola_scales` if
quantised), and of the whole adapter the seed, the generator and a checksum of its bases. Loading is strict:
a key, a shape or a base that differs is an error, since PEFT itself would go on with coefficients of other bases.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from limbeck.adapters.basis import GENERATOR, Bank, Stream
from limbeck.adapters.config import NolaConfig
from limbeck.adapters.factor import dequantised, levels, packed, unpacked, wide
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
    _require("seed", entries[f"{ROOT}seed"].item(), config.basis_seed)
    if not given:
        _require("generator", bytes(entries[f"{ROOT}generator"].tolist()).decode(), GENERATOR)
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
