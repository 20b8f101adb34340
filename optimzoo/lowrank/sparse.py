"""Linear function whose weight is a low-rank product plus a sparse matrix, and is not kept."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def index_dtype(positions: int) -> torch.dtype:
    """Return int32 if the flat positions of a matrix fit, else int64."""
    return torch.int32 if positions < 2**31 else torch.int64


def random_support(positions: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw ``count`` different positions below ``positions`` uniformly on the CPU, sorted."""
    dtype = index_dtype(positions)
    drawn = torch.randperm(positions, generator=generator, dtype=dtype, device="cpu")[:count]
    return drawn.sort().values


def dense_sum(B: Tensor, A: Tensor, values: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Return W = scale · B A + S, where S has ``values`` at the flat positions ``indices``."""
    weight = (B * scale) @ A
    # Flat and in place: the product is ours alone, and no second matrix of its size is made.
    weight.view(-1).index_add_(0, indices, values.to(weight.dtype))
    return weight


class SparsePlusLowRank(torch.autograd.Function):
    """Product x (s B A + S)ᵀ; x, A, B and S's values are kept for the backward, W is recomputed.

    With g the gradient of the output and G = gᵀ x the one of W::

        dx = g W        dB = s G Aᵀ        dA = s Bᵀ G        dvalues = G[indices]
    """

    @staticmethod
    def forward(
        x: Tensor, B: Tensor, A: Tensor, values: Tensor, indices: Tensor, scale: float
    ) -> Tensor:
        """Return the product; all tensors have one dtype."""
        return F.linear(x, dense_sum(B, A, values, indices, scale))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the inputs for the backward."""
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are needed; W and G are made in turn, never both at once."""
        x, B, A, values, indices = ctx.saved_tensors
        dx = dB = dA = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = grad @ dense_sum(B, A, values, indices, ctx.scale)
        if any(ctx.needs_input_grad[1:4]):
            G = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
            dvalues = G.view(-1).index_select(0, indices)
            dB, dA = ctx.scale * (G @ A.mT), ctx.scale * (B.mT @ G)
        return dx, dB, dA, dvalues, None, None
