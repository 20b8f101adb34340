"""What RMNP's rule keeps to; its steps on the shapes of all methods are in `test_zoo_fidelity`."""

import numpy as np
import pytest
import torch
from reference.muon_numpy import RmnpReference
from torch import nn
from torch.testing import assert_close

from optimzoo import RMNP, Muon

SHAPES = {"tall": (33, 17), "wide": (24, 40), "square": (9, 9), "stack": (3, 8, 5)}
EVERYWHERE = pytest.mark.parametrize("fused", [None, False], ids=["kernels", "eager"])


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def hidden(*params, **layout):
    return [{"params": list(params), "role": "hidden", **layout}]


def one_step(grad, **options):
    """Return what a weight of zeros has gone, down, after one step of rate 1."""
    layout = {k: options.pop(k) for k in ("stacked", "transposed", "heads") if k in options}
    weight = nn.Parameter(torch.zeros_like(grad))
    weight.grad = grad.clone()
    RMNP(hidden(weight, **layout), lr=1.0, **options).step()
    return -weight.detach()


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_thirty_steps_follow_the_reference_with_rows_and_columns_of_zeros(name, dtype, fused):
    """In bfloat16 the momentum is the optimizer's own: each step is the reference's, rounded."""
    low, shape, mu = dtype == torch.bfloat16, SHAPES[name], 0.9
    weight = nn.Parameter(normal(*shape, seed=9).to(dtype))
    optimizer = RMNP(
        hidden(weight, stacked=name == "stack"),
        lr=0.01,
        momentum=mu,
        weight_decay=0.1,
        fused=fused,
        rounding="nearest",
    )
    stacked = {"w"} if name == "stack" else set()
    reference = RmnpReference(
        {"w": weight.detach().double().numpy()},
        {"w"},
        stacked=stacked,
        lr=0.01,
        momentum=mu,
        weight_decay=0.1,
    )
    for step in range(30):
        grad = (normal(*shape, seed=step) * 2.0 ** (step % 7)).to(dtype)
        grad[..., 0, :] = 0  # never anything else
        grad[..., 1] = 0
        grad[..., 2 + step % 3, :] = 0  # now and then
        if low:
            reference.params["w"] = weight.detach().double().numpy()
            before = optimizer.state[weight].get("momentum_buffer", torch.zeros(shape))
            totals = before.detach().double().numpy() / (1 - mu)
            keys = [f"w[{i}]" for i in range(shape[0])] if stacked else ["w"]
            reference.momentum_buffer = dict(
                zip(keys, totals if stacked else [totals], strict=True)
            )
        weight.grad = grad
        optimizer.step()
        reference.step({"w": grad.double().numpy()})
        off = np.abs(weight.detach().double().numpy() - reference.params["w"])
        limit = 2.0**-8 * (np.abs(reference.params["w"]) + 0.02) if low else None
        if low:
            assert (off <= limit).all(), step
        else:
            assert off.max() < (1e-12 if dtype == torch.float64 else 1e-5), step
    decayed = (1 - 0.01 * 0.1) ** 30
    kept = weight.detach().double()[..., 0, :] / normal(*shape, seed=9).to(dtype)[..., 0, :]
    assert_close(kept, torch.full_like(kept, decayed), rtol=0, atol=0.03 if low else 1e-5)


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_have_the_norm_of_the_adjustment(dtype, fused):
    for shape, expected in (((12, 3), 2.0), ((3, 12), 1.0), ((5, 5), 1.0)):
        update = one_step(normal(*shape, dtype=dtype), fused=fused)
        assert_close(update.norm(dim=1), torch.full(shape[:1], expected, dtype=dtype))
    assert_close(
        one_step(normal(4, 9, dtype=dtype), adjust_lr_fn="match_rms_adamw").norm(dim=1),
        torch.full((4,), 0.6, dtype=dtype),
    )


@EVERYWHERE
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1e-20])
def test_rows_of_nothing_stay_and_those_that_underflow_do_not_explode(size, fused):
    """As the squares of 1e-30 do in float32: such a row has the norm zero, and no small divisor."""
    grad = normal(6, 8, dtype=torch.float32)
    grad[2] = size
    update = one_step(grad, fused=fused, momentum=0.0)
    assert update.isfinite().all() and update[2].norm() <= 1e-7
    assert_close(update[[0, 1, 3, 4, 5]].norm(dim=1), torch.full((5,), 1.0))
    assert not one_step(torch.zeros(6, 8), fused=fused).any()


@EVERYWHERE
def test_experts_convolutions_and_transposed_weights_are_their_matrices(fused):
    experts, filters, conv1d = normal(4, 6, 9), normal(6, 3, 2, 2), normal(6, 9)
    for dtype in (torch.float64, torch.float32):
        e, f, c = experts.to(dtype), filters.to(dtype), conv1d.to(dtype)
        each = torch.stack([one_step(expert, fused=fused) for expert in e])
        assert_close(one_step(e, stacked=True, fused=fused), each)
        turned = one_step(e, stacked=True, transposed=True, fused=fused)
        assert_close(turned, torch.stack([one_step(x.mT, fused=fused).mT for x in e]))
        assert_close(one_step(f, fused=fused), one_step(f.flatten(1), fused=fused).view_as(f))
        for how in ({"fused": fused}, {"fused": fused, "nesterov": False}):
            assert_close(one_step(c, transposed=True, **how), one_step(c.mT, **how).mT)


def test_heads_change_the_adjustment_alone():
    grad = normal(12, 3)
    assert_close(one_step(grad, heads=2), one_step(grad) / 2**0.5)
    assert_close(one_step(grad, heads=4), one_step(grad) / 2)


def test_a_gradient_is_left_alone_and_its_size_does_not_count():
    grad = normal(6, 8, dtype=torch.float32)
    for fused in (None, False):
        for nesterov in (True, False):
            options = {"fused": fused, "nesterov": nesterov}
            weight = nn.Parameter(torch.zeros(6, 8))
            weight.grad = grad.clone()
            RMNP(hidden(weight), lr=1.0, **options).step()
            assert torch.equal(weight.grad, grad)
            assert_close(one_step(grad * 2.0**20, **options), -weight.detach())


def test_the_momentum_is_muons():
    """So a checkpoint of one, its groups of equal rates, is one of the other."""
    grads = [normal(6, 8, seed=step) for step in range(5)]
    states = []
    for make in (RMNP, Muon):
        weight = nn.Parameter(normal(6, 8, seed=9))
        optimizer = make(hidden(weight), lr=0.01, momentum=0.8)
        for grad in grads:
            weight.grad = grad
            optimizer.step()
        states.append(optimizer.state[weight])
    assert states[0].keys() == states[1].keys() == {"momentum_buffer"}
    assert torch.equal(states[0]["momentum_buffer"], states[1]["momentum_buffer"])


def test_eight_bits_cost_a_byte_and_a_64th():
    weight = nn.Parameter(normal(64, 96, dtype=torch.float32))
    optimizer = RMNP(hidden(weight), state_bits=8, rounding="stochastic")
    for step in range(3):
        weight.grad = normal(64, 96, seed=step, dtype=torch.float32)
        optimizer.step()
    state = {k: v for k, v in optimizer.state[weight].items() if k != "rounding_step"}
    assert state.keys() == {"momentum_buffer_codes", "momentum_buffer_scale"}
    assert sum(v.numel() * v.element_size() for v in state.values()) == 64 * 96 * (1 + 4 / 256)
