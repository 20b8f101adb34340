"""optimzoo: memory-efficient optimizers for language-model training, as torch.optim drop-ins."""

import torch as _torch

from optimzoo._version import __version__
from optimzoo._version import warn_of_untested_torch as _warn_of_untested_torch
from optimzoo.audit import describe
from optimzoo.gradient_release import Release, release
from optimzoo.gradient_stabilizer import GradientStabilizer, stabilize
from optimzoo.lr_range_test import LRRangeTest, lr_range_test
from optimzoo.optimizers.adams import AdamS
from optimzoo.optimizers.apollo import APOLLO, APOLLOMini
from optimzoo.optimizers.fira import Fira
from optimzoo.optimizers.galore import GaLore
from optimzoo.optimizers.muon import Muon
from optimzoo.optimizers.natural_galore import NaturalGaLore
from optimzoo.optimizers.rmnp import RMNP
from optimzoo.optimizers.scale import SCALE
from optimzoo.optimizers.sinkgd import SinkGD
from optimzoo.optimizers.stable_spam import StableSPAM
from optimzoo.optimizers.swan import SWAN
from optimzoo.registry import OptimInfo, create_optimizer, get_info, list_optimizers
from optimzoo.roles import param_groups
from optimzoo.state_transfer import AdoptedState, AdoptionReport, adopt_state
from optimzoo.tuned_rates import StartingValues, starting_values
from optimzoo.update_statistics import update_statistics

_warn_of_untested_torch(_torch.__version__)

__all__ = [
    "APOLLO",
    "RMNP",
    "SCALE",
    "SWAN",
    "APOLLOMini",
    "AdamS",
    "AdoptedState",
    "AdoptionReport",
    "Fira",
    "GaLore",
    "GradientStabilizer",
    "LRRangeTest",
    "Muon",
    "NaturalGaLore",
    "OptimInfo",
    "Release",
    "SinkGD",
    "StableSPAM",
    "StartingValues",
    "__version__",
    "adopt_state",
    "create_optimizer",
    "describe",
    "get_info",
    "list_optimizers",
    "lr_range_test",
    "param_groups",
    "release",
    "stabilize",
    "starting_values",
    "update_statistics",
]
