"""Low-precision storage: stochastic rounding."""

from optimzoo.lowbit.stochastic import copy_, round_stochastic

__all__ = ["copy_", "round_stochastic"]
