"""The switch `fused`, on every optimizer: by kernels, by none, or by kernels alone."""

import copy

import pytest
import torch
from needs import needs_cpu_kernels
from optimizer_db import Tiny, train
from registered import NAMES, create
from torch import nn

from optimzoo import create_optimizer, get_info, param_groups
from optimzoo.kernels import dispatch

OURS = [n for n in NAMES if get_info(n).make.__module__.startswith("optimzoo.")]


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels that are called."""
    names = []
    kernels = dispatch.backend("cpu")
    for name in ("scale_", "adam_", "adams_", "reduce", "apply_", "center_", "sinkhorn_"):
        if hasattr(kernels, name):
            real = getattr(kernels, name)

            def counted(*args, name=name, real=real, **options):
                names.append(name)
                return real(*args, **options)

            monkeypatch.setattr(kernels, name, counted)
    return names


def stepped(name, **options):
    model = Tiny()
    optimizer = create(name, model, lr=2**-8, **options)
    train(model, optimizer, 3)
    return model, optimizer


@needs_cpu_kernels
@pytest.mark.parametrize("name", OURS)
def test_false_is_the_eager_path_and_none_takes_kernels(name, calls):
    eager, optimizer = stepped(name, fused=False)
    assert calls == [] and all(group["fused"] is False for group in optimizer.param_groups)
    fast, optimizer = stepped(name)
    assert calls and all(group["fused"] is None for group in optimizer.param_groups)
    for ours, theirs in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_cpu_kernels
@pytest.mark.parametrize("name", OURS)
def test_true_takes_kernels_or_names_the_weight(name, calls):
    stepped(name, fused=True)
    assert calls
    model = Tiny().double()
    with pytest.raises(RuntimeError, match=r"fused=True cannot step a torch\.float64") as caught:
        train(model, create(name, model, fused=True), 1)
    assert "\n" not in str(caught.value)


@needs_cpu_kernels
def test_a_group_may_differ(calls):
    model = Tiny()
    groups = [{**g, "fused": g["role"] != "vector"} for g in param_groups(model)]
    for group in groups:
        group["fused"] = None if group["fused"] else False
    optimizer = create_optimizer("galore", groups, fused=True)
    train(model, optimizer, 1)
    both = len(calls)
    again, everything = Tiny(), {"fused": False}
    train(again, create_optimizer("galore", again, **everything), 1)
    assert 0 < both == len(calls)


def test_without_kernels_true_is_refused_before_the_first_weight_moves(monkeypatch):
    monkeypatch.setattr(dispatch, "_backend", lambda kind: None)
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    for name in OURS:
        with pytest.raises(RuntimeError, match=r"fused=True cannot step a torch\.float32"):
            train(model, create(name, model, fused=True), 1)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    weight = nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    create_optimizer("galore", [weight], fused=None).step()
    assert not torch.equal(weight, torch.ones(2, 2))
