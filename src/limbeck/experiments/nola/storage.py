"""What one task's adapter takes on disk, as PEFT saves it: LoRA, VeRA, and NOLA at several numbers of bases and bits.

The models have the shapes of the paper's, on the meta device: without weights, since what is saved depends on shapes
alone. Of the adapters only what is trained gets numbers, all 0, which take as many bytes as any. Nothing is trained.
"""

import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners._buffer_dict import BufferDict
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from limbeck.adapters import NolaConfig
from limbeck.experiments.runs import Cell, Result, Workspace
from limbeck.params import one_of, positive

FLOAT = 32  # bits of a coefficient that is not quantised
ARMS = ("lora_4", "lora_1", "vera", "nola")
_REFERENCE, _GIGABYTE = "lora_1", 1e9


def _gpt2(layers: int, width: int, heads: int) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=width, n_head=heads))


def _llama(layers: int, width: int, inner: int, heads: int, groups: int) -> nn.Module:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=heads, num_key_value_heads=groups))


def _vit(layers: int, width: int, heads: int) -> nn.Module:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    return ViTForImageClassification(ViTConfig(**sizes, num_attention_heads=heads))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2_m": lambda: _gpt2(24, 1024, 16),
    "gpt2_l": lambda: _gpt2(36, 1280, 20),
    "llama2_7b": lambda: _llama(32, 4096, 11008, 32, 32),
    "llama2_13b": lambda: _llama(40, 5120, 13824, 40, 40),
    "llama2_70b": lambda: _llama(80, 8192, 28672, 64, 8),
    "vit_l": lambda: _vit(24, 1024, 16),
}
_QV = {"gpt2": ["c_attn"], "vit": ["q_proj", "v_proj"]}
_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there. A row is `model arm`, and for NOLA also bases and bits."""

    rows: tuple[str, ...]
    rank: int
    vera_rank: int
    fleet: int
    budget: float

    def __post_init__(self) -> None:
        positive(rank=self.rank, vera_rank=self.vera_rank, fleet=self.fleet, budget=self.budget)
        for row in self.rows:
            coordinates = _coordinates(row)
            if _reference(coordinates) not in map(_coordinates, self.rows):
                raise ValueError(f"received the row {row!r}, expected {coordinates['model']} {_REFERENCE} too")


def _coordinates(row: str) -> dict[str, str | int]:
    model, arm, *numbers = row.split(" ")
    one_of("model", model, MODELS)
    one_of("arm", arm, ARMS)
    if len(numbers) != (2 if arm == "nola" else 0):
        raise ValueError(f"received the row {row!r}, expected 'model arm', and for nola its bases and bits")
    basis, bits = map(int, numbers) if numbers else (0, FLOAT)
    return {"model": model, "arm": arm, "basis": basis, "bits": bits}


def _reference(coordinates: dict[str, str | int]) -> dict[str, str | int]:
    """Where LoRA of rank 1 on the same model stands."""
    return {"model": coordinates["model"], "arm": _REFERENCE, "basis": 0, "bits": FLOAT}


def cells(params: Params, _: Sequence[int]) -> list[Cell]:
    """Every row, those of LoRA r = 1 first: the others are compared with them."""
    inputs = {name: value for name, value in asdict(params).items() if name != "rows"}
    planned = [Cell(row, inputs, wave=int(row["arm"] != _REFERENCE)) for row in map(_coordinates, params.rows)]
    return sorted(planned, key=lambda cell: cell.wave)


def run(cell: Cell, params: Params, workspace: Workspace) -> Generator[dict[str, int], None, Result]:
    """Attach, save, measure the files."""
    yield {"step": 0, "steps": 1}
    coordinates = cell.coordinates
    metrics = sizes(attached(str(coordinates["model"]), config(coordinates, params)))
    metrics["fleet/gigabytes"] = metrics["disk/bytes"] * params.fleet / _GIGABYTE
    metrics["fleet/variants"] = float(params.budget * _GIGABYTE // metrics["disk/bytes"])
    if coordinates["arm"] == "nola":
        numbers = metrics["count/trainable"] * coordinates["bits"] / 8
        metrics |= {
            "disk/beyond": metrics["disk/weights"] - numbers,
            "fleet/numbers": numbers * params.fleet / _GIGABYTE,
        }
    if coordinates["arm"] != _REFERENCE:
        (lora,) = (run for run in workspace.records if run["cell"] == _reference(coordinates))
        metrics |= beside(metrics, lora["metrics"], int(coordinates["bits"]))
    yield {"step": 1, "steps": 1}
    return Result(metrics, trainable_parameters=int(metrics["count/trainable"]))


def config(coordinates: dict[str, str | int], params: Params) -> PeftConfig:
    """The adapter of a row, on the matrices that the paper adapts: of a ViT, NOLA's are those of the MLPs."""
    family = str(coordinates["model"]).partition("_")[0]
    conv = {"fan_in_fan_out": True} if family == "gpt2" else {}
    targets = _QV.get(family, _LLAMA)
    if coordinates["arm"] == "vera":
        return VeraConfig(r=params.vera_rank, target_modules=targets, **conv)
    if coordinates["arm"] != "nola":
        return LoraConfig(r=int(str(coordinates["arm"])[-1]), target_modules=targets, **conv)
    if family == "gpt2":
        matrices = {"target_modules": targets, "fused_slices": {"c_attn": ("q", "v")}}
    else:
        matrices = {"target_modules": ["fc1", "fc2"] if family == "vit" else targets}
    bits = None if coordinates["bits"] == FLOAT else coordinates["bits"]
    return NolaConfig(r=params.rank, num_basis=coordinates["basis"], quant_bits=bits, **matrices)


def attached(model: str, adapter: PeftConfig) -> PeftModel:
    """The adapter on an empty model; its trained numbers are 0."""
    with torch.device("meta"):
        host = MODELS[model]()
    with torch.random.fork_rng(devices=[]):  # PEFT draws LoRA's start from the global generator
        adapted = get_peft_model(host, adapter)
    for module in adapted.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.requires_grad:
                setattr(module, name, nn.Parameter(torch.zeros(weight.shape, dtype=weight.dtype)))
        if isinstance(module, BufferDict):  # VeRA's projections, which PEFT saves
            module.update({name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in module.items()})
    return adapted


def sizes(model: PeftModel) -> dict[str, float]:
    """How many numbers train, and the bytes of the two files that PEFT saves."""
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    with tempfile.TemporaryDirectory(prefix="limbeck-") as folder:
        model.save_pretrained(folder)
        files = Path(folder, "adapter_model.safetensors"), Path(folder, "adapter_config.json")
        weights, settings = (float(file.stat().st_size) for file in files)
    files_bytes = {"disk/weights": weights, "disk/config": settings, "disk/bytes": weights + settings}
    return {"count/trainable": float(count)} | files_bytes


def beside(own: dict[str, float], lora: dict[str, float], bits: int) -> dict[str, float]:
    """How often an adapter of so many bits fits into LoRA of rank 1, by its count, by its files, and of the saving that
    the count promises, which share the files keep.
    """
    numbers = lora["count/trainable"] / own["count/trainable"]
    files = lora["disk/bytes"] / own["disk/bytes"]
    return {"ratio/count": numbers, "ratio/bytes": files, "ratio/kept": files / (numbers * FLOAT / bits)}
