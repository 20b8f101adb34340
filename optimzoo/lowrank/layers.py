"""Linear layers whose weight is a low-rank product, alone or beside a sparse or a frozen part.

All have ``B`` [out, r], ``A`` [r, in] and a fixed ``scale`` s = alpha / r. With W the matrix that
the layer stands for and b an optional bias, y = x Wᵀ + b:

- :class:`LowRankLinear`: W = s B A (the "Low-Rank" of arXiv 2505.22922);
- :class:`SparseLowRankLinear`: W = s B A + S, S sparse on a fixed random support (SLTrain,
  arXiv 2406.02214);
- :class:`LoRALinear`: W = W₀ + s B A, W₀ frozen (LoRA, arXiv 2106.09685), with the merge of
  ReLoRA (arXiv 2307.05695).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optimzoo.lowrank.sparse import SparsePlusLowRank, dense_sum, index_dtype, random_support


def draw_uniform_(param: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill with U(-bound, bound), drawn on the CPU in float32: the same on every device and type.

    A tensor on ``meta`` is left alone, and nothing is drawn.
    """
    if not param.is_meta:
        draw = torch.empty(param.shape, dtype=torch.float32, device="cpu")
        param.copy_(draw.uniform_(-bound, bound, generator=generator))


class FactoredLinear(nn.Module):
    """Base class of the layers: the factors ``B`` [out, r] and ``A`` [r, in], scale and bias.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank: r, from 1 to min(in, out).
        alpha: the scale is s = alpha / r; the authors' 32 at rank 128 is s = 1/4.
        bias: whether the layer has a bias.
        device: device of the parameters; on ``meta`` nothing is drawn (`reset_parameters` later).
        dtype: dtype of the parameters.

    Raises:
        ValueError: a rank that the shape cannot have, an alpha that is not above zero.
    """

    was_conv1d = False  # made from a Conv1D of `transformers`, to which `merge` returns it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        alpha: float = 32.0,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        limit = min(out_features, in_features)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"rank is {rank}; for a {out_features} x {in_features} weight it must be from 1 "
                f"to {limit}"
            )
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}; it must be above 0")
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.scale = rank, alpha / rank
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.B = nn.Parameter(torch.empty(out_features, rank, **place))
        self.A = nn.Parameter(torch.empty(rank, in_features, **place))
        self.bias = nn.Parameter(torch.empty(out_features, **place)) if bias else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every parameter anew: bias as ``nn.Linear``, A and B by :meth:`reset_factors`."""
        self.reset_factors(generator)
        if self.bias is not None:
            draw_uniform_(self.bias, 1 / math.sqrt(self.in_features), generator)

    @torch.no_grad()
    def reset_factors(self, generator: torch.Generator | None = None) -> None:
        """Draw A as Kaiming-uniform with a = √5, which is U(±1/√in); B becomes zero."""
        draw_uniform_(self.A, 1 / math.sqrt(self.in_features), generator)
        self.B.zero_()

    @property
    def weight(self) -> Tensor:
        """Return W, the matrix that the layer stands for, [out, in]; computed at every access."""
        return (self.B * self.scale) @ self.A

    def extra_repr(self) -> str:
        """Return the shape as ``nn.Linear`` shows it, with rank and scale."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"scale={self.scale:g}, bias={self.bias is not None}"
        )


class LowRankLinear(FactoredLinear):
    """y = s (x Aᵀ) Bᵀ + b: a linear layer of rank r with r (out + in) weights.

    Both factors start as Kaiming-uniform with a = √5, that is U(±1/√r) for B and U(±1/√in) for A,
    as in the authors' code (B is not zero, since there is no other weight). Arguments and errors
    are those of :class:`FactoredLinear`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        super().__init__(in_features, out_features, rank, **options)
        self.reset_parameters()

    @torch.no_grad()
    def reset_factors(self, generator: torch.Generator | None = None) -> None:
        """Draw both factors."""
        super().reset_factors(generator)
        draw_uniform_(self.B, 1 / math.sqrt(self.rank), generator)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``s (x Aᵀ) Bᵀ + b`` for ``x`` of shape [..., in]."""
        return F.linear(F.linear(x, self.A) * self.scale, self.B, self.bias)


