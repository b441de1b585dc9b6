"""The L1 distances between two batches of points: the values and gradients of `torch.cdist(p=1)`, sooner.

cdist reduces one pair at a time without using the vector unit well. Large float32 problems on the CPU go through two
kernels that numba compiles at the first of them, where numba is installed. All others take torch's operations, a block
of students and classes against all teachers at a time, and cdist's own backward, which is good where batches are small.

Each element of a result is summed by one thread in one order, so the number of threads does not change a bit of it.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import no_type_check

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from limbeck.losses.masking import wide

WIDTH, BLOCK = 2048, 2**20  # torch: classes at a time, and elements in all of the temporary, 4 MB in float32
CHUNK = 512  # kernels: classes at a time, so that some hundred rows fit the second cache
WORTH = 2**23  # students x teachers x classes from which on the kernels pay for their threads
SHARE = 2**26  # of these for each thread; for less, its wait for torch's own, which spin for a while, costs more
ZERO = np.float32(0)


@no_type_check
def _distances(cost, student, teacher):
    """cost_ij += sum_k |student_ik - teacher_jk|, a chunk of classes at a time, for j in fours: each saves a load."""
    for start in range(0, student.shape[1], CHUNK):
        for j in range(0, len(teacher), 4):
            b, c = teacher[j, start : start + CHUNK], teacher[j + 1, start : start + CHUNK]
            d, e = teacher[j + 2, start : start + CHUNK], teacher[j + 3, start : start + CHUNK]
            for i in range(len(student)):
                a = student[i, start : start + CHUNK]
                g = h = u = v = ZERO
                for k in range(len(a)):
                    g += abs(a[k] - b[k])
                    h += abs(a[k] - c[k])
                    u += abs(a[k] - d[k])
                    v += abs(a[k] - e[k])
                cost[i, j] += g
                cost[i, j + 1] += h
                cost[i, j + 2] += u
                cost[i, j + 3] += v


@no_type_check
def _signs(pull, grad, x, y):
    """pull_ik = sum_j grad_ij sign(x_ik - y_jk), where sign(0) = 0, for j in fours: each saves a load and a store."""
    for start in range(0, x.shape[1], CHUNK):
        pull[:, start : start + CHUNK] = ZERO
        for j in range(0, len(y), 4):
            b, c = y[j, start : start + CHUNK], y[j + 1, start : start + CHUNK]
            d, e = y[j + 2, start : start + CHUNK], y[j + 3, start : start + CHUNK]
            for i in range(len(x)):
                a, out = x[i, start : start + CHUNK], pull[i, start : start + CHUNK]
                g, h, u, v = grad[i, j], grad[i, j + 1], grad[i, j + 2], grad[i, j + 3]
                for k in range(len(a)):
                    out[k] += (
                        ((g if a[k] > b[k] else ZERO) - (g if a[k] < b[k] else ZERO))
                        + ((h if a[k] > c[k] else ZERO) - (h if a[k] < c[k] else ZERO))
                        + ((u if a[k] > d[k] else ZERO) - (u if a[k] < d[k] else ZERO))
                        + ((v if a[k] > e[k] else ZERO) - (v if a[k] < e[k] else ZERO))
                    )


def _require_exact(distances: Callable, signs: Callable) -> None:
    """Raise ValueError where the kernels differ from torch on quarters, whose sums are exact in any order."""
    x, y = (((torch.arange(rows * 521) * step) % 23 / 4).view(rows, 521) for rows, step in ((3, 7), (4, 5)))
    gaps, grad = x[:, None] - y, torch.arange(12.0).view(3, 4) / 4 - 1
    cost, pull = torch.zeros(3, 4), torch.empty(3, 521)
    distances(cost.numpy(), x.numpy(), y.numpy())
    signs(pull.numpy(), grad.numpy(), x.numpy(), y.numpy())
    for name, found, expected in (
        ("distances", cost, gaps.abs().sum(2)),
        ("signs", pull, (grad[..., None] * gaps.sign()).sum(1)),
    ):
        if not torch.equal(found, expected):
            off = (found - expected).abs().max()
            raise ValueError(
                f"received {name} off by {off} from the kernel that numba compiled, expected torch's; "
                "take another version of numba, or none"
            )


@functools.cache
def _kernels() -> tuple[Callable, Callable] | None:
    """Both kernels compiled and checked, or None without numba, which takes too long to import before it is needed."""
    try:
        from numba import njit  # noqa: PLC0415
    except ImportError:
        return None
    # Reassociation only, for the sum to use the vector unit: NaN and infinity keep their meaning.
    kernels = njit(nogil=True, fastmath={"reassoc"})(_distances), njit(nogil=True)(_signs)
    _require_exact(*kernels)
    return kernels


def _pays(student: Tensor, teacher: Tensor) -> bool:
    large = len(student) * teacher.numel() >= WORTH
    return large and student.dtype == torch.float32 and student.device.type == "cpu" and _kernels() is not None


def _fours(rows: Tensor) -> Tensor:
    """The rows, with some of 0 after them where their number is not a multiple of four."""
    spare = -len(rows) % 4
    return pad(rows, (0, 0, 0, spare)) if spare else rows


def _by_rows(kernel: Callable, rows: tuple[Tensor, ...], whole: Tensor) -> None:
    """The kernel on parts of the rows side by side, on torch's number of threads at most: it frees the interpreter."""
    arrays, shared = [tensor.detach().numpy() for tensor in rows], whole.detach().numpy()
    threads = min(torch.get_num_threads(), max(1, len(rows[0]) * whole.numel() // SHARE))
    first, *others = zip(*(np.array_split(array, threads) for array in arrays), strict=True)
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(kernel, *part, shared) for part in others]
        kernel(*first, shared)
        for part in running:
            part.result()


def _summed(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_k |student_ik - teacher_jk| by torch's operations."""
    cost = student.new_zeros(len(student), len(teacher))
    width = min(WIDTH, student.shape[1])
    block = min(len(student), max(1, BLOCK // (len(teacher) * width)))
    buffer = student.new_empty(block * len(teacher) * width)
    for s, t in zip(student.split(width, 1), teacher.split(width, 1), strict=True):
        for rows, out in zip(s.split(block), cost.split(block), strict=True):
            gaps = buffer[: rows.numel() * len(t)].view(len(rows), *t.shape)
            out.add_(torch.sub(rows[:, None], t, out=gaps).abs_().sum(2))
    return cost


def _pull(grad: Tensor, x: Tensor, y: Tensor, cost: Tensor) -> Tensor:
    """sum_j grad_ij sign(x_ik - y_jk): what reaches x."""
    if not _pays(x, y):
        return torch.ops.aten._cdist_backward(grad.contiguous(), x, y, 1.0, cost.contiguous())
    pull = torch.empty_like(x)
    y = _fours(y)
    grad = pad(grad, (0, len(y) - grad.shape[1])).contiguous()  # rows that make up the fours have no weight
    _by_rows(_kernels()[1], (pull, grad, x), y)
    return pull


class Manhattan(torch.autograd.Function):
    """[students, classes], [teachers, classes] -> [students, teachers]; gradient to both, 0 at ties."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor) -> Tensor:
        """The distances, in float32 or wider."""
        student, teacher = (x.contiguous() for x in wide(student, teacher))
        if _pays(student, teacher):
            fours = _fours(teacher)
            cost = student.new_zeros(len(student), len(fours))
            _by_rows(_kernels()[0], (cost, student), fours)
            cost = cost[:, : len(teacher)].contiguous()
        else:
            cost = _summed(student, teacher)
        ctx.save_for_backward(student, teacher, cost)
        return cost

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """To whichever of the two asks for it."""
        student, teacher, cost = ctx.saved_tensors
        to_student, to_teacher = ctx.needs_input_grad
        return (
            _pull(grad, student, teacher, cost) if to_student else None,
            _pull(grad.t(), teacher, student, cost.t()) if to_teacher else None,
        )
