"""Moments in 8 bits: codes against a search over all of them; the optimizers that hold them."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from zoo_models import METHODS, llama, normal, reloaded, train

from optimzoo import SCALE, param_groups, release
from optimzoo.core.matrix_optimizer import MatrixOptimizer
from optimzoo.lowbit import RngKey, blockwise, dequantize, moments, quantize
from optimzoo.memory import account
from optimzoo.models.llama import Llama, get_config

BF16, F32 = torch.bfloat16, torch.float32
ZOO = {**METHODS, "scale": (SCALE, {"lr": 0.01})}
COUNTER = RngKey(11, 3, 5)
SHAPES = [(1,), (255,), (256,), (257,), (7, 129), (3, 5, 41), (4097,)]


def values_of(codes, signed):
    """The rule in float64."""
    part = codes.astype(np.float64) / (127 if signed else 255)
    return np.sign(part) * part**2 if signed else part**4


def draw(shape, *, signed, seed=0):
    """Entries that differ by orders of magnitude."""
    x = normal(*shape, seed=seed, dtype=F32) ** 3
    return x if signed else x.square()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_to_nearest_takes_the_nearest_of_all_codes(shape, signed):
    x = draw(shape, signed=signed)
    codes, scales = quantize(x, signed=signed)
    assert codes.shape == x.shape and codes.dtype == (torch.int8 if signed else torch.uint8)
    table = values_of(np.arange(-127, 128) if signed else np.arange(256), signed)
    flat, decoded = x.double().numpy().ravel(), dequantize(codes, scales).numpy().ravel()
    assert len(scales) == math.ceil(len(flat) / 256)
    for i, scale in enumerate(scales.tolist()):
        block = flat[256 * i : 256 * (i + 1)]
        assert scale == np.abs(block).max()
        best = np.abs(block[:, None] - scale * table).min(1)
        error = np.abs(decoded[256 * i : 256 * (i + 1)] - block)
        np.testing.assert_allclose(error, best, rtol=1e-3, atol=1e-6 * scale)


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_codes_have_the_number_as_their_mean(signed):
    """Within four standard errors, from the two neighbours alone."""
    x = draw((64,), signed=signed)
    x[0] = 8.0 * x.abs().max()  # the scale of every block
    many = x.repeat(4, 4096).T.reshape(4096, 256)
    first, scales = quantize(many, signed=signed, rng_key=COUNTER)
    again, _ = quantize(many, signed=signed, rng_key=COUNTER)
    other, _ = quantize(many, signed=signed, rng_key=COUNTER._replace(step=4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    decoded, scale = dequantize(first, scales).double(), scales[0].item()
    table = scale * values_of(np.arange(-127, 128) if signed else np.arange(256), signed)
    total = spread = 0.0
    for column in range(5, 256, 4):
        exact = many[0, column].double().item()
        low, high = table[table <= exact].max(), table[table > exact].min()
        ups = decoded[:, column] > (low + high) / 2
        around = torch.where(ups, high, low).float().double()
        torch.testing.assert_close(decoded[:, column], around, rtol=1e-5, atol=0)
        chance = (exact - low) / (high - low)
        off, variance = ups.sum().item() - chance * len(ups), chance * (1 - chance) * len(ups)
        total, spread = total + off, spread + variance
        assert variance < 10 or abs(off) < 4 * math.sqrt(variance)  # fewer are not normal
    assert abs(total) < 4 * math.sqrt(spread)


@pytest.mark.parametrize("signed", [True, False])
def test_zeros_and_what_is_not_finite(signed):
    x = draw((1000,), signed=signed)
    x[256:512] = 0.0
    x[600], x[800] = torch.inf, torch.nan
    for rng_key in (None, COUNTER):
        decoded = dequantize(*quantize(x, signed=signed, rng_key=rng_key))
        assert (decoded[256:512] == 0).all()
        assert decoded[512:].isnan().all()
        assert decoded[:256].isfinite().all()
    assert quantize(x[:0], signed=signed)[0].shape == (0,)


def test_the_same_codes_whatever_the_chunks_and_the_layout(monkeypatch):
    x = draw((9, 700), signed=True)
    want = quantize(x, signed=True, rng_key=COUNTER)
    monkeypatch.setattr(blockwise, "_CHUNK", 512)
    for layout in (x, x.t().contiguous().t()):
        got = quantize(layout, signed=True, rng_key=COUNTER)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(dequantize(*got), dequantize(*want))


@pytest.mark.parametrize("rng_key", [None, COUNTER], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(("shape", "rows"), [((31, 129), (16, 15, 0)), ((7, 300), (2, 2, 2, 1))])
def test_parts_have_the_codes_of_the_whole(shape, rows, signed, rng_key, monkeypatch):
    """Parts that begin inside of a block, and one without elements."""
    x = draw(shape, signed=signed)
    x[1, 3], x[-1, 2] = torch.nan, torch.inf
    how = {"signed": signed, "rng_key": rng_key}
    codes, scales = quantize(x, **how)
    monkeypatch.setattr(blockwise, "_CHUNK", 512)
    pieces, sizes = x.split(rows), []
    starts = [shape[1] * sum(rows[:i]) for i in range(len(rows))]

    def parts(max_):
        return [blockwise.Part(start, x.numel(), max_) for start in starts]

    for piece, part in zip(pieces, parts(lambda s: sizes.append(s.clone())), strict=True):
        quantize(piece, part=part, **how)
    largest = torch.stack(sizes).amax(0)  # what an all-reduce gives each process
    decoded = []
    for piece, part in zip(pieces, parts(lambda s: s.copy_(largest)), strict=True):
        own, every = quantize(piece, part=part, **how)
        assert torch.equal(own, codes.view(-1)[part.start :][: own.numel()].view(own.shape))
        torch.testing.assert_close(every, scales, rtol=0, atol=0, equal_nan=True)
        decoded.append(dequantize(own, every, part))
    expected = dequantize(codes, scales)
    torch.testing.assert_close(torch.cat(decoded), expected, rtol=0, atol=0, equal_nan=True)


def make(name, model, **hyper):
    cls, own = ZOO[name]
    return cls(param_groups(model), **{**own, "state_bits": 8, **hyper})


def set_grads(model, seed):
    for i, p in enumerate(model.parameters()):
        p.grad = normal(*p.shape, seed=100 * seed + i, dtype=F32).to(p.dtype)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def all_sizes(monkeypatch):
    """Codes for the smallest tensors too."""
    monkeypatch.setattr(moments, "SMALLEST", 1)


@pytest.mark.sampled(7)
@pytest.mark.parametrize(("dtype", "rounding"), [(F32, "nearest"), (BF16, "stochastic")])
@pytest.mark.parametrize("name", ZOO)
def test_resumes_and_copies_to_the_bit(name, dtype, rounding, all_sizes):
    model = llama(dtype)
    optimizer = make(name, model, rounding=rounding)
    for step in range(5):
        set_grads(model, step)
        optimizer.step()
    saved = reloaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again, twin = llama(dtype), None
    again.load_state_dict(saved["model"])
    other = make(name, again, rounding=rounding)
    other.load_state_dict(saved["optimizer"])
    codes = {v.dtype for s in other.state.values() for k, v in s.items() if k.endswith("_codes")}
    assert codes == ({torch.int8} if name == "scale" else {torch.int8, torch.uint8})
    scales = {v.dtype for s in other.state.values() for k, v in s.items() if k.endswith("_scale")}
    assert scales == {F32}
    twin, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (again, other), (twin, copied)):
        for step in range(5, 8):
            set_grads(m, step)
            o.step()
    assert same(values(model), values(again)) and same(values(model), values(twin))
    assert isinstance(optimizer, MatrixOptimizer | SCALE)


@pytest.mark.parametrize("name", ["scale", "galore", "stable_spam", "muon"])
def test_released_in_the_backward_the_bits_are_the_same(name, all_sizes):
    runs = []
    for released in (False, True):
        model = llama(BF16)
        optimizer = make(name, model, rounding="stochastic")
        handle = release(optimizer) if released else None
        train(model, optimizer, 3)
        runs.append(values(model))
        assert handle is None or handle.remove() is None
    assert same(*runs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", ["scale", "galore", "muon"])
def test_training_is_that_of_float32_moments(name, rounding, all_sizes):
    """The loss falls as far, to a twentieth of the way."""
    ends = []
    for bits in (None, 8):
        model = llama(F32)
        losses = train(model, make(name, model, state_bits=bits, rounding=rounding), 20)
        ends.append(losses[-1])
    assert abs(ends[1] - ends[0]) < 0.05 * (losses[0] - ends[0])


def test_scales_momentum_at_7b_is_half():
    """131 MB of codes and 2 MB of scales in the place of 262 MB."""
    with torch.device("meta"):
        model = Llama(get_config("7b"))
    plain, eight = (account(model, "scale", dtype=BF16, state_bits=b).state for b in (None, 8))
    head = 32000 * 4096
    assert plain["head", "exp_avg"] == 2 * head
    assert (eight["head", "exp_avg_codes"], eight["head", "exp_avg_scale"]) == (head, head // 64)
    assert sum(plain.values()) - sum(eight.values()) == 2 * head - head - head // 64


@pytest.mark.parametrize("name", ["scale", "galore", "stable_spam", "muon"])
def test_the_account_is_what_is_held(name, all_sizes):
    model = llama(BF16)
    optimizer = make(name, model)
    set_grads(model, 0)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values()]
    counted = account(llama(BF16), name, state_bits=8, **ZOO[name][1])
    assert counted.state_total == sum(t.numel() * t.element_size() for t in held)


def test_small_moments_stay_wide_and_errors_name_the_value():
    head, vector = nn.Parameter(normal(64, 64)), nn.Parameter(normal(64))
    groups = [{"params": [head], "role": "head"}, {"params": [vector], "role": "vector"}]
    optimizer = SCALE(groups, state_bits=8)
    small = nn.Parameter(normal(63, 65, dtype=BF16))
    optimizer.add_param_group({"params": [small], "role": "head"})
    for p in (head, vector, small):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state[head]) == {"exp_avg_codes", "exp_avg_scale"}
    assert optimizer.state[small]["exp_avg"].dtype == F32  # 4,095 elements
    assert optimizer.state[vector]["exp_avg"].dtype == torch.float64
    with pytest.raises(ValueError, match="Invalid state_bits: 4; it must be None or 8"):
        SCALE(groups, state_bits=4)
    with pytest.raises(ValueError, match="state_bits=8 excludes capturable=True"):
        SCALE(groups, state_bits=8, capturable=True)
