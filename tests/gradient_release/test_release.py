"""Optimizer-in-backward: the same weights, almost no gradients, and refusals where it cannot be."""

import copy
import math
import weakref

import pytest
import torch
from release_runs import DEVICE, assert_equal, distance, llama, loss_of, make, train
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR
from zoo_models import reloaded

import optimzoo
from optimzoo import SCALE, list_optimizers, param_groups, release
from optimzoo.models.llama import Llama, LlamaConfig

NAMES = list_optimizers()


class LiveGradients:
    """Bytes of the gradients that live while a gradient arrives; the most, and of which."""

    def __init__(self, model):
        self.seen, self.peak = [], 0
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self.look)

    def look(self, param):
        self.seen = [s for s in self.seen if s[0]() is not None]
        if all(ref() is not param.grad for ref, _ in self.seen):
            self.seen.append((weakref.ref(param.grad), param.grad.nbytes))
        self.peak = max(self.peak, sum(size for _, size in self.seen))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_in_weights_and_state(name):
    inner = 36 if name == "adams" else 37
    models = [Llama(LlamaConfig(97, 24, inner, 2, 2), seed=3).to(DEVICE) for _ in range(2)]
    optimizers = []
    for i, model in enumerate(models):
        optimizer = make(name, model, lr=1e-2)
        scheduler = LinearLR(optimizer, 0.1, total_iters=10)
        if i:
            release(optimizer)
        train(model, optimizer, range(20), scheduler=scheduler)
        optimizers.append(optimizer)
    assert_equal(*models)
    states = [o.state_dict()["state"] for o in optimizers]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"fused": False},
        {"foreach": True},
        {"normalize": "row", "norm": "l2", "weight_decay": 0.1},
        {"normalize": "sign", "maximize": True},
        {"normalize": "spectral"},
        {"vector_lr": 1e-2, "momentum": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_is_exact_under_clipping(hyper, dtype):
    """But for rounding: a step rounds a weight's factor, its direction, the product and the sum."""
    steps, roundings = 20, 4
    near = steps * roundings * torch.finfo(dtype).eps / 2
    models, norms = [llama(dtype), llama(dtype)], []
    if (hyper.get("normalize"), dtype) == ("spectral", torch.float32):
        # On a GPU Newton-Schulz is in bfloat16, as in Muon. In float32 each of its five iterations
        # stretches small singular values, and rounding with them, up to 3.4 times: 3.4^5 · 2^-24 of
        # a direction, of which a step, 1e-3 of weights of 0.02, keeps a twentieth; twenty steps.
        near = 0.05 if DEVICE == "cuda" else 3e-5
    for i, model in enumerate(models):
        optimizer = make("scale", model, **hyper)
        released = release(optimizer, max_norm=0.3) if i else None
        norms.append(train(model, optimizer, range(steps), clip=0.3, released=released))
    assert min(norms[0]) > 0.3
    assert distance(*models) < near
    assert norms[1] == pytest.approx(norms[0], rel=near)


@pytest.mark.parametrize("name", ["swan", "sinkgd"])
def test_scale_invariant_methods_are_exact_under_clipping(name):
    models = [llama(torch.float64), llama(torch.float64)]
    for i, model in enumerate(models):
        optimizer = make(name, model)
        released = release(optimizer, max_norm=0.3) if i else None
        train(model, optimizer, range(20), clip=0.3, released=released)
    assert distance(*models) < 1e-12


@pytest.mark.parametrize("clip", [None, 0.3])
def test_few_gradients_live_at_once(clip):
    model = llama()
    live = LiveGradients(model)
    optimizer = make("scale", model)
    train(model, optimizer, range(1))
    every = sum(p.nbytes for p in model.parameters())
    assert live.peak == every
    release(optimizer, max_norm=clip)
    live.peak, live.seen = 0, []
    train(model, optimizer, range(2))
    sizes = {p: p.nbytes for p in model.parameters()}
    waiting = sum(s for p, s in sizes.items() if p is model.lm_head.weight or p.ndim == 1)
    two = sum(sorted(sizes.values())[-2:])
    assert live.peak <= (waiting if clip else 0) + two < every


def test_groups_with_momentum_wait_for_the_norm():
    models = [llama(torch.float64), llama(torch.float64)]
    for i, model in enumerate(models):
        groups = param_groups(model)
        next(g for g in groups if g["role"] == "hidden")["momentum"] = 0.5
        optimizer = SCALE(groups)
        released = release(optimizer, max_norm=0.3) if i else None
        train(model, optimizer, range(5), clip=0.3, released=released)
    assert distance(*models) < 1e-13


def test_an_infinite_max_norm_measures():
    models = [llama(), llama()]
    train(models[0], make("scale", models[0]), range(3))
    optimizer = make("scale", models[1])
    released = release(optimizer, max_norm=math.inf)
    norms = train(models[1], optimizer, range(3), clip=math.inf, released=released)
    assert_equal(*models)
    assert min(norms) > 0


@pytest.mark.parametrize("clip", [None, 0.3])
def test_closures(clip):
    models = [llama(torch.float64), llama(torch.float64)]
    for i, model in enumerate(models):
        optimizer = make("scale", model)
        released = release(optimizer, max_norm=clip) if i else None

        def closure(model=model, optimizer=optimizer, released=released):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            if clip and released is None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        losses = [optimizer.step(closure).item() for _ in range(5)]
        assert losses[-1] < losses[0]
    assert distance(*models) < 1e-13


def test_accumulation_is_refused_unless_paused():
    models = [llama(), llama()]
    optimizer = make("adamw", models[0])
    for _ in range(3):
        for micro in range(3):
            loss_of(models[0], micro).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer = make("adamw", models[1])
    released = release(optimizer)
    for _ in range(3):
        with released.paused():
            for micro in range(2):
                loss_of(models[1], micro).backward()
        loss_of(models[1], 2).backward()
        optimizer.step()
    assert_equal(*models)
    loss_of(models[1], 0).backward()
    with pytest.raises(RuntimeError, match=r"second gradient.*\(97, 24\).*released.paused"):
        loss_of(models[1], 1).backward()


def test_removable_and_refused_twice():
    models = [llama(), llama()]
    train(models[0], make("scale", models[0]), range(4))
    optimizer = make("scale", models[1])
    with release(optimizer):
        train(models[1], optimizer, range(2))
        with pytest.raises(ValueError, match="released already"):
            release(make("sgd", models[1]))
    assert not any(p._post_accumulate_grad_hooks for p in models[1].parameters())
    loss_of(models[1], 2).backward()
    assert all(p.grad is not None for p in models[1].parameters())
    optimizer.step()
    optimizer.zero_grad()
    train(models[1], optimizer, [3])
    assert_equal(*models)


def test_refusals():
    model = llama()
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, not Llama"):
        release(model)
    with pytest.raises(ValueError, match="LBFGS steps all parameters together"):
        release(torch.optim.LBFGS(model.parameters()))
    for name in ("adamw", "galore", "stable_spam", "muon"):
        with pytest.raises(ValueError, match=r"cannot clip what it releases.*without max_norm"):
            release(make(name, model), max_norm=1.0)
    with pytest.raises(ValueError, match="Invalid max_norm: 0; it must be > 0"):
        release(make("scale", model), max_norm=0)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_checkpoints_resume_to_the_same_bits():
    models = [llama(), llama(), llama()]
    for i, model in enumerate(models[:2]):
        optimizer = make("galore", model)
        if i:
            release(optimizer)
        train(model, optimizer, range(5))
    state = optimizer.state_dict()
    models[2].load_state_dict(models[1].state_dict())
    resumed = make("galore", models[2])
    release(resumed)  # a load brings new groups and a new state
    resumed.load_state_dict(reloaded(state))
    train(models[2], resumed, range(5, 10))
    optimizer = make("galore", models[0])
    optimizer.load_state_dict(reloaded(state))
    train(models[0], optimizer, range(5, 10))
    assert_equal(models[0], models[2])
    assert not copy.deepcopy(models[2]).lm_head.weight._post_accumulate_grad_hooks


def test_hooks_and_schedulers_run_once_a_round():
    model, calls = llama(), []
    optimizer = make("scale", model)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    release(optimizer)
    train(model, optimizer, range(2), scheduler=scheduler)
    assert calls == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 4)


def test_the_public_name():
    assert optimzoo.release is release
