"""The Triton kernels against the NumPy transcription; test_kernels_triton.py runs them."""

import numpy as np
import pytest
import test_kernels as rules
import torch
from kernels_triton import (
    ADAM,
    ADAM_RULE,
    BF16,
    COLUMNS,
    DEVICE,
    F16,
    F32,
    MIXES,
    QUIET,
    ROWS,
    RULE,
    SHAPES,
    SIGN,
    adam,
    agree,
    apply,
    exact,
    make,
    on_device,
    scale,
)
from reference import kernels_numpy as reference

from optimzoo.kernels import triton as kernels

pytestmark = pytest.mark.filterwarnings(QUIET)


def storing(dtype):
    """How an array is rounded when it is stored in this type."""
    return lambda x: torch.tensor(x).float().to(dtype).double().numpy()


@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("momentum", ["", "momentum", "nesterov"])
def test_scale(kind, mix, momentum):
    for seed, shape in enumerate(SHAPES):
        l2 = seed % 2 == 0
        p, g = make(shape, mix[0], seed), make(shape, mix[1], seed + 50, 1e-3)
        m = make(shape, mix[2], seed + 90, 1e-3) if momentum else None
        options = {**RULE, "l2": l2, "maximize": True}
        options["weight_decay"] *= (-1) ** seed  # cautious
        options["nesterov"] = momentum == "nesterov"
        want, average = reference.scale(
            *(exact(p), exact(g), exact(m)),
            **{**options, "kind": kind, "grad_scale": 4.0, "stored": storing(mix[2])},
        )
        scale([p], [g], [m], [kind], **options, grad_scale=on_device(4.0))
        # A momentum that is close to a tie may be rounded the other way, and moves its quotient.
        agree(p, want, slack=1e-3 if momentum and mix[2] != F32 else 1e-6)
        if momentum:
            agree(m, average)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("momentum", ["", "momentum", "nesterov"])
@pytest.mark.parametrize("cols", [257, 519, 1025, 1031])
def test_rows_that_begin_anywhere(mix, momentum, cols):
    """By vectors in the middle and by element at both ends; each end has 0 to 7 of them."""
    p, g = make((17, cols), mix[0], cols), make((17, cols), mix[1], 1, 1e-3)
    m = make((17, cols), mix[2], 2, 1e-3) if momentum else None
    options = {**RULE, "nesterov": momentum == "nesterov"}
    want, average = reference.scale(
        *(exact(p), exact(g), exact(m)), kind=ROWS, stored=storing(mix[2]), **options
    )
    scale([p], [g], [m], [ROWS], **options)
    agree(p, want, slack=1e-3 if momentum and mix[2] != F32 else 1e-6)
    if momentum:
        agree(m, average)


@pytest.mark.parametrize("kind", [ROWS, COLUMNS])
@pytest.mark.parametrize("momentum", ["", "momentum", "nesterov"])
def test_long_rows_and_tall_columns(kind, momentum):
    shape = (2, 16393) if kind == ROWS else (523, 3)
    p, g = make(shape, F32, 1), make(shape, F32, 2)
    m = make(shape, F32, 3) if momentum else None
    options = {**RULE, "nesterov": momentum == "nesterov"}
    want, average = reference.scale(exact(p), exact(g), exact(m), kind=kind, **options)
    scale([p], [g], [m], [kind], **options)
    agree(p, want)
    if momentum:
        agree(m, average)


def test_signs_that_nesterov_looks_ahead_to():
    rules.test_signs_are_those_that_nesterov_looks_ahead_to(kernels, DEVICE)


def adam_inputs(n, mix, seed=0):
    p, g, m = make((n,), mix[0], seed), make((n,), mix[1], seed + 1), make((n,), mix[2], seed + 2)
    return p, g, m, make((n,), mix[2], seed + 3).abs()


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("n", [1, 7, 129, 2056])
@pytest.mark.parametrize("t", [1, 1000])
@pytest.mark.parametrize("eps_before", [True, False])
def test_adam(mix, n, t, eps_before):
    p, g, m, v = adam_inputs(n, mix, n)
    rule = {**ADAM_RULE, "eps_before": eps_before}
    if n == 7:
        rule |= {"betas": (0.0, 0.5), "weight_decay": -rule["weight_decay"]}
    want = reference.adam(*map(exact, (p, g, m, v)), t, **rule, maximize=True, grad_scale=4.0)
    adam(
        *([p], [g], [m], [v], [on_device(float(t))]),
        **{**rule, "maximize": True, "grad_scale": on_device(4.0)},
    )
    for tensor, expected in zip((p, m, v), want, strict=True):
        agree(tensor, expected)


@pytest.mark.parametrize("mix", MIXES)
def test_adams_masks(mix):
    tensors, masks, wants = [], [], []
    extra = {"l1": 0.3, "alpha": 0.6}
    for n in (1, 129, 4099):
        p, g, m, v = adam_inputs(n, mix, n)
        kept = np.random.default_rng(n).random(n) < 0.5
        rule = {**ADAM_RULE, **extra, "eps_before": False}
        wants.append(reference.adam(*map(exact, (p, g, m, v)), 2, mask=kept, **rule))
        masks.append(torch.tensor(np.packbits(kept, bitorder="little")).to(DEVICE))
        tensors.append((p, g, m, v))
    p, g, m, v = map(list, zip(*tensors, strict=True))
    adam(p, g, m, v, [on_device(2.0)] * 3, masks=masks, eps_before=False, **extra)
    for got, want in zip(zip(p, m, v, strict=True), wants, strict=True):
        for tensor, expected in zip(got, want, strict=True):
            agree(tensor, expected)


