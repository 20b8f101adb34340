"""Methods whose hidden rule calls kernels: with them and without, the same training."""

import pytest
import torch
from needs import needs_cpu_kernels
from torch import nn

import optimzoo
from optimzoo.kernels import dispatch

pytestmark = needs_cpu_kernels

METHODS = {
    "fira": ("fira", {"rank": 4, "update_proj_gap": 5}),
    "fira, all of the residual": ("fira", {"rank": 4, "residual_scale": "one"}),
    "apollo": ("apollo", {"rank": 4, "update_proj_gap": 5}),
    "apollo, scaled in front": ("apollo", {"rank": 4, "scale_front": True}),
    "apollo, one scale": ("apollo", {"rank": 4, "scale_type": "tensor", "maximize": True}),
    "apollo_mini": ("apollo_mini", {}),
    "swan": ("swan", {}),
    "sinkgd": ("sinkgd", {"alpha": 1.0}),
    "sinkgd, once": ("sinkgd", {"alpha": 1.0, "iterations": 1, "maximize": True}),
    "stable_spam": ("stable_spam", {"update_proj_gap": 5}),
    "stable_spam, clean": ("stable_spam", {"update_proj_gap": 5, "reset_step": "clean"}),
}
CALLS = {"fira": "reduce_ apply_", "apollo": "reduce_ apply_", "swan": "center_"}
CALLS |= {"sinkgd": "sinkhorn_", "apollo_mini": "reduce_ apply_", "stable_spam": "reduce_ adam_"}


def train(name, options, shape, dtype, *, rounding="nearest"):
    """Twelve steps whose gradients lie mostly in a few directions, one of them with a spike."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    start = weight.detach().clone()
    cause = torch.randn(shape[0], 3, generator=generator)
    optimizer = optimzoo.create_optimizer(
        name,
        [{"params": [weight], "role": "hidden"}],
        lr=1e-2,
        weight_decay=0.1,
        rounding=rounding,
        **options,
    )
    for step in range(12):
        grad = cause @ torch.randn(3, shape[1], generator=generator)
        grad += 0.3 * torch.randn(shape, generator=generator)
        if step == 8:
            grad[0, 0] = 300.0
        weight.grad = grad.to(dtype)
        optimizer.step()
    return start.float(), weight.detach().float()


@pytest.mark.parametrize("shape", [(24, 7), (7, 24), (129, 33), (16, 16)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_kernels_take_the_same_steps(method, shape, monkeypatch):
    name, options = METHODS[method]
    start, fused = train(name, options, shape, torch.float32)
    monkeypatch.setattr(dispatch, "backend", lambda kind: None)
    _, eager = train(name, options, shape, torch.float32)
    assert (fused - eager).norm() <= 2e-5 * (eager - start).norm()


@pytest.mark.parametrize("method", METHODS)
def test_kernels_take_the_same_steps_in_bfloat16(method, monkeypatch):
    name, options = METHODS[method]
    kernels = {"rounding": "stochastic"}  # moments in float32 on both sides
    start, fused = train(name, options, (40, 24), torch.bfloat16, **kernels)
    monkeypatch.setattr(dispatch, "backend", lambda kind: None)
    _, eager = train(name, options, (40, 24), torch.bfloat16, **kernels)
    # A rounding that falls otherwise moves an entry by one of its last bits.
    assert (fused - eager).norm() <= 5e-2 * (eager - start).norm()


@pytest.mark.parametrize("method", METHODS)
def test_the_kernels_are_called(method, monkeypatch):
    name, options = METHODS[method]
    called = set()
    kernels = dispatch.backend("cpu")
    run = kernels._call
    monkeypatch.setattr(kernels, "_call", lambda op, *a, **k: (called.add(op), run(op, *a, **k))[1])
    train(name, options, (24, 7), torch.float32)
    expected = {call.rstrip("_") for call in CALLS[name].split()}
    if options.get("residual_scale") == "one":
        expected = {"adam"}
    assert expected <= called
