"""The CPU library at its edges: mixed calls, what is not finite, wide indices."""

import ctypes
import mmap
import os
import sys
from itertools import product

import numpy as np
import pytest
import torch
from needs import needs_cpu_kernels
from reference import kernels_numpy as reference
from reference.kernels_numpy import ADAM, COLUMNS, ROWS, SIGN
from test_kernels import step_bound

from optimzoo.kernels import native
from optimzoo.optimizers.sinkgd import sinkhorn

pytestmark = needs_cpu_kernels
CPU = native.CPU
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
RULE = {
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "l2": False,
    "eps": 1e-8,
    "betas": (0.9, 0.99),
    "adam_eps": 1e-8,
    "maximize": False,
}
ADAM_RULE = {
    "lr": 0.1,
    "betas": (0.9, 0.99),
    "eps": 1e-3,
    "weight_decay": 0.1,
    "maximize": False,
    "eps_before": False,
}
APPLY_RULE = {"lr": 0.1, "weight_decay": 0.1}
SINKHORN_RULE = {**APPLY_RULE, "iterations": 3}
FIXED, LAZY = 0x10, mmap.MAP_PRIVATE | 0x4000  # Linux's MAP_FIXED and MAP_NORESERVE
ROUNDING = {"seed": 2**63 + 9, "step": 2**40, "first_index": 2**31}


