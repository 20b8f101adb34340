"""The CUDA kernels: emulated on a CPU with threads in either order, and on a GPU if there is one.

The rules of test_kernels.py, then what only these kernels have: rows too long for registers, tables
larger than one launch, partitions, the ends of tensors, graph capture.
"""

import ctypes
import importlib.util
import itertools
import mmap
import os
import random

import emulated_cuda
import gpu_kernel_runs
import numpy as np
import pytest
import test_kernels as rules
import torch
from reference import kernels_numpy as reference
from test_kernels import BF16, F16, F32, RULE, normal, wide

from optimzoo.kernels import native, triton

ROWS, COLUMNS, SIGN, ADAM = range(4)
KINDS = [ROWS, COLUMNS, SIGN, ADAM]
TYPES = [F32, BF16, F16]
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
TURNED = {"emulated": "0", "backwards": "1"}


@pytest.fixture(params=["emulated", "backwards", pytest.param("cuda", marks=no_gpu)])
def on(request, monkeypatch):
    """A backend and its device."""
    if request.param == "cuda":
        assert native.CUDA.available(), native.CUDA.why_not()
        yield native.CUDA, "cuda"
    else:
        monkeypatch.setenv("OZ_EMULATION_BACKWARDS", TURNED[request.param])
        with emulated_cuda.streams():
            yield emulated_cuda.backend(), "cpu"


def mixes():
    """Types of parameter, gradient and state: all, or some where the threads' order counts."""
    every = [*itertools.product(TYPES, repeat=3)]
    return every[::6] if os.environ.get("OZ_EMULATION_BACKWARDS") == "1" else every


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN])
def test_scale(on, kind):
    for types in mixes():
        rules.test_scale_is_the_rule(*on, kind, types)
    rules.test_signs_are_those_that_nesterov_looks_ahead_to(*on)


@pytest.mark.parametrize("layout", gpu_kernel_runs.LAYOUTS)
@pytest.mark.parametrize("method", gpu_kernel_runs.NESTEROV)
def test_nesterov(on, method, layout):
    gpu_kernel_runs.check(*on, method, layout)


@pytest.mark.parametrize("method", gpu_kernel_runs.NESTEROV)
def test_nesterov_in_16_bits(on, method):
    gpu_kernel_runs.check_16_bits(*on, method)


def test_adam(on):
    for types in mixes():
        rules.test_adam_is_the_rule(*on, types)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("param", TYPES)
def test_reduce_apply_and_center(on, param):
    for grad in TYPES:
        rules.test_reduce_apply_and_center_are_the_rules(*on, (param, grad))


def test_rows_of_zeros_scalers_and_rounding(on):
    rules.test_a_row_of_zeros_stays_and_what_is_not_finite_stays_in_its_row(*on)
    for dtype in TYPES:
        rules.test_scaler_and_learning_rate_come_as_tensors(*on, dtype)
    for dtype in (BF16, F16):
        rules.test_stochastic_rounding_is_unbiased(*on, dtype)
        for kind in KINDS:
            rules.test_stochastic_rounding_is_that_of_the_header(*on, dtype, kind)


def step(kernels, params, grads, kinds, moments=None, squares=None, **options):
    none = [None] * len(params)
    one = torch.ones((), device=params[0].device)
    steps = [one if kind == ADAM else None for kind in kinds]
    shapes = [tuple(p.shape) for p in params]
    lists = (params, grads, moments or none, squares or none, steps, kinds, shapes)
    kernels.scale_(*lists, **{**RULE, **options})


@pytest.mark.parametrize("dtype", TYPES)
def test_each_tensor_has_a_rate_and_a_decay_of_its_own(on, dtype):
    """Rows of every way to read them, columns, signs and Adam in one call."""
    kernels, device = on
    shapes = [(9, 264), (9, 263), (2, 16392), (2, 140001), (40, 72), (9, 264), (9, 264)]
    kinds = [ROWS, ROWS, ROWS, ROWS, COLUMNS, SIGN, ADAM]
    rates = [0.1 / (1 + i) for i in range(len(kinds))]
    decays = [0.05 * i for i in range(len(kinds))]

    def stepped(which, **options):
        params = [normal(shapes[i], i, dtype, device) for i in which]
        grads = [normal(shapes[i], 9 + i, dtype, device) for i in which]
        moments = [normal(shapes[i], 19 + i, dtype, device) if i % 2 == 0 else None for i in which]
        squares = [moments[k].abs() if kinds[i] == ADAM else None for k, i in enumerate(which)]
        step(kernels, params, grads, [kinds[i] for i in which], moments, squares, **options)
        return params

    lr = [torch.tensor(r, device=device) if i % 3 == 0 else r for i, r in enumerate(rates)]
    together = stepped(range(len(kinds)), lr=lr, weight_decay=decays)
    for i, one in enumerate(together):
        assert torch.equal(one, stepped([i], lr=rates[i], weight_decay=decays[i])[0]), kinds[i]


