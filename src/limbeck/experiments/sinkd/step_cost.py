"""What a step of each loss costs, forward and backward: ours, the plain recipe, POT's and geomloss's, and KL.

`fallback` is ours as it runs without numba. `recipe` is SinKD's loss as one would first write it: torch.cdist, and
logsumexp iterations under autograd. POT runs the same number of iterations, without its stopping test, and ends on
rows. geomloss anneals epsilon instead of iterating a fixed number of times: the same cost and final epsilon, another
algorithm. Where classes are few, a training step of `table_encoder`'s student is timed beside them. Run by
`make bench` only.
"""

import sys
from collections.abc import Callable
from unittest import mock

import ot
import pandas as pd
import torch
from geomloss import SamplesLoss
from torch import Tensor

from limbeck import measurements, models, params, seeding
from limbeck.experiments.sinkd import arms, comparison, distillation
from limbeck.losses import divergence, manhattan, transport

SHAPES = {"smoke": ((8, 3),), "bench": ((32, 3), (32, 17), (256, 1000), (32, 30522), (256, 8000))}
ROUNDS = {"smoke": 1, "bench": 15}
EPSILON, ITERATIONS, TEMPERATURE = 0.1, 20, 2.0  # released code
THREADS, FEW, TOKENS = 2, 17, 16


def measure(profile: str) -> pd.DataFrame:
    """One row per shape, loss and round, each with its seconds, their ratio to KL's, and the share of a training step
    that it takes beyond KL (where a step was timed); ratio and share are within the round.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return pd.DataFrame([row for shape in SHAPES[profile] for row in _rows(*shape, ROUNDS[profile])])
    finally:
        torch.set_num_threads(threads)


def _rows(batch: int, classes: int, rounds: int) -> list[dict[str, float | int | str]]:
    calls = losses(batch, classes) | ({"step": step(batch, classes)} if classes <= FEW else {})
    seconds = measurements.alternate(calls, rounds=rounds)
    rows = []
    for name, rounds_of_loss in seconds.items():
        for index, (loss, kl) in enumerate(zip(rounds_of_loss, seconds["kl"], strict=True)):
            row = {"batch": batch, "classes": classes, "loss": name, "round": index}
            row |= {"bench/seconds": loss, "bench/ratio": loss / kl}
            if "step" in seconds:
                row["bench/share"] = (loss - kl) / seconds["step"][index]
            rows.append(row)
    return rows


def step(batch: int, classes: int) -> Callable[[], object]:
    """Forward and backward of cross-entropy through `table_encoder`'s student on texts of the median length."""
    section = params.load("sinkd", "table_encoder", "default", comparison.Params)
    student = distillation.pretrained(section.setup.model, classes=classes, seed=0, student=section.students[0])
    weights = list(models.trainable(student).values())
    ids = torch.arange(1000, 1000 + batch * TOKENS).reshape(batch, TOKENS)
    labels = torch.arange(batch) % classes
    return lambda: torch.autograd.grad(arms.cross_entropy(student(ids).logits, labels), weights, allow_unused=True)


def losses(batch: int, classes: int) -> dict[str, Callable[[], Tensor]]:
    """Each loss as a call that returns the gradient with respect to the same student logits."""
    source = seeding.generator(0, "bench", batch, classes)
    student = torch.randn(batch, classes, generator=source).mul_(2).requires_grad_()
    teacher = torch.randn(batch, classes, generator=source).mul_(2)
    target = (teacher / TEMPERATURE).softmax(-1)
    geometry = SamplesLoss(
        "sinkhorn", p=1, blur=EPSILON, debias=False, cost=lambda x, y: torch.cdist(x, y, p=1), backend="tensorized"
    )

    def gradient(loss: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        return lambda: torch.autograd.grad(loss((student / TEMPERATURE).softmax(-1)), student)[0]

    def with_pot(probs: Tensor) -> Tensor:
        cost, mass = torch.cdist(probs, target, p=1), torch.full((batch,), 1 / batch)
        options = {"numItermax": ITERATIONS, "stopThr": 0, "warn": False}
        return batch * ot.sinkhorn2(mass, mass, cost, EPSILON, method="sinkhorn_log", **options)

    def ours(probs: Tensor) -> Tensor:
        return transport.sinkhorn_distance(probs, target, epsilon=EPSILON, iterations=ITERATIONS)

    def fallback() -> Tensor:
        with mock.patch.object(manhattan, "_kernels", lambda: None):
            return gradient(ours)()

    return {
        "kl": lambda: torch.autograd.grad(divergence.forward_kl(student, teacher), student)[0],
        "sinkhorn": gradient(ours),
        "fallback": fallback,
        "recipe": gradient(lambda probs: recipe(probs, target)),
        "pot": gradient(with_pot),
        "geomloss": gradient(lambda probs: batch * geometry(probs, target)),
    }


def recipe(student_probs: Tensor, teacher_probs: Tensor) -> Tensor:
    """SinKD's loss, plainly: cdist, then rows and columns in turn by logsumexp."""
    cost = torch.cdist(student_probs, teacher_probs, p=1)
    log_plan = -cost / EPSILON
    for _ in range(ITERATIONS):
        log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
    return (log_plan.exp() * cost).sum()


if __name__ == "__main__":
    measurements.write("sinkd", "table_cost", measure, *sys.argv[1:])