def normal(shape, seed, dtype=F32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Kind, shape, types of weight, gradient and moments (None: no momentum).
MIXED = [
    (ROWS, (7, 129), F32, F32, None),
    (COLUMNS, (1025, 33), BF16, BF16, None),
    (ADAM, (1, 4097), F32, F32, F32),
    (ROWS, (129, 1), F16, F32, BF16),
    (COLUMNS, (3, 5000), BF16, F32, F32),
    (SIGN, (9, 1000), F16, BF16, None),
    (ADAM, (1, 7), BF16, BF16, F32),
    (ROWS, (2, 9001), BF16, BF16, BF16),
    (ADAM, (1, 5000), F16, F32, BF16),
]


def scale_mixed(which, **options):
    """One call over the named entries of MIXED; what it has written."""
    params, grads, ms, vs, steps, kinds, shapes = [], [], [], [], [], [], []
    for i in which:
        kind, shape, ptype, gtype, mtype = MIXED[i]
        params.append(normal(shape, i, ptype))
        grads.append(normal(shape, 100 + i, gtype))
        ms.append(None if mtype is None else normal(shape, 200 + i, mtype))
        vs.append(normal(shape, 300 + i, mtype).abs() if kind == ADAM else None)
        steps.append(torch.tensor(3.0 + i) if kind == ADAM else None)
        kinds.append(kind)
        shapes.append(shape)
    CPU.scale_(params, grads, ms, vs, steps, kinds, shapes, **{**RULE, **options})
    return [*zip(params, ms, vs, strict=True)]


@pytest.mark.parametrize("rounded", [False, True], ids=["nearest", "stochastic"])
def test_one_call_over_all_kinds_and_types_is_one_call_a_tensor(threads, rounded):
    """To the bit with one thread; with three only the order of sums over a column differs."""
    threads(1)
    options = {"seed": 5, "step": 7} if rounded else {}
    together = scale_mixed(range(len(MIXED)), **options)
    for i, written in enumerate(together):
        alone = scale_mixed([i], **options, first_index=i)[0]
        for one, other in zip(written, alone, strict=True):
            assert (one is None and other is None) or torch.equal(one, other), MIXED[i]
    threads(3)
    for i, (one, other) in enumerate(
        zip(together, scale_mixed(range(len(MIXED)), **options), strict=True)
    ):
        loose = 2**-7 if MIXED[i][0] == COLUMNS else 0.0
        torch.testing.assert_close(one[0], other[0], rtol=loose, atol=loose)


def test_each_tensor_has_a_rate_and_a_decay_of_its_own(threads):
    threads(1)
    count = len(MIXED)
    rates = [torch.tensor(0.1 / (1 + i)) if i % 2 else 0.1 / (1 + i) for i in range(count)]
    decays = [0.1 * i for i in range(count)]
    lists = {"lr": rates, "weight_decay": decays}
    together = scale_mixed(range(count), **lists)
    for i, written in enumerate(together):
        alone = scale_mixed([i], lr=float(rates[i]), weight_decay=decays[i])[0]
        for one, other in zip(written, alone, strict=True):
            assert (one is None and other is None) or torch.equal(one, other), MIXED[i]


def test_a_call_is_reproducible_with_its_threads(threads):
    threads(2)
    first = scale_mixed(range(len(MIXED)), seed=1)
    for _ in range(20):
        for written, again in zip(first, scale_mixed(range(len(MIXED)), seed=1), strict=True):
            assert torch.equal(written[0], again[0])


def into(operation, dtype, **options):
    """The result of an operation in memory of `dtype`, from the same float32 inputs."""
    shapes = [(5, 900), (2, 4200)]
    params = [normal(s, i, BF16).to(F16).to(dtype) for i, s in enumerate(shapes)]
    grads = [normal(s, 9 + i) for i, s in enumerate(shapes)]
    if operation == "center":
        CPU.center_(params, grads, shapes, eps=1e-8, **options)
    elif operation == "apply":
        scales = [normal(c, 4) for _, c in shapes]
        CPU.apply_(params, grads, scales, [COLUMNS] * 2, shapes, **APPLY_RULE, **options)
    elif operation == "sinkhorn":
        CPU.sinkhorn_(params, grads, [ROWS, COLUMNS], shapes, **SINKHORN_RULE, **options)
    elif operation == "columns":
        moments = [normal(s, 5 + i) for i, s in enumerate(shapes)]
        none = [None] * 2
        CPU.scale_(params, grads, moments, none, none, [COLUMNS] * 2, shapes, **{**RULE, **options})
    else:
        moments = [[normal(s, seed + i).abs() for i, s in enumerate(shapes)] for seed in (5, 7)]
        steps = [torch.tensor(2.0)] * 2
        extra = {"direction": True} if operation == "direction" else {}
        CPU.adam_(params, grads, *moments, steps, **ADAM_RULE, **extra, **options)
    return params


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(
    "operation", ["columns", "adam", "direction", "apply", "center", "sinkhorn"]
)
def test_stochastic_rounding_of_every_operation(threads, operation, dtype):
    threads(1)
    exact = into(operation, F32)
    rounded = into(operation, dtype, **ROUNDING)
    name = {BF16: "bfloat16", F16: "float16"}[dtype]
    for i, (x, r) in enumerate(zip(exact, rounded, strict=True)):
        rng_key = {"seed": ROUNDING["seed"], "step": ROUNDING["step"]}
        rng_key["index"] = ROUNDING["first_index"] + i
        wanted = reference.round_stochastic(x.numpy(), name, **rng_key)
        np.testing.assert_array_equal(r.float().numpy(), wanted)
        assert not torch.equal(r, x.to(dtype))


def test_an_infinite_gradient_of_the_scaler_writes_nothing_at_all():
    """Not the weights, not the moments, not the sums."""
    shape = (6, 40)
    found = {"found_inf": torch.ones(())}
    p, g, m, v, out = (normal(shape, seed) for seed in range(5))
    before = [t.clone() for t in (p, m, v, out)]
    none, one = [None], torch.ones(())
    for kind in (ROWS, COLUMNS, SIGN):
        CPU.scale_([p], [g], [m], none, none, [kind], [shape], **RULE, **found)
        CPU.apply_([p], [g], [out], [kind], [shape], **APPLY_RULE, **found)
        CPU.reduce_([g], [out], [kind], [shape], **found)
    CPU.adam_([p], [g], [m], [v], [one], **ADAM_RULE, **found)
    CPU.center_([p], [g], [shape], eps=1e-8, **found)
    CPU.sinkhorn_([p], [g], [ROWS], [shape], **SINKHORN_RULE, **found)
    for now, then in zip((p, m, v, out), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_scale_of_the_gradients_is_divided_out(dtype):
    """A power of two: to the bit, in every operation but for the underflow of squares."""
    shape = (5, 300)
    factor = 2.0**10
    scaled = {"grad_scale": torch.tensor(factor)}
    p, g = normal(shape, 0, dtype), normal(shape, 1)
    results = []
    for grad, options in ((g, {}), (g * factor, scaled)):
        m, v, one = normal(shape, 2), normal(shape, 3).abs(), torch.ones(())
        adam, applied, centred = p.clone(), p.clone(), torch.full_like(p, torch.nan)
        alternated = p.clone()
        CPU.sinkhorn_([alternated], [grad], [ROWS], [shape], **SINKHORN_RULE, **options)
        sums = [torch.full((5,), torch.nan), torch.full((300,), torch.nan)]
        clipped = torch.tensor([torch.nan, torch.nan, 0.5, 0.25])
        CPU.adam_([adam], [grad], [m], [v], [one], **ADAM_RULE, **options)
        CPU.apply_(
            [applied], [grad], [sums[0].fill_(0.5)], [ROWS], [shape], **APPLY_RULE, **options
        )
        CPU.center_([centred], [grad], [shape], eps=1e-8, **options)
        outs = [*sums, clipped]
        CPU.reduce_([grad] * 3, outs, [ROWS, COLUMNS, SIGN], [shape] * 3, **options)
        results.append([adam, m, v, applied, centred, alternated, *sums, clipped[:2]])
    for plain, divided in zip(*results, strict=True):
        assert plain.isfinite().all() and torch.equal(plain, divided)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_not_finite_goes_through_where_it_belongs(dtype, bad):
    shape = (4, 300)
    g = normal(shape, 1, dtype)
    g[1, 17] = bad
    m, v, one = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), torch.ones(())
    p = normal(shape, 0, dtype)
    CPU.adam_([p], [g], [m], [v], [one], **ADAM_RULE)
    touched = torch.zeros(shape, dtype=torch.bool)
    touched[1, 17] = True
    for t in (p, m, v):
        assert torch.equal(~t.isfinite(), touched)
    out = torch.empty(shape, dtype=dtype)
    CPU.center_([out], [g], [shape], eps=1e-8)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()
    sums = [torch.zeros(4), torch.zeros(300), torch.tensor([0.0, 0.0, 1.0, 0.5])]
    CPU.reduce_([g] * 3, sums, [ROWS, COLUMNS, SIGN], [shape] * 3)
    assert (~sums[0].isfinite()).nonzero().tolist() == [[1]]
    assert (~sums[1].isfinite()).nonzero().tolist() == [[17]]
    assert not sums[2][:2].isfinite().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [ROWS, COLUMNS])
