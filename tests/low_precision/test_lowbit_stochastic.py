"""Stochastic rounding: the bits, the expectation, the edges."""

import math

import numpy as np
import pytest
import torch
from reference import kernels_numpy as reference

from optimzoo.lowbit import copy_, round_stochastic, stochastic

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bfloat16", F16: "float16"}
COUNTER = {"seed": 11, "step": 3, "index": 5}


def wide_range(n):
    generator = torch.Generator().manual_seed(0)
    size = torch.exp2(torch.rand(n, generator=generator) * 70 - 55)
    return torch.randn(n, generator=generator) * size


def same_bits(a, b):
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "rng_key", [(0, 0, 0), (11, 3, 5), (2**64 - 1, 2**64 - 1, 2**32 - 1), (2**63, 2**32, 2**31)]
)
def test_bits_are_those_of_the_transcription(dtype, rng_key):
    x = wide_range(20_000)
    x[:6] = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 2.0**-14, 65504.0])
    x = x.clamp(-65504, 65504)
    rng_key = dict(zip(("seed", "step", "index"), rng_key, strict=True))
    want = torch.from_numpy(reference.round_stochastic(x.numpy(), NAMES[dtype], **rng_key))
    got = round_stochastic(x, dtype, **rng_key)
    assert same_bits(got, want.to(dtype))
    assert not same_bits(got, x.to(dtype))


def test_random_bits_of_known_counters():
    """The formula in plain integers, at elements on both sides of 2^32."""
    key = stochastic._key(2**40 + 1, 7, 9)
    for start in (0, 2**31 - 2, 2**32 - 4, 2**32, 3 * 2**32 + 2**31):
        got = stochastic._random_bits(start, 4, key, torch.device("cpu"))
        inner = [int(reference.finaliser((e >> 32) ^ key)) for e in range(start, start + 4)]
        want = [
            int(reference.finaliser((e & 0xFFFFFFFF) ^ i))
            for e, i in zip(range(start, start + 4), inner, strict=True)
        ]
        assert [b & 0xFFFFFFFF for b in got.tolist()] == want
    expected = 0
    for word in (9, 0, 7, 2**8, 1):
        expected = int(reference.finaliser(word ^ expected))
    assert key == expected


