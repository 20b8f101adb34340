"""The native kernels against the header's words in NumPy, float64: shapes, types, options."""

import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from needs import needs_cpu_kernels
from reference import kernels_numpy as reference
from reference.kernels_numpy import ADAM, COLUMNS, ROWS, SIGN

from optimzoo.kernels import native

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SHAPES = [(1, 1), (1, 129), (129, 1), (7, 129), (64, 64), (33, 1000), (3, 9000), (0, 5), (5, 0)]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
BACKENDS = [
    pytest.param(native.CPU, "cpu", id="cpu", marks=needs_cpu_kernels),
    pytest.param(native.CUDA, "cuda", id="cuda", marks=no_gpu),
]
on_backends = pytest.mark.parametrize(("kernels", "device"), BACKENDS)
# Two roundings of a stored value apart at most: the kernel's float32 sum may lie across a boundary.
TOLERANCE = {F32: (3e-6, 3e-6), BF16: (2**-7, 1e-6), F16: (2**-10, 1e-6)}


def normal(shape, seed, dtype, device="cpu", offset=0):
    """A contiguous tensor whose storage begins `offset` elements before it."""
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape))
    store = torch.empty(count + offset, dtype=dtype)
    store[offset:] = torch.randn(count, generator=generator).to(dtype)
    return store.to(device)[offset:].view(shape)


UNIT = 2.0**-24  # the largest relative error of one rounding in float32


def random_walk(n):
    """What the roundings of a sum of n terms may come to, in parts of it, in whatever order.

    Each is off by UNIT of the sum so far at most, up or down: their sum is six deviations and more
    of that away from zero. One term that is missing or doubled is further.
    """
    return 4 * (1 + math.sqrt(n)) * UNIT


def step_bound(p, n, lr):
    """How far two steps of SCALE may be apart whose sums of n squares were added in other orders.

    Each sum is off by n UNIT at most, its root by half of that; no entry of g / s is larger than
    sqrt(n), and few are larger than 5. The weight is rounded twice.
    """
    return lr * min(5.0, math.sqrt(n)) * (n + 8) * UNIT + 4 * UNIT * p.abs()


def wide(t):
    return t.double().cpu().numpy()


def close(result, expected, dtype, what=""):
    rtol, atol = TOLERANCE[dtype]
    np.testing.assert_allclose(wide(result), expected, rtol=rtol, atol=atol, err_msg=str(what))


def stored(dtype):
    """Rounds as memory of that type does."""
    return lambda x: torch.as_tensor(x, dtype=torch.float32).to(dtype).double().numpy()


def test_the_cpu_library_was_built_and_is_chosen():
    """Where it can be, it must be there: the other tests are skipped without it."""
    if os.environ.get("OPTIMZOO_NATIVE") == "0":
        pytest.skip(native.CPU.why_not())
    if "no g++ or clang++ on PATH" in native.CPU.why_not():
        pytest.skip("it was installed without a compiler")
    assert native.CPU.available(), native.CPU.why_not()
    sets = ["baseline", "avx2", "avx512"]
    flags = torch.backends.cpu.get_cpu_capability().lower()
    best = flags if flags in sets else "baseline"
    if "ATEN_CPU_CAPABILITY" in os.environ:  # torch's choice, not the machine's
        best = sets[max(sets.index(best), sets.index(native.CPU.variant()))]
    assert native.CPU.variant() == os.environ.get("OPTIMZOO_CPU_ISA", best)


