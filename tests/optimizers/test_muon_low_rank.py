"""Muon's momentum in two thin factors; `test_zoo_fidelity.py` has its NumPy transcription."""

import copy
import io

import numpy as np
import pytest
import torch
from optimizer_db import Tiny, train
from torch import nn

from optimzoo import Muon, adopt_state, create_optimizer, param_groups
from optimzoo.memory import account, simulate
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.subspace.low_rank_average import orthonormal_columns

FACTORS = ["momentum_left", "momentum_right"]
EXACT = {"ns_dtype": "float64", "adjust_lr_fn": "spectral_unclamped", "lr": 0.1}
LAYOUTS = {
    "tall": ((12, 7), {}),
    "wide": ((7, 12), {}),
    "square": ((9, 9), {}),
    "odd": ((65, 6), {}),
    "transposed": ((7, 12), {"transposed": True}),
    "heads": ((12, 7), {"heads": 3}),
    "experts": ((3, 8, 6), {"stacked": True}),
    "transposed experts": ((3, 8, 6), {"stacked": True, "transposed": True}),
    "convolution": ((8, 3, 2, 2), {}),
}


def drawn(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weight_of(name, dtype=torch.float64, **options):
    shape, layout = LAYOUTS[name]
    p = nn.Parameter(drawn(*shape, seed=99, dtype=dtype))
    return p, Muon([{"params": [p], "role": "hidden", **layout}], **{**EXACT, **options})


def run(p, optimizer, grads):
    for grad in grads:
        p.grad = None if grad is None else grad.reshape(p.shape).to(p.dtype)
        optimizer.step()


def of_rank(p, rank, steps, seed=5):
    """Gradients whose rows lie in one space of a dimension, and whose columns do."""
    flat = p if p.ndim < 4 else p.flatten(1)
    left = drawn(*flat.shape[:-1], rank, seed=seed)
    right = drawn(*flat.shape[:-2], flat.shape[-1], rank, seed=seed + 1)
    middle = [drawn(*flat.shape[:-2], rank, rank, seed=seed + 2 + i) for i in range(steps)]
    return [left @ x @ right.mT for x in middle]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("rank", "given"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_past_of_that_rank_is_kept_whole(name, rank, given, nesterov):
    """Muon's own steps, from the first on, with gradients of zero and none among them."""
    ends = []
    for momentum_rank in (None, rank):
        p, optimizer = weight_of(name, momentum_rank=momentum_rank, nesterov=nesterov)
        grads = of_rank(p, given, 30)
        grads[0] = grads[11] = torch.zeros_like(p)
        grads[6] = None
        run(p, optimizer, grads)
        ends.append(p.detach())
        assert [*optimizer.state[p]] == (FACTORS if momentum_rank else ["momentum_buffer"])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_more_than_that_rank_is_not():
    ends = []
    for momentum_rank in (None, 2):
        p, optimizer = weight_of("tall", momentum_rank=momentum_rank)
        run(p, optimizer, of_rank(p, 3, 30))
        ends.append(p.detach())
    assert (ends[0] - ends[1]).norm() > 1e-2 * ends[0].norm()


def test_the_past_is_nearly_the_nearest_of_its_rank():
    """Of a steady part and noise: within a tenth of what an SVD of the whole momentum leaves."""
    p, optimizer = weight_of("square", momentum_rank=3)
    left, right = (np.linalg.qr(drawn(9, 9, seed=s).numpy())[0] for s in (1, 2))
    steady = (left * 2.0 ** -np.arange(9)) @ right.T
    mean = np.zeros((9, 9))
    for step in range(60):
        grad = steady + 0.02 * drawn(9, 9, seed=step).numpy()
        run(p, optimizer, [torch.tensor(grad)])
        mean = 0.95 * mean + 0.05 * grad
    kept = [optimizer.state[p][key].numpy() for key in FACTORS]
    nearest = np.linalg.norm(np.linalg.svd(mean)[1][3:])
    assert nearest <= np.linalg.norm(mean - kept[0] @ kept[1].T) < 1.1 * nearest
    np.testing.assert_allclose(kept[0].T @ kept[0], np.eye(3), atol=1e-11)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_of_the_shorter_side_is_a_buffer_to_the_bit(name):
    ends = []
    for momentum_rank in (None, 9):
        p, optimizer = weight_of(name, momentum_rank=momentum_rank)
        run(p, optimizer, [drawn(*p.shape, seed=s) for s in range(4)])
        assert [*optimizer.state[p]] == ["momentum_buffer"]
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_experts_and_transposed_weights_are_their_matrices():
    experts, optimizer = weight_of("experts", momentum_rank=2)
    turned, other = weight_of("transposed experts", momentum_rank=2)
    with torch.no_grad():
        turned.set_(experts.detach().mT.contiguous())
    alone = []
    for i in range(3):
        p = nn.Parameter(experts.detach()[i].clone())
        one = Muon([{"params": [p], "role": "hidden"}], **EXACT, momentum_rank=2)
        run(p, one, [drawn(3, 8, 6, seed=s)[i] for s in range(6)])
        alone.append(p.detach())
    grads = [drawn(3, 8, 6, seed=s) for s in range(6)]
    run(experts, optimizer, grads)
    run(turned, other, [grad.mT for grad in grads])
    torch.testing.assert_close(experts.detach(), torch.stack(alone), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(turned.detach().mT, experts.detach(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tall", "experts", "transposed"])
def test_before_the_first_gradient_nothing_has_happened(name, dtype):
    """Gradients of zero, as DCP's trial step has them, leave the first step what it would be."""
    p, optimizer = weight_of(name, dtype, momentum_rank=3)
    q, other = weight_of(name, dtype, momentum_rank=3)
    run(p, optimizer, [torch.zeros_like(p)] * 2)
    assert torch.equal(p, q) and not optimizer.state[p]["momentum_left"].any()
    grads = [drawn(*p.shape, seed=s) for s in range(4)]
    run(p, optimizer, grads)
    run(q, other, grads)
    assert torch.equal(p, q)
    for key in FACTORS:
        assert torch.equal(optimizer.state[p][key], other.state[q][key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["zeros", "one row", "one column", "one entry", "tiny", "huge"])
def test_gradients_without_directions_are_finite_and_are_recovered_from(what, dtype):
    p, optimizer = weight_of("tall", dtype, momentum_rank=4)
    grads = [drawn(12, 7, seed=s) for s in range(8)]
    mask = torch.zeros(12, 7)
    mask[{"one row": 3, "one entry": 3}.get(what, slice(None)), :] = 1
    mask[:, 1:] = 0 if what in ("one column", "one entry") else mask[:, 1:]
    poor = [grad * mask for grad in grads]
    if what in ("zeros", "tiny", "huge"):
        size = {"zeros": 0.0, "tiny": 1e-30, "huge": 1e30}[what]
        poor = [grad * (min(size, 1e4) if dtype == torch.float16 else size) for grad in grads]
    run(p, optimizer, poor)
    state = optimizer.state[p]
    assert all(x.isfinite().all() for x in (p, *state.values()))
    run(p, optimizer, [None, *grads * 8])  # the rank grows again
    left, right = (state[key].double() for key in FACTORS)
    assert all(x.isfinite().all() for x in (p, left, right))
    if what != "huge":  # of which 64 steps leave something
        limit = 0.05 if dtype == torch.bfloat16 else 1e-3
        torch.testing.assert_close(left.mT @ left, torch.eye(4).double(), rtol=0, atol=limit)


def test_a_missing_gradient_changes_nothing():
    p, optimizer = weight_of("wide", momentum_rank=2)
    run(p, optimizer, [drawn(7, 12)])
    before = copy.deepcopy((p.detach(), optimizer.state[p]))
    run(p, optimizer, [None])
    assert torch.equal(p, before[0])
    assert all(torch.equal(optimizer.state[p][key], before[1][key]) for key in FACTORS)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["tall", "transposed", "experts", "convolution"])
def test_a_resumed_run_is_the_run_to_the_bit(name, dtype, rounding):
    options = {"momentum_rank": 3, "rounding": rounding, "weight_decay": 0.1}
    p, optimizer = weight_of(name, dtype, **options)
    grads = [drawn(*p.shape, seed=s) for s in range(10)]
    run(p, optimizer, grads[:5])
    file = io.BytesIO()
    torch.save((p.detach(), optimizer.state_dict()), file)
    run(p, optimizer, grads[5:])
    file.seek(0)
    weight, state = torch.load(file, weights_only=True)
    q, other = weight_of(name, dtype, **{**options, "momentum_rank": None})  # the state's options
    with torch.no_grad():
        q.copy_(weight)
    other.load_state_dict(state)
    run(q, other, grads[5:])
    assert torch.equal(p, q)
    wide = dtype == torch.float16 or rounding == "stochastic"
    for key in FACTORS:
        assert torch.equal(optimizer.state[p][key], other.state[q][key])
        assert other.state[q][key].dtype == (torch.float32 if wide else dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_the_numbers_but_for_their_rounding(dtype):
    """The products are in float32: only what is stored is rounded."""
    products = []
    for own in (torch.float32, dtype):
        p, optimizer = weight_of("tall", own, momentum_rank=3)
        run(p, optimizer, [g.to(dtype) for g in of_rank(p, 3, 20)])
        left, right = (optimizer.state[p][key].float() for key in FACTORS)
        products.append(left @ right.mT)
    # The same gradients, to the bit: factors of float32 under float16.
    limit = 1e-6 if dtype == torch.float16 else 2**-6
    assert (products[0] - products[1]).norm() <= limit * products[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [None, 8])
def test_bytes_of_the_factors(dtype, bits):
    """By walking the state of a model that has stepped; the account has the same."""
    config = LlamaConfig(97, 24, 37, 2, 2)
    model = Llama(config).to(dtype)
    options = {"momentum_rank": 5, "state_bits": bits}
    optimizer = create_optimizer("muon", model, **options)
    tokens = torch.arange(14).view(1, 14)
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    found = 0
    for p, state in optimizer.state.items():
        if "momentum_left" in state:
            assert [*state] == FACTORS
            assert [x.shape for x in state.values()] == [(n, 5) for n in p.shape]
            found += sum(x.untyped_storage().nbytes() for x in state.values())
    wide = dtype == torch.float16 or bits == 8
    size = 4 if wide else dtype.itemsize
    assert found == size * 5 * 2 * (4 * (24 + 24) + 3 * (24 + 37))
    held = account(Llama(config).to(dtype), "muon", **options).state
    assert sum(held["hidden", key] for key in FACTORS) == found
    assert ("hidden", "momentum_buffer") not in held
    if bits:
        assert held["head", "exp_avg_codes"] == held["head", "exp_avg_sq_codes"]
        return
    shards = account(Llama(config).to(dtype), "muon", shards=2, **options).state
    # Rows are cut, and so is the left factor; the right one is whole in each process.
    assert shards["hidden", "momentum_right"] == held["hidden", "momentum_right"]
    # 37 rows are cut in 19 and 18.
    assert shards["hidden", "momentum_left"] == size * 5 * 2 * (4 * 12 + 2 * 19 + 12)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_simulated_step_holds_the_factors(device):
    config = LlamaConfig(97, 64, 96, 2, 2)
    tokens = torch.zeros(1, 17, dtype=torch.int64)
    peaks = []
    for rank in (4, None):
        model = Llama(config)
        step = {"step": lambda m: m(tokens[:, :-1], tokens[:, 1:]), "device": device}
        peaks.append(simulate(model, "muon", momentum_rank=rank, **step).peak.bytes)
    whole, factors = (account(Llama(config), "muon", momentum_rank=r) for r in (None, 4))
    saved = whole.state_total - factors.state_total
    assert peaks[1] - peaks[0] > 0.8 * saved > 0


@pytest.mark.parametrize("foreach", [False, True])
def test_weights_of_one_shape_are_one_stack(foreach):
    """The numbers of one by one, to the rounding of their products, with their own state."""
    shapes = [(9, 17), (17, 9), (9, 17), (9, 17), (17, 9), (2, 9)]
    params = [nn.Parameter(drawn(*s, seed=i)) for i, s in enumerate(shapes)]
    optimizer = Muon(
        [{"params": params, "role": "hidden"}], **EXACT, momentum_rank=2, foreach=foreach
    )
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    others = [Muon([{"params": [p], "role": "hidden"}], **EXACT, momentum_rank=2) for p in alone]
    for step in range(30):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            grad = drawn(*p.shape, seed=100 * step + i)
            grad = None if (step + i) % 5 == 0 else grad * (step > 2 or i != 2)
            p.grad, q.grad = grad, grad
        optimizer.step()
        for other in others:
            other.step()
    for p, q, other in zip(params, alone, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert optimizer.state[p].keys() == other.state[q].keys()


def test_a_scheduler_may_change_the_momentum():
    model = Tiny()
    optimizer = Muon(param_groups(model), momentum_rank=2, momentum=0.0)
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        group["momentum"] = 0.9
    losses = train(model, optimizer, 20)
    assert losses[-1] < losses[0]


def test_adopted_moments():
    """An average becomes no factors and none comes from them; the same options go on."""
    model = Tiny()
    adamw = create_optimizer("adamw", model, lr=1e-3)
    train(model, adamw, 2)
    muon = create_optimizer("muon", model, momentum_rank=2)
    report = adopt_state(muon, adamw)
    assert report.not_used["hidden.weight"] == "a momentum of low rank starts anew"
    train(model, muon, 2)
    again = create_optimizer("muon", model, momentum_rank=2)
    report = adopt_state(again, muon)
    assert report.used["hidden.weight"] == "momentum_left, momentum_right"
    whole = create_optimizer("muon", model)
    report = adopt_state(whole, muon)
    assert report.not_used["hidden.weight"] == "the old momentum is of low rank, in factors"
    train(model, whole, 1)
    train(model, again, 1)


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
@pytest.mark.parametrize("shape", [(9, 4), (3, 9, 4), (2, 3, 9, 4), (4, 4), (200, 16), (5, 1)])
def test_columns_are_those_of_qr_but_for_their_signs(shape, size):
    columns = drawn(*shape)
    basis = orthonormal_columns(columns * size)
    expected = torch.linalg.qr(columns)[0]
    torch.testing.assert_close(basis @ basis.mT, expected @ expected.mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(basis.abs(), expected.abs(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ratio", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15, 0.0])
def test_columns_that_are_nearly_dependent(ratio):
    """Down to 1e-11 they are orthonormal; below they are short, and never long."""
    columns = drawn(40, 6)
    columns[:, 3] = columns[:, 0] - columns[:, 1] + ratio * columns[:, 3]
    basis = orthonormal_columns(columns)
    values = torch.linalg.svdvals(basis)
    assert basis.isfinite().all() and values.max() < 1 + 1e-9
    assert values[4] > 1 - 1e-9
    if ratio > 1e-11:
        assert values[5] > 1 - 1e-3
    others = columns[:, [0, 1, 2, 4, 5]]
    torch.testing.assert_close(basis @ (basis.mT @ others), others, rtol=1e-9, atol=1e-9)


def test_columns_of_zeros_are_those_of_the_identity():
    columns = drawn(2, 7, 3)
    columns[0] = 0.0
    columns[1, :, 1] = 0.0
    basis = orthonormal_columns(columns)
    torch.testing.assert_close(basis[0], torch.eye(7, 3).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(basis[1].mT @ basis[1], torch.eye(3).double(), rtol=0, atol=1e-11)
