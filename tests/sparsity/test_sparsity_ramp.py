"""CAST's ramp: masked weights shrink to nothing, and `finalize` says what is left of them."""

import math
import warnings

import pytest
import torch
from test_sparsity import logits, small
from torch import nn
from zoo_models import train

from optimzoo.optimizers.adams import AdamS
from optimzoo.sparsity import finalize, masked_weights, prepare, report, sparse_groups


def decay_bound(rates, start, *, l1, total_steps):
    """The size that a masked weight of ``start`` at most has after steps without gradients.

    AdamS moves it towards 0 by s = η · αλ / (1 - β₁ᵗ) / √(v / (1 - β₂ᵗ)), and past it by at most s.
    """
    v, size = 0.0, start
    for t, rate in enumerate(rates, start=1):
        pull = min(t / total_steps, 1.0) * l1
        v = 0.999 * v + 0.001 * pull**2
        step = rate * pull / (1 - 0.9**t) / (v / (1 - 0.999**t)) ** 0.5
        size = max(size - step, step)
    return size


def falling(steps, rate=0.01):
    return [rate * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]


def test_without_gradients_masked_weights_shrink_by_the_ramps_arithmetic():
    model, rates = small(), falling(60)
    prepare(model)
    # One mask for all steps: the first step, of η / (1 - β₁), takes masked weights past kept ones.
    options = {"l1": 0.01, "total_steps": 60, "mask_every": 60}
    optimizer = AdamS(sparse_groups(model), lr=0.01, **options)
    before = {p: p.detach().clone() for p in model.parameters()}
    for rate in rates:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for item in masked_weights(model, optimizer):
        parent = next(p for p in before if p.data_ptr() == item.weight.data_ptr())
        assert torch.equal(item.weight[item.mask], before[parent][item.mask])
        largest = before[parent].abs().max().item()
        bound = decay_bound(rates, largest, l1=0.01, total_steps=60)
        # Each of the steps is rounded, and each weight as often: to 2^-24 of the largest.
        limit = bound + 60 * 2**-23 * largest
        assert item.weight[~item.mask].abs().max() <= limit < 1e-2 * largest
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut = finalize(model, optimizer)
    assert max(cut.values()) < 1e-2


def test_a_dense_model_ends_sparse_with_what_it_learned():
    """Where the decay is far above the gradients, and goes on past the ramp, whatever they are."""
    model = small()
    prepare(model)
    optimizer = AdamS(sparse_groups(model), lr=0.01, l1=10.0, total_steps=40)
    losses = []
    for rate in falling(80):
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses += train(model, optimizer, 1)
        if len(losses) == 1:
            assert report(model, optimizer).total()["masked_mean"] > 0.1
    assert losses[-1] < losses[0] / 2
    assert report(model, optimizer).total()["masked_mean"] < 1e-3
    dense = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        finalize(model, optimizer)
    assert (logits(model) - dense).abs().max() < 1e-2 * dense.abs().max()


def test_finalize_returns_and_tells_how_much_of_each_weight_it_cuts():
    layers = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        layers[0].weight.copy_(torch.tensor([[4.0, -2.0, 1.0, 2.0]]))
        layers[1].weight.copy_(torch.tensor([[4.0, -4.0, 0.0, 1e-3]]))
    optimizer = AdamS([{"params": list(layers.parameters()), "role": "hidden"}], lr=0.0, l1=0.0,
                      total_steps=9)  # fmt: skip
    for p in layers.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    message = (
        r"^finalize sets weights to 0 that are not small: 44.7% of the norm of 0.weight, and above "
        r"1.0% in 1 of 2 weights; .*$"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        cut = finalize(layers, optimizer)
    assert cut == pytest.approx({"0.weight": (5 / 25) ** 0.5, "1.weight": 1e-3 / 32**0.5})
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert layers[0].weight.tolist() == [[4.0, -2.0, 0.0, 0.0]]
