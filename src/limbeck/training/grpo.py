"""Learning from one's own completions: roll out, verify, score, one optimiser step; one record per step.

What is minimised is an argument, so every arm of a comparison is this loop. A step's loss is a sum of terms over all of
its completions, each with the weight that it has in the whole step, so neither the cut into micro-batches nor the
number of processes changes it: every process works on some rows, and gradients are added up.

Left out: a reference policy; filtering of groups with equal rewards, since there the teacher has most to say.
"""

from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from limbeck.training import resume
from limbeck.training.rollouts import Metrics, Problem, Rollout, Run, Scores, add_up, chunk, micro_batches

Terms = dict[str, Tensor]
Curve = dict[str, list[float]]
Objective = Callable[[int, Rollout], tuple[Callable[[Scores], Terms], Metrics]]
"""At a step, for its rollout: the terms of some rows, and numbers to log. The sum of all terms over all rows is
minimised; a term without gradient is only measured."""


def fit(
    run: Run,
    parameters: dict[str, nn.Parameter],
    problems: Sequence[Sequence[Problem]],
    objective: Objective,
    *,
    state: Path | None,
    measure: Callable[[], Metrics] | None = None,
) -> Generator[Metrics, None, Curve]:
    """Train on the problems of each step, one rollout per `next`; returns the curve.

    The curve holds a mean of every number per window of `save_every` steps, the window's largest gradient norm, as
    `optimiser/gradient_norm_max`, and what `measure` says at its end. There the run is saved to `state`, if there is
    one, and a later call with the same arguments goes on from it, on a CPU to the bit. AdamW at a constant rate, betas
    (0.9, 0.999), no weight decay, clipped gradients.
    """
    settings = run.settings
    optimiser = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True)
    saved = (state and resume.load(state, parameters, optimiser)) or {"step": 0, "curve": {}}
    curve: Curve = saved["curve"]
    window: list[Metrics] = []
    for step in range(saved["step"], len(problems)):
        rollout = run.roll(problems[step], step)
        terms, record = objective(step, rollout)
        record = rollout.metrics | record
        for update in range(settings.updates):
            split = update == 0 and step % settings.split_every == 0
            record |= _update(run, parameters, rollout, terms, optimiser, split=split)
        window.append(record)
        yield {"step": step + 1, "steps": len(problems), **record}
        if len(window) == settings.save_every or step + 1 == len(problems):
            for name in dict.fromkeys(name for entry in window for name in entry):
                values = [entry[name] for entry in window if name in entry]
                curve.setdefault(name, []).append(sum(values) / len(values))
            largest = {"optimiser/gradient_norm_max": max(entry["optimiser/gradient_norm"] for entry in window)}
            for name, value in (largest | (measure() if measure else {})).items():
                curve.setdefault(name, []).append(value)
            window = []
            if state:
                resume.save(state, parameters, optimiser, {"step": step + 1, "curve": curve})
    return curve


def _update(
    run: Run,
    parameters: dict[str, nn.Parameter],
    rollout: Rollout,
    terms: Callable[[Scores], Terms],
    optimiser: torch.optim.Optimizer,
    *,
    split: bool,
) -> Metrics:
    """One optimiser step on a rollout. With `split`, the gradient of each term apart: norms, and cosines."""
    weights = list(parameters.values())
    totals: Terms = {}
    gradients: dict[str, list[Tensor]] = {}
    optimiser.zero_grad(set_to_none=True)
    for rows in micro_batches(rollout, chunk(range(len(rollout.completions))), run.settings.micro_tokens):
        losses = terms(run.score(rollout, rows))
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + value.detach().double()
            if split and value.requires_grad:
                gradient = torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
                sums = gradients.setdefault(name, [torch.zeros_like(weight) for weight in weights])
                torch._foreach_add_(sums, list(gradient))
        torch.stack([value for value in losses.values() if value.requires_grad]).sum().backward()
    add_up([*totals.values(), *(part for parts in gradients.values() for part in parts)])
    add_up(weight.grad for weight in weights if weight.grad is not None)
    norm = nn.utils.clip_grad_norm_(weights, run.settings.clip_norm, error_if_nonfinite=True)
    optimiser.step()
    summed = {name: value.item() for name, value in totals.items()}
    return summed | {"optimiser/gradient_norm": norm.item()} | _compared(gradients)


def _compared(gradients: dict[str, list[Tensor]]) -> Metrics:
    """The norm of each term's gradient and, of two terms, their cosine."""
    flat = {name: torch.cat([part.flatten() for part in parts]) for name, parts in gradients.items()}
    metrics = {f"gradient/{name.removeprefix('loss/')}": vector.norm().item() for name, vector in flat.items()}
    if len(flat) == 2:
        metrics["gradient/cosine"] = torch.cosine_similarity(*flat.values(), dim=0).item()
    return metrics
