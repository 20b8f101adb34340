"""The Adam beside the methods: the kernels under it, and the loop that specifies it."""

import copy
from itertools import product

import pytest
import torch
from needs import WITHOUT_CPU_KERNELS
from reference.rest_adam_numpy import correction
from torch.testing import assert_close

from optimzoo.core import adam as adam_rule
from optimzoo.kernels import native

SHAPES = [(13, 6), (7,), (), (1, 9), (0, 3), (129, 5)]
OPTIONS = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0, "maximize": False}


def normal(shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def start(dtype=torch.float64, counts=None):
    """Parameters with their moments and step counts."""
    params = [normal(shape, i, dtype) for i, shape in enumerate(SHAPES)]
    steps = [torch.tensor(float(c)) for c in counts or [0] * len(SHAPES)]
    return (
        params,
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        steps,
    )


def step(run, t, foreach, **options):
    params, m, v, steps = run
    grads = [normal(p.shape, 1000 * t + i, p.dtype) for i, p in enumerate(params)]
    adam_rule.adam(
        params, grads, m, v, steps, foreach=foreach, capturable=False, **{**OPTIONS, **options}
    )


def start_like(run):
    """A run's tensors in float32."""
    return tuple([t.float() for t in part] for part in run)


@pytest.fixture
def fused(monkeypatch):
    """How many parameters each call of the kernel was given."""
    if not native.CPU.available():
        pytest.skip(WITHOUT_CPU_KERNELS)
    calls = []
    kernel = native.CPU.adam_

    def counted(params, *args, **kwargs):
        calls.append(len(params))
        return kernel(params, *args, **kwargs)

    monkeypatch.setattr(native.CPU, "adam_", counted)
    return calls


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": -0.1},  # cautious
        {"maximize": True},
        {"betas": (0.5, 0.75)},
        {"eps": 1.0},
        {"eps": 1e-8},
        {"lr": torch.tensor(2**-7)},
    ],
    ids=str,
)
def test_the_fused_path_is_the_loop_from_the_first_step_on(fused, options):
    runs = [start(torch.float32), start(), start(), start()]
    for t in range(50):
        for run, foreach in zip(runs, (None, None, False, True), strict=True):
            step(run, t, foreach, **options)
        assert_close(runs[1], runs[2], rtol=1e-12, atol=1e-12)  # float64 has no kernel
        assert_close(runs[2], runs[3], rtol=1e-12, atol=1e-12)
        assert_close(runs[0], start_like(runs[2]), rtol=1e-5, atol=2e-6)
    assert fused == [len(SHAPES)] * 50


def test_the_loop_is_the_rule():
    """Against the formula, one number at a time; torch's own order of eps differs by far."""
    run = start()
    expected = [p.numpy().copy() for p in run[0]]
    m = [0 * p for p in expected]
    v = [0 * p for p in expected]
    for t in range(1, 11):
        grads = [normal(p.shape, 1000 * t + i).numpy() for i, p in enumerate(run[0])]
        step(run, t, False, weight_decay=0.1)
        for i, g in enumerate(grads):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            direction = correction((0.9, 0.999), t) * m[i] / (v[i] ** 0.5 + 1e-3)
            expected[i] = expected[i] * (1 - 0.01 * 0.1) - 0.01 * direction
    assert_close(run[0], [torch.as_tensor(p) for p in expected], rtol=1e-12, atol=1e-14)

    params = start()[0]
    torchs = [torch.nn.Parameter(p.clone()) for p in params]
    adamw = torch.optim.AdamW(torchs, lr=0.01, eps=1e-3, weight_decay=0.1)
    for t in range(1, 11):
        for i, p in enumerate(torchs):
            p.grad = normal(p.shape, 1000 * t + i)
        adamw.step()
    assert (torchs[0].detach() - run[0][0]).abs().max() > 1e-4


def test_step_counts_may_differ(fused):
    counts = [0, 3, 3, 0, 7, 100]
    runs = [start(torch.float32, counts), start(torch.float32, counts)]
    for t in range(20):
        for run, foreach in zip(runs, (None, False), strict=True):
            step(run, t, foreach, eps=1.0)
    assert_close(*runs, rtol=1e-5, atol=2e-6)
    assert [int(s) for s in runs[0][3]] == [c + 20 for c in counts]
    assert fused == [len(SHAPES)] * 20


@pytest.mark.parametrize("spread", list(product([False, True], repeat=3))[1:], ids=str)
def test_other_layouts_are_not_fused_and_right(fused, spread):
    """The kernels walk raw memory. A state saved from such a weight keeps its layout as well."""
    runs = [start(torch.float32), start(torch.float32)]
    for t in range(5):
        for part, change in zip(runs[0][:3], spread, strict=True):
            if change and t == 0:
                for i in (0, 3, 5):
                    part[i] = part[i].mT.contiguous().mT
        for run, foreach in zip(runs, (None, False), strict=True):
            step(run, t, foreach)
    assert_close(*runs, rtol=1e-5, atol=2e-6)
    assert fused == [len(SHAPES) - 2] * 5  # a single row has but one layout


def test_gradients_of_another_layout_are_fused_and_right(fused):
    runs = [start(torch.float32), start(torch.float32)]
    for t in range(5):
        for run, foreach in zip(runs, (None, False), strict=True):
            params, m, v, steps = run
            grads = [normal(p.shape, 1000 * t + i, p.dtype) for i, p in enumerate(params)]
            if foreach is None:
                grads = [g.mT.contiguous().mT if g.ndim > 1 else g for g in grads]
            adam_rule.adam(params, grads, m, v, steps, foreach=foreach, capturable=False, **OPTIONS)
    assert_close(*runs, rtol=1e-5, atol=2e-6)
    assert fused == [len(SHAPES)] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_paths_agree(fused, dtype):
    runs = [start(dtype), start(dtype), start(dtype)]
    for t in range(20):
        for run, foreach in zip(runs, (None, False, True), strict=True):
            step(run, t, foreach)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    for other in runs[1:]:
        assert_close(other[0], runs[0][0], rtol=tolerance, atol=tolerance)
    assert fused == [len(SHAPES)] * 20


def test_moments_of_another_dtype_are_fused_and_right(fused):
    """A float32 state under bfloat16 weights, or the other way about."""
    for weight_dtype, dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        ends = []
        for foreach in (None, False, True):
            run = start(weight_dtype)
            run = (run[0], *([x.to(dtype) for x in part] for part in run[1:3]), run[3])
            before = copy.deepcopy(run[0])
            for t in range(10):
                step(run, t, foreach)
            assert {x.dtype for x in run[1]} == {dtype}
            assert not any(
                torch.equal(a, b) for a, b in zip(run[0], before, strict=True) if a.numel()
            )
            ends.append(run[0])
        for other in ends[1:]:
            assert_close(other, ends[0], rtol=0.02, atol=0.02)
    assert fused == [len(SHAPES)] * 20
