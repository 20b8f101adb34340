"""Report on a model's way to N:M: zeros, flips of the masks, size of the masked weights."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from optimzoo.sparsity.masks import pack, unpack
from optimzoo.sparsity.pruning import MaskedWeight, masked_weights

LARGE = 1e-3  # of the kept median: what is below it, pruning does not change


@dataclass(frozen=True)
class WeightReport:
    """Report on one sparse weight.

    Attributes:
        name: its name in the model.
        weights: its number of elements.
        zeros: how many are exactly 0.
        flips: how many mask bits differ from the previous report's.
        kept_median: the kept weights' median magnitude.
        masked_mean: the masked weights' mean magnitude, in units of `kept_median`.
        masked_max: their largest, likewise.
        masked_large: how many of them are above 1e-3 `kept_median`.
    """

    name: str
    weights: int
    zeros: int
    flips: int
    kept_median: float
    masked_mean: float
    masked_max: float
    masked_large: int


@dataclass(frozen=True)
class SparsityReport:
    """Report on a model's way to N:M, weight by weight and in total.

    Attributes:
        weights: one record per sparse weight.
        masks: the packed masks by name, for the next report to count the flips since this one.
    """

    weights: list[WeightReport]
    masks: dict[str, Tensor] = field(repr=False)

    def total(self) -> dict[str, float]:
        """Return shares of zeros, flips, large masked weights; mean and largest masked size."""
        count = sum(w.weights for w in self.weights) or 1
        means = sum(w.masked_mean * w.weights for w in self.weights)
        return {
            "zeros": sum(w.zeros for w in self.weights) / count,
            "flips": sum(w.flips for w in self.weights) / count,
            "masked_large": sum(w.masked_large for w in self.weights) / count,
            "masked_mean": means / count,
            "masked_max": max((w.masked_max for w in self.weights), default=0.0),
        }

    def __str__(self) -> str:
        lines = [f"{'zeros':>7}{'flips':>8}{'masked/kept: mean':>19}{'max':>10}  weight"]
        for w in self.weights:
            lines.append(
                f"{w.zeros / w.weights:>7.1%}{w.flips:>8}{w.masked_mean:>19.2e}"
                f"{w.masked_max:>10.2e}  {w.name}"
            )
        return "\n".join(lines)


@torch.no_grad()
def report(
    model: nn.Module, optimizer: Optimizer, previous: SparsityReport | None = None
) -> SparsityReport:
    """Measure the weights of ``model`` that ``optimizer`` keeps masks of.

    Args:
        model: any module.
        optimizer: AdamS, or another whose state has masks (:func:`masked_weights`).
        previous: an earlier report; the flips since then are counted.

    Raises:
        ValueError: see :func:`masked_weights`.
    """
    before = {} if previous is None else previous.masks
    items = masked_weights(model, optimizer)
    rows = [_row(item, before.get(item.name)) for item in items]
    return SparsityReport(rows, {item.name: pack(item.mask) for item in items})


def _row(item: MaskedWeight, before: Tensor | None) -> WeightReport:
    sizes = item.weight.detach().abs()
    kept, masked = sizes[item.mask], sizes[~item.mask]
    median = float(kept.median()) if kept.numel() else 0.0
    unit = median or 1.0
    old = item.mask if before is None else unpack(before, item.mask.shape)
    return WeightReport(
        item.name,
        sizes.numel(),
        int((sizes == 0).sum()),
        int((item.mask != old).sum()),
        median,
        float(masked.mean()) / unit if masked.numel() else 0.0,
        float(masked.max()) / unit if masked.numel() else 0.0,
        int((masked > LARGE * unit).sum()),
    )
