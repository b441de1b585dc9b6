"""What the file of an adapter holds: its coefficients, and from which bases they are counted; never the bases.

For each adapted module alpha and beta as `nola_coefficients.a` and `.b`, one row per matrix, or packed into bytes as
the extra state of `nola_coefficients` if quantised; and of the whole adapter the seed, the generator and a checksum of
its bases, which stands in adapter_config.json too, where every loader meets it. Loading is strict: a key, a shape or a
base that differs is an error, since PEFT itself would go on with coefficients of other bases.

An adapter in other forms: as plain LoRA (`to_lora`), which any server of LoRA can host, or at fewer bits (`quantise`).
"""

import re
from collections.abc import Iterable

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as PACKED
from transformers.pytorch_utils import Conv1D

from limbeck.adapters.basis import GENERATOR, Bank, Stream
from limbeck.adapters.config import NolaConfig
from limbeck.adapters.factor import from_rows, quantised, require_bits, to_rows, wide
from limbeck.adapters.layer import NolaLayer, PackedCoefficients

PREFIX = "base_model.model."  # of a PeftModel's keys; a model with injected layers alone has none
ROOT = "nola_"  # of the keys that belong to the whole adapter, behind the prefix
COEFFICIENTS = "nola_coefficients"
_WRAPPERS = re.compile(r"\b_(?:fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # no state dict has them
_COMPILED = re.compile(r"\b_orig_mod\.")


def bare(name: str) -> str:
    """The module's name without what FSDP, checkpointing or compiling put around it."""
    return _COMPILED.sub("", _WRAPPERS.sub("", name))


def _layers(model: nn.Module, adapter_name: str) -> dict[str, NolaLayer]:
    """Name in the state dict -> layer of the modules that have this adapter."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, NolaLayer))
    return {_WRAPPERS.sub("", name): layer for name, layer in layers if adapter_name in layer.nola_factors}


def adapted(model: nn.Module, adapter_name: str) -> dict[str, NolaLayer]:
    """Bare name -> layer of the modules that have this adapter."""
    return {bare(name): layer for name, layer in _layers(model, adapter_name).items()}


def _streams(layers: Iterable[NolaLayer], adapter_name: str) -> dict[str, tuple[Stream, int]]:
    """Key in the file -> a stream of the adapter, and how many of its bases count."""
    streams_by_key = {}
    for factor in (factor for layer in layers for factor in layer.nola_factors[adapter_name]):
        for number, streams in ((factor.number, factor.streams), (1, factor.fixed)):
            streams_by_key |= {f"{ROOT}basis.{stream.key}.{stream.factor}": (stream, number) for stream in streams}
    return streams_by_key


def _bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def _require(name: str, received: object, expected: object, remedy: str = "") -> None:
    if received != expected:
        raise ValueError(f"received an adapter with the {name} {received}, expected {expected}{remedy}")


_OTHER_BASES = ", as saved: the model's widths, the settings or the generator differ (basis_checksum=None starts anew)"
_OTHER_NUMBERS = ", as saved: the file or adapter_config.json is damaged or another's (digest: null there skips this)"


class _Unread(Bank):
    """In place of bases that the file holds, until a loader reads them: they are drawn only if they are the same."""

    def __init__(self, streams: list[Stream], checksum: str):
        super().__init__()
        self.streams, self.expected = streams, checksum

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"streams": self.streams, "expected": self.expected}

    def draw(self, stream: Stream, start: int, count: int) -> Tensor:
        """Raises ValueError where the generator has others."""
        remedy = ", as saved: `PeftModel.from_pretrained` reads the file's own"
        _require("checksum of its bases", Bank().checksum(self.streams).hex(), self.expected, remedy)
        return super().draw(stream, start, count)


def require_bases(layers: dict[str, NolaLayer], config: NolaConfig, adapter_name: str) -> None:
    """Raise ValueError where a loaded config was saved with other bases than these layers have."""
    if config.basis_checksum is None:
        return
    streams = [stream for stream, _ in _streams(layers.values(), adapter_name).values()]
    if config.save_basis:
        _take_from(layers, adapter_name, _Unread(streams, config.basis_checksum))
    else:
        _require("checksum of its bases", Bank().checksum(streams).hex(), config.basis_checksum, _OTHER_BASES)


def _take_from(layers: dict[str, NolaLayer], adapter_name: str, bank: Bank) -> None:
    for factor in (factor for layer in layers.values() for factor in layer.nola_factors[adapter_name]):
        factor.take_from(bank)


def _pair(state_dict: dict[str, Tensor], name: str, layer: NolaLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """alpha and beta of the state dict, which lacks a layer's where another adapter is called as a part of its name."""
    key, own = f"{name}.{COEFFICIENTS}.{adapter_name}", zip("ab", layer.coefficients(adapter_name), strict=True)
    a, b = (state_dict.get(f"{key}.{part}", coefficients.detach()) for part, coefficients in own)
    for part, factor in zip((a, b), layer.nola_factors[adapter_name], strict=True):
        _require(f"shape of {key}, perhaps sharded,", tuple(part.shape), (len(factor.streams), factor.number))
    return a, b


def to_file(
    model: nn.Module, config: NolaConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The entries of the file, with the adapter's name in each key as in `state_dict`, the model's."""
    layers = _layers(model, adapter_name)
    bank = next(iter(layers.values())).nola_factors[adapter_name][0].bank
    entries = {}
    for name in sorted(layers):
        key, pair = f"{bare(name)}.{COEFFICIENTS}.{adapter_name}", _pair(state_dict, name, layers[name], adapter_name)
        if config.quant_bits:
            entries[f"{key}.{PACKED}"] = to_rows(pair, config.quant_bits)
        else:
            entries |= {f"{key}.a": pair[0], f"{key}.b": pair[1]}
    streams = _streams(layers.values(), adapter_name)
    checksum = bank.checksum(stream for stream, _ in streams.values())
    config.saved_checksum = checksum.hex()
    origin = {
        f"{ROOT}seed": torch.tensor([config.basis_seed]),
        f"{ROOT}generator": _bytes(GENERATOR.encode()),
        f"{ROOT}checksum": _bytes(checksum),
    }
    if config.save_basis:
        origin |= {key: bank.draw(stream, 0, number) for key, (stream, number) in streams.items()}
    named = f"{COEFFICIENTS}.{adapter_name}."
    short = {key.removeprefix(PREFIX).replace(named, f"{COEFFICIENTS}."): value for key, value in entries.items()}
    config.saved_digest = config.digest_of(short | origin)
    prefix = PREFIX if all(name.startswith(PREFIX) for name in layers) else ""
    return entries | {f"{prefix}{key}.{adapter_name}": value for key, value in origin.items()}


def _from_earlier(
    entries: dict[str, Tensor], layers: dict[str, NolaLayer], config: NolaConfig, adapter_name: str
) -> dict[str, Tensor]:
    """The same from a file of the first layout: alpha and beta side by side, the scales of all modules together."""
    shapes = {name: layer.coefficients(adapter_name)[0].shape for name, layer in layers.items()}
    scales = entries.pop(f"{ROOT}scales", None)
    if scales is not None:
        _require(f"shape of {ROOT}scales", tuple(scales.shape), (sum(rows for rows, _ in shapes.values()), 2))
        scales = scales.float().contiguous().view(torch.uint8)
    for name in sorted(shapes):
        key, (rows, number) = f"{name}.{COEFFICIENTS}", shapes[name]
        values = entries.pop(key, None)
        if values is not None:
            _require(f"number of rows of {key}", values.shape[:-1], (rows,))
        if values is not None and scales is None:
            entries |= {f"{key}.a": values[:, :number].clone(), f"{key}.b": values[:, number:].clone()}
        elif values is not None:
            entries[f"{key}.{PACKED}"] = torch.cat([values, scales[:rows]], 1)
        scales = None if scales is None else scales[rows:]
    return entries


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


def _coefficients(
    entries: dict[str, Tensor], name: str, layer: NolaLayer, adapter_name: str, bits: int | None
) -> tuple[Tensor, Tensor]:
    """alpha and beta of the entries, in the shapes of the layer's."""
    key, shapes = f"{bare(name)}.{COEFFICIENTS}", [part.shape for part in layer.coefficients(adapter_name)]
    if bits:
        dtype = wide(layer.coefficients(adapter_name)[0].dtype)
        a, b = from_rows(entries[f"{key}.{PACKED}"], bits, shapes, dtype)
        return a, b
    for part, shape in zip("ab", shapes, strict=True):
        _require(f"shape of {key}.{part}", tuple(entries[f"{key}.{part}"].shape), tuple(shape))
    return entries[f"{key}.a"], entries[f"{key}.b"]


def from_file(
    model: nn.Module, config: NolaConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The entries for the model: the coefficients under its keys, all other entries as they are.

    Raises ValueError for missing or unexpected keys, or another seed, generator, checksum or shape than the model's.
    """
    layers = {name.removeprefix(PREFIX): layer for name, layer in _layers(model, adapter_name).items()}
    bare_layers = {bare(name): layer for name, layer in layers.items()}
    streams = _streams(layers.values(), adapter_name)
    short = {key: key.removeprefix(PREFIX).removeprefix("base_model.") for key in state_dict}
    model_keys = {bare(key).removeprefix(PREFIX) for key in model.state_dict() if f".{COEFFICIENTS}." not in key}
    own = {short[key]: value for key, value in state_dict.items() if short[key] not in model_keys}
    entries = _from_earlier(own, bare_layers, config, adapter_name)
    parts = (PACKED,) if config.quant_bits else ("a", "b")
    expected = {f"{name}.{COEFFICIENTS}.{part}" for name in bare_layers for part in parts}
    expected |= {f"{ROOT}{name}" for name in ("seed", "generator", "checksum")}
    expected |= set(streams) if config.save_basis else set()
    missing, unexpected = sorted(expected - set(entries)), sorted(set(entries) - expected)
    if missing or unexpected:
        raise ValueError(f"received an adapter without {missing} and with {unexpected}, expected just the model's keys")
    given, prefix, loaded = _verified(entries, config, streams), "", {}
    if any(key.startswith(PREFIX) for key in model.state_dict()):
        prefix = PREFIX
    for name, layer in layers.items():
        pair = _coefficients(entries, name, layer, adapter_name, config.quant_bits)
        key = f"{prefix}{name}.{COEFFICIENTS}.{adapter_name}"
        loaded |= {f"{key}.a": pair[0], f"{key}.b": pair[1]}
        if isinstance(layer.nola_coefficients[adapter_name], PackedCoefficients):
            loaded[f"{key}.{PACKED}"] = layer.nola_coefficients[adapter_name].get_extra_state()
    if config.digest is not None:
        _require("digest of its numbers", config.digest_of(entries), config.digest, _OTHER_NUMBERS)
        config.digest = None  # what is loaded into the model later is other numbers
    if given or config.save_basis:
        _take_from(layers, adapter_name, Bank(given))  # others of the model go on with the bases of their seeds
    return {key: value for key, value in state_dict.items() if short[key] in model_keys} | loaded


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
    state = {key: value for key, value in saved.items() if f".{ROOT}" not in key}
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