@on_backends
@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN])
@pytest.mark.parametrize("types", [*product([F32, BF16, F16], repeat=3)], ids=str)
def test_scale_is_the_rule(kernels, device, kind, types):
    """All shapes in one call, with momentum and without, every mix of types."""
    ptype, gtype, mtype = types
    for turn, options in enumerate(
        [
            {"weight_decay": 0.0, "l2": False, "maximize": False},
            {"weight_decay": 0.3, "l2": True, "maximize": True},
            {"weight_decay": -0.5, "l2": False, "maximize": True},  # cautious
            {"weight_decay": 0.3, "l2": True, "maximize": True, "nesterov": True},
            {"weight_decay": -0.5, "l2": False, "maximize": False, "nesterov": True},
        ]
    ):
        params = [normal(s, i, ptype, device, offset=turn) for i, s in enumerate(SHAPES)]
        grads = [normal(s, 99 + i, gtype, device, offset=turn) for i, s in enumerate(SHAPES)]
        moments = [
            normal(s, 55 + i, mtype, device, offset=turn) if (i + turn) % 2 == 0 else None
            for i, s in enumerate(SHAPES)
        ]
        rule = {"lr": 0.125, "momentum": 0.75, "eps": 1e-8, **options}
        expected = [
            reference.scale(
                wide(p),
                wide(g),
                None if m is None else wide(m),
                kind=kind,
                stored=stored(mtype),
                **rule,
            )
            for p, g, m in zip(params, grads, moments, strict=True)
        ]
        none = [None] * len(params)
        kinds = [kind] * len(params)
        kernels.scale_(
            params,
            grads,
            moments,
            none,
            none,
            kinds,
            SHAPES,
            betas=(0.9, 0.99),
            adam_eps=1e-8,
            **rule,
        )
        for p, m, (new_p, new_m), shape in zip(params, moments, expected, SHAPES, strict=True):
            if m is not None:
                close(m, new_m, mtype, shape)
            if m is None or kind != SIGN:  # the sign of a momentum that rounds to zero is open
                # A momentum rounded the other way is off by one unit before it is normalised.
                loose = mtype if m is not None and mtype != F32 else ptype
                error = np.abs(wide(p) - new_p)
                rtol, atol = max(TOLERANCE[ptype], TOLERANCE[loose])
                assert np.all(error <= atol + rtol * (np.abs(new_p) + 0.5)), shape


@on_backends
def test_signs_are_those_that_nesterov_looks_ahead_to(kernels, device):
    """Of a momentum that stays above zero, where the gradient once more would lead below it."""
    p, g, m = (torch.full((3, 40), x, device=device) for x in (0.0, -2.0, 1.0))
    rule = {**RULE, "momentum": 0.75, "lr": 1.0}
    for nesterov, wanted in ((True, 1.0), (False, 0.0)):  # from 1 back to 0
        kernels.scale_(
            *([p], [g], [m.clone()], [None], [None], [SIGN], [(3, 40)]), **rule, nesterov=nesterov
        )
        assert p.eq(wanted).all()


@pytest.mark.sampled(3)
@on_backends
@pytest.mark.parametrize("types", [*product([F32, BF16, F16], repeat=3)], ids=str)
def test_adam_is_the_rule(kernels, device, types):
    """AdamW, Adam with eps before the correction, AdamS, clipping, direction; steps may differ."""
    ptype, gtype, mtype = types
    variants = [
        {"eps_before": False, "weight_decay": 0.1},
        # Cautious, with betas of which a momentum that is zero is so in float32 too.
        {"eps_before": False, "weight_decay": -0.5, "betas": (0.75, 0.99)},
        {"eps_before": True, "maximize": True},
        {"eps_before": False, "l1": 0.5, "alpha": 0.25, "masked": True},
        {"eps_before": True, "clip": (0.7, 0.4, 1.5)},
        {"eps_before": True, "direction": True, "max_update": 0.7},
        {"eps_before": False, "max_update": 0.7},
    ]
    for turn, variant in enumerate(variants):
        options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.0, **variant}
        options.setdefault("maximize", False)
        masked, clip = options.pop("masked", False), options.pop("clip", None)
        make = {"device": device, "offset": turn % 2}
        params = [normal(s, i, ptype, **make) for i, s in enumerate(SHAPES)]
        grads = [normal(s, 99 + i, gtype, **make) for i, s in enumerate(SHAPES)]
        ms = [normal(s, 55 + i, mtype, **make) for i, s in enumerate(SHAPES)]
        vs = [normal(s, 77 + i, mtype, **make).abs() for i, s in enumerate(SHAPES)]
        steps = [torch.tensor(float(i + 1), device=device) for i in range(len(SHAPES))]
        keep = [np.random.default_rng(i).random(s) < 0.5 for i, s in enumerate(SHAPES)]
        masks = [
            torch.as_tensor(np.packbits(k.reshape(-1), bitorder="little"), device=device)
            for k in keep
        ]
        expected = [
            reference.adam(
                *(wide(x) for x in (p, g, m, v)),
                step.item(),
                mask=k if masked else None,
                clip=clip,
                **options,
            )
            for p, g, m, v, step, k in zip(params, grads, ms, vs, steps, keep, strict=True)
        ]
        extra = {}
        if masked:
            extra["masks"] = masks
        if clip:
            extra["clips"] = [torch.tensor(clip, device=device)] * len(params)
        if options.get("direction"):
            for p in params:
                p.fill_(torch.nan)  # an output only
        kernels.adam_(params, grads, ms, vs, steps, **options, **extra)
        for p, m, v, new in zip(params, ms, vs, expected, strict=True):
            close(p, new[0], ptype, variant)
            close(m, new[1], mtype, variant)
            close(v, new[2], mtype, variant)