# One below, at and above what a block's registers hold (8192 in float32, 16384 in 16 bits), what
# shared memory holds, what it does not, and lengths that are not read in vectors.
LONG = [(2, n) for n in (8188, 8192, 8196, 16384, 16392, 20001, 40000, 61440, 100000, 140000)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("averaged", ["", "momentum", "nesterov"])
def test_long_rows(on, dtype, averaged):
    kernels, device = on
    params = [normal(s, i, dtype, device) for i, s in enumerate(LONG)]
    grads = [normal(s, 9 + i, dtype, device) for i, s in enumerate(LONG)]
    moments = [normal(s, 5 + i, dtype, device) if averaged else None for i, s in enumerate(LONG)]
    rule = {"lr": 0.125, "momentum": 0.75, "weight_decay": 0.25, "l2": False, "eps": 1e-8}
    rule["nesterov"] = averaged == "nesterov"
    expected = [
        reference.scale(
            *(None if x is None else wide(x) for x in (p, g, m)),
            kind=ROWS,
            stored=rules.stored(dtype),
            **rule,
        )
        for p, g, m in zip(params, grads, moments, strict=True)
    ]
    step(kernels, params, grads, [ROWS] * len(LONG), moments, **rule)
    for p, m, (new_p, new_m) in zip(params, moments, expected, strict=True):
        rules.close(p, new_p, dtype, p.shape)
        if averaged:
            rules.close(m, new_m, dtype, p.shape)


def many(device, count=900):
    """More tensors than a table holds, of all kinds and types mixed."""
    choose = random.Random(1)
    lists = [[], [], [], [], []]
    for i in range(count):
        shape = (choose.choice([1, 2, 9]), choose.choice([1, 8, 40, 129]))
        dtype, kind = choose.choice(TYPES), choose.choice(KINDS)
        p, g, m, v = (normal(shape, seed + i, dtype, device) for seed in (0, 1000, 2000, 3000))
        moments = (m, v.abs()) if kind == ADAM else (None, None)
        for column, value in zip(lists, (p, g, kind, *moments), strict=True):
            column.append(value)
    return lists


def test_many_tensors_of_all_kinds_in_one_call(on):
    """As each alone, to the bit."""
    kernels, device = on
    assert emulated_cuda.built().oz_test_slots() < 900
    together, alone = many(device), many(device)
    step(kernels, *together, seed=5, first_index=7)
    for i, one in enumerate(zip(*alone, strict=True)):
        step(kernels, *([x] for x in one), seed=5, first_index=7 + i)
    for index in (0, 3, 4):
        for a, b in zip(together[index], alone[index], strict=True):
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_does_not_depend_on_the_alignment(on, kind):
    """To the bit: sums are taken in one order."""
    kernels, device = on
    for dtype, shape in itertools.product(TYPES, [(5, 264), (37, 1024), (2, 9000)]):
        results = []
        for offset in (0, 1):
            p, g, m, v = (normal(shape, seed, dtype, device, offset) for seed in range(4))
            averages = ([m], [v.abs()]) if kind == ADAM else ([m], None)
            step(kernels, [p], [g], [kind], *averages)
            results.append((p.clone(), m.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), (dtype, shape)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN])
def test_reductions_of_many_parts(on, kind):
    """More than one partial sum, empty ones, more rows than chunks; NaN and infinity."""
    kernels, device = on
    shapes = [(300, 600), (5000, 9), (1, 40000), (40000, 1), (65, 257)]
    grads = [normal(s, i, BF16, device) for i, s in enumerate(shapes)]
    grads[0][7, 11], grads[2][0, 5] = torch.inf, torch.nan
    sizes = [{ROWS: r, COLUMNS: c, SIGN: 4}[kind] for r, c in shapes]
    outs = [torch.full((n,), 0.5, device=device) for n in sizes]
    kernels.reduce_(grads, outs, [kind] * len(shapes), shapes)
    for g, out in zip(grads, outs, strict=True):
        expected = reference.reduce(wide(g), kind, bound=0.5, ratio=0.5)
        rules.close(out[: len(expected)], expected, F32, g.shape)


