"""What a step of each adapter costs: time and memory, on the layers of a GPT-2 M, forward, backward and optimiser.

PEFT's LoRA and VeRA; NOLA with bases that all matrices share, with bases of their own that stay in memory, that are
drawn again, all of a factor at once or a few at a time, and drawn again as the first official release does. The stack
without an adapter is timed beside them, so that what an adapter adds can be told. Merged, NOLA has to leave the modules
and the operations of the stack alone. Run by `make bench` only.

The stack has no vocabulary. Its weights are drawn, since a step takes as long whatever they are. All arms share them;
only adapters are their own. The gradient goes to the inputs as well, so that the stack without an adapter has the same
backward pass as the others.

In the release's forward and again in its backward, a generator is reseeded and all bases of a factor drawn from the
uniform distribution with Kaiming's bound for the whole stack, 1 / sqrt(rows cols). The release reseeds the global
generator, and so disturbs whatever draws from it next; here it is one of its own. The matrix products are ours, at
least as fast as its sums.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from peft import LoraConfig, PeftConfig, VeraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import GPT2Config, GPT2Model

from limbeck import measurements, models, params, seeding
from limbeck.adapters import NolaConfig
from limbeck.adapters.layer import NolaLayer

SECTIONS = {"smoke": "tiny", "bench": "bench"}  # profile: section of params/nola.yaml
TARGET = "c_attn"  # q, k and v in one matrix
NOLA = {  # arm: how its bases are kept and drawn; without a chunk size, all of a factor at once
    "nola_shared": {"share_basis": True},
    "nola_unique": {"share_basis": False},
    "nola_regenerated": {"share_basis": False, "cache_bytes": 0},
    "nola_chunked": {"share_basis": False, "cache_bytes": 0},
    "released": {"share_basis": False, "cache_bytes": 0, "init": "mean"},
}
CHUNKED = "nola_chunked"
ARMS = ("none", "lora", "vera", *NOLA)
WHOLE = "nola_regenerated"  # the arm whose memory and draws others are compared with
DRAWN = (WHOLE, CHUNKED, "released")
_MEGABYTE = 1e6
_REPEATS = 3  # of a peak, of which the lowest counts: a heap in pieces may raise one
_SPREAD = 0.02


@dataclass(frozen=True)
class Params:
    """The section of params/nola.yaml; sources stand there."""

    arms: tuple[str, ...]
    layers: int
    width: int
    heads: int
    tokens: int
    rank: int
    num_basis: int
    chunk_size: int
    cache_bytes: int
    vera_rank: int
    learning_rate: float
    rounds: int
    threads: int

    def __post_init__(self) -> None:
        params.positive(layers=self.layers, rounds=self.rounds, threads=self.threads, tokens=self.tokens)
        for arm in self.arms:
            params.one_of("arm", arm, ARMS)
        if missing := sorted({"none", "lora", "nola_shared", *DRAWN} - set(self.arms)):
            raise ValueError(f"received arms without {', '.join(missing)}, which others are compared with")


def measure(profile: str) -> pd.DataFrame:
    """One row per arm and round: seconds, their ratio to LoRA's, what the adapter adds to the stack's own step, and how
    much more the release's adds; in the first round also what was measured once: peaks of memory, and merging.
    """
    params.one_of("profile", profile, SECTIONS)
    section = params.load("nola", "table_cost", SECTIONS[profile], Params)
    threads = torch.get_num_threads()
    torch.set_num_threads(section.threads)
    try:
        return pd.DataFrame(_rows(section))
    finally:
        torch.set_num_threads(threads)


def _rows(section: Params) -> list[dict[str, float | int | str]]:
    base = stack(section)
    adapted = {arm: attach(arm, base, section) for arm in section.arms}
    calls = {arm: step(model, section) for arm, model in adapted.items()}
    settle = {"settle": calls["none"]}  # not read: it pays for the memory that the step before it, the release's, freed
    seconds = measurements.alternate(settle | calls, rounds=section.rounds)
    once = {arm: {"memory/step": measurements.peak_extra(call) / _MEGABYTE} for arm, call in calls.items()}
    for arm, peaks in factor_memory(adapted).items():
        once[arm] |= peaks
    once["nola_shared"] |= merging(base, adapted["nola_shared"], section.tokens)
    rows = []
    for index in range(section.rounds):
        spent = {arm: times[index] for arm, times in seconds.items()}
        shares = {arm: value - spent["none"] for arm, value in spent.items()}
        for arm in section.arms:
            row = {"arm": arm, "round": index, "bench/seconds": spent[arm], "bench/ratio": spent[arm] / spent["lora"]}
            row |= {"bench/share": shares[arm]} if arm != "none" else {}
            row |= {"bench/gain": shares["released"] / shares[arm]} if arm in DRAWN else {}
            rows.append(row | (once[arm] if index == 0 else {}))
    return rows


def stack(section: Params) -> GPT2Model:
    """The frozen stack in float32, in evaluation mode: matrices drawn by a seed, the rest as GPT-2 starts."""
    sizes = {"n_layer": section.layers, "n_embd": section.width, "n_head": section.heads, "n_positions": section.tokens}
    config = GPT2Config(**sizes, vocab_size=1, use_cache=False, bos_token_id=None, eos_token_id=None)
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


def config(arm: str, section: Params) -> PeftConfig:
    """An arm's adapter. PEFT's own adapt the fused matrix whole, NOLA its q and v columns each."""
    if arm == "lora":
        return LoraConfig(r=section.rank, target_modules=[TARGET], fan_in_fan_out=True)
    if arm == "vera":
        return VeraConfig(r=section.vera_rank, target_modules=[TARGET], fan_in_fan_out=True)
    options = {"cache_bytes": section.cache_bytes} | NOLA[arm]
    options["chunk_size"] = section.chunk_size if arm == CHUNKED else section.num_basis
    slices = {"target_modules": [TARGET], "fused_slices": {TARGET: ("q", "v")}}
    return NolaConfig(r=section.rank, num_basis=section.num_basis, nola_alpha=section.rank, **slices, **options)


def attach(arm: str, base: GPT2Model, section: Params) -> nn.Module:
    """A copy of the stack with the arm's adapter, on the weights of `base`.

    NOLA's coefficients are away from 0, as after a step: at 0, one factor of two would neither learn nor be built anew.
    """
    if arm == "none":
        return shared_copy(base)
    with torch.random.fork_rng(devices=[]):  # PEFT draws LoRA's start from the global generator
        model = get_peft_model(shared_copy(base), config(arm, section)).eval()
    for layer in nola_layers(model):
        for coefficients in layer.coefficients("default"):
            coefficients.data.fill_(1 / coefficients.shape[1])
    if arm == "released":
        draw_as_released(nola_layers(model))
    return model


def nola_layers(model: nn.Module) -> list[NolaLayer]:
    """The adapted layers, in order."""
    return [module for module in model.modules() if isinstance(module, NolaLayer)]


def step(model: nn.Module, section: Params) -> Callable[[], None]:
    """One step of AdamW on what trains, as a call: the loss is a fixed projection of the last hidden states."""
    source = seeding.generator(0, "inputs")
    inputs = torch.randn(1, section.tokens, section.width, generator=source).requires_grad_()
    direction = torch.randn(section.width, generator=source) / section.width
    weights = list(models.trainable(model).values())
    options = {"lr": section.learning_rate, "weight_decay": 0.0, "fused": True}
    optimiser = torch.optim.AdamW(weights, **options) if weights else None

    def call() -> None:
        for tensor in (inputs, *weights):
            tensor.grad = None
        (model(inputs_embeds=inputs).last_hidden_state @ direction).sum().backward()
        if optimiser:
            optimiser.step()

    return call


def factor_memory(adapted: dict[str, nn.Module]) -> dict[str, dict[str, float]]:
    """Peak memory of one factor, forward and backward, for each way to draw its bases, and as a share of WHOLE's."""
    peaks = {}
    for arm in DRAWN:
        call = _factor_passes(adapted[arm])
        call()  # threads and buffers that stay
        peaks[arm] = min(measurements.peak_extra(call) for _ in range(_REPEATS)) / _MEGABYTE
    return {arm: {"memory/factor": peak, "memory/share": peak / peaks[WHOLE]} for arm, peak in peaks.items()}


