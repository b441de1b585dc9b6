"""Reverse KL from hidden states, where logits over the whole vocabulary for all tokens would not fit."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from limbeck.losses.masking import require_finite, require_mask


class _ReverseKL(torch.autograd.Function):
    """The mean over tokens, and while each chunk's logits are there, the gradient of it."""

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor, chunk: int) -> Tensor:
        """d KL / d logits = q (log q - log p - KL), row by row."""
        to_hidden, to_head = (
            torch.zeros_like(x) if needed else None
            for x, needed in zip((hidden, head), ctx.needs_input_grad[:2], strict=True)
        )
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            student, teacher = _logprobs(hidden[rows], head), _logprobs(teacher_hidden[rows], teacher_head)
            gap = teacher.neg_().add_(student)
            probs = student.exp_()
            kl = torch.linalg.vecdot(probs, gap)[:, None]
            total += kl.sum()
            pull = gap.sub_(kl).mul_(probs).div_(len(hidden)).to(hidden.dtype)
            if to_hidden is not None:
                torch.mm(pull, head, out=to_hidden[rows])
            if to_head is not None:
                to_head.addmm_(pull.T, hidden[rows])
        ctx.save_for_backward(to_hidden, to_head)
        return total / len(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the forward pass, times what comes in."""
        scaled = (None if x is None else x * grad.to(x.dtype) for x in ctx.saved_tensors)
        return *scaled, None, None, None


def _logprobs(hidden: Tensor, head: Tensor) -> Tensor:
    logits = (hidden @ head.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.sub_(logits.logsumexp(-1, keepdim=True))


def chunked_reverse_kl(
    student_hidden: Float[Tensor, "*rows width"],
    student_head: Float[Tensor, "vocab width"],
    teacher_hidden: Float[Tensor, "*rows teacher_width"],
    teacher_head: Float[Tensor, "vocab teacher_width"],
    *,
    mask: Bool[Tensor, "*rows"] | None = None,
    chunk: int = 64,
) -> Float[Tensor, ""]:
    """KL(student || teacher), exact over the vocabulary, mean over the kept rows, `chunk` rows at a time.

    `divergence.reverse_kl` of the logits hidden @ head^T, without them: each chunk's gradient is taken while its logits
    exist, so nothing of size rows x vocabulary is ever held and no logit is computed twice.

    Units: nats a row. Gradient: to student_hidden and student_head; the teacher is detached. Of first order only.
    Memory: three chunks of logits, and the gradients. Raises ValueError for unequal rows or vocabularies, chunk < 1, an
    empty mask, or a loss that is not finite.
    """
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1] or len(student_head) != len(teacher_head):
        shapes = [tuple(x.shape) for x in (student_hidden, student_head, teacher_hidden, teacher_head)]
        raise ValueError(f"received shapes {shapes}, expected the same rows and the same vocabulary on both sides")
    if chunk < 1:
        raise ValueError(f"received chunk {chunk}, expected at least 1")
    if mask is None:
        student, teacher = student_hidden.flatten(0, -2), teacher_hidden.flatten(0, -2)
    else:
        require_mask(mask, student_hidden[..., 0])
        student, teacher = student_hidden[mask], teacher_hidden[mask]
    if not len(student):
        raise ValueError("received no selected row, expected at least one")
    return require_finite(_ReverseKL.apply(student, student_head, teacher.detach(), teacher_head.detach(), chunk))
