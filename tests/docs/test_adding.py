"""The method of the contributing guide: its code runs, and has the rule that it says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from optimzoo.core.record import RECORDS

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
LR, DECAY, MOMENTUM = 0.01, 0.1, 0.9


@pytest.fixture(scope="module")
def signum():
    (code,) = re.findall(r"```python\n(.+?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    assert RECORDS.pop("signum").make is names["Signum"]
    return names["Signum"]


def stepped(signum, weights, grads, **options):
    """Return the weights after a step for each set of gradients, and the optimizer."""
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in weights]
    groups = [
        {"params": params[:-1], "role": "hidden"},
        {"params": params[-1:], "role": "hidden", "transposed": True},
    ]
    optimizer = signum(groups, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, **options)
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = torch.from_numpy(grad)
        optimizer.step()
    return [p.detach().numpy() for p in params], optimizer


@pytest.mark.parametrize(("foreach", "calls"), [(False, 4), (True, 3)])
def test_the_guides_method_has_its_rule_alone_and_in_stacks(signum, foreach, calls):
    shapes = []

    class Counted(signum):
        def direction(self, grad, *rest):
            shapes.append(tuple(grad.shape))
            return super().direction(grad, *rest)

    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape in ((5, 3), (4, 4), (5, 3), (5, 3))]
    grads = [[rng.normal(size=w.shape) for w in weights] for _ in range(6)]
    expected = [w.copy() for w in weights]
    momenta = [np.zeros_like(w) for w in weights]
    for step in grads:
        for w, m, g in zip(expected, momenta, step, strict=True):
            m[...] = MOMENTUM * m + (1 - MOMENTUM) * g
            w[...] = (1 - LR * DECAY) * w - LR * np.sign(m)
    found, _ = stepped(Counted, weights, grads, foreach=foreach)
    for w, e in zip(found, expected, strict=True):
        np.testing.assert_allclose(w, e, rtol=0, atol=1e-14)
    assert len(shapes) == calls * len(grads) and (3, 5) in shapes
    assert ((2, 5, 3) in shapes) == foreach


def test_the_base_gives_it_8_bit_momentum_and_state_that_loads(signum):
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(96, 80)).astype(np.float32) for _ in range(2)]
    grads = [[rng.normal(size=(96, 80)).astype(np.float32) for _ in weights] for _ in range(4)]
    _, optimizer = stepped(signum, weights, grads, state_bits=8)
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert state["exp_avg_codes"].dtype == torch.int8 and "exp_avg" not in state
    _, other = stepped(signum, weights, [])
    other.load_state_dict(optimizer.state_dict())
    loaded = other.state[other.param_groups[0]["params"][0]]
    assert torch.equal(loaded["exp_avg_codes"], state["exp_avg_codes"])