def test_nothing_is_written_where_the_scaler_found_infinities(on):
    kernels, device = on
    found = {"found_inf": torch.ones((), device=device)}
    for dtype, kind in itertools.product([F32, BF16], KINDS):
        p, g, m, v = (normal((7, 129), seed, dtype, device) for seed in range(4))
        held = [x.clone() for x in (p, m, v)]
        step(kernels, [p], [g], [kind], [m], [v] if kind == ADAM else None, **found)
        out = torch.ones(129, device=device)
        if kind != ADAM:
            shape = [(7, 129)]
            kernels.reduce_([g], [out], [kind], shape, **found)
            kernels.apply_([p], [g], [out], [kind], shape, lr=1.0, weight_decay=0.0, **found)
            kernels.center_([p], [g], shape, eps=1e-8, **found)
        assert all(torch.equal(a, b) for a, b in zip(held, (p, m, v), strict=True))
        assert torch.equal(out, torch.ones(129, device=device))


@pytest.mark.thorough
def test_sanitizer_run_touches_nothing_behind_a_tensor(monkeypatch):
    """What compute-sanitizer watches on a GPU: here each storage ends where memory ends."""
    spec = importlib.util.spec_from_file_location(
        "sanitize", emulated_cuda.ROOT / "tools" / "sanitize.py"
    )
    sanitize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sanitize)
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    held = []  # mapped until the end

    def at_the_end(shape, dtype, device, offset):
        made = torch.randn(shape).to(dtype)
        size = made.numel() * made.element_size()
        pages = -(-(size + 16) // page)
        area = mmap.mmap(-1, (pages + 1) * page)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(area))
        last = ctypes.c_void_p(begin + pages * page)
        assert libc.mprotect(last, ctypes.c_size_t(page), 0) == 0  # no access
        store = torch.frombuffer(area, dtype=torch.uint8, count=pages * page)
        place = store[pages * page - size - (-size % 16 if offset == 0 else 0) :][:size]
        held.append(area)
        return place.view(dtype).view(shape).copy_(made)

    monkeypatch.setattr(sanitize, "tensor", at_the_end)
    torch.manual_seed(0)
    with emulated_cuda.streams():
        assert sanitize.run(emulated_cuda.backend(), "cpu") == 30


# ---- Partitions, for tensors that need not exist. ----

GIANT = [(2**26, 64), (64, 2**26 + 8), (1, 2**34 + 3), (2**31 + 5, 1), (151936, 16384)]


def ask(name, *arguments, count=4):
    out = (ctypes.c_int64 * count)()
    getattr(emulated_cuda.built(), name)(*arguments, out)
    return list(out)


def number(name, *arguments):
    function = getattr(emulated_cuda.built(), name)
    function.restype = ctypes.c_int64
    return function(*arguments)


