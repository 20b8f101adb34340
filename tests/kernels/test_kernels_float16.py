"""float16 in the CPU kernels: to and from float32 with the bits of torch, in every build."""

import numpy as np
import pytest
import torch
from needs import needs_cpu_kernels

from optimzoo.kernels import native

pytestmark = needs_cpu_kernels
F32, F16 = torch.float32, torch.float16
EVERY_HALF = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(F16)
# Adam's and SCALE's moments become the gradient itself: m + 1 (g - m) with m = 0.
OPTIONS = {"betas": (0.0, 0.0), "weight_decay": 0.0, "maximize": False}


def bits(x):
    return x.contiguous().view(torch.int16 if x.dtype == F16 else torch.int32).numpy()


def edges():
    """Around every float16 number and halfway to the next, and an ulp of float32 beside both."""
    upper = EVERY_HALF[: 2**15].abs().sort().values  # each magnitude once; NaNs last
    numbers = upper[upper.isfinite()].double()
    halfway = torch.cat([(numbers[:-1] + numbers[1:]) / 2, torch.tensor([65520.0])])
    points = torch.cat([numbers, halfway.double()]).float()
    beside = [points.nextafter(torch.tensor(to)) for to in (torch.inf, -torch.inf)]
    tiny = torch.tensor([2.0**-25, 2.0**-26, 2.0**-126, 2.0**-149, 3e38, torch.inf])
    values = torch.cat([points, *beside, tiny])
    return torch.cat([values, -values])


def adams_average(grad, dtype):
    """The first moment, in `dtype`, by Adam's kernel: blocks of floats converted."""
    p, m, v = torch.zeros_like(grad), torch.zeros_like(grad, dtype=dtype), torch.zeros_like(grad)
    one = torch.ones(())
    options = {"lr": 0.0, "eps": 1.0, "eps_before": False, **OPTIONS}
    native.CPU.adam_([p], [grad], [m], [v.to(dtype)], [one], **options)
    return m


def scales_average(grad):
    """SCALE's momentum, all in the gradient's type: registers converted."""
    shape = (1, grad.numel())
    p, m = torch.zeros_like(grad), torch.zeros_like(grad)
    options = {"lr": 0.0, "momentum": 0.0, "l2": False, "eps": 1.0, "adam_eps": 1.0, **OPTIONS}
    native.CPU.scale_([p], [grad], [m], [None], [None], [0], [shape], **options)
    return m


@pytest.mark.parametrize("count", [2**16, 7])
def test_every_float16_is_the_float32_that_it_is_for_torch(count):
    """A sum begins at 0, so -0 comes out as 0."""
    halves = EVERY_HALF[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))[:count]]
    want = halves.float() + 0.0
    got = adams_average(halves, F32)
    number = ~want.isnan()
    np.testing.assert_array_equal(bits(got)[number], bits(want)[number])
    assert got[~number].isnan().all()


def test_every_float32_at_an_edge_rounds_to_the_float16_of_torch():
    values = edges()
    want = (values + 0.0).half()
    np.testing.assert_array_equal(bits(adams_average(values, F16)), bits(want))


def test_registers_of_float16_come_back_as_they_were():
    numbers = EVERY_HALF[EVERY_HALF.isfinite()]
    np.testing.assert_array_equal(bits(scales_average(numbers)), bits(numbers + 0.0))


@pytest.mark.parametrize("lr", [2.0**-1, 2.0**-3, 2.0**-9])
def test_registers_round_to_the_float16_of_torch(lr):
    """p - lr g is exact in float64, and in float32 but for the one rounding of the difference.

    The divisor is 1: the floor eps, for the root mean square of g is below it.
    """
    generator = torch.Generator().manual_seed(1)
    p, g = (torch.randn(1, 40003, generator=generator).half() for _ in range(2))
    sizes = torch.tensor([2.0**-16, 2.0**-8, 1.0, 2.0**12])
    p *= sizes[torch.arange(40003) % 4]
    g /= 2
    assert g.float().square().mean() < 0.5
    want = (p.double() - lr * g.double()).float().half()
    options = {"lr": lr, "momentum": 0.0, "l2": False, "eps": 1.0, "adam_eps": 1.0, **OPTIONS}
    native.CPU.scale_([p], [g], [None], [None], [None], [0], [(1, 40003)], **options)
    np.testing.assert_array_equal(bits(p), bits(want))


@pytest.mark.parametrize("by", [lambda g: adams_average(g, F16), scales_average])
def test_infinities_and_nans_stay_what_they_are(by):
    """A NaN need not keep its bits: torch itself has others for single elements than for many."""
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65520.0, -1e38, 1.0] * 9)
    for grad in (special, -special):
        half = grad.half()
        # m + 1 (g - m) with m = 0 of an infinite g is g itself.
        got = by(half if by is scales_average else grad)
        np.testing.assert_array_equal(got.float().numpy(), half.float().numpy())