def test_what_is_not_finite_spreads_by_sinkhorn_as_on_the_eager_path(kind, bad):
    """Along its row and its column, and then to all others."""
    shape = (70, 300)
    g = normal(shape, 1)
    g[1, 17] = bad
    for iterations in (1, 2):
        p = normal(shape, 0)
        CPU.sinkhorn_([p], [g], [kind], [shape], **{**SINKHORN_RULE, "iterations": iterations})
        eager = sinkhorn(g if kind == ROWS else g.mT, iterations)
        assert p[1, 17].isnan()
        assert torch.equal(p.isnan(), (eager if kind == ROWS else eager.mT).isnan())


@pytest.mark.parametrize("kind", [ROWS, COLUMNS])
def test_sinkhorn_gives_the_same_bits_with_any_threads_alone_or_together(threads, kind):
    shapes = [(513, 70), (1, 5), (130, 4099), (1300, 33), (8, 1), (600, 700)]
    results = []
    for count in (1, 2, 3, 4, 7):
        threads(count)
        params = [normal(s, i) for i, s in enumerate(shapes)]
        grads = [normal(s, 9 + i) for i, s in enumerate(shapes)]
        CPU.sinkhorn_(params, grads, [kind] * len(shapes), shapes, **SINKHORN_RULE)
        results.append(params)
    alone = [normal(s, i) for i, s in enumerate(shapes)]
    for p, g in zip(alone, grads, strict=True):
        CPU.sinkhorn_([p], [g], [kind], [p.shape], **SINKHORN_RULE)
    for other in (*results[1:], alone):
        for p, q, shape in zip(other, results[0], shapes, strict=True):
            assert torch.equal(p, q), shape


@pytest.mark.parametrize("power", [-60, -20, 20, 50])
def test_sinkhorn_keeps_the_direction_of_gradients_of_any_size(power):
    """To the bit by a power of two, as long as the squares are numbers of float32."""
    shape = (40, 300)
    results = []
    for factor in (1.0, 2.0**power):
        p = normal(shape, 0)
        CPU.sinkhorn_([p], [normal(shape, 1) * factor], [ROWS], [shape], **SINKHORN_RULE)
        results.append(p)
    assert torch.equal(*results)


