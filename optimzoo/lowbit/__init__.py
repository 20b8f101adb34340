"""Low-precision storage: stochastic rounding."""

from optimzoo.lowbit.stochastic import copy_, round_stochastic
from optimzoo.lowbit.write_back import (
    LOW,
    ROUNDINGS,
    Counter,
    moment_dtype,
    next_counter,
    one_by_one,
    stand_in,
)

__all__ = [
    "LOW",
    "ROUNDINGS",
    "Counter",
    "copy_",
    "moment_dtype",
    "next_counter",
    "one_by_one",
    "round_stochastic",
    "stand_in",
]
