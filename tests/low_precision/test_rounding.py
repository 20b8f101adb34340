"""`rounding="stochastic"`: the bits of every step, what they depend on, and the kernels' own."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from needs import needs_cpu_kernels
from optimizer_db import PlannedAdamS, Tiny
from torch import nn
from zoo_models import METHODS, normal, reloaded, train

from optimzoo import SCALE, Muon, create_optimizer, param_groups, release
from optimzoo.core import rounded
from optimzoo.kernels import dispatch
from optimzoo.lowbit import round_stochastic, write_back
from optimzoo.memory import account
from optimzoo.models.llama import Llama, LlamaConfig

BF16, F16 = torch.bfloat16, torch.float16
ZOO = {
    **METHODS,
    "scale": (SCALE, {"lr": 0.01}),
    "adams": (PlannedAdamS, {"lr": 0.01, "n": 2, "m": 4, "total_steps": 6, "mask_every": 2}),
    "muon": (Muon, {"lr": 0.01}),
}
TORCH = ("sgd", "adamw", "adafactor", "rprop", "asgd")
every_method = pytest.mark.parametrize("name", [*ZOO, *TORCH])
SEED = 2**62 - 5


def make(name, model, **hyper):
    hyper = {"rounding": "stochastic", "seed": SEED, **hyper}
    if name in TORCH:
        return create_optimizer(name, model, **{"lr": 0.01, **hyper})
    cls, own = ZOO[name]
    groups = param_groups(model) if isinstance(model, nn.Module) else model
    return cls(groups, **{**own, **hyper})


def llama(dtype):
    """One block: the next has the same shapes, and takes as long."""
    return Llama(LlamaConfig(97, 24, 37, 1, 2), seed=3).to(dtype)


def model_of(name, dtype=BF16):
    if name != "adams":
        return llama(dtype)
    # AdamS wants whole groups of four inputs.
    model = nn.Sequential(nn.Embedding(97, 24), nn.Linear(24, 40), nn.Linear(40, 97, bias=False))
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        p.data = (torch.randn(p.shape, generator=generator) / 2).to(dtype)
    return model


def set_grads(params, seed):
    for i, p in enumerate(params):
        p.grad = normal(*p.shape, seed=100 * seed + i, dtype=torch.float32).to(p.dtype)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def unrounded(monkeypatch):
    """What the eager rules round: (weight, its float32 stand-in after the step), in order."""
    seen = []

    def copy_(dst, src, **rng_key):
        seen.append((dst, src.detach().clone()))
        return write_back_copy(dst, src, **rng_key)

    write_back_copy = write_back.copy_
    monkeypatch.setattr(write_back, "copy_", copy_)
    monkeypatch.setattr(rounded, "copy_", copy_)
    return seen


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "backend", lambda kind: None)


@pytest.mark.parametrize("dtype", [BF16, F16])
@every_method
def test_a_weight_is_rounded_once_a_step_by_its_own_counter(name, dtype, unrounded, no_kernels):
    """Bits: those of the specification, at its index among all, and its own count of steps."""
    model = model_of(name, dtype)
    optimizer = make(name, model)
    order = [p for group in optimizer.param_groups for p in group["params"]]
    late = order[1]
    for step in range(1, 4):
        set_grads(order, step)
        if step == 1:
            late.grad = None  # starts a step later, and counts its own
        unrounded.clear()
        optimizer.step()
        stepped = [p for p in order if p.grad is not None]
        assert len(unrounded) == len(stepped)
        for p, wide in unrounded:
            assert wide.dtype == torch.float32
            index = next(i for i, q in enumerate(order) if q is p)
            rng_key = {"seed": SEED, "step": step - (p is late), "index": index}
            assert torch.equal(p, round_stochastic(wide, dtype, **rng_key)), (index, step)


@pytest.mark.sampled(3)
@every_method
def test_the_mean_over_seeds_is_the_unrounded_step(name, unrounded, no_kernels):
    """Within four standard errors over all weights, and no weight goes beyond its neighbours."""
    errors, chances = [], []
    for seed in range(8):
        model = model_of(name)
        hyper = {"projector": "svd"} if "galore" in name or name == "fira" else {}
        optimizer = make(name, model, seed=seed, **hyper)
        set_grads(list(model.parameters()), 0)
        unrounded.clear()
        optimizer.step()
        for p, wide in unrounded:
            low = round_down(wide)
            spacing = round_up(wide) - low
            assert ((p.float() == low) | (p.float() == low + spacing)).all()
            inexact = spacing != 0
            chance = ((wide - low) / spacing)[inexact].double()
            errors.append((((p.float() - low) / spacing)[inexact].double() - chance).flatten())
            chances.append((chance * (1 - chance)).flatten())
    error, variance = torch.cat(errors), torch.cat(chances).sum().item()
    assert error.numel() > 8 * 4000
    assert abs(error.sum().item()) < 4 * math.sqrt(variance)


def round_down(x):
    """The bfloat16 neighbour towards zero."""
    return (x.view(torch.int32) & ~0xFFFF).view(torch.float32)


def round_up(x):
    low = round_down(x)
    away = ((x.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
    return torch.where(low == x, low, away)


@every_method
def test_the_order_of_the_parameters_does_not_matter(name):
    """Each alone and in reverse, as an optimizer in the backward pass steps them: the same bits."""
    runs = []
    for alone in (False, True):
        model = model_of(name)
        optimizer = make(name, model)
        params = list(model.parameters())
        for step in range(3):
            set_grads(params, step)
            if alone:
                grads = [p.grad for p in params]
                for p, grad in reversed([*zip(params, grads, strict=True)]):
                    for q in params:
                        q.grad = None
                    p.grad = grad
                    optimizer.step()
            else:
                optimizer.step()
        runs.append(values(model))
    assert same(*runs)


@every_method
def test_released_in_the_backward_the_bits_are_the_same(name):
    runs = []
    for released in (False, True):
        model = model_of(name)
        optimizer = make(name, model)
        handle = release(optimizer) if released else nullcontext()
        with handle:
            for step in range(3):
                optimizer.zero_grad()
                terms = [
                    (p * normal(*p.shape, seed=9 * step + i, dtype=torch.float32).to(BF16)).sum()
                    for i, p in enumerate(model.parameters())
                ]
                sum(terms).backward()
                optimizer.step()
        runs.append(values(model))
    assert same(*runs)


@pytest.mark.sampled(3)
@every_method
def test_a_resumed_run_goes_on_to_the_bit(name):
    model = model_of(name)
    optimizer = make(name, model)
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    saved = reloaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = model_of(name)
    again.load_state_dict(saved["model"])
    other = make(name, again)
    other.load_state_dict(saved["optimizer"])
    twin, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (again, other), (twin, copied)):
        for step in range(3, 6):
            set_grads(list(m.parameters()), step)
            o.step()
    assert same(values(model), values(again)) and same(values(model), values(twin))
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
        assert a["rounding_step"].dtype == torch.int64 and a["rounding_step"] == 6


@every_method
def test_float32_weights_are_not_rounded_and_not_counted(name):
    runs = []
    for rounding in ("nearest", "stochastic"):
        model = model_of(name, torch.float32)
        optimizer = make(name, model, rounding=rounding)
        for step in range(3):
            set_grads(list(model.parameters()), step)
            optimizer.step()
        assert not any("rounding_step" in state for state in optimizer.state.values())
        runs.append(values(model))
    if name in TORCH:  # one by one, torch's fused steps are not taken
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)
    else:
        assert same(*runs)


@needs_cpu_kernels
@pytest.mark.parametrize("hyper", [{}, {"normalize": "row"}, {"weight_decay": 0.1}], ids=str)
def test_scales_kernels_and_its_specification_agree(hyper):
    """Where the float32 results differ in a last bit, a rounding may; so one weight in hundreds."""
    runs = []
    for fused in (True, False):
        model = llama(BF16)
        optimizer = make("scale", model, fused=fused, **hyper)
        set_grads(list(model.parameters()), 1)
        optimizer.step()
        runs.append(values(model))
    differ = total = 0
    for a, b in zip(*runs, strict=True):
        differ, total = differ + (a != b).sum().item(), total + a.numel()
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-6)
    assert differ < total / 300


@needs_cpu_kernels
def test_kernels_and_specification_have_the_same_bits_where_the_step_is_exact():
    """Signs and a power of two: the float32 results are alike, so the roundings must be."""
    runs = []
    for fused in (True, False):
        model = llama(BF16)
        optimizer = make("scale", model, fused=fused, normalize="sign", lr=2.0**-12)
        for step in range(4):
            set_grads(list(model.parameters()), step)
            optimizer.step()
        runs.append([p.detach().clone() for p in model.parameters() if p.ndim > 1])
    assert same(*runs)


@pytest.mark.parametrize("name", ["galore", "adams"])
def test_adams_kernels_and_specification_agree(name):
    runs = []
    for foreach in (None, False):
        model = model_of(name)
        optimizer = make(name, model, foreach=foreach)
        for step in range(2):
            set_grads(list(model.parameters()), step)
            optimizer.step()
        runs.append(values(model))
    differ = sum((a != b).sum().item() for a, b in zip(*runs, strict=True))
    assert differ < sum(a.numel() for a in runs[0]) / 100
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-4)


def test_a_stack_whose_columns_are_reduced_takes_the_specification():
    """A kernel would give each of its matrices the bits of the first elements."""
    start = normal(3, 8, 6, dtype=torch.float32).to(BF16)
    results = []
    for fused in (None, False):
        weight = nn.Parameter(start.clone())
        group = {"params": [weight], "role": "hidden", "stacked": True}
        optimizer = make("scale", [group], normalize="row", fused=fused)
        set_grads([weight], 3)
        optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)
    with pytest.raises(RuntimeError, match="fused=True cannot step"):
        weight.grad = torch.ones_like(weight)
        make("scale", [{**group, "params": [weight]}], normalize="row", fused=True).step()


@pytest.mark.parametrize("fused", [None, False])
def test_updates_below_half_a_last_bit_are_not_lost(fused):
    """A 64th of one, 200 times: to nearest nothing moves; stochastic, what ought to."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        weight = nn.Parameter(torch.ones(100, 100, dtype=BF16))
        group = {"params": [weight], "role": "hidden"}
        optimizer = make("scale", [group], rounding=rounding, lr=2.0**-14, fused=fused)
        for _ in range(200):
            weight.grad = -torch.ones_like(weight)
            optimizer.step()
        moved[rounding] = weight.detach().double() - 1
    assert (moved["nearest"] == 0).all()
    # Each step adds a variance of at most 2^-7 times 2^-14.
    error = math.sqrt(200 * 2.0**-21 / 10_000)
    assert abs(moved["stochastic"].mean().item() - 200 * 2.0**-14) < 4 * error


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["scale", "galore", "adamw"])
def test_training_goes_on_where_rounding_to_nearest_stalls(name):
    """Rates so small that most steps are below half a last bit."""
    losses = {}
    for rounding, dtype in (("nearest", torch.float32), ("nearest", BF16), ("stochastic", BF16)):
        model = llama(dtype)
        optimizer = make(name, model, lr=2e-4, rounding=rounding)
        losses[rounding, dtype] = train(model, optimizer, 30)[-1]
    exact, nearest, stochastic = losses.values()
    assert abs(stochastic - exact) < abs(nearest - exact) / 2


def test_what_it_holds_beside_the_weights():
    """A count a tensor; Adam's moments in float32; the head's momentum stays in bfloat16."""
    model = Tiny(dtype=BF16)
    for name in ("scale", "galore", "adamw"):
        optimizer = make(name, model)
        set_grads(list(model.parameters()), 0)
        optimizer.step()
        held = [t for state in optimizer.state.values() for t in state.values()]
        counted = account(model, name, rounding="stochastic")
        assert counted.state_total == sum(t.numel() * t.element_size() for t in held)
        moments = {s["exp_avg_sq"].dtype for s in optimizer.state.values() if "exp_avg_sq" in s}
        assert moments == {torch.float32}
    scale = make("scale", model)
    scale.step()
    assert scale.state[model.lm_head.weight]["exp_avg"].dtype == BF16
    assert set(scale.state[model.hidden.weight]) == {"rounding_step"}


def test_a_hyperparameter_that_torch_does_not_have():
    with pytest.raises(ValueError, match="Invalid rounding: 'up'; it must be one of nearest"):
        create_optimizer("adamw", Tiny(), rounding="up")
    assert type(create_optimizer("adamw", Tiny(), rounding="nearest")) is torch.optim.AdamW
