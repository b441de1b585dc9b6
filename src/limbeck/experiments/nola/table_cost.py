"""What a step of each adapter costs: time and memory, on the layers of a GPT-2 M, forward, backward and optimiser.

PEFT's LoRA and VeRA; NOLA with bases that all matrices share, with bases of their own that stay in memory, that are
drawn again, all of a factor at once or a few at a time, and drawn again as the first official release does
(`cost_released`). The stack without an adapter is timed beside them, so that what an adapter adds can be told. Merged,
NOLA has to leave the modules and the operations of the stack alone. Run by `make bench` only.
"""

from collections import Counter
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from transformers import GPT2Model

from limbeck import measurements, params
from limbeck.experiments.nola import cost_stack

SECTIONS = {"smoke": "tiny", "bench": "bench"}  # profile: section of params/nola.yaml
WHOLE = "nola_regenerated"  # the arm whose memory and draws others are compared with
DRAWN = (WHOLE, "nola_chunked", "released")
_MEGABYTE = 1e6
_REPEATS = 3  # of a peak, of which the lowest counts: a heap in pieces may raise one
Rows = dict[str, dict[str, float]]


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
        """Check what no type can."""
        params.positive(layers=self.layers, rounds=self.rounds, threads=self.threads, tokens=self.tokens)
        for arm in self.arms:
            params.one_of("arm", arm, cost_stack.ARMS)
        if missing := sorted({"none", "lora", "nola_shared", *DRAWN} - set(self.arms)):
            raise ValueError(f"received arms without {', '.join(missing)}, which others are compared with")


def measure(profile: str) -> pd.DataFrame:
    """One row an arm and round: seconds, their ratio to LoRA's, what the adapter adds to the stack's own step, and how
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
    base = start(section)
    arms = {arm: attach(arm, base, section) for arm in section.arms}
    size = {"tokens": section.tokens, "width": section.width, "learning_rate": section.learning_rate}
    calls = {arm: cost_stack.step(model, **size) for arm, model in arms.items()}
    settle = {"settle": calls["none"]}  # not read: it pays for the memory that the step before it, the release's, freed
    seconds = measurements.alternate(settle | calls, rounds=section.rounds)
    once = {arm: {"memory/step": measurements.peak_extra(call) / _MEGABYTE} for arm, call in calls.items()}
    for arm, found in drawing(arms).items():
        once[arm] |= found
    once["nola_shared"] |= merging(base, arms["nola_shared"], section.tokens)
    rows = []
    for index in range(section.rounds):
        spent = {arm: found[index] for arm, found in seconds.items()}
        shares = {arm: value - spent["none"] for arm, value in spent.items()}
        for arm in section.arms:
            row = {"arm": arm, "round": index, "bench/seconds": spent[arm], "bench/ratio": spent[arm] / spent["lora"]}
            row |= {"bench/share": shares[arm]} if arm != "none" else {}
            row |= {"bench/gain": shares["released"] / shares[arm]} if arm in DRAWN else {}
            rows.append(row | (once[arm] if index == 0 else {}))
    return rows


def start(section: Params) -> GPT2Model:
    """The stack of the section."""
    sizes = {name: getattr(section, name) for name in ("layers", "width", "heads", "tokens")}
    return cost_stack.stack(**sizes)


def attach(arm: str, base: GPT2Model, section: Params) -> nn.Module:
    """The stack with the section's adapter of an arm."""
    names = ("rank", "num_basis", "chunk_size", "cache_bytes", "vera_rank")
    return cost_stack.attach(arm, base, cost_stack.config(arm, **{name: getattr(section, name) for name in names}))


def drawing(arms: dict[str, nn.Module]) -> Rows:
    """Peak memory of one factor, forward and backward, for each way to draw its bases, and as a share of WHOLE's."""
    found = {}
    for arm in DRAWN:
        call = cost_stack.factor_passes(arms[arm])
        call()  # threads and buffers that stay
        found[arm] = min(measurements.peak_extra(call) for _ in range(_REPEATS)) / _MEGABYTE
    return {arm: {"memory/factor": peak, "memory/share": peak / found[WHOLE]} for arm, peak in found.items()}


def merging(base: GPT2Model, adapted: nn.Module, tokens: int) -> dict[str, float]:
    """How many modules, and operations of a forward pass, the merged stack has that the stack lacks, or lacks that it
    has. Merging writes into the weights, which all arms share: measure it last.
    """
    inputs = torch.zeros(1, tokens, base.config.n_embd)
    merged = adapted.merge_and_unload()
    return {
        "merged/modules": float(_differ(modules(base), modules(merged))),
        "merged/operations": float(_differ(operations(base, inputs), operations(merged, inputs))),
    }


def modules(model: nn.Module) -> Counter:
    """Each module's name and type."""
    return Counter((name, type(module).__name__) for name, module in model.named_modules())


def operations(model: nn.Module, inputs: torch.Tensor) -> Counter:
    """What torch's profiler records of a forward pass."""
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model(inputs_embeds=inputs)
    return Counter(event.name for event in profile.events())


def _differ(left: Counter, right: Counter) -> int:
    return sum(((left - right) + (right - left)).values())