@on_backends
@pytest.mark.parametrize("types", [*product([F32, BF16, F16], repeat=2)], ids=str)
def test_reduce_apply_and_center_are_the_rules(kernels, device, types):
    ptype, gtype = types
    shapes = [s for s in SHAPES if np.prod(s)]
    options = product([ROWS, COLUMNS, SIGN], [False, True], [0.2, -0.5])
    for kind, maximize, weight_decay in options:
        params = [normal(s, i, ptype, device, offset=1) for i, s in enumerate(shapes)]
        grads = [normal(s, 99 + i, gtype, device, offset=1) for i, s in enumerate(shapes)]
        kinds = [kind] * len(shapes)
        sizes = [{ROWS: r, COLUMNS: c, SIGN: 4}[kind] for r, c in shapes]
        outs = [torch.full((n,), torch.nan, device=device) for n in sizes]
        if kind == SIGN:
            for out in outs:
                out[2:] = torch.tensor([0.5, 0.25])
        kernels.reduce_(grads, outs, kinds, shapes, maximize=maximize)
        for g, out in zip(grads, outs, strict=True):
            expected = reference.reduce(wide(g), kind, bound=0.5, ratio=0.25, maximize=maximize)
            rtol = random_walk(max(*g.shape, min(g.numel(), 4096)))  # what float32 adds up
            np.testing.assert_allclose(wide(out[: len(expected)]), expected, rtol=rtol)
        scales = [normal((n,), 7 + i, F32, device) for i, n in enumerate(sizes)]
        rule = {"lr": 0.1, "weight_decay": weight_decay, "maximize": maximize}
        expected = [
            reference.apply(wide(p), wide(g), wide(s), kind, **rule)
            for p, g, s in zip(params, grads, scales, strict=True)
        ]
        kernels.apply_(params, grads, scales, kinds, shapes, **rule)
        for p, new in zip(params, expected, strict=True):
            close(p, new, ptype)
        for out in params:
            out.fill_(torch.nan)  # an output only
        kernels.center_(params, grads, shapes, eps=1e-6, maximize=maximize)
        for p, g in zip(params, grads, strict=True):
            close(p, reference.center(wide(g), eps=1e-6, maximize=maximize), ptype)


