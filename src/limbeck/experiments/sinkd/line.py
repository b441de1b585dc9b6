"""Distributions on a line: what SinKD's two pictures of its motivation share."""

import torch
from torch import Tensor

from limbeck.losses import divergence, transport

ARMS = ("kl", "rkl", "js", "sinkhorn")
HALF_WIDTH = 10.0


def grid(bins: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The places of the bins, from -10 to 10."""
    return torch.linspace(-HALF_WIDTH, HALF_WIDTH, bins, dtype=dtype)


def log_mixture(places: Tensor, log_weights: Tensor, means: Tensor, deviations: Tensor) -> Tensor:
    """Log-probabilities over the places, [..., bins], of mixtures whose components lie on the last axis of the rest."""
    z = (places[:, None] - means[..., None, :]) / deviations[..., None, :]
    parts = -z.square() / 2 - deviations.log()[..., None, :] + log_weights[..., None, :]
    return parts.logsumexp(-1).log_softmax(-1)


def divergences(student: Tensor, teacher: Tensor, arm: str, epsilon: float, iterations: int) -> Tensor:
    """The arm's divergence of every student [..., bins] from the teacher [bins], from log-probabilities.

    `sinkhorn` is sample-wise, on the cost |x - x'| / (the grid's length), with the envelope gradient.
    """
    if arm == "sinkhorn":
        return transport.sample_index_cost_per_row(
            student.exp(),
            teacher.exp().expand_as(student),
            epsilon=epsilon,
            iterations=iterations,
            scale=1 / (len(teacher) - 1),
            gradient="envelope",
        )
    forms = {
        "kl": divergence.forward_kl_per_token,
        "rkl": divergence.reverse_kl_per_token,
        "js": divergence.jensen_shannon_per_token,
    }
    return forms[arm](student, teacher.expand_as(student))
