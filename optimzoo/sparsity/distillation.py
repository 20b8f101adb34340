"""Knowledge distillation from the dense model, without a second tensor of the logits' size."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a position that does not count, as in torch's cross-entropy


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    eta: float = 1 / 3,
    *,
    chunk: int = 256,
) -> Tensor:
    """Return ``η KL(teacher ‖ student) + (1 − η) CE(student, labels)``, averaged over the labels.

    Softmaxes are taken in float32 at least, `chunk` positions at a time. Beside the two logits it
    holds one tensor of the student's logits' size and dtype, the gradient, made in the forward.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_logits: logits of the same shape; they get no gradient.
        labels: ``[...]``, the token that each position is to predict (shift them yourself); -100
            leaves a position out of both terms. Without any label the loss is 0.
        eta: η, from 0 (cross-entropy alone) to 1; 1/3 in the paper's LLaMA runs.
        chunk: positions at a time.

    Raises:
        ValueError: shapes that do not fit, a label outside the vocabulary, eta outside [0, 1].

    Source: arXiv 2509.25996, Eq. 13; temperature 1.
    """
    _check(student_logits.shape, teacher_logits.shape, labels, eta, chunk)
    loss: Tensor = _FromLogits.apply(
        student_logits.flatten(0, -2), teacher_logits.flatten(0, -2), labels.flatten(), eta, chunk
    )
    return loss


def linear_distillation_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    labels: Tensor,
    eta: float = 1 / 3,
    *,
    chunk: int = 256,
) -> Tensor:
    """Return :func:`distillation_loss` from hidden states and heads, without whole logits.

    Args:
        student: its last hidden state ``[..., d]`` and its head's weight ``[vocab, d]``.
        teacher: the same of the teacher (its d may differ); they get no gradient.
        labels: see :func:`distillation_loss`.
        eta: see :func:`distillation_loss`.
        chunk: positions whose logits are held at a time.

    Raises:
        ValueError: see :func:`distillation_loss`.
    """
    (hidden, head), (other, other_head) = student, teacher
    shapes = [(*h.shape[:-1], w.shape[0]) for h, w in (student, teacher)]
    _check(shapes[0], shapes[1], labels, eta, chunk)
    loss: Tensor = _FromHidden.apply(
        hidden.flatten(0, -2),
        head,
        other.flatten(0, -2),
        other_head,
        labels.flatten(),
        eta,
        chunk,
    )
    return loss


def _check(
    student: Sequence[int], teacher: Sequence[int], labels: Tensor, eta: float, chunk: int
) -> None:
    if student != teacher or tuple(student[:-1]) != labels.shape:
        raise ValueError(
            f"student {list(student)}, teacher {list(teacher)} and labels "
            f"{list(labels.shape)} do not fit; they are [..., vocab] twice and [...]"
        )
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"Invalid eta: {eta}; it must be in [0, 1]")
    if chunk < 1:
        raise ValueError(f"Invalid chunk: {chunk}; it must be at least 1")
    counted = labels[labels != IGNORED]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < student[-1]:
        raise ValueError(
            f"labels go from {int(counted.min())} to {int(counted.max())}; they must be in "
            f"[0, {student[-1]}), or {IGNORED} where there is none"
        )


def _losses(student: Tensor, teacher: Tensor, labels: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Return the sum of some positions' losses, and its gradient in the student's logits."""
    wide = torch.promote_types(student.dtype, torch.float32)
    counts = (labels != IGNORED).unsqueeze(-1)
    index = labels.clamp_min(0).unsqueeze(-1)
    log_p = student.to(wide).log_softmax(-1)
    log_q = teacher.to(wide).log_softmax(-1)
    q = log_q.exp()
    # xlogy's rule, 0 log 0 = 0, for a teacher with logits of -inf.
    divergence = torch.where(q > 0, q * (log_q - log_p), 0).sum(-1, keepdim=True)
    likelihood = log_p.gather(-1, index)
    loss = torch.where(counts, eta * divergence - (1 - eta) * likelihood, 0).sum()
    grad = log_p.exp_().sub_(q, alpha=eta)
    grad.scatter_add_(-1, index, torch.full_like(likelihood, eta - 1))
    return loss, grad.mul_(counts)


class _FromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, eta: float, chunk: int
    ) -> Tensor:
        total = student.new_zeros((), dtype=torch.promote_types(student.dtype, torch.float32))
        grad = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        number = (labels != IGNORED).sum().clamp_min(1)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            loss, slope = _losses(student[part], teacher[part], labels[part], eta)
            total += loss
            if grad is not None:
                grad[part] = slope
        ctx.save_for_backward(grad)
        ctx.number, ctx.chunk = number, chunk
        return total / number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        (slope,) = ctx.saved_tensors
        # In float16 a loss scale is infinite, and a slope over the number of labels underflows.
        factor, grad = grad_loss / ctx.number, torch.empty_like(slope)
        for start in range(0, len(slope), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad[part] = slope[part].to(factor.dtype) * factor
        return grad, None, None, None, None


class _FromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        other: Tensor,
        other_head: Tensor,
        labels: Tensor,
        eta: float,
        chunk: int,
    ) -> Tensor:
        wide = torch.promote_types(head.dtype, torch.float32)
        total = head.new_zeros((), dtype=wide)
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head, dtype=wide)  # a sum over the chunks
        number = (labels != IGNORED).sum().clamp_min(1)
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            student = hidden[part] @ head.mT
            loss, slope = _losses(student, other[part] @ other_head.mT, labels[part], eta)
            total += loss
            slope = slope.to(student.dtype)
            grad_hidden[part] = (slope @ head.to(slope.dtype)).to(hidden.dtype)
            grad_head += slope.mT @ hidden[part].to(slope.dtype)
        grad_head /= number
        if head.dtype != torch.float16:  # which does not hold it before the loss scale
            grad_head = grad_head.to(head.dtype)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.number, ctx.dtype = number, head.dtype
        return total / number

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        grad_hidden, grad_head = ctx.saved_tensors
        factor = grad_loss / ctx.number
        grad_hidden = (grad_hidden.to(factor.dtype) * factor).to(grad_hidden.dtype)
        grad_head = (grad_head * grad_loss.to(grad_head.dtype)).to(ctx.dtype)
        return (grad_hidden, grad_head, None, None, None, None, None)