def _factor_passes(model: nn.Module) -> Callable[[], None]:
    """Forward and backward of the first factor of the first layer, its coefficients as after a step, as a call."""
    layer = nola_layers(model)[0]
    factor, coefficients = layer.nola_factors["default"][0], layer.coefficients("default")[0].detach()

    def call() -> None:
        fresh: Tensor = coefficients.clone().requires_grad_()
        factor(fresh).sum().backward()

    return call


def merging(base: GPT2Model, adapted: nn.Module, tokens: int) -> dict[str, float]:
    """How many modules, and operations of a forward pass, the merged stack has that the stack lacks, or lacks that it
    has. Merging writes into the weights, which all arms share: measure it last.
    """
    inputs = torch.zeros(1, tokens, base.config.n_embd)
    merged = adapted.merge_and_unload()
    return {
        "merged/modules": float(_differences(modules(base), modules(merged))),
        "merged/operations": float(_differences(operations(base, inputs), operations(merged, inputs))),
    }


def modules(model: nn.Module) -> Counter:
    """Each module's name and type."""
    return Counter((name, type(module).__name__) for name, module in model.named_modules())


def operations(model: nn.Module, inputs: torch.Tensor) -> Counter:
    """What torch's profiler records of a forward pass."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(inputs_embeds=inputs)
    return Counter(event.name for event in profile.events())


def _differences(one: Counter, other: Counter) -> int:
    return sum(((one - other) + (other - one)).values())


class _Regenerate(torch.autograd.Function):
    """sum_i c_i basis_i of each matrix, in float32; the backward draws the same bases a second time."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, coefficients: Tensor, sums: "ReleasedSums") -> Tensor:
        ctx.sums = sums
        rows = [row @ sums.bases(seed) for row, seed in zip(coefficients, sums.seeds, strict=True)]
        return torch.stack(rows).view(-1, *sums.shape)

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        sums = ctx.sums
        rows = [sums.bases(seed) @ row for row, seed in zip(grad.flatten(1), sums.seeds, strict=True)]
        return torch.stack(rows), None


