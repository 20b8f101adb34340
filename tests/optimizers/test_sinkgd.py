"""What SinkGD's normalisation keeps to; its steps are in `test_zoo_fidelity`."""

import numpy as np
import pytest
import torch
from needs import needs_cpu_kernels
from reference.spectral_numpy import sr_sinkhorn
from torch import nn
from torch.testing import assert_close

from optimzoo import SinkGD, create_optimizer
from optimzoo.kernels import native
from optimzoo.memory import simulate
from optimzoo.optimizers.sinkgd import sinkhorn

SHAPES = [(12, 7), (7, 12), (9, 9), (129, 5), (1, 7), (7, 1), (1, 1)]


def normal(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def rms(x, dim):
    return x.square().mean(dim).sqrt()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_and_columns_tend_to_the_rms_one(shape):
    x = sinkhorn(normal(*shape), 5)
    assert_close(rms(x, 0), torch.ones(shape[1], dtype=x.dtype), rtol=1e-12, atol=0)
    x = sinkhorn(normal(*shape), 300)
    assert_close(rms(x, 1), torch.ones(shape[0], dtype=x.dtype), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1)], ids=str)
def test_a_line_gives_its_signs(shape):
    grad = normal(*shape)
    assert_close(sinkhorn(grad, 1), grad.sign())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_zero_rows_and_columns_stay_zero_and_leave_the_others_alone(dtype):
    grad = normal(12, 7, dtype=dtype)
    grad[[0, 5]] = 0
    grad[:, [2, 6]] = 0
    x = sinkhorn(grad, 5)
    assert x.dtype == torch.promote_types(dtype, torch.float32)
    assert not x[[0, 5]].any() and not x[:, [2, 6]].any()
    expected = sr_sinkhorn(grad.double().numpy(), 5)
    assert_close(x.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert not sinkhorn(torch.zeros(12, 7, dtype=dtype), 5).any()


@pytest.mark.parametrize("power", [-60, -20, 20, 50])
def test_only_the_direction_of_a_gradient_counts(power):
    """Of a small one too: an eps beside its norms would change the rule."""
    grad = normal(12, 7, dtype=torch.float32)
    assert torch.equal(sinkhorn(grad * 2.0**power, 5), sinkhorn(grad, 5))


def test_a_stack_is_its_matrices_and_the_gradient_stays():
    grad = normal(2, 3, 12, 7, dtype=torch.float32)
    before = grad.clone()
    x = sinkhorn(grad, 5)
    assert torch.equal(grad, before)
    for matrix, own in zip(grad.flatten(0, 1), x.flatten(0, 1), strict=True):
        assert_close(own, sinkhorn(matrix, 5))


@pytest.mark.parametrize("shape", [(24, 40), (33, 17)], ids=str)
def test_thirty_steps_in_bfloat16_follow_the_reference(shape):
    """Normalised in float32, and rounded once: each step is the reference's, rounded."""
    weight = nn.Parameter(normal(*shape, dtype=torch.bfloat16))
    optimizer = SinkGD([{"params": [weight], "role": "hidden"}], weight_decay=0.1, alpha=1.0)
    lr = optimizer.param_groups[0]["lr"]
    for step in range(30):
        before = weight.detach().double().numpy()
        grad = (normal(*shape) * (1 + step) + normal(*shape[::-1]).mT).to(torch.bfloat16)
        weight.grad = grad
        optimizer.step()
        exact = before * (1 - 0.1 * lr) - lr * sr_sinkhorn(grad.double().numpy(), 5)
        off = np.abs(weight.detach().double().numpy() - exact)
        assert (off <= 2.0**-8 * np.abs(exact) + 1e-6).all(), step
    assert optimizer.state[weight] == {}


def test_the_rate_of_a_hidden_weight_is_alpha_times_that_of_the_others():
    weights = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    rates = [{"lr": 0.02}, {"lr": 0.001, "alpha": 1.0}]
    for weight, own in zip(weights, rates, strict=True):
        optimizer = SinkGD([{"params": [weight], "role": "hidden"}], weight_decay=0.5, **own)
        weight.grad = normal(8, 6, dtype=torch.float32)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == own["lr"]
    assert_close(*weights)


LAYOUTS = {
    "weights": ([(9, 17), (300, 40), (1, 7), (7, 1), (9, 17)], {}),
    "transposed": ([(8, 12), (130, 9)], {"transposed": True}),
    "stacks": ([(3, 6, 10), (2, 3, 70, 9)], {"stacked": True}),
    "transposed stacks": ([(3, 6, 10), (2, 3, 70, 9)], {"stacked": True, "transposed": True}),
    "convolutions": ([(4, 3, 2, 2), (6, 1, 4)], {}),
    "transposed convolutions": ([(4, 3, 2, 2)], {"transposed": True}),
}


def stepped(layout, dtype, fused, **options):
    """Return weights of a layout after four steps, and what they were."""
    shapes, how = LAYOUTS[layout]
    weights = [nn.Parameter(normal(*shape, dtype=dtype)) for shape in shapes]
    before = [p.detach().clone() for p in weights]
    groups = [{"params": weights, "role": "hidden", **how}]
    optimizer = SinkGD(groups, lr=0.1, alpha=0.5, weight_decay=0.1, fused=fused, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for p in weights:
            grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = (grad * 10.0 ** (-2 * step)).to(dtype)
            p.grad[0] = 0
        optimizer.step()
    return [p.detach() for p in weights], before


@needs_cpu_kernels
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernel_takes_the_steps_of_the_eager_path(layout, maximize):
    eager, before = stepped(layout, torch.float32, False, maximize=maximize)
    fused, _ = stepped(layout, torch.float32, None, maximize=maximize)
    for p, q, start in zip(fused, eager, before, strict=True):
        assert_close(p, q, rtol=2e-6, atol=2e-6)
        assert not torch.equal(p, start)


@needs_cpu_kernels
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_16_bits_are_rounded_alike(layout, dtype, rounding):
    """By the same random bits: hardly an entry falls to the other side."""
    eager, _ = stepped(layout, dtype, False, rounding=rounding)
    fused, _ = stepped(layout, dtype, None, rounding=rounding)
    apart = sum(int((p != q).sum()) for p, q in zip(fused, eager, strict=True))
    assert apart <= 0.01 * sum(p.numel() for p in eager)


@needs_cpu_kernels
def test_a_group_is_one_call_of_the_kernel(monkeypatch):
    calls = []
    run = native.CPU.sinkhorn_
    monkeypatch.setattr(
        native.CPU, "sinkhorn_", lambda *a, **k: (calls.append(len(a[0])), run(*a, **k))
    )
    stepped("weights", torch.float32, None)
    assert calls == [5] * 4
    stepped("weights", torch.bfloat16, True, rounding="stochastic")
    assert calls[4:] == [5] * 4
    stepped("weights", torch.float32, False)
    stepped("weights", torch.float64, None)
    assert len(calls) == 8


@needs_cpu_kernels
@pytest.mark.parametrize("name", ["sinkgd", "rmnp"])
def test_a_gpus_step_is_simulated_with_its_kernel(name):
    """The eager path holds a stack of directions there, which kernels do without."""
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))

    def peak(device, fused):
        def make(groups):
            groups = [{**group, "role": "hidden"} for group in groups]
            return create_optimizer(name, groups, fused=fused)

        forward = {"step": lambda model: model(torch.zeros(2, 256)).sum(), "device": device}
        return simulate(model, make, **forward).peak.bytes

    assert peak("cuda", None) < peak("cuda", False)
