"""Steps by a GPU's kernels against NumPy in float64 and eager ones: Nesterov's momentum, SinkGD.

The kernels may be emulated or interpreted: then the device is the CPU.
"""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
from reference.muon_numpy import RmnpReference
from reference.scale_numpy import ScaleReference
from reference.spectral_numpy import SinkgdReference
from torch import nn

from optimzoo import RMNP, SCALE, SinkGD, stacks
from optimzoo.kernels import dispatch

NESTEROV = {
    "rmnp": {},
    "scale by rows": {"normalize": "column"},
    "scale by columns": {"normalize": "row", "norm": "l2"},
    "scale by sign": {"normalize": "sign"},
}
METHODS = NESTEROV | {"sinkgd": {"alpha": 1.0}}
LAYOUTS = {
    "tall": ((33, 17), {}),
    "wide": ((17, 40), {}),
    "odd": ((3, 259), {}),
    "one row": ((1, 70), {}),
    "transposed": ((17, 33), {"transposed": True}),
    "stack": ((3, 8, 5), {"stacked": True}),
    "transposed stack": ((2, 8, 12), {"stacked": True, "transposed": True}),
}
VARIANTS = [{}, {"weight_decay_style": "cautious", "maximize": True}]
RULE = {"lr": 0.02, "weight_decay": 0.1}
MOMENTUM = {"momentum": 0.8, "nesterov": True}


class Counted:
    """A backend that counts the calls of its kernels."""

    def __init__(self, kernels):
        self.kernels, self.calls = kernels, []

    def available(self):
        return True

    def __getattr__(self, name):
        function = getattr(self.kernels, name)
        return lambda *args, **options: (self.calls.append(name), function(*args, **options))[1]


@contextmanager
def chosen(kernels, device):
    """Let dispatch choose these kernels, on a CPU as it does on a GPU."""
    counted = Counted(kernels)
    dispatch._backend.cache_clear()
    try:
        with mock.patch.dict(dispatch.BACKENDS, {device: (counted,)}):
            if device == "cpu":
                with mock.patch.object(stacks, "on_gpu", lambda matrix: True):
                    yield counted
            else:
                yield counted
    finally:
        dispatch._backend.cache_clear()


def gradients(shape, dtype, device, steps=4):
    """Of sizes that are far apart; a row and a column of zeros for good, others now and then."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        grad = torch.randn(shape, generator=generator) * 2.0 ** (step % 3)
        if shape[-2] > 1:
            grad[..., 0, :] = 0
            grad[..., 2 + step % 3 :: 5, :] = 0
        grad[..., 1] = 0
        yield grad.to(dtype).to(device)


def kernel_of(method):
    return "sinkhorn_" if method == "sinkgd" else "scale_"


def steps_of(method):
    return 2 if method == "sinkgd" else 4  # it keeps nothing from one to the next


def make(method, weight, layout, **options):
    group = {"params": [weight], "role": "hidden", **layout}
    if method == "rmnp":
        return RMNP([group], **RULE, **MOMENTUM, **options)
    if method == "sinkgd":
        return SinkGD([group], **RULE, **options)
    return SCALE([{**group, "momentum": 0.8}], **RULE, **MOMENTUM, **options)


def trained(method, shape, layout, dtype, device, **options):
    """Return the weight before and after the steps, and its state."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    weight = nn.Parameter(start.clone())
    optimizer = make(method, weight, layout, **METHODS[method], **options)
    for grad in gradients(shape, dtype, device, steps_of(method)):
        weight.grad = grad
        optimizer.step()
    return start, weight.detach(), optimizer.state[weight]


def as_matrices(tensor, layout):
    """Return the matrices ``[out, in]`` by name."""
    array = tensor.detach().double().cpu().numpy()
    array = array if layout.get("stacked") else array[None]
    return {str(i): a.T if layout.get("transposed") else a for i, a in enumerate(array)}


def expected(method, start, layout, device, **options):
    weights = as_matrices(start, layout)
    rule = {**RULE, **METHODS[method], **options}
    if method == "rmnp":
        reference = RmnpReference(weights, set(weights), **rule, **MOMENTUM)
    elif method == "sinkgd":
        reference = SinkgdReference(weights, set(weights), **rule)
    else:
        reference = ScaleReference(weights, dict.fromkeys(weights, "head"), **rule, **MOMENTUM)
    for grad in gradients(start.shape, start.dtype, device, steps_of(method)):
        reference.step(as_matrices(grad, layout))
    return reference.params


def check(kernels, device, method, layout):
    """In float32, each by itself: the reference's weights, and the eager path's with its state."""
    shape, group = LAYOUTS[layout]
    if method == "rmnp" and layout == "one row":
        return  # no matrix
    for options in VARIANTS:
        with chosen(kernels, device) as counted:
            start, weight, state = trained(method, shape, group, torch.float32, device, **options)
        assert kernel_of(method) in counted.calls
        _, eager, eager_state = trained(
            method, shape, group, torch.float32, device, fused=False, **options
        )
        wanted = expected(method, start, group, device, **options)
        for name, matrix in as_matrices(weight, group).items():
            np.testing.assert_allclose(matrix, wanted[name], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(weight, eager, rtol=3e-6, atol=3e-6)
        assert state.keys() == eager_state.keys()
        for key, value in state.items():
            torch.testing.assert_close(value, eager_state[key], rtol=1e-6, atol=1e-6)


def check_16_bits(kernels, device, method):
    """Of the eager path's dtypes, and rounded by the same random bits."""
    for dtype in (torch.bfloat16, torch.float16):
        for rounding in ("nearest", "stochastic"):
            options = {"rounding": rounding, "fused": None}
            args = (method, (17, 264), {}, dtype, device)
            with chosen(kernels, device) as counted:
                start, weight, state = trained(*args, **options)
            assert kernel_of(method) in counted.calls
            _, eager, eager_state = trained(*args, **{**options, "fused": False})
            assert {k: v.dtype for k, v in state.items()} == {
                k: v.dtype for k, v in eager_state.items()
            }
            moved = (eager.float() - start.float()).norm()
            # The eager path rounds what it looks ahead to, as it does a momentum of 16 bits.
            assert (weight.float() - eager.float()).norm() <= 0.05 * moved
            wide = all(t.dtype == torch.float32 for t in state.values() if t.ndim)
            if wide and rounding == "stochastic":
                assert (weight == eager).float().mean() > 0.98


def check_captured(kernels, method):
    """Replays with another rate each time are steps; for a GPU."""
    weights = []
    for captured in (False, True):
        grads = list(gradients((40, 24), torch.bfloat16, "cuda"))
        weight = nn.Parameter(torch.ones(40, 24, dtype=torch.bfloat16, device="cuda"))
        weight.grad = torch.zeros_like(weight)
        lr = torch.tensor(0.1, device="cuda")
        with chosen(kernels, "cuda"):
            optimizer = make(method, weight, {}, capturable=True, **METHODS[method])
            optimizer.param_groups[0]["lr"] = lr
            graph = torch.cuda.CUDAGraph()
            for step, grad in enumerate(grads):
                weight.grad.copy_(grad)
                lr.fill_(0.1 / (1 + step))
                if step == 0 or not captured:
                    optimizer.step()
                    continue
                if step == 1:
                    with torch.cuda.graph(graph):
                        optimizer.step()
                graph.replay()
        torch.cuda.synchronize()
        weights.append(weight.detach())
    assert torch.equal(*weights) and not weights[0].eq(1.0).all()