@pytest.mark.parametrize(("kernels", "device"), BACKENDS[:1])
@pytest.mark.parametrize("kind", [ROWS, COLUMNS])
@pytest.mark.parametrize("types", [*product([F32, BF16, F16], repeat=2)], ids=str)
def test_sinkhorn_is_the_rule(kernels, device, kind, types, shapes=(*SHAPES, (65, 5), (200, 40))):
    """All shapes in one call; rows and columns of zeros, and of sizes that are far apart."""
    ptype, gtype = types
    for turn, options in enumerate(
        [
            {"iterations": 1, "weight_decay": 0.0, "maximize": False},
            {"iterations": 5, "weight_decay": 0.3, "maximize": True},
        ]
    ):
        params = [normal(s, i, ptype, device, offset=turn) for i, s in enumerate(shapes)]
        grads = [normal(s, 99 + i, gtype, device, offset=turn) for i, s in enumerate(shapes)]
        for g in grads:
            g[2::5] *= 2.0**-6
            g[:, 1::7] *= 2.0**6
            g[1::3], g[:, 3::4] = 0.0, 0.0
        rule = {"lr": 0.125, **options}
        expected = [
            reference.sinkhorn(wide(p), wide(g), kind, **rule)
            for p, g in zip(params, grads, strict=True)
        ]
        kernels.sinkhorn_(params, grads, [kind] * len(shapes), shapes, **rule)
        for p, new in zip(params, expected, strict=True):
            rtol, atol = TOLERANCE[ptype]
            np.testing.assert_allclose(wide(p), new, rtol=rtol, atol=max(atol, 3e-6))


RULE = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "l2": False,
    "eps": 1e-8,
    "betas": (0.9, 0.99),
    "adam_eps": 1e-8,
    "maximize": False,
}


def plain_scale(kernels, p, g, kind, **options):
    kernels.scale_([p], [g], [None], [None], [None], [kind], [p.shape], **{**RULE, **options})


@on_backends
def test_a_row_of_zeros_stays_and_what_is_not_finite_stays_in_its_row(kernels, device):
    for kind, dtype in product([ROWS, COLUMNS], [F32, BF16]):
        p, g = (normal((6, 40), seed, dtype, device) for seed in (0, 1))
        lines = (p, g) if kind == ROWS else (p.mT, g.mT)
        lines[1][0] = 0.0
        lines[1][1, 3] = torch.nan
        lines[1][2, 5] = torch.inf
        before = p.clone()
        plain_scale(kernels, p, g, kind)
        after, old = (p, before) if kind == ROWS else (p.mT, before.mT)
        assert torch.equal(after[0], old[0])
        assert after[1].isnan().all()
        assert after[2, 5].isnan() and torch.equal(after[2, :5], old[2, :5])
        assert after[3:].isfinite().all() and not torch.equal(after[3:], old[3:])


@on_backends
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_scaler_and_learning_rate_come_as_tensors(kernels, device, dtype):
    for kind in (ROWS, COLUMNS, SIGN):
        p, g = (normal((5, 300), seed, dtype, device) for seed in (0, 1))
        plainly, again = p.clone(), p.clone()
        one = torch.ones((), device=device)
        plain_scale(kernels, again, g, kind, found_inf=one)
        assert torch.equal(again, p)
        plain_scale(kernels, plainly, g, kind)
        plain_scale(kernels, again, g, kind, found_inf=0 * one, grad_scale=4 * one, lr=0.1 * one)
        assert (again - plainly).abs().max() <= TOLERANCE[dtype][0]


@on_backends
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN, ADAM])
def test_stochastic_rounding_is_that_of_the_header(kernels, device, dtype, kind):
    """From the float32 result of the same call on float32 memory, bit for bit."""
    name = {BF16: "bfloat16", F16: "float16"}[dtype]
    shapes = [(5, 700), (3, 5000)]
    for scale in (1.0, 2.0**-16):  # float16's subnormals too
        params = [normal(s, i, dtype, device) * scale for i, s in enumerate(shapes)]
        grads = [normal(s, 9 + i, F32, device) for i, s in enumerate(shapes)]
        exact = [p.float() for p in params]
        for into, seed in ((params, 2**40 + 5), (exact, None)):
            kernels.scale_(
                into,
                grads,
                [None if kind != ADAM else torch.zeros_like(g) for g in grads],
                [None if kind != ADAM else torch.zeros_like(g) for g in grads],
                [None if kind != ADAM else torch.ones((), device=device) for _ in grads],
                [kind] * 2,
                shapes,
                **{**RULE, "lr": 0.1 * scale},
                seed=seed,
                step=2**33 + 1,
                first_index=3,
            )
        for i, (p, x) in enumerate(zip(params, exact, strict=True)):
            wanted = reference.round_stochastic(
                x.cpu().numpy(), name, seed=2**40 + 5, step=2**33 + 1, index=3 + i
            )
            np.testing.assert_array_equal(p.float().cpu().numpy(), wanted)


