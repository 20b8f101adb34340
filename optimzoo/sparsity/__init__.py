"""From a dense model to an N:M-sparse one: masks, weight scaling, distillation, pruning."""

from optimzoo.sparsity.distillation import distillation_loss, linear_distillation_loss
from optimzoo.sparsity.masks import is_nm, nm_mask, pack, packed_mask, unpack
from optimzoo.sparsity.pruning import finalize, masked_weights, to_semi_structured
from optimzoo.sparsity.report import SparsityReport, report
from optimzoo.sparsity.scaling import WeightScale, linear_targets, prepare, sparse_groups

__all__ = [
    "SparsityReport",
    "WeightScale",
    "distillation_loss",
    "finalize",
    "is_nm",
    "linear_distillation_loss",
    "linear_targets",
    "masked_weights",
    "nm_mask",
    "pack",
    "packed_mask",
    "prepare",
    "report",
    "sparse_groups",
    "to_semi_structured",
    "unpack",
]
