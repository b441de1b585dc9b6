"""Sinkhorn by the book in float64: numpy loops for values, torch autograd through logsumexp for gradients."""

import numpy as np
import torch


def plan(cost, epsilon, iterations):
    """Divide rows, then columns, of the Gibbs kernel; every marginal of a square cost is one."""
    kernel = np.exp(-np.asarray(cost, dtype=np.float64) / epsilon)
    for _ in range(iterations):
        for i in range(kernel.shape[0]):
            kernel[i] /= kernel[i].sum()
        for j in range(kernel.shape[1]):
            kernel[:, j] /= kernel[:, j].sum()
    return kernel * (kernel.shape[0] / kernel.shape[1])


def cost(student, teacher, p):
    gaps = np.asarray(student)[:, None, :] - np.asarray(teacher)[None, :, :]
    return np.abs(gaps).sum(-1) if p == 1 else np.sqrt((gaps**2).sum(-1) + 1e-12)


def distance(student, teacher, epsilon=0.1, iterations=20, p=1):
    between = cost(student, teacher, p)
    return (plan(between, epsilon, iterations) * between).sum()


def marginal_plan(cost, rows, columns, epsilon, iterations):
    """u = r / (K v), v = c / (K^T u)."""
    kernel, v = np.exp(-np.asarray(cost) / epsilon), np.ones(len(columns))
    for _ in range(iterations):
        u = rows / (kernel @ v)
        v = columns / (kernel.T @ u)
    return u[:, None] * kernel * v[None, :]


def unrolled_distance(student, teacher, epsilon=0.1, iterations=20, p=1, envelope=False):
    """Batch-wise distance in torch, every step an ordinary operation: autograd gives the exact unrolled gradient."""
    between = (
        torch.cdist(student, teacher, p=float(p))
        if p == 1
        else (((student[:, None] - teacher) ** 2).sum(-1) + 1e-12) ** 0.5
    )
    log_kernel = -(between.detach() if envelope else between) / epsilon
    g = torch.zeros(len(teacher), dtype=student.dtype)
    for _ in range(iterations):
        f = -(log_kernel + g).logsumexp(1)
        g = -(log_kernel + f[:, None]).logsumexp(0)
    return ((log_kernel + f[:, None] + g).exp() * between).sum() * (len(student) / len(teacher))


def dual_value(cost, rows, columns, epsilon, iterations):
    """min <P, D> + epsilon KL(P | r c^T), at convergence."""
    best = marginal_plan(cost, rows, columns, epsilon, iterations)
    product = np.outer(rows, columns)
    return (best * cost).sum() + epsilon * (best * np.log(best / product) - best + product).sum()
