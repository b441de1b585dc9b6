"""Supervised training and distillation: AdamW, linear decay to 0 without warm-up, clipped gradients, resumable.

Betas (0.9, 0.999), eps 1e-8 and no weight decay, as in SinKD's released scripts. What is minimised is an argument.
"""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.training import resume

Terms = dict[str, Tensor]
Curve = dict[str, list[float]]


def fit(
    parameters: dict[str, nn.Parameter],
    loss: Callable[[Tensor], Terms],
    batches: Sequence[Tensor],
    *,
    learning_rate: float,
    clip_norm: float,
    state: Path | None,
    save_every: int,
    measure: Callable[[], dict[str, float]] | None = None,
) -> Generator[dict[str, float], None, Curve]:
    """Minimise the sum of the terms that `loss(rows)` returns, one optimiser step per `next`; returns the curve.

    The curve holds the mean of every term over windows of `save_every` steps, and what `measure` says after each. Then
    the run is saved to `state`, if there is one, and a later call with the same arguments goes on from there. Yields
    the step's terms and gradient norm.
    """
    optimiser = torch.optim.AdamW(parameters.values(), lr=learning_rate, weight_decay=0.0, fused=True)
    saved = (state and resume.load(state, parameters, optimiser)) or {"step": 0, "curve": {}}
    curve: Curve = saved["curve"]
    window: list[dict[str, float]] = []
    for step in range(saved["step"], len(batches)):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * (1 - step / len(batches))
        record = _step(parameters, loss(batches[step]), optimiser, clip_norm)
        window.append(record)
        yield {"step": step + 1, "steps": len(batches), **record}
        if len(window) == save_every or step + 1 == len(batches):
            means = {name: sum(r[name] for r in window) / len(window) for name in record}
            for name, value in (means | (measure() if measure else {})).items():
                curve.setdefault(name, []).append(value)
            window = []
            if state:
                resume.save(state, parameters, optimiser, {"step": step + 1, "curve": curve})
    return curve


def _step(
    parameters: dict[str, nn.Parameter], terms: Terms, optimiser: torch.optim.Optimizer, clip_norm: float
) -> dict[str, float]:
    optimiser.zero_grad(set_to_none=True)
    torch.stack(list(terms.values())).sum().backward()
    norm = nn.utils.clip_grad_norm_(parameters.values(), clip_norm, error_if_nonfinite=True)
    optimiser.step()
    return {name: term.item() for name, term in terms.items()} | {"optimiser/gradient_norm": norm.item()}


def gradient_norm(parameters: dict[str, nn.Parameter], value: Tensor) -> float:
    """The norm of d value / d parameters, in the units of `value` per parameter; no gradient is accumulated."""
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True, retain_graph=True)
    return torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt().item()