class ReleasedSums:
    """One factor of the matrices of a layer, in the place of a `Factor` of ours: each matrix has a seed of its own."""

    def __init__(self, seeds: tuple[int, ...], shape: tuple[int, int], number: int):
        self.seeds, self.shape, self.number = seeds, shape, number

    def __call__(self, coefficients: Float[Tensor, "matrix basis"]) -> Float[Tensor, "matrix rows cols"]:
        """The factors. Gradient: to the coefficients."""
        return _Regenerate.apply(coefficients, self)

    def bases(self, seed: int) -> Float[Tensor, "basis size"]:
        """All bases of one matrix, drawn from the beginning."""
        bound = (self.shape[0] * self.shape[1]) ** -0.5
        source = torch.Generator(device="cpu").manual_seed(seed)
        return torch.empty(self.number, self.shape[0] * self.shape[1]).uniform_(-bound, bound, generator=source)


def draw_as_released(layers: list[NolaLayer], adapter_name: str = "default") -> None:
    """Let these layers draw their bases as the release does; all else of them stays."""
    seeds = iter(range(2**31))
    for layer in layers:
        factors = layer.nola_factors[adapter_name]
        layer.nola_factors[adapter_name] = tuple(
            ReleasedSums(tuple(next(seeds) for _ in f.streams), f.streams[0].shape, f.number) for f in factors
        )


if __name__ == "__main__":
    measurements.write("nola", "table_cost", measure, *sys.argv[1:])
