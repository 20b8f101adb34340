"""Low-precision storage: stochastic rounding, moments in 8 bits."""

from optimzoo.lowbit.blockwise import dequantize, opened, quantize
from optimzoo.lowbit.stochastic import copy_, round_stochastic
from optimzoo.lowbit.write_back import (
    LOW,
    ROUNDINGS,
    STEP,
    Counter,
    at_least_float32,
    moment_dtype,
    next_counter,
    one_by_one,
    stand_in,
    widened,
)

__all__ = [
    "LOW",
    "ROUNDINGS",
    "STEP",
    "Counter",
    "at_least_float32",
    "copy_",
    "dequantize",
    "moment_dtype",
    "next_counter",
    "one_by_one",
    "opened",
    "quantize",
    "round_stochastic",
    "stand_in",
    "widened",
]
