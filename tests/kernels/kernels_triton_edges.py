"""The Triton kernels where it is easy to go wrong; test_kernels_triton.py runs these cases."""

import numpy as np
import pytest
import torch
from kernels_triton import (
    ADAM,
    BF16,
    COLUMNS,
    DEVICE,
    F16,
    F32,
    MIXES,
    QUIET,
    ROWS,
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
from test_scale_launch_cache import CHANGES, part_ways, run

from optimzoo.kernels import dispatch
from optimzoo.kernels import triton as kernels
from optimzoo.kernels.triton import launch, table
from optimzoo.kernels.triton.scale import _rows
from optimzoo.lowbit import round_stochastic, stochastic

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = {BF16: "bfloat16", F16: "float16"}


@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_or_column(kind, value):
    p, g = make((6, 9), BF16, 0), make((6, 9), BF16, 1)
    g[2, 3] = value
    before = p.clone()
    scale([p], [g], [None], [kind])
    spoiled = torch.zeros_like(p, dtype=torch.bool)
    spoiled[2, 3] = kind != SIGN or value != value  # infinity has a sign
    if value != value and kind != SIGN:  # an infinite norm stops its row, one of NaN spoils it
        spoiled[(2, slice(None)) if kind == ROWS else (slice(None), 3)] = True
    assert torch.equal(p.isnan(), spoiled)
    assert (p != before)[~spoiled].sum() > 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_largest_is_nan_if_any_is(value):
    out = torch.zeros(4, device=DEVICE)
    kernels.reduce_([on_device([1.0, value, 2.0])], [out], [SIGN], [(1, 3)])
    assert out[0].isnan() if value != value else out[0] == float("inf")


@pytest.mark.parametrize("kind", [ROWS, COLUMNS, SIGN])
def test_zeros_move_by_the_decay_alone(kind):
    p = make((5, 6), F32, 0)
    want = exact(p) * (1 - 0.1 * 0.1)
    scale([p], [torch.zeros_like(p)], [None], [kind])
    agree(p, want)


def test_found_inf_writes_nothing():
    p, g, m, v = (make((5, 8), BF16, i) for i in range(4))
    sums = on_device([7.0] * 8)
    before = [t.clone() for t in (p, g, m, v, sums)]
    found = {"found_inf": on_device(1.0)}
    for kind in (ROWS, COLUMNS, SIGN):
        scale([p], [g], [m], [kind], **found)
        kernels.reduce_([g], [sums], [kind], [(5, 8)], **found)
        apply([p], [g], [sums], [kind], **found)
    adam([p], [g], [m], [v], [on_device(1.0)], **found)
    kernels.center_([p], [g], [(5, 8)], eps=1e-6, **found)
    for kind in (ROWS, COLUMNS):
        sinkhorn([p], [g], [kind], **found)
    for tensor, kept in zip((p, g, m, v, sums), before, strict=True):
        assert torch.equal(tensor, kept)
    scale([p], [g], [m], [ROWS], found_inf=on_device(0.0))
    assert not torch.equal(p, before[0])


def sinkhorn(params, grads, kinds, **changes):
    options = {"lr": 0.1, "weight_decay": 0.1, "iterations": 3, **changes}
    kernels.sinkhorn_(params, grads, kinds, [tuple(p.shape) for p in params], **options)


def test_sinkhorn_of_many_is_that_of_each_alone():
    """To the bit, with rates of its own, in whatever chunks the others are cut up."""
    shapes = [(70, 24), (130, 24), (3, 40), (70, 25), (0, 4), (200, 3)]
    kinds = [ROWS, COLUMNS, COLUMNS, ROWS, ROWS, COLUMNS]
    lr = [0.1, on_device(0.2), 0.3, 0.4, 0.5, 0.6]
    decays = [0.0, 0.1, -0.2, 0.3, 0.0, 0.5]
    params = [make(s, (F32, BF16)[i % 2], i) for i, s in enumerate(shapes)]
    grads = [make(s, F32, 10 + i) for i, s in enumerate(shapes)]
    alone = [p.clone() for p in params]
    kept = [g.clone() for g in grads]
    sinkhorn(params, grads, kinds, lr=lr, weight_decay=decays)
    for i, p in enumerate(alone):
        sinkhorn([p], [grads[i]], [kinds[i]], lr=lr[i], weight_decay=decays[i])
        assert torch.equal(p, params[i]) and torch.equal(grads[i], kept[i])
    other = make(shapes[2], F32, 2)
    sinkhorn([other], [grads[2]], [COLUMNS], lr=lr[2], weight_decay=0.2)
    assert not torch.equal(other, params[2])  # its decay is cautious


def test_lr_may_be_a_tensor():
    p, g = make((5, 8), F32, 0), make((5, 8), F32, 1)
    q = p.clone()
    scale([p], [g], [None], [ROWS], lr=0.03)
    scale([q], [g], [None], [ROWS], lr=on_device(0.03))
    assert torch.equal(p, q)


# Signs as gradients: every update is a power of two, so that float32 holds the sums exactly, and
# all of the rounding is the stochastic one.
@pytest.mark.parametrize(
    "operation", ["rows", "columns", "sign", "adam", "apply", "center", "sinkhorn"]
)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_stochastic_rounding_to_the_bit(operation, dtype):
    words = {"seed": 2**63 + 17, "step": 2**33 + 5, "first_index": 2**31}
    shapes = [(6, 8), (4, 130), (3, 258)]
    params = [make(s, dtype, i, 1e-3 if i else 1e-6) for i, s in enumerate(shapes)]
    grads = [torch.ones(s, device=DEVICE) for s in shapes]
    for g in grads:
        g[:, ::2] = -1.0
    lr = 2.0**-20 if dtype == BF16 else 2.0**-26
    wants = [p.float() - lr * g for p, g in zip(params, grads, strict=True)]
    if operation == "apply":
        halves = [on_device([0.5])] * 3
        apply(params, grads, halves, [SIGN] * 3, lr=2 * lr, weight_decay=0.0, **words)
    elif operation == "adam":
        state = [[torch.zeros(s, device=DEVICE) for s in shapes] for _ in range(2)]
        plain = {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
        adam(params, grads, *state, [on_device(1.0)] * 3, lr=lr, **plain, **words)
    elif operation == "sinkhorn":
        options = {"lr": lr, "weight_decay": 0.0, "iterations": 3}
        kernels.sinkhorn_(params, grads, [ROWS, COLUMNS, ROWS], shapes, **options, **words)
    elif operation == "center":
        eighths = [g * 0.125 * (1 + 2.0**-14) for g in grads]
        kernels.center_(params, eighths, shapes, eps=1.0, **words)
        wants = eighths
    else:
        kinds = [("rows", "columns", "sign").index(operation)] * 3
        scale(params, grads, [None] * 3, kinds, lr=lr, weight_decay=0.0, eps=0.0, **words)
    rng_key = {"seed": words["seed"], "step": words["step"]}
    for i, (p, x) in enumerate(zip(params, wants, strict=True)):
        index = words["first_index"] + i
        want = round_stochastic(x, dtype, index=index, **rng_key)
        assert torch.equal(p.view(torch.int16), want.view(torch.int16))
        other = reference.round_stochastic(x.cpu().numpy(), NAMES[dtype], index=index, **rng_key)
        np.testing.assert_array_equal(exact(p), other)
        assert not torch.equal(p, x.to(dtype))  # some were rounded the other way


def test_stochastic_rounding_of_subnormals_at_the_very_bound():
    """Numbers that just reach the next one of float16 with their own random bits, or just miss."""
    bits = reference.random_bits(1000, 1, 2, 0) >> 8
    for short, want in ((0, 2.0**-24), (1, 0.0)):
        units = np.maximum(2.0**24 - bits - short, 0.0) * 2.0**-48
        p = torch.zeros(1, 1000, dtype=F16, device=DEVICE)
        options = {"lr": -1.0, "weight_decay": 0.0, "seed": 1, "step": 2}
        apply([p], [on_device(units[None].tolist())], [on_device([1.0])], [SIGN], **options)
        assert (p == want).all()


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_stochastic_rounding_of_what_is_not_finite(dtype):
    p = torch.zeros(1, 6, dtype=dtype, device=DEVICE)
    g = on_device([[float("nan"), float("inf"), -float("inf"), 3e38, 1e30, -0.0]])
    apply([p], [g], [on_device([1.0])], [SIGN], lr=-1.0, weight_decay=0.0, seed=1)
    want = round_stochastic(g, dtype, seed=1, step=0, index=0)
    torch.testing.assert_close(p, want, rtol=0, atol=0, equal_nan=True)


def test_indices_beyond_32_bits():
    """One program far into a tensor of more than 2^33 elements, of which only its part exists."""
    first, count = 2**33, 64 * 64
    p, g = make((64, 64), BF16, 0, 1e-3), torch.ones(64, 64, dtype=BF16, device=DEVICE)
    want = p.float() - 2.0**-15
    record = table.Record(p, g, None, None, None, None, None, first // 64 + 64, 64, 0)
    values = [*launch._columns([record], [0])]
    for field in (table.PARAM, table.GRAD):
        values[field.value] -= first * 2
    values[table.FIRST.value] = -first // count
    values[table.RATES.value] = int(np.float32(2.0**-15).view(np.int32))
    gradient, rounding = launch.scalars(seed=3, step=4)
    rule = {
        "one_minus_beta": 0.1,
        "NESTEROV": False,
        "eps": 0.0,
        "L2": False,
        **gradient,
        **rounding,
    }
    types = {"P": launch.TYPES[BF16], "G": launch.TYPES[BF16], "M": None}
    tile = dict(launch.row_tile(record).constants)
    _rows[(1,)](
        *(torch.tensor(values, device=DEVICE), 1),
        **{**rule, **types, "ALIGNED": 1, "HUGE": True, "SEARCH": 16, **tile},
    )
    bits = stochastic._random_bits(first, count, stochastic._key(3, 4, 0), p.device)
    assert torch.equal(p, stochastic._bfloat16(want.view(-1), bits).to(BF16).view(64, 64))


def test_many_tensors_are_stepped_as_each_alone():
    params, grads, averages, kinds = [], [], [], []
    shapes = [*SHAPES[:5], (9, 24), (3, 0)]
    for i in range(15):
        mix, shape = MIXES[i % 5], shapes[i % 7]
        flat = make((shape[0] * shape[1] + 1,), mix[0], i)
        params.append((flat[1:] if i % 4 == 3 else flat[:-1]).view(shape))  # one that is unaligned
        grads.append(make(shape, mix[1], i + 100))
        averages.append(make(shape, mix[2], i + 200) if i % 3 else None)
        kinds.append(i % 3)
    lone = [
        ([p.clone()], [g], [None if m is None else m.clone()], [kind])
        for p, g, m, kind in zip(params, grads, averages, kinds, strict=True)
    ]
    scale(params, grads, averages, kinds, seed=7)
    for i, arguments in enumerate(lone):
        scale(*arguments, seed=7, first_index=i)
        assert torch.equal(params[i], arguments[0][0])
        assert averages[i] is None or torch.equal(averages[i], arguments[2][0])


def test_each_tensor_has_its_own_rate_and_decay():
    kinds = [ROWS, COLUMNS, SIGN, ADAM, COLUMNS]
    params, grads, averages, squares = (
        [make((6, 40), F32, 10 * j + i) for i in range(5)] for j in range(4)
    )
    squares = [v.abs() for v in squares]
    rates, decays = [0.3, on_device(0.2), 0.1, on_device(0.05), 0.01], [0.1, 0.0, 0.3, 0.2, 0.5]
    steps = [on_device(3.0)] * 5
    options = {"betas": (0.9, 0.999), "adam_eps": 1e-8, "maximize": False, "momentum": 0.9}
    options |= {"l2": False, "eps": 1e-8}

    def step(lr, weight_decay, chosen):
        tensors = [[c[i].clone() for i in chosen] for c in (params, averages, squares)]
        columns = (tensors[0], [grads[i] for i in chosen], *tensors[1:], steps[: len(chosen)])
        own = {"lr": lr, "weight_decay": weight_decay, **options}
        kernels.scale_(*columns, [kinds[i] for i in chosen], [(6, 40)] * len(chosen), **own)
        return tensors[0]

    together = step(rates, decays, range(5))
    for i in range(5):
        assert torch.equal(together[i], step(rates[i], decays[i], [i])[0])
        assert not torch.equal(together[i], step(rates[i - 1], decays[i], [i])[0])
        assert not torch.equal(together[i], step(rates[i], decays[i - 1], [i])[0])


def test_a_plan_is_replayed_with_other_gradients_counts_and_rates():
    """Its words, and so its table, are those of a plan that is made anew."""
    kinds = [ROWS, COLUMNS, ADAM]
    params, averages, squares = (
        [make((6, 40), F32, 3 * j + i) for i in range(3)] for j in range(3)
    )
    squares = [v.abs() for v in squares]
    options = {"betas": (0.9, 0.999), "adam_eps": 1e-8, "maximize": False, "momentum": 0.9}
    options |= {"l2": False, "eps": 1e-8}
    kept = kernels.scale_table()
    plans = []
    for step in range(4):
        grads = [make((6, 40), F32, 100 * step + i) for i in range(3)]
        if step == 3:  # one that begins elsewhere takes another plan
            grads[1] = torch.cat([grads[1].flatten(), grads[1].flatten()])[1:241].view(6, 40)
        rates = {"lr": [0.1, on_device(0.2), 0.3 + step], "weight_decay": [0.1, 0.0, 0.1 * step]}
        results = []
        for held in (kept, None):
            tensors = [[t.clone() for t in column] for column in (params, averages, squares)]
            if held is not None:
                tensors = [params, averages, squares]
                before = [[t.clone() for t in column] for column in tensors]
            else:
                tensors = before
            counts = [None, None, on_device(float(step + 1))]
            columns = (tensors[0], grads, *tensors[1:], counts, kinds, [(6, 40)] * 3)
            kernels.scale_(*columns, **rates, **options, table=held)
            results.append([t for column in tensors for t in column])
        plans.append(kept.plan)
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
    assert plans[0] is plans[1] is plans[2] is not plans[3]


class Compiled:
    """In a kernel's place: what Triton returns of a launch, which takes the same arguments."""

    arg_names = ("table", "count", "eps", "found_inf", "L2")

    def __init__(self):
        self.launched, self.again = [], []

    def __getitem__(self, grid):
        def launched(*values, num_warps):
            self.launched.append(values)
            return {grid: lambda *values: self.again.append(values)}

        return launched


def test_a_launch_is_repeated_by_what_the_first_one_compiled():
    kernel, grad = Compiled(), make((8, 64), F32, 0)
    plan = launch.Plan([grad])
    plan.add(kernel, [record(8, 64)], launch.row_tile)
    flag = on_device(0.0)
    for eps, found_inf, L2 in (
        (1.0, None, True),
        (2.0, None, True),
        (2.0, flag, True),
        (3.0, flag, False),
    ):
        plan.run(eps=eps, found_inf=found_inf, L2=L2)
    assert [v[1:] for v in kernel.launched] == [
        (1, 1.0, None, True),
        (1, 2.0, flag, True),
        (1, 3.0, flag, False),
    ]
    assert [v[1:] for v in kernel.again] == [(1, 2.0, None, True)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_kept_call_of_scale_gives_the_same_bits(change, monkeypatch):
    dispatch._backend.cache_clear()
    monkeypatch.setitem(dispatch.BACKENDS, DEVICE, (kernels,))
    try:
        kept, optimizer = run(change, DEVICE, keep=True)
        anew, _ = run(change, DEVICE, keep=False)
    finally:
        dispatch._backend.cache_clear()
    assert len(optimizer._launch_cache._launches) == (3 if change is part_ways else 1)
    for call in optimizer._launch_cache._launches:
        assert call.kernels is kernels
    for one, other in zip(kept, anew, strict=True):
        assert torch.equal(one, other)


def test_neighbours_are_left_alone():
    whole = torch.full((3, 200), 5.0, dtype=BF16, device=DEVICE)
    for kind in (ROWS, COLUMNS, SIGN):
        scale([whole[1, 1:-1].view(2, 99)], [make((2, 99), BF16, kind)], [None], [kind])
    assert whole[0].eq(5.0).all() and whole[2].eq(5.0).all()
    assert whole[1, [0, -1]].eq(5.0).all() and whole[1, 1:-1].ne(5.0).sum() > 150
    for rows in (1, 2, 3, 4):  # the tensor begins at a multiple of 16 bytes, and its rows anywhere
        whole = torch.full((1600,), 5.0, dtype=BF16, device=DEVICE)
        scale(
            [whole[16 : 16 + 259 * rows].view(rows, 259)],
            [make((rows, 259), BF16, 0)],
            [None],
            [ROWS],
        )
        assert whole[:16].eq(5.0).all() and whole[16 + 259 * rows :].eq(5.0).all()
        assert whole[16 : 16 + 259 * rows].ne(5.0).float().mean() > 0.8


class Recorder:
    """In a kernel's place: keeps the grids it is launched on."""

    arg_names = ()

    def __init__(self):
        self.grids = []

    def __getitem__(self, grid):
        self.grids.append(grid[0])
        return lambda *arguments, **constants: None


def record(rows, cols, dtype=F32, offset=0):
    grad = torch.empty(rows * cols + offset, dtype=dtype, device=DEVICE)[offset:]
    return table.Record(None, grad, None, None, None, None, None, rows, cols, 0)


def test_like_tensors_take_one_launch():
    alike = [record(rows, 64) for rows in (1, 64, 65, 0, 200)]
    other = [record(8, 64), record(8, 64, BF16), record(8, 64, offset=1), record(8, 2000)]
    for records, grids in ((alike, [1 + 1 + 2 + 4]), (other, [1, 1, 1, 4])):
        kernel = Recorder()
        plan = launch.Plan([records[0].grad])
        plan.add(kernel, records, launch.row_tile)
        plan.run()
        assert kernel.grids == grids


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 10**6), (10**6, 1), (7, 129), (4096, 4096), (3, 70000)]
)
@pytest.mark.parametrize("make_tile", [launch.row_tile, launch.block_tile])
def test_tiles_cover_and_fit(shape, make_tile):
    rows, cols = shape
    tile = make_tile(record(0, 0)._replace(rows=rows, cols=cols))
    constants = dict(tile.constants)
    assert constants["R"] * constants["C"] <= 1024 * tile.warps
    across = 1 if constants.get("LOOP") else -(-cols // constants["C"])
    assert tile.units == -(-rows // constants["R"]) * across
    assert make_tile is launch.block_tile or constants["LOOP"] or constants["C"] >= cols


def test_autograd_knows_what_was_written():
    p, g, m = (make((4, 8), F32, i) for i in range(3))
    before = p._version, g._version, m._version
    scale([p], [g], [m], [ROWS])
    assert p._version > before[0] and m._version > before[2]
    assert g._version == before[1]


def test_no_tensors_no_work():
    scale([], [], [], [])
    adam([], [], [], [], [])
    kernels.reduce_([], [], [], [])
    apply([], [], [], [])
    kernels.center_([], [], [], eps=1.0)
    sinkhorn([], [], [])
    empty = torch.zeros(3, 0, device=DEVICE)
    for kind in (ROWS, COLUMNS, SIGN):
        scale([empty], [empty], [None], [kind])
        apply([empty], [empty], [on_device([1.0])], [kind])
        kernels.reduce_([empty], [on_device([1.0] * 4)], [kind], [(3, 0)])
    kernels.center_([empty], [empty], [(3, 0)], eps=1.0)
    sinkhorn([empty], [empty], [ROWS])
