"""The stack that `table_cost` times: the layers of a GPT-2, without its vocabulary, and the adapters on q and v.

Weights are drawn, since a step takes as long whatever they are. All arms share them; only adapters are their own. The
gradient goes to the inputs as well, so that the stack without an adapter has the same backward pass as the others.
"""

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from limbeck import models, seeding
from limbeck.adapters import NolaConfig
from limbeck.adapters.layer import NolaLayer
from limbeck.experiments.nola.cost_released import draw_as_released

TARGET = "c_attn"  # q, k and v in one matrix
NOLA = {  # arm: how its bases are kept and drawn; None draws all of a factor at once
    "nola_shared": {"share_basis": True, "chunk_size": None},
    "nola_unique": {"share_basis": False, "chunk_size": None},
    "nola_regenerated": {"share_basis": False, "cache_bytes": 0, "chunk_size": None},
    "nola_chunked": {"share_basis": False, "cache_bytes": 0},
    "released": {"share_basis": False, "cache_bytes": 0, "chunk_size": None, "init": "mean"},
}
ARMS = ("none", "lora", "vera", *NOLA)
_SPREAD = 0.02


def stack(*, layers: int, width: int, heads: int, tokens: int) -> GPT2Model:
    """The frozen stack in float32, in evaluation mode: matrices drawn by a seed, the rest as GPT-2 starts."""
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_positions": tokens, "vocab_size": 1}
    config = GPT2Config(**sizes, use_cache=False, bos_token_id=None, eos_token_id=None)
    with torch.device("meta"):  # else transformers would draw each weight first
        model = GPT2Model(config)
    model.to_empty(device="cpu").requires_grad_(requires_grad=False)
    source = seeding.generator(0, "weights")
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(0.0, _SPREAD, generator=source)
        else:
            weight.data.fill_(float(name.endswith("weight")))
    return model.eval()


def shared_copy(model: nn.Module) -> nn.Module:
    """The model's modules anew, on the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def config(
    arm: str, *, rank: int, num_basis: int, chunk_size: int, cache_bytes: int, vera_rank: int
) -> PeftConfig | None:
    """The arm's adapter. PEFT's own adapt the fused matrix whole, NOLA its q and v columns each; None for no adapter.

    Raises ValueError for an arm that is not among ARMS.
    """
    if arm not in ARMS:
        raise ValueError(f"received arm {arm!r}, expected one of {', '.join(ARMS)}")
    if arm == "none":
        return None
    if arm == "lora":
        return LoraConfig(r=rank, target_modules=[TARGET], fan_in_fan_out=True)
    if arm == "vera":
        return VeraConfig(r=vera_rank, target_modules=[TARGET], fan_in_fan_out=True)
    options = {"chunk_size": chunk_size, "cache_bytes": cache_bytes} | NOLA[arm]
    options["chunk_size"] = options["chunk_size"] or num_basis
    place = {"target_modules": [TARGET], "fused_slices": {TARGET: ("q", "v")}}
    return NolaConfig(r=rank, num_basis=num_basis, nola_alpha=rank, **place, **options)


def attach(arm: str, base: GPT2Model, adapter: PeftConfig | None) -> nn.Module:
    """A copy of the stack with the arm's adapter, on the weights of `base`.

    NOLA's coefficients are away from 0, as after a step: at 0, one factor of two would neither learn nor be built anew.
    """
    if adapter is None:
        return shared_copy(base)
    with torch.random.fork_rng(devices=[]):  # PEFT draws LoRA's start from the global generator
        model = get_peft_model(shared_copy(base), adapter).eval()
    for layer in nola_layers(model):
        for coefficients in layer.coefficients("default"):
            coefficients.data.fill_(1 / coefficients.shape[1])
    if arm == "released":
        draw_as_released(nola_layers(model))
    return model


def nola_layers(model: nn.Module) -> list[NolaLayer]:
    """The adapted layers, in order."""
    return [module for module in model.modules() if isinstance(module, NolaLayer)]


def step(model: nn.Module, *, tokens: int, width: int, learning_rate: float) -> Callable[[], None]:
    """One step of AdamW on what trains, as a call: the loss is a fixed projection of the last hidden states."""
    source = seeding.generator(0, "inputs")
    inputs = torch.randn(1, tokens, width, generator=source).requires_grad_()
    direction = torch.randn(width, generator=source) / width
    weights = list(models.trainable(model).values())
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0, fused=True) if weights else None

    def call() -> None:
        for tensor in (inputs, *weights):
            tensor.grad = None
        (model(inputs_embeds=inputs).last_hidden_state @ direction).sum().backward()
        if optimiser:
            optimiser.step()

    return call


def factor_passes(model: nn.Module) -> Callable[[], None]:
    """Forward and backward of the first factor of the first layer, its coefficients as after a step, as a call."""
    layer = nola_layers(model)[0]
    factor, coefficients = layer.nola_factors["default"][0], layer.coefficients("default")[0].detach()

    def call() -> None:
        fresh: Tensor = coefficients.clone().requires_grad_()
        factor(fresh).sum().backward()

    return call
