"""Low-rank weights for pretraining: layers, conversion, refactorization, momentum reset."""

from optimzoo.lowrank.convert import KINDS, Audit, Converted, convert, merge, support_bytes
from optimzoo.lowrank.layers import (
    FactoredLinear,
    LoRALinear,
    LowRankLinear,
    SparseLowRankLinear,
)
from optimzoo.lowrank.momentum_reset import MomentumReset
from optimzoo.lowrank.refactorize import balanced_factors, refactorize_
from optimzoo.lowrank.restarts import ReLoRA, Restarts, quick_recovery

__all__ = [
    "KINDS",
    "Audit",
    "Converted",
    "FactoredLinear",
    "LoRALinear",
    "LowRankLinear",
    "MomentumReset",
    "ReLoRA",
    "Restarts",
    "SparseLowRankLinear",
    "balanced_factors",
    "convert",
    "merge",
    "quick_recovery",
    "refactorize_",
    "support_bytes",
]