class SparseLowRankLinear(FactoredLinear):
    """SLTrain: y = x (s B A + S)ᵀ + b with S sparse, its support drawn once and kept.

    B starts at zero, A as U(±1/√in), the ``values`` of S as U(±1/√in), as in the authors' code.
    The support is the buffer ``indices``: sorted flat positions ``row · in + column``, int32 where
    out · in < 2³¹ (theirs are always int64). The forward multiplies with W, made for the moment;
    the backward makes it again, so that no tensor of W's size waits between the two.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        rank: r, from 1 to min(in, out).
        sparsity: share of the entries that S has, in (0, 1]; SLTrain's scripts: 0.03.
        **options: options of :class:`FactoredLinear`.

    Raises:
        ValueError: a rank, an alpha or a sparsity out of range.
    """

    indices: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        sparsity: float = 0.03,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, rank, **options)
        if not 0 < sparsity <= 1:
            raise ValueError(f"sparsity is {sparsity}; it is a share of the entries, in (0, 1]")
        positions = in_features * out_features
        count, device = max(1, round(sparsity * positions)), self.A.device
        self.values = nn.Parameter(torch.empty(count, device=device, dtype=self.A.dtype))
        empty = torch.empty(count, device=device, dtype=index_dtype(positions))
        self.register_buffer("indices", empty)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew, and the support."""
        super().reset_parameters(generator)
        if not self.indices.is_meta:
            positions = self.in_features * self.out_features
            self.indices.copy_(random_support(positions, self.indices.numel(), generator))
        draw_uniform_(self.values, 1 / math.sqrt(self.in_features), generator)

    @property
    def weight(self) -> Tensor:
        """Return W = s B A + S, [out, in]; computed at every access."""
        return dense_sum(self.B, self.A, self.values, self.indices, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x (s B A + S)ᵀ + b`` for ``x`` of shape [..., in]."""
        tensors = [x, self.B, self.A, self.values]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = [t.to(dtype) if t.dtype != torch.float64 else t for t in tensors]
        y: Tensor = SparsePlusLowRank.apply(*tensors, self.indices, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LoRALinear(FactoredLinear):
    """y = x W₀ᵀ + s (x Aᵀ) Bᵀ + b with W₀ (``frozen``, [out, in]) not trained.

    B starts at zero, so that the layer starts as its W₀; A as U(±1/√in). On its own it draws W₀ as
    ``nn.Linear`` does. Arguments and errors are those of :class:`FactoredLinear`.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, **options: Any) -> None:
        super().__init__(in_features, out_features, rank, **options)
        frozen = torch.empty(out_features, in_features, device=self.A.device, dtype=self.A.dtype)
        self.frozen = nn.Parameter(frozen, requires_grad=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew, W₀ too."""
        super().reset_parameters(generator)
        draw_uniform_(self.frozen, 1 / math.sqrt(self.in_features), generator)

    @property
    def weight(self) -> Tensor:
        """Return W = W₀ + s B A, [out, in]; computed at every access."""
        return torch.addmm(self.frozen, self.B, self.A, alpha=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W₀ᵀ + s (x Aᵀ) Bᵀ + b`` for ``x`` of shape [..., in]."""
        low = F.linear(F.linear(x, self.A) * self.scale, self.B)
        return F.linear(x, self.frozen, self.bias) + low

    @torch.no_grad()
    def merge_(self, generator: torch.Generator | None = None) -> None:
        """Restart as in ReLoRA: W₀ ← W₀ + s B A, A drawn anew, B = 0. The layer's output stays.

        The sum is made in float32 (float64 stays) and rounded once to W₀'s type.
        """
        exact = torch.promote_types(self.frozen.dtype, torch.float32)
        product = self.B.to(exact) @ self.A.to(exact)
        self.frozen.copy_(self.frozen.to(exact).add_(product, alpha=self.scale))
        self.reset_factors(generator)
