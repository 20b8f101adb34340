"""What the cases of the Triton kernels share: inputs, options, tolerances.

They run in a process of their own, as TRITON_INTERPRET=1 must be set before anything imports
Triton; without it, on a GPU. The interpreter takes half a millisecond a program: shapes are small.
"""

import os

import numpy as np
import torch

from optimzoo.kernels import triton as kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROWS, COLUMNS, SIGN, ADAM = range(4)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MIXES = [(F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F16), (BF16, F32, F32), (F32, BF16, BF16)]
SHAPES = [(1, 1), (7, 129), (129, 7), (1, 300), (40, 64), (300, 8)]
RULE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "l2": False, "eps": 1e-8}
ADAM_RULE = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.1}
# NumPy, which interprets, warns where a GPU computes an infinity, or a NaN beside the tensor.
QUIET = "ignore::RuntimeWarning"


def make(shape, dtype, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(DEVICE)


def on_device(values):
    return torch.tensor(values, dtype=F32, device=DEVICE)


def exact(tensor):
    return None if tensor is None else tensor.detach().cpu().double().numpy()


def agree(tensor, want, slack=1e-6):
    """Within half a unit in the last place of the tensor's type, and float32's own error."""
    bits = {F32: 24, BF16: 8, F16: 11}[tensor.dtype]
    got, want = exact(tensor), np.asarray(want).reshape(tensor.shape)
    _, exponent = np.frexp(want)
    least = 2.0**-24 if tensor.dtype == F16 else 0.0  # between subnormal numbers
    unit = np.maximum(np.ldexp(1.0, exponent - bits), least)
    np.testing.assert_array_less(np.abs(got - want), 0.51 * unit + slack * (np.abs(want) + 1))


def scale(params, grads, averages, kinds, **changes):
    none = [None] * len(params)
    shapes = [tuple(p.shape) for p in params]
    vectors = {"betas": (0.9, 0.999), "adam_eps": 1e-8, "maximize": False}
    kernels.scale_(
        *(params, grads, averages, none, none, kinds, shapes), **(RULE | vectors | changes)
    )


def adam(params, grads, averages, squares, steps, **changes):
    options = {**ADAM_RULE, "maximize": False, "eps_before": True, **changes}
    kernels.adam_(params, grads, averages, squares, steps, **options)


def apply(params, grads, scales, kinds, **changes):
    shapes = [tuple(p.shape) for p in params]
    options = {"lr": 0.1, "weight_decay": 0.1, **changes}
    kernels.apply_(params, grads, scales, kinds, shapes, **options)
