"""What the kernels read by address alone: of every type, shape and layout that it may be.

A wrong one is read, or written, beyond its end, without an error.
"""

import math

import pytest
import torch
from needs import needs_cpu_kernels

import optimzoo

HYPER = {
    **{name: {"rank": 4} for name in ("GaLore", "NaturalGaLore", "Fira", "APOLLO")},
    **{
        name: {} for name in ("SCALE", "APOLLOMini", "SWAN", "SinkGD", "StableSPAM", "Muon", "RMNP")
    },
    "AdamS": {"l1": 1e-3, "total_steps": 10},
}


@pytest.fixture
def default_dtype():
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def give(*params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype)


def stepped(name, steps=3):
    generator = torch.Generator().manual_seed(0)
    weight, bias = (
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32))
        for shape in ((16, 24), (16,))
    )
    groups = [{"params": [weight], "role": "hidden"}, {"params": [bias], "role": "vector"}]
    optimizer = getattr(optimzoo, name)(groups, lr=1e-2, **HYPER[name])
    for step in range(steps):
        give(weight, bias, seed=step)
        optimizer.step()
    return weight.detach(), bias.detach()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", HYPER)
def test_the_default_dtype_is_not_that_of_what_kernels_write(name, dtype, default_dtype):
    want = stepped(name)
    default_dtype(dtype)
    # Under bfloat16 torch's own scalars are float32 still, under float64 some are wider.
    torch.testing.assert_close(stepped(name), want, rtol=1e-6, atol=1e-6)


def single(shape=(6, 6), role="hidden", **options):
    p = torch.nn.Parameter(torch.linspace(-1, 1, math.prod(shape)).view(shape).clone())
    return p, optimzoo.SCALE([{"params": [p], "role": role}], lr=0.1, **options)


def both_ways(events, **options):
    """The weights after three steps, ``events(p, optimizer)`` before the last: eager and fused."""
    found = []
    for fused in (False, None):
        p, optimizer = single(fused=fused, **options)
        for step in range(3):
            give(p, seed=step)
            if step == 2:
                events(p, optimizer)
            optimizer.step()
        found.append(p.detach())
    return found


def cast_count(dtype):
    def event(p, optimizer):
        state = optimizer.state_dict()
        state["state"][0]["step"] = state["state"][0]["step"].to(dtype)
        optimizer.load_state_dict(state)

    return event


def cast_moment(name, dtype):
    def event(p, optimizer):
        optimizer.state[p][name] = optimizer.state[p][name].to(dtype)

    return event


def turn_weight(p, optimizer):
    p.data = p.data.t()


def turn_average(p, optimizer):
    optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].t()


def negate_lazily(p, optimizer):
    p.grad = torch._neg_view(p.grad)


VECTOR = {"shape": (6,), "role": "vector"}
EVENTS = {
    **{str(t)[6:]: (cast_count(t), VECTOR) for t in (torch.int64, torch.float64, torch.float16)},
    "exp_avg is bfloat16": (cast_moment("exp_avg", torch.bfloat16), VECTOR),
    "exp_avg_sq is bfloat16": (cast_moment("exp_avg_sq", torch.bfloat16), VECTOR),
    "weight turned": (turn_weight, {}),
    "average turned": (turn_average, {"role": "head"}),
    "negated lazily": (negate_lazily, {}),
}


@pytest.mark.parametrize("case", EVENTS)
def test_what_the_kernels_cannot_read_as_it_lies_is_read_right(case):
    event, options = EVENTS[case]
    eager, fused = both_ways(event, **options)
    torch.testing.assert_close(fused, eager, rtol=2e-6, atol=2e-6)
    assert eager.isfinite().all()


@pytest.mark.parametrize("name", ["scale", "sinkgd"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_stack_whose_matrices_lie_in_another_order_is_stepped(name, transposed):
    """Flattened to a list of matrices it is a copy, which a kernel would step in its place."""
    weights = []
    for fused in (False, None):
        p = torch.nn.Parameter(torch.linspace(-1, 1, 120).view(3, 2, 5, 4).clone())
        p.data = p.data.transpose(0, 1)
        layout = {"role": "hidden", "stacked": True, "transposed": transposed}
        optimizer = optimzoo.create_optimizer(name, [{"params": [p], **layout}], lr=1.0)
        optimizer.param_groups[0]["fused"] = fused
        give(p, seed=0)
        optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=2e-6, atol=2e-6)
    start = torch.linspace(-1, 1, 120).view(3, 2, 5, 4).transpose(0, 1)
    assert (weights[1] - start).abs().min() > 0


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("shape", [(3, 6), (60, 60)])
def test_a_gradient_of_another_shape_is_refused(steps, shape):
    """As the eager path refuses it; ``steps`` before that, so that a call is kept, or not."""
    p, optimizer = single()
    for step in range(steps):
        give(p, seed=step)
        optimizer.step()
    give(p, seed=9)
    p.data = torch.zeros(shape)
    with pytest.raises(RuntimeError, match="must match the size"):
        optimizer.step()
    assert p.eq(0).all()


@pytest.mark.parametrize("fused", [False, None])
def test_a_sign_that_is_not_a_number_stays_none(fused):
    """Else an average that is spoiled would stand still for ever, and nobody would see it."""
    p, optimizer = single(normalize="sign", fused=fused)
    give(p, seed=0)
    p.grad[1, 2] = float("nan")
    optimizer.step()
    assert p.isnan().nonzero().tolist() == [[1, 2]]


@needs_cpu_kernels
def test_a_skipped_step_is_no_stochastic_rounding():
    p = torch.nn.Parameter(torch.ones(6, 6, dtype=torch.bfloat16))
    groups = [{"params": [p], "role": "hidden"}]
    optimizer = optimzoo.SCALE(groups, lr=1e-3, rounding="stochastic", fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counts = []
    for step in range(3):
        scaler.scale(p.float().sum()).backward()
        if step == 1:
            p.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(int(optimizer.state[p]["rounding_step"]))
    assert counts == [1, 1, 2]
