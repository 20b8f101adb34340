"""An average of the weights under release, by the code of the page, against one without."""

import re

import numpy as np
import pytest
import torch
from data_helpers import ROOT
from release_runs import llama, loss_of, make

import optimzoo

STEPS = 5
PAGE = ROOT / "docs" / "gradient_release.md"
[CODE] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("name", ["scale", "adamw", "muon"])
def test_the_average_is_that_of_a_run_without_release(name):
    model = llama(torch.float64)
    scope = {
        "optimzoo": optimzoo,
        "model": model,
        "optimizer": make(name, model, lr=0.02),
        "batches": range(STEPS),
        "loss": lambda step: loss_of(model, step),
    }
    exec(CODE, scope)
    assert scope["average"].n_averaged == STEPS

    plain = llama(torch.float64)
    optimizer, means = make(name, plain, lr=0.02), None
    for step in range(STEPS):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        weights = [p.detach().cpu().numpy().copy() for p in plain.parameters()]
        if means is None:
            means = weights
        else:
            means = [0.999 * m + 0.001 * w for m, w in zip(means, weights, strict=True)]
    averaged = [p.detach().cpu().numpy() for p in scope["average"].module.parameters()]
    for ours, expected, last in zip(averaged, means, weights, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-14)
        assert np.abs(last - expected).max() > 1e-4  # an average that was a copy would be seen
    # It has no part in the release: its own weights keep no hooks, and a step leaves it alone.
    loss_of(scope["average"].module, 0).backward()
    assert all(p.grad is not None for p in scope["average"].module.parameters())
