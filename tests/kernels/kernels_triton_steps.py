"""SinkGD's kernel, and steps of methods, by Triton; test_kernels_triton.py runs these cases."""

import gpu_kernel_runs
import pytest
import test_kernels as rules
from kernels_triton import (
    COLUMNS,
    DEVICE,
    F32,
    MIXES,
    QUIET,
    ROWS,
    SHAPES,
    agree,
    exact,
    make,
)
from reference import kernels_numpy as reference

from optimzoo.kernels import triton as kernels

pytestmark = pytest.mark.filterwarnings(QUIET)


@pytest.mark.parametrize("kind", [ROWS, COLUMNS])
@pytest.mark.parametrize("mix", MIXES[:3])
def test_sinkhorn(kind, mix):
    rules.test_sinkhorn_is_the_rule(kernels, DEVICE, kind, mix[:2], [*SHAPES, (0, 5), (130, 40)])


@pytest.mark.parametrize("kind", [ROWS, COLUMNS])
def test_sinkhorn_of_long_rows(kind):
    """Which do not fit the registers, in more than one chunk."""
    p, g = make((66, 16393), F32, 1), make((66, 16393), F32, 2)
    g[3], g[:, 5] = 0.0, 0.0
    options = {"lr": 0.1, "weight_decay": 0.1, "iterations": 2}
    want = reference.sinkhorn(exact(p), exact(g), kind, **options)
    kernels.sinkhorn_([p], [g], [kind], [(66, 16393)], **options)
    agree(p, want)


@pytest.mark.parametrize("layout", gpu_kernel_runs.LAYOUTS)
@pytest.mark.parametrize("method", gpu_kernel_runs.METHODS)
def test_steps(method, layout):
    gpu_kernel_runs.check(kernels, DEVICE, method, layout)


@pytest.mark.parametrize("method", gpu_kernel_runs.METHODS)
def test_steps_in_16_bits(method):
    gpu_kernel_runs.check_16_bits(kernels, DEVICE, method)
