"""AdamS against its float64 transcription; the mask, the ramp, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from reference.adams_numpy import AdamSReference
from torch import nn

from optimzoo.optimizers.adams import AdamS
from optimzoo.sparsity import unpack

STEPS, TOTAL = 60, 45  # the ramp ends within the run
HIDDEN = {
    "tall": (12, 8),
    "wide": (7, 24),
    "square": (8, 8),
    "row": (1, 12),
    "odd_tall": (129, 4),
    "odd_wide": (5, 132),
    "ties": (6, 16),
    "conv": (6, 2, 2, 3),
    "stack": (3, 5, 12),
    "conv1d": (12, 7),
}
REST = {"embedding": (13, 6), "head": (13, 6), "vector": (7,), "scalar": ()}
SHAPES = {**HIDDEN, **REST}
STACKED, TRANSPOSED = frozenset({"stack"}), frozenset({"conv1d"})
CASES = {
    "paper": {},
    "decay": {"weight_decay": 0.1},
    "cautious": {"weight_decay": 0.5, "weight_decay_style": "cautious"},
    "betas": {"betas": (0.7, 0.95), "eps": 1e-4},
    "strong": {"l1": 2.0, "mask_every": 7},
    "one_of_two": {"n": 1, "m": 2, "mask_every": 1},
    "all_kept": {"n": 4, "m": 4},
    "up": {"maximize": True, "weight_decay": 0.1},
    "predecessor": {"decay": "l2", "l1": 0.5},
}


def start(name):
    """Exact in float32; `ties` has three magnitudes only."""
    index = list(SHAPES).index(name)
    draw = np.random.default_rng([7, index]).normal(size=SHAPES[name])
    draw = np.round(draw) / 2 if name == "ties" else draw / 4
    return np.asarray(draw, dtype=np.float32)


def gradient(name, step):
    """Steady and noise; missing now and then; for `ties` few values, so that ties stay."""
    index = list(SHAPES).index(name)
    if (5 * step + 3 * index) % 11 == 0:
        return None
    steady = np.random.default_rng([8, index]).normal(size=SHAPES[name])
    noise = np.random.default_rng([9, index, step]).normal(size=SHAPES[name])
    value = np.sign(steady) if name == "ties" else steady + noise
    return np.asarray(value, dtype=np.float32)


def groups(params):
    """One group for each layout of the hidden weights, one for each of the other roles."""
    result = []
    for name, p in params.items():
        layout = {"stacked": name in STACKED, "transposed": name in TRANSPOSED}
        role = "vector" if p.ndim < 2 else name if name in REST else "hidden"
        result.append({"params": [p], "param_names": [name], "role": role, **layout})
    return result


def schedule(step):
    return 0.55 + 0.45 * math.cos(math.pi * step / STEPS)


def run_both(dtype, hyper):
    """Yields (step, parameters, optimizer, oracle) after each step of both."""
    params = {n: nn.Parameter(torch.tensor(start(n), dtype=dtype)) for n in SHAPES}
    options = {"l1": 0.3, "total_steps": TOTAL, **hyper}
    optimizer = AdamS(groups(params), lr=0.02, **options)
    known = {k: v for k, v in optimizer.defaults.items() if k in ("betas", "eps", "weight_decay")}
    own = {k: v for k, v in options.items() if k != "foreach"}
    layout = {"stacked": STACKED, "transposed": TRANSPOSED}
    values = {n: start(n) for n in SHAPES}
    oracle = AdamSReference(values, set(HIDDEN), lr=0.02, **{**known, **own}, **layout)
    for step in range(STEPS):
        grads = {n: gradient(n, step) for n in SHAPES}
        for name, p in params.items():
            p.grad = None if grads[name] is None else torch.tensor(grads[name], dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * schedule(step)
        optimizer.step()
        given = {n: g for n, g in grads.items() if g is not None}
        oracle.step(given, lr_factor=schedule(step))
        yield step, params, optimizer, oracle


def masks_of_oracle(oracle, name):
    shape = SHAPES[name]
    if name in STACKED:
        return np.stack([oracle.masks[f"{name}[{i}]"] for i in range(shape[0])])
    mask = oracle.masks[name]
    return mask.T if name in TRANSPOSED else mask.reshape(shape)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_follows_the_transcription_in_float64(case, foreach):
    hyper = {**CASES[case], "foreach": foreach}
    for step, params, optimizer, oracle in run_both(torch.float64, hyper):
        for name, p in params.items():
            state = optimizer.state.get(p, {})
            if not state:
                continue
            message = f"{name}, step {step}"
            np.testing.assert_allclose(
                p.detach().numpy(), oracle.params[name], rtol=1e-9, atol=1e-11, err_msg=message
            )
            if name in HIDDEN:
                mask = unpack(state["mask"], p.shape).numpy()
                assert np.array_equal(mask, masks_of_oracle(oracle, name)), message
    if case != "all_kept":
        assert min(oracle.flips[n] for n in HIDDEN if n != "ties") > 0  # masks did change


@pytest.mark.parametrize("foreach", [False, True])
def test_follows_the_transcription_in_float32(foreach):
    """Until the ramp ends: after it, rounding decides on which side of zero a weight is."""
    for step, params, _, oracle in run_both(torch.float32, {"foreach": foreach}):
        if step >= TOTAL // 2:
            break
        for name, p in params.items():
            np.testing.assert_allclose(
                p.detach().numpy(), oracle.params[name], rtol=1e-4, atol=2e-5, err_msg=name
            )