# A tenth, an odd fraction, one close to the lower and one to the upper neighbour; the last two are
# among the subnormal numbers of float16.
@pytest.mark.parametrize("x", [0.1, -1.2345, 1.0001, -1023.9, 3.3e-6, -2.0e-8])
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_expectation_is_the_number(dtype, x):
    n = 1_000_000
    x = torch.tensor(x)
    rounded = round_stochastic(x.expand(n), dtype, **COUNTER).double()
    low, high = rounded.min().item(), rounded.max().item()
    exact = x.item()
    assert low < exact < high
    assert rounded.unique().tolist() == [low, high]  # its two neighbours, nothing else
    chance = (exact - low) / (high - low)
    error = (high - low) * math.sqrt(chance * (1 - chance) / n)
    assert abs(rounded.mean().item() - exact) < 4 * error


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_neighbouring_elements_steps_and_tensors_are_not_alike(dtype):
    """Correlation of what they are rounded to, within 4 standard errors of none."""
    x = torch.full((200_001,), 1.0 + 2.0**-12)

    def ups(**changes):
        return (round_stochastic(x, dtype, **(COUNTER | changes)).double() > 1.0).numpy()

    first = ups()
    others = [ups(seed=12), ups(step=4), ups(index=6), np.roll(first, 1)]
    for other in others:
        assert abs(np.corrcoef(first, other)[0, 1]) < 4 / math.sqrt(x.numel())


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_what_the_type_holds_stays(dtype):
    x = wide_range(5000).clamp(-60000, 60000).to(dtype)
    assert same_bits(round_stochastic(x.float(), dtype, **COUNTER), x)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_same_counter_same_bits_whatever_the_chunks(dtype, monkeypatch):
    x = wide_range(1001)
    want = round_stochastic(x, dtype, **COUNTER)
    monkeypatch.setattr(stochastic, "_CHUNK", 64)
    assert same_bits(round_stochastic(x, dtype, **COUNTER), want)
    assert same_bits(round_stochastic(x.view(7, 143), dtype, **COUNTER), want.view(7, 143))
    # A matrix that is stored by columns still counts its elements by rows.
    turned = x.view(7, 143).t().contiguous().t()
    assert same_bits(round_stochastic(turned, dtype, **COUNTER), want.view(7, 143))


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_what_is_not_finite(dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for seed in range(20):  # no random bits may turn them into something else
        got = round_stochastic(x, dtype, seed=seed, step=0, index=0)
        torch.testing.assert_close(got, x.to(dtype), equal_nan=True)


def test_beyond_the_largest_number():
    x = torch.full((1000,), 3.4e38)
    assert round_stochastic(x, BF16, **COUNTER).isinf().any()
    assert round_stochastic(x, F16, **COUNTER).isinf().all()
    assert round_stochastic(torch.full((1000,), 65504.0), F16, **COUNTER).isfinite().all()


def test_small_updates_are_not_lost():
    """A bfloat16 1.0 that takes 2^-13 a thousand times: to nearest it never moves."""
    p = torch.ones(2000, dtype=BF16)
    for step in range(1000):
        copy_(p, p.float() + 2.0**-13, seed=0, step=step, index=0)
    moved = p.double().mean().item() - 1.0
    expected = 1000 * 2.0**-13
    # Each step adds a variance of at most 2^-7 times 2^-13.
    assert abs(moved - expected) < 4 * math.sqrt(1000 * 2.0**-20 / 2000)
    assert (torch.ones(1, dtype=BF16) + 2.0**-13).item() == 1.0


def test_float64_goes_through_float32_and_float32_stays():
    x = torch.randn(100, dtype=torch.float64)
    assert same_bits(
        round_stochastic(x, BF16, **COUNTER), round_stochastic(x.float(), BF16, **COUNTER)
    )
    assert torch.equal(round_stochastic(x, F32, **COUNTER), x.float())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1), (2, 3, 5)])
def test_shapes(shape):
    x = torch.full(shape, 0.1)
    got = round_stochastic(x, BF16, **COUNTER)
    assert got.shape == x.shape and got.dtype == BF16
    torch.testing.assert_close(got.float(), x, rtol=2.0**-7, atol=0)


def test_copy_writes_into_any_layout():
    x = wide_range(60).view(6, 10)
    want = round_stochastic(x, BF16, **COUNTER)
    whole = torch.zeros(6, 20, dtype=BF16)
    for dst in (torch.zeros(6, 10, dtype=BF16), whole[:, ::2], torch.zeros(10, 6, dtype=BF16).t()):
        assert copy_(dst, x, **COUNTER) is dst
        assert same_bits(dst.contiguous(), want)
    assert whole[:, 1::2].eq(0).all()
    plain = torch.zeros(6, 10)
    assert torch.equal(copy_(plain, x, **COUNTER), x)


def test_copy_into_a_parameter_is_outside_of_autograd():
    p = torch.nn.Parameter(torch.zeros(8, dtype=BF16))
    x = torch.full((8,), 0.1, requires_grad=True)
    copy_(p, x, **COUNTER)
    assert p.is_leaf and p.requires_grad and p.grad_fn is None
    assert not round_stochastic(x, BF16, **COUNTER).requires_grad


def test_errors_name_the_value():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"torch.int8; use bfloat16"):
        round_stochastic(x, torch.int8, **COUNTER)
    for name, value in (("seed", -1), ("seed", 2**64), ("step", -1), ("index", 2**32)):
        with pytest.raises(ValueError, match=rf"Invalid {name}: {value}; it must be from 0 to"):
            round_stochastic(x, BF16, **(COUNTER | {name: value}))
    with pytest.raises(ValueError, match=r"cannot copy \(3,\) into \(1, 3\)"):
        copy_(torch.zeros(1, 3, dtype=BF16), x, **COUNTER)