@pytest.mark.parametrize("eps_before", [True, False])
def test_adam_has_a_largest_update(eps_before):
    p, g, m, v = adam_inputs(129, MIXES[0])
    g[5] = float("nan")
    rule = {**ADAM_RULE, "eps_before": eps_before, "max_update": 0.7}
    want = reference.adam(*map(exact, (p, g, m, v)), 2, **rule)
    adam([p], [g], [m], [v], [on_device(2.0)], eps_before=eps_before, max_update=0.7)
    assert p[5].isnan()
    for tensor, expected in zip((p, m, v), want, strict=True):
        agree(torch.cat([tensor[:5], tensor[6:]]), np.delete(expected, 5))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("bound", [0.5, 0.0])
def test_adam_clipped(mix, bound):
    p, g, m, v = adam_inputs(129, mix)
    clip = [bound, 0.25, 2.0]
    want = reference.adam(*map(exact, (p, g, m, v)), 2, clip=clip, eps_before=True, **ADAM_RULE)
    adam([p], [g], [m], [v], [on_device([2.0])], clips=[on_device(clip)])
    for tensor, expected in zip((p, m, v), want, strict=True):
        agree(tensor, expected)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("limit", [{}, {"max_update": 0.7}], ids=str)
def test_adam_direction(mix, limit):
    p, g, m, v = adam_inputs(129, mix)
    rule = {**ADAM_RULE, "eps_before": True, "direction": True, **limit}
    want = reference.adam(*map(exact, (p, g, m, v)), 1, **rule)
    p.fill_(float("nan"))
    adam([p], [g], [m], [v], [None], direction=True, **limit)
    for tensor, expected in zip((p, m, v), want, strict=True):
        agree(tensor, expected)


def test_adam_needs_a_step_unless_a_direction():
    p, g, m, v = adam_inputs(3, MIXES[0])
    with pytest.raises(ValueError, match=r"steps\[1\] is None"):
        adam([p, p], [g, g], [m, m], [v, v], [on_device(1.0), None])


def test_vectors_take_adam_in_scale():
    p, g, m, v = adam_inputs(129, MIXES[0])
    rule = {**ADAM_RULE, "betas": (0.8, 0.9), "eps_before": True}
    want = reference.adam(*map(exact, (p, g, m, v)), 3, **rule)
    weight, grad = make((7, 9), F32, 8), make((7, 9), F32, 9)
    alone = weight.clone()
    scale([alone], [grad], [None], [ROWS])
    kernels.scale_(
        *([weight, p], [grad, g], [None, m], [None, v], [None, on_device(3.0)]),
        *([ROWS, ADAM], [(7, 9), (1, 129)]),
        **{**RULE, "betas": (0.8, 0.9), "adam_eps": 1e-3, "maximize": False},
    )
    for tensor, expected in zip((p, m, v), want, strict=True):
        agree(tensor, expected)
    assert torch.equal(weight, alone)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_reduce(dtype):
    for seed, shape in enumerate([*SHAPES, (600, 5), (2, 33000)]):
        g = make(shape, dtype, seed)
        sizes = {ROWS: shape[0], COLUMNS: shape[1], SIGN: 4}
        if shape[1] == 33000:
            del sizes[COLUMNS]  # a thousand programs
        outs = {kind: on_device([float("nan")] * n) for kind, n in sizes.items()}
        outs[SIGN][2:] = on_device([0.5, 0.25])
        options = {"maximize": True, "grad_scale": on_device(2.0)}
        n = len(outs)
        kernels.reduce_([g] * n, [*outs.values()], [*outs], [shape] * n, **options)
        for kind, out in outs.items():
            options = {"bound": 0.5, "ratio": 0.25, "maximize": True, "grad_scale": 2.0}
            want = reference.reduce(exact(g), kind, **options)
            np.testing.assert_allclose(exact(out)[: len(want)], want, rtol=1e-5)


@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN])
@pytest.mark.parametrize("mix", MIXES)
def test_apply(kind, mix):
    for seed, shape in enumerate([*SHAPES, (20, 700)]):
        p, g = make(shape, mix[0], seed), make(shape, mix[1], seed + 50)
        scales = make(((*shape, 1)[kind],), F32, seed).abs()
        options = {"lr": 0.1, "weight_decay": (-1) ** seed * 0.1, "maximize": True}
        want = reference.apply(exact(p), exact(g), exact(scales), kind, **options)
        apply([p], [g], [scales], [kind], **options)
        agree(p, want)


@pytest.mark.parametrize("mix", MIXES)
def test_center(mix):
    for seed, shape in enumerate([*SHAPES, (1, 16400)]):
        g = make(shape, mix[1], seed) + 3.0
        out = torch.full(shape, float("nan"), dtype=mix[0], device=DEVICE)
        kernels.center_([out], [g], [shape], eps=1e-6, maximize=True)
        agree(out, reference.center(exact(g), eps=1e-6, maximize=True), slack=1e-5)
