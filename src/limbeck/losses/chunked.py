"""Reverse KL from hidden states, where logits over the whole vocabulary for all tokens would not fit."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.losses.masking import Mask, Number, require_finite, require_mask, wide_dtype


class _ReverseKL(torch.autograd.Function):
    """The mean over tokens, and while each chunk's logits are there, the gradient of it. A side has one dtype."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, chunk: int) -> Tensor:
        """d KL / d logits = q (log q - log p - KL), row by row. Sums over chunks are in the dtype of the loss."""
        dtype = wide_dtype(hidden, teacher_hidden)
        to_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        to_head = torch.zeros_like(head, dtype=dtype) if ctx.needs_input_grad[1] else None
        total = hidden.new_zeros((), dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                student = _logprobs(hidden[rows], head, dtype)
                gap = _logprobs(teacher_hidden[rows], teacher_head, dtype).neg_().add_(student)
                probs = student.exp_()
                kl = torch.linalg.vecdot(probs, gap.masked_fill_(probs == 0, 0))[:, None]
                total += kl.sum()
                pull = gap.sub_(kl).mul_(probs).div_(len(hidden)).to(hidden.dtype)
                if to_hidden is not None:
                    torch.mm(pull, head, out=to_hidden[rows])
                if to_head is not None and pull.dtype == dtype:
                    to_head.addmm_(pull.T, hidden[rows])
                elif to_head is not None:
                    to_head += pull.T @ hidden[rows]
        ctx.save_for_backward(to_hidden, None if to_head is None else to_head.to(head.dtype))
        return total / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, times what comes in."""
        scaled = (None if x is None else x * grad for x in ctx.saved_tensors)
        return *scaled, None, None, None


def _matched(hidden: Tensor, head: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of their product: autocast's where it is on, which leaves float64 alone; else the wider one."""
    dtype, where = torch.promote_types(hidden.dtype, head.dtype), hidden.device.type
    if torch.is_autocast_enabled(where) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(where)
    elif not dtype.is_floating_point:
        dtype = torch.float32
    return hidden.to(dtype), head.to(dtype)


def _logprobs(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    logits = (hidden @ head.T).to(dtype)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def chunked_reverse_kl(
    student_hidden: Number[Tensor, "*rows width"],
    student_head: Number[Tensor, "vocab width"],
    teacher_hidden: Number[Tensor, "*rows teacher_width"],
    teacher_head: Number[Tensor, "vocab teacher_width"],
    *,
    mask: Mask[Tensor, "*rows"] | None = None,
    chunk: int = 64,
) -> Float[Tensor, ""]:
    """KL(student || teacher), exact over the vocabulary, mean over the kept rows, `chunk` rows at a time.

    `divergence.reverse_kl` of the logits hidden @ head^T (in autocast's dtype where it is on), without them: each
    chunk's gradient is taken while its logits exist, so nothing of size rows x vocabulary is ever held and no logit is
    computed twice.

    Units: nats a row. Gradient: to student_hidden and student_head; the teacher is detached. Of first order only.
    Memory: three chunks of logits, and the gradients. Raises ValueError for unequal rows or vocabularies, chunk < 1, an
    empty mask, or a loss that is not finite.
    """
    sides = (student_hidden, student_head), (teacher_hidden, teacher_head)
    fits = all(x.ndim and head.ndim == 2 and len(head) and x.shape[-1] == head.shape[-1] for x, head in sides)
    if not fits or student_hidden.shape[:-1] != teacher_hidden.shape[:-1] or len(student_head) != len(teacher_head):
        shapes = [tuple(x.shape) for side in sides for x in side]
        raise ValueError(f"received shapes {shapes}, expected the same rows and the same vocabulary on both sides")
    wide_dtype(student_hidden, student_head, teacher_hidden, teacher_head)  # refuses what has no product
    if chunk < 1:
        raise ValueError(f"received chunk {chunk}, expected at least 1")
    if mask is None:
        student, teacher = student_hidden[None].flatten(0, -2), teacher_hidden[None].flatten(0, -2)
    else:
        mask = require_mask(mask, student_hidden.shape[:-1])
        student, teacher = student_hidden[mask], teacher_hidden[mask]
    if not len(student):
        raise ValueError("received no selected row, expected at least one")
    sides = *_matched(student, student_head), *_matched(teacher.detach(), teacher_head.detach())
    return require_finite(_ReverseKL.apply(*sides, chunk))