def test_a_constant_row_is_centred_to_zero_and_an_empty_call_is_none():
    g = torch.zeros(3, 50)
    g[1] = 2.5
    out = torch.full_like(g, torch.nan)
    CPU.center_([out], [g], [g.shape], eps=1e-8)
    assert torch.equal(out, torch.zeros_like(g))
    CPU.scale_([], [], [], [], [], [], [], **RULE)
    CPU.adam_([], [], [], [], [], **ADAM_RULE)


def test_autograd_is_told_of_what_a_kernel_wrote():
    p = normal((3, 4), 0).requires_grad_()
    loss = (p * p).sum()
    CPU.scale_([p], [normal((3, 4), 1)], [None], [None], [None], [ROWS], [(3, 4)], **RULE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def repeated(count, dtype, period):
    """`count` writable elements of which each `period` bytes are the same memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    size = -(-count * dtype.itemsize // period) * period
    access = mmap.PROT_READ | mmap.PROT_WRITE
    base = libc.mmap(None, size, access, LAZY | mmap.MAP_ANONYMOUS, -1, 0)
    file = os.memfd_create("weights")
    os.ftruncate(file, period)
    for at in range(0, size, period):
        place = libc.mmap(base + at, period, access, mmap.MAP_SHARED | FIXED, file, 0)
        assert place == base + at
    os.close(file)
    memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(base)
    return torch.frombuffer(memory, dtype=dtype), lambda: libc.munmap(ctypes.c_void_p(base), size)


@pytest.mark.thorough
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's mmap flags")
def test_elements_beyond_2_to_the_31(threads):
    """Zero gradients move nothing, so 4 GB of weights may be the same 3 MB again and again."""
    threads(1)
    period = 3 * 2**20  # bytes; an index that loses its upper bits must not meet the same memory
    rows, cols = shape = (2**16 + 3, 2**15)
    memory = [repeated(rows * cols, BF16, period) for _ in range(3)]
    p, m, v = (tensor.view(shape) for tensor, _ in memory)
    # Private pages that are only read are one page of zeros.
    g = torch.frombuffer(mmap.mmap(-1, 2 * rows * cols, LAZY), dtype=BF16).view(shape)
    g[-1] = 2.0
    rule = {**RULE, "lr": 0.5, "weight_decay": 0.0}
    # By rows u = 1. By columns u = 2 / sqrt(4 / rows) = 256, but for 3 more rows than 2^16.
    for kind, wanted in ((ROWS, 0.5), (COLUMNS, -127.0)):
        p[-1] = 1.0
        CPU.scale_([p], [g], [None], [None], [None], [kind], [shape], **rule)
        assert (p[-1] == wanted).all()
        p[-1] = 0.0
        assert (p[: period // 2 // cols] == 0).all()  # one period: the others are the same memory
    CPU.adam_([p], [g], [m], [v], [None], **ADAM_RULE, direction=True)
    for t, wanted in ((p, 0.2 / 0.201), (m, 0.2), (v, 0.04)):
        torch.testing.assert_close(t[-1], torch.full_like(t[-1], wanted))
        t[-1] = 0.0
        assert (t[: period // 2 // cols] == 0).all()
    outs = [torch.full((n,), torch.nan) for n in (rows, cols, 4)]
    outs[2][2:] = 0.0
    CPU.reduce_([g] * 3, outs, [ROWS, COLUMNS, SIGN], [shape] * 3)
    assert outs[0][-1] == 4.0 * cols and (outs[0][:-1] == 0).all()
    assert (outs[1] == 4.0).all()
    assert outs[2][:2].tolist() == [2.0, 4.0 * cols]
    for _, release in memory:
        release()


def test_rows_and_columns_swap_with_the_transpose(threads):
    """The two reductions are one rule: a column of g is a row of its transpose."""
    threads(1)
    for shape, dtype in product([(129, 7), (1, 65), (600, 31)], [F32, BF16]):
        p, g = normal(shape, 0, dtype), normal(shape, 1, dtype)
        q, h = p.mT.contiguous(), g.mT.contiguous()
        none = [None]
        CPU.scale_([p], [g], none, none, none, [COLUMNS], [shape], **RULE)
        CPU.scale_([q], [h], none, none, none, [ROWS], [q.shape], **RULE)
        # Sums in other orders: see step_bound. bfloat16 may round across a boundary, by a unit.
        loose = 2**-7 * (p.abs() + 2**-7) if dtype == BF16 else 0.0
        assert ((p - q.mT).abs() <= step_bound(p, shape[0], RULE["lr"]) + loose).all()
