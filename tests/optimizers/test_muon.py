"""Muon on a CPU against a NumPy transcription in float64, and against torch's own."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import optimzoo

SHAPES = ((7, 5), (5, 7), (6, 6), (129, 3), (1, 4), (4, 1))
STEPS = 6


def gradients(step):
    generator = np.random.default_rng(step)
    return [np.asarray(generator.normal(size=s), dtype=np.float32) for s in SHAPES]


def transcription(*, lr, momentum, decay, nesterov, steps, adjust):
    """Keller Jordan's iteration, and torch's two ways to adjust the learning rate."""
    weights = [w.astype(np.float64) for w in gradients(99)]
    means = [np.zeros_like(w) for w in weights]
    for step in range(STEPS):
        for i, g in enumerate(gradients(step)):
            g = g.astype(np.float64)
            means[i] = momentum * means[i] + (1 - momentum) * g
            u = momentum * means[i] + (1 - momentum) * g if nesterov else means[i]
            rows, cols = u.shape
            x = u.T if rows > cols else u
            x = x / np.sqrt((x**2).sum())
            for _ in range(steps):
                square = x @ x.T
                x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
            x = x.T if rows > cols else x
            size = 0.2 * math.sqrt(max(rows, cols)) if adjust else math.sqrt(max(1, rows / cols))
            weights[i] = weights[i] * (1 - lr * decay) - lr * size * x
    return weights


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_follows_the_transcription(adjust, nesterov, dtype, limit):
    params = [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in gradients(99)]
    hyper = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    groups = [{"params": params, "role": "hidden"}]
    optimizer = optimzoo.Muon(groups, **hyper, ns_steps=4, adjust_lr_fn=adjust)
    for step in range(STEPS):
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
        optimizer.step()
    options = {"nesterov": nesterov, "steps": 4, "adjust": adjust}
    for p, w in zip(
        params, transcription(lr=0.03, momentum=0.9, decay=0.1, **options), strict=True
    ):
        assert np.abs(p.detach().double().numpy() - w).max() <= limit * np.abs(w).max()


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_is_torchs_but_for_the_rounding_of_its_products(adjust):
    ours, theirs = ([nn.Parameter(torch.tensor(w)) for w in gradients(99)] for _ in range(2))
    hyper = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    optimizers = (
        optimzoo.Muon([{"params": ours, "role": "hidden"}], **hyper),
        torch.optim.Muon(theirs, **hyper),
    )
    for step in range(STEPS):
        for p, q, g in zip(ours, theirs, gradients(step), strict=True):
            p.grad, q.grad = torch.tensor(g), torch.tensor(g)
        for optimizer in optimizers:
            optimizer.step()
    for p, q, w in zip(ours, theirs, gradients(99), strict=True):
        gone = (q - torch.tensor(w)).norm()
        assert 0 < (p - q).norm() < 0.05 * gone
    sizes = [[s["momentum_buffer"] for s in o.state.values()] for o in optimizers]
    for m, n in zip(*sizes, strict=True):
        assert torch.equal(m, n)
