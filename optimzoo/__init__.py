"""optimzoo: memory-efficient optimizers for language-model training, as torch.optim drop-ins."""

from optimzoo._version import __version__
from optimzoo.optimizers.muon import Muon
from optimzoo.optimizers.scale import SCALE
from optimzoo.registry import OptimInfo, create_optimizer, get_info, list_optimizers
from optimzoo.roles import describe, param_groups

__all__ = [
    "SCALE",
    "Muon",
    "OptimInfo",
    "__version__",
    "create_optimizer",
    "describe",
    "get_info",
    "list_optimizers",
    "param_groups",
]
