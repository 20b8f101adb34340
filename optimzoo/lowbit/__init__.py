"""Low-precision storage: stochastic rounding, moments in 8 bits."""

from optimzoo.lowbit.blockwise import dequantize, quantize
from optimzoo.lowbit.moments import dequantized_moments
from optimzoo.lowbit.stochastic import copy_, round_stochastic
from optimzoo.lowbit.write_back import (
    LOW,
    ROUNDINGS,
    STEP,
    RngKey,
    apply_with_rounding,
    at_least_float32,
    fp32_working_copy,
    moment_dtype,
    next_rng_key,
    widened,
)

__all__ = [
    "LOW",
    "ROUNDINGS",
    "STEP",
    "RngKey",
    "apply_with_rounding",
    "at_least_float32",
    "copy_",
    "dequantize",
    "dequantized_moments",
    "fp32_working_copy",
    "moment_dtype",
    "next_rng_key",
    "quantize",
    "round_stochastic",
    "widened",
]