@pytest.mark.parametrize("shape", [*GIANT, (1, 1), (31, 257), (65, 256), (4097, 700)])
def test_column_parts_cover_a_tensor_once(shape):
    """Chunks follow each other from row 0 to the last, in every tile of columns."""
    rows, cols = map(ctypes.c_int64, shape)
    units = number("oz_test_column_units", rows, cols)
    tiles = -(-shape[1] // 256)
    assert units < 2**31 and units % tiles == 0
    for tile in {0, tiles // 2, tiles - 1}:
        end = 0
        for unit in range(tile, units, tiles):
            col, begin, after, chunk = ask("oz_test_part", rows, cols, ctypes.c_uint32(unit))
            assert (col, begin, chunk) == (tile * 256, end, unit // tiles) and after > begin
            end = after
        assert end == shape[0]


@pytest.mark.parametrize("shape", GIANT)
def test_rows_and_segments_reach_the_last_element(shape):
    """The element that the last unit's threads reach last; none in a unit after it."""
    rows, cols = map(ctypes.c_int64, shape)
    units = number("oz_test_segment_units", rows, cols)
    places = [
        ask("oz_test_segment", cols, ctypes.c_uint32(units - 1), thread, count=3)
        for thread in range(512)
    ]
    reached = {
        (row, min(col + k * stride + 8, shape[1]))
        for row, col, stride in places
        for k in (0, 1)
        if row < shape[0] and col + k * stride < shape[1]
    }
    assert units < 2**31 and max(reached) == (shape[0] - 1, shape[1])
    for turn in (4, 8):
        units = number("oz_test_row_units", rows, cols, turn)
        batch = (shape[1] - 1) // (turn * 2048)
        ends = [
            ask("oz_test_turn", cols, turn, ctypes.c_uint32(units - 1), t, ctypes.c_int64(b), i)[:2]
            for t, b, i in itertools.product(range(512), {0, batch}, range(4))
        ]
        inside = [(r, c) for r, c in ends if r < shape[0] and c < shape[1]]
        assert max(inside)[0] == shape[0] - 1
        assert max(c for _, c in inside) == (shape[1] - 1) // turn * turn


def test_a_unit_finds_its_tensor():
    starts = [0, 1, 2, 50, 51, 300, 301]
    table = (ctypes.c_uint32 * len(starts))(*starts)
    for unit, guess in itertools.product(range(301), range(6)):
        wanted = int(np.searchsorted(starts, unit, side="right")) - 1
        if guess <= wanted:  # a block's units only grow
            arguments = (table, len(starts) - 1, ctypes.c_uint32(unit), guess)
            assert emulated_cuda.built().oz_test_slot_of(*arguments) == wanted


@pytest.mark.parametrize("at", [8, 13, 2**32 - 8, 2**32 - 3, 2**32, 2**40 + 5])
def test_rounding_of_far_elements(at):
    """The upper half of an element's index counts; aligned runs take it from their first."""
    key = 12345
    bits = [
        int(reference.finaliser(e % 2**32 ^ int(reference.finaliser(e >> 32 ^ key))))
        for e in range(at, at + 8)
    ]
    x = np.linspace(1.0, 2.0, 8, dtype=np.float32) * np.float32(1.0001)
    rounded = x.copy()
    place = rounded.ctypes.data_as(ctypes.c_void_p)
    function = emulated_cuda.built().oz_test_round
    function(place, 1, ctypes.c_uint32(key), ctypes.c_int64(at))
    cut = (x.view(np.uint32) + (np.array(bits, np.uint32) & 0xFFFF)) & np.uint32(0xFFFF0000)
    np.testing.assert_array_equal(rounded, cut.view(np.float32))


# ---- On a GPU alone. ----


@no_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_step_replays(kind):
    """With another learning rate each time, as without capture."""
    lr = torch.tensor(0.1, device="cuda")
    states = []
    for captured in (False, True):
        p, g, m, v = (normal((65, 264), seed, BF16, "cuda") for seed in range(4))
        count, out = torch.ones((), device="cuda"), torch.zeros(264, device="cuda")
        averages = ([m], [v.abs_()]) if kind == ADAM else ([m], [None])

        def once(p=p, g=g, averages=averages, count=count, out=out):
            lists = ([p], [g], *averages, [count], [kind], [(65, 264)])
            native.CUDA.scale_(*lists, **{**RULE, "lr": lr, "nesterov": True})
            if kind != ADAM:  # its scratch memory is allocated in the graph
                native.CUDA.reduce_([p], [out], [kind], [(65, 264)])

        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                once()
        for value in (0.1, 0.01):
            lr.fill_(value)
            graph.replay() if captured else once()
        torch.cuda.synchronize()
        states.append((p, m, out))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@no_gpu
@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("method", gpu_kernel_runs.METHODS)
def test_a_captured_step_of_a_method_replays(method, name):
    if (method, name) != ("sinkgd", "native"):  # which has no kernel for it
        gpu_kernel_runs.check_captured(native.CUDA if name == "native" else triton, method)


@no_gpu
@pytest.mark.parametrize(
    ("kind", "shape"), [(ROWS, (2**19 + 3, 4096)), (COLUMNS, (2**19 + 3, 4096))]
)
def test_more_than_two_to_the_31_elements(kind, shape):
    p = torch.zeros(shape, dtype=BF16, device="cuda")
    g = torch.ones(shape, dtype=BF16, device="cuda")
    g[-1] = 2.0
    step(native.CUDA, [p], [g], [kind], lr=1.0)
    size = ((shape[0] - 1 + 4) / shape[0]) ** 0.5
    for row, value in ((0, 1.0), (shape[0] // 2, 1.0), (-2, 1.0), (-1, 2.0)):
        wanted = -1.0 if kind == ROWS else -value / size
        assert (p[row].float() - wanted).abs().max() < 2**-7 * 2