@on_backends
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_stochastic_rounding_is_unbiased(kernels, device, dtype):
    """The mean error of many roundings is within four standard errors of zero."""
    p = torch.ones(1, 1000, dtype=dtype, device=device)
    g = torch.ones(1, 1000, device=device)
    unit = {BF16: 2**-8, F16: 2**-11}[dtype]  # between numbers below 1
    errors = []
    for step in range(200):
        q = p.clone()
        plain_scale(kernels, q, g, SIGN, lr=0.3 * unit, seed=1, step=step)
        errors.append((q.double() - 1 + 0.3 * unit) / unit)
    errors = torch.stack(errors)
    assert errors.abs().max() <= 1
    assert errors.mean().abs() < 4 * errors.std() / errors.numel() ** 0.5


@needs_cpu_kernels
def test_tensors_of_a_call_do_not_touch_each_other():
    """Alone or together, with any number of threads: rows to the bit, columns to rounding."""
    threads = torch.get_num_threads()
    shapes = [(513, 70), (1, 5), (1300, 33)]
    for kind in (ROWS, COLUMNS, SIGN):
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            params = [normal(s, i, F32) for i, s in enumerate(shapes)]
            grads = [normal(s, 9 + i, F32) for i, s in enumerate(shapes)]
            none = [None] * 3
            native.CPU.scale_(params, grads, none, none, none, [kind] * 3, shapes, **RULE)
            results.append(params)
        alone = [normal(s, i, F32) for i, s in enumerate(shapes)]
        for i, p in enumerate(alone):
            plain_scale(native.CPU, p, normal(p.shape, 9 + i, F32), kind)
        results.append(alone)
        for other in results[1:]:
            for p, q, shape in zip(other, results[0], shapes, strict=True):
                bound = step_bound(q, shape[0], RULE["lr"]) if kind == COLUMNS else 0.0
                assert ((p - q).abs() <= bound).all(), shape
    torch.set_num_threads(threads)


MASKS = Path(__file__).parents[1] / "sparsity" / "test_sparsity_masks.py"


@needs_cpu_kernels
@pytest.mark.thorough
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets_pass_the_same_tests(isa):
    """In a process of its own: the choice is made once."""
    if native.CPU.variant() in ("baseline", isa):
        pytest.skip(f"this machine has no more than {native.CPU.variant()}")
    names = "chosen or is_the_rule or are_the_rules or header or zeros"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider"),
            *(__file__, str(MASKS), "-k", f"cpu and ({names}) or packed"),
        ],
        env={**os.environ, "OPTIMZOO_CPU_ISA": isa, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:]
    assert " passed" in run.stdout


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (20, 4096), (20, 8321), (5, 1023)])
def test_the_passes_over_a_history_are_products(shape, dtype):
    history, vector = (normal(s, i, dtype) for i, s in enumerate((shape, shape[1:])))
    weights = normal(shape[:1], 2, F32)
    terms = wide(history) * wide(vector)
    error = np.abs(wide(native.CPU.history_dot(history, vector)) - terms.sum(1))
    assert np.all(error <= random_walk(shape[1]) * np.sqrt((terms**2).sum(1)) + UNIT)
    terms = wide(weights)[:, None] * wide(history)
    error = np.abs(wide(native.CPU.history_combine(history, weights)) - terms.sum(0))
    assert np.all(error <= (shape[0] + 1) * UNIT * np.abs(terms).sum(0))
