"""Muon against a NumPy transcription in float64, against torch's own, and what it takes beyond."""

import importlib
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from optimizer_db import Tiny, train
from reference.muon_numpy import JORDAN, MuonReference, iterated
from sharded_runs import distance, shard, spawn
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import optimzoo
from optimzoo import Muon, stacks
from optimzoo.memory import account, simulate
from optimzoo.subspace.newton_schulz import orthogonalize

# For which torch chooses the side, the adjustment and (ours) the Gram form differently.
SHAPES = ((7, 5), (5, 7), (6, 6), (129, 3), (3, 129), (2, 2))
STEPS = 6
HYPER = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1}
ADJUSTMENTS = [None, "original", "match_rms_adamw", "spectral_unclamped"]
OURS = [None, "original", "match_rms_adamw"]  # that every torch with a Muon knows
EXACT = {"ns_dtype": "float32"}  # the default is bfloat16 on some CPUs


def gradients(step, shapes=SHAPES):
    generator = np.random.default_rng(step)
    return [np.asarray(generator.normal(size=s), dtype=np.float32) for s in shapes]


def start(dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter(torch.tensor(w, dtype=dtype)) for w in gradients(99, shapes)]


def step_all(optimizer, params, step):
    for p, g in zip(params, gradients(step, [p.shape for p in params]), strict=True):
        p.grad = torch.tensor(g, dtype=p.dtype)
    optimizer.step()


def hidden(params, **options):
    return [{"params": params, "role": "hidden", **options}]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ADJUSTMENTS)
def test_follows_the_transcription(adjust, nesterov, dtype, limit):
    """Of the update, which is what the weight has gone when nothing decays."""
    hyper = {"lr": 0.03, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    params = start(dtype)
    before = [w.astype(np.float64) for w in gradients(99)]
    optimizer = Muon(hidden(params), **hyper, ns_steps=4, ns_dtype=dtype)
    names = [str(i) for i in range(len(SHAPES))]
    reference = MuonReference(
        dict(zip(names, before, strict=True)), set(names), ns_steps=4, **hyper
    )
    for step in range(STEPS):
        step_all(optimizer, params, step)
        reference.step(dict(zip(names, gradients(step), strict=True)))
    for name, p, w in zip(names, params, before, strict=True):
        gone = reference.params[name] - w
        off = p.detach().double().numpy() - reference.params[name]
        assert np.abs(off).max() <= limit * max(np.abs(gone).max(), np.abs(w).max())
        mean, expected = optimizer.state[p]["momentum_buffer"], reference.momentum_buffer[name]
        np.testing.assert_allclose(mean.double().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjust", OURS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_torchs_where_torch_orthogonalises_as_we_do(dtype, nesterov, adjust, monkeypatch):
    """torch's own iteration, in bfloat16, divides the momentum by its norm if it is given that."""

    def ours(update, coefficients, steps, eps):
        return orthogonalize(update, steps=steps, coefficients=coefficients, dtype=torch.float32)

    module = importlib.import_module("torch.optim._muon")
    monkeypatch.setattr(module, "_zeropower_via_newtonschulz", lambda *a, **_: ours(*a[:4]))
    hyper = {**HYPER, "nesterov": nesterov, "adjust_lr_fn": adjust, "ns_steps": 6}
    hyper |= {"ns_coefficients": (3.0, -3.2, 1.2)}
    if dtype == torch.bfloat16:  # torch rounds a decayed weight twice
        hyper["weight_decay"] = 0.0
    params, theirs = start(dtype), start(dtype)
    optimizers = Muon(hidden(params), **hyper, **EXACT), torch.optim.Muon(theirs, **hyper)
    for step in range(STEPS):
        step_all(optimizers[0], params, step)
        step_all(optimizers[1], theirs, step)
    limit = 1e-6 if dtype == torch.float32 else 2**-8
    for p, q in zip(params, theirs, strict=True):
        pairs = zip(optimizers, (p, q), strict=True)
        assert torch.equal(*(o.state[w]["momentum_buffer"] for o, w in pairs))
        torch.testing.assert_close(p, q, rtol=limit, atol=limit)


@pytest.mark.parametrize("adjust", OURS)
def test_is_torchs_but_for_the_rounding_of_its_products(adjust):
    params, theirs = start(), start()
    hyper = {**HYPER, "adjust_lr_fn": adjust}
    optimizers = Muon(hidden(params), **hyper, **EXACT), torch.optim.Muon(theirs, **hyper)
    for step in range(STEPS):
        step_all(optimizers[0], params, step)
        step_all(optimizers[1], theirs, step)
    for p, q, w in zip(params, theirs, gradients(99), strict=True):
        assert 0 < (p - q).norm() < 0.05 * (q - torch.tensor(w)).norm()


@pytest.mark.parametrize("foreach", [None, True, False])
def test_the_rest_is_torchs_adamw(foreach):
    """Of an eps that says where it stands."""
    adamw = {"betas": (0.8, 0.95), "eps": 0.3, "weight_decay": 0.1}
    hyper = {f"other_{key}": value for key, value in adamw.items()}
    params, theirs = start(), start()
    ours = Muon([{"params": params, "role": "head"}], other_lr=0.02, foreach=foreach, **hyper)
    other = torch.optim.AdamW(theirs, lr=0.02, **adamw)
    for step in range(STEPS):
        step_all(ours, params, step)
        step_all(other, theirs, step)
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert ours.state[p].keys() == other.state[q].keys()


def one_step(weight, **options):
    """The first step of a weight, and its gradient."""
    layout = {k: options.pop(k) for k in ("stacked", "transposed", "heads") if k in options}
    p = nn.Parameter(torch.zeros_like(weight))
    p.grad = weight.clone()
    Muon(hidden([p], **layout), lr=1.0, **{**EXACT, **options}).step()
    return p.detach()


def drawn(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


alone = partial(one_step, ns_dtype="float64", adjust_lr_fn="spectral_unclamped")


def test_experts_convolutions_and_transposed_weights_are_their_matrices():
    experts, filters, conv1d = drawn(4, 6, 9), drawn(6, 3, 2, 2), drawn(6, 9)
    each = torch.stack([alone(expert) for expert in experts])
    torch.testing.assert_close(alone(experts, stacked=True), each)
    turned = alone(experts, stacked=True, transposed=True)
    torch.testing.assert_close(turned, torch.stack([alone(e.mT).mT for e in experts]))
    torch.testing.assert_close(alone(filters), alone(filters.flatten(1)).view_as(filters))
    torch.testing.assert_close(alone(conv1d, transposed=True), alone(conv1d.mT).mT)


def test_a_channels_last_convolution_keeps_its_momentum():
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(drawn(6, 3, 2, 2).to(memory_format=layout))
        optimizer = Muon(hidden([p]), ns_dtype="float64")
        for step in range(3):
            step_all(optimizer, [p], step)
        runs.append(p.detach())
    torch.testing.assert_close(*runs)


def test_heads_are_blocks_of_rows():
    qkv, experts = drawn(9, 4), drawn(2, 6, 5)
    blocks = torch.cat([alone(block) for block in qkv.split(3)])
    torch.testing.assert_close(alone(qkv, heads=3), blocks)
    assert not torch.allclose(alone(qkv), blocks)
    torch.testing.assert_close(alone(qkv.mT, heads=3, transposed=True), blocks.mT)
    of_experts = torch.stack([alone(e, heads=2) for e in experts])
    torch.testing.assert_close(alone(experts, heads=2, stacked=True), of_experts)
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 5))
    groups = optimzoo.param_groups(model, {r"^0\.weight": {"heads": 3}, r"^1": "vector"})
    assert [g["heads"] for g in Muon(groups).param_groups if g["role"] == "hidden"] == [3]


def test_what_is_no_matrix_takes_the_rule_of_the_rest_at_its_rate():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 8, 4)
            self.depthwise = nn.Conv1d(8, 8, 4, groups=8)
            self.one = nn.Linear(8, 1)
            self.inner = nn.Linear(1, 8)

    model = Mixed()
    groups = optimzoo.param_groups(model, {r"^(one|inner)\.w": "hidden"})
    optimizer = Muon(groups, lr=0.5, weight_decay=0.1, other_lr=0.25, other_weight_decay=0.2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    rates = {n: rates[n] for n in rates if n.endswith("weight")}
    others = ("depthwise", "one", "inner")
    assert rates == {"patch.weight": 0.5, **{f"{n}.weight": 0.25 for n in others}}
    for group in optimizer.param_groups:
        if group["role"] == "hidden":
            assert group["weight_decay"] == (0.1 if group["lr"] == 0.5 else 0.2)
        for name, p in zip(group["param_names"], group["params"], strict=True):
            keys = {"momentum_buffer"} if name == "patch.weight" else {"step", "exp_avg"}
            assert keys <= optimizer.state[p].keys(), name


def test_a_refused_group_leaves_the_others_as_they_were():
    params = start()
    optimizer = Muon(params[:1])
    line = nn.Parameter(torch.ones(1, 4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [line, params[0]], "role": "hidden"})
    assert len(optimizer.param_groups) == 1
    step_all(optimizer, params[:1], 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda o, lrs: lr_scheduler.OneCycleLR(o, lrs, total_steps=4),
        lambda o, lrs: lr_scheduler.CyclicLR(o, [lr / 9 for lr in lrs], lrs, step_size_up=2),
    ],
)
def test_schedulers_cycle_the_momentum_and_no_betas(make):
    model = Tiny()
    optimizer = Muon(optimzoo.param_groups(model))
    scheduler = make(optimizer, [g["lr"] for g in optimizer.param_groups])
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["momentum"])
        train(model, optimizer, 1)
        if len(seen) < 4:
            scheduler.step()
    assert len({round(m, 6) for m in seen}) > 1 and all(0.8 <= m <= 0.95 for m in seen)
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)


@pytest.mark.parametrize("count", range(1, 9))
def test_coefficients_of_each_iteration(count):
    """The polynomial of the singular values, by both forms of the iteration."""
    generator = np.random.default_rng(count)
    triples = [(2 + x, -1.5 - x, 0.5 + x / 2) for x in generator.uniform(0, 0.4, count)]
    for shape in ((8, 9), (8, 40), (40, 8)):
        matrix = drawn(*shape)
        p = one_step(matrix, ns_coefficients=triples, ns_steps=3, ns_dtype="float64", momentum=0.0)
        expected = iterated(matrix.numpy(), triples) * math.sqrt(max(1, shape[0] / shape[1]))
        np.testing.assert_allclose(-p.numpy(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("condition", [1e1, 1e2, 1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("columns", [48, 64, 100, 300])
def test_the_error_of_both_forms(columns, condition):
    """From the polynomial of a float64 SVD, in the spectral norm: 1e-5 in float32 by either form.

    On one Gram matrix for all five iterations it is 2e-4 from a condition of 100 on.
    """
    generator = np.random.default_rng(columns)
    left, right = (np.linalg.qr(generator.normal(size=(n, 48)))[0] for n in (48, columns))
    matrix = (left * np.geomspace(1, 1 / condition, 48)) @ right.T
    matrix = matrix.astype(np.float32)
    expected = iterated(matrix.astype(np.float64), [JORDAN] * 5)
    for x, want in ((matrix, expected), (matrix.T, expected.T)):
        result = orthogonalize(torch.tensor(x.copy()), dtype=torch.float32).double().numpy()
        assert np.linalg.norm(result - want, 2) < 4e-5


def test_the_dtype_of_the_iteration(monkeypatch):
    matrix = drawn(24, 40, dtype=torch.float32)
    exact, low = one_step(matrix), one_step(matrix, ns_dtype=torch.bfloat16)
    assert 1e-4 < (exact - low).norm() / exact.norm() < 0.05
    for amx, same in ((True, low), (False, exact)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert torch.equal(one_step(matrix, ns_dtype=None), same)
    wide = matrix.double()
    assert torch.equal(one_step(wide, ns_dtype=None), one_step(wide, ns_dtype="float64"))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_of_8_bits_costs_a_byte_and_a_64th(nesterov, rounding):
    weight = nn.Parameter(drawn(64, 96, dtype=torch.bfloat16))
    small = nn.Parameter(drawn(63, 65, dtype=torch.bfloat16))  # 4,095 elements
    optimizer = Muon(hidden([weight, small]), state_bits=8, rounding=rounding, nesterov=nesterov)
    for step in range(3):
        step_all(optimizer, [weight, small], step)
    state = {k: v for k, v in optimizer.state[weight].items() if k != "rounding_step"}
    assert {k: v.dtype for k, v in state.items()} == {
        "momentum_buffer_codes": torch.int8, "momentum_buffer_scale": torch.float32,
    }  # fmt: skip
    assert sum(v.numel() * v.element_size() for v in state.values()) == 64 * 96 * (1 + 4 / 256)
    assert optimizer.state[small]["momentum_buffer"].dtype == torch.float32


def test_8_bits_train_as_32_do():
    ends = []
    for bits in (None, 8):
        p, target = nn.Parameter(torch.zeros(64, 96)), drawn(64, 96, dtype=torch.float32)
        optimizer = Muon(hidden([p]), lr=0.1, state_bits=bits, rounding="stochastic", **EXACT)
        for _ in range(30):
            p.grad = p.detach() - target
            optimizer.step()
        ends.append((p.detach() - target).norm() / target.norm())
    assert ends[0] < 0.9 and abs(ends[1] - ends[0]) < 0.02 * (1 - ends[0])


class Count(TorchDispatchMode):
    """Count operations that are no views."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        self.operations += not any(r.alias_info and not r.alias_info.is_write for r in returns)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "nesterov": False}], ids=str)
def test_weights_of_one_shape_are_one_stack(options, monkeypatch):
    """As on a GPU: the numbers of one by one, and no more operations for three times as many."""
    runs, operations = [], []
    for together, layers in ((False, 2), (True, 2), (True, 6)):
        if together:
            monkeypatch.setattr(stacks, "on_gpu", lambda matrix: True)
        shapes = [(8, 6), (6, 8), (6, 8), (8, 20)] * layers
        params = start(torch.float64, shapes)
        optimizer = Muon(hidden(params), **options)
        for step in range(3):
            for p, g in zip(params, gradients(step, shapes), strict=True):
                p.grad = torch.tensor(g, dtype=p.dtype)
            if step == 1:
                params[0].grad = None
            with Count() as count:
                optimizer.step()
        operations.append(count.operations)
        runs.append(params)
    for p, q in zip(*runs[:2], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert operations[1] == operations[2] < operations[0]


def test_a_stack_of_experts_goes_in_chunks(monkeypatch):
    experts = drawn(5, 8, 6)
    whole = alone(experts, stacked=True)
    monkeypatch.setattr(stacks, "STACK", 2 * 8 * 6)
    torch.testing.assert_close(alone(experts, stacked=True), whole)


def test_a_checkpoint_of_the_wrapper_goes_on():
    """Of commit 3effa33, which stepped torch's AdamW and a Muon of its own: three steps each."""
    file = Path(__file__).parent / "checkpoints" / "muon_3effa33.pt"
    saved = torch.load(file, weights_only=True)
    model = Tiny()
    optimizer = Muon(optimzoo.param_groups(model), **EXACT)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.01, 0.01, 0.01]
    train(model, optimizer, 3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, saved["end"][name], rtol=1e-5, atol=1e-6)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 24))
        self.router = nn.Linear(24, 4, bias=False)
        self.depthwise = nn.Conv1d(24, 24, 4, groups=24)

    def forward(self, x):
        share = self.router(x).softmax(-1)
        return torch.einsum("bd,eod,be->bo", x, self.gate_up_proj, share)


def test_planners_take_stacked_experts():
    model = Experts()
    held = account(model, "muon")
    assert held.state["hidden", "momentum_buffer"] == 4 * (4 * 16 * 24 + 4 * 24)
    assert held.state["hidden", "exp_avg"] == 4 * 24 * 4

    for device in ("cpu", "cuda"):
        found = simulate(model, "muon", step=lambda m: m(torch.ones(2, 24)).sum(), device=device)
        assert found.peak.bytes > held.total


class Blocks(nn.Module):
    """What Muon takes beyond plain matrices; 3 rows a block, so that two processes cut one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.Parameter(torch.randn(3, 6, 5))
        self.qkv = nn.Linear(5, 9)
        self.filters = nn.Conv1d(2, 7, 3)
        self.depthwise = nn.Conv1d(7, 7, 3, groups=7)

    def forward(self, x):
        x = self.qkv(torch.einsum("bd,eod,bo->bd", x, self.experts, x[:, :1].expand(-1, 6)))
        return self.depthwise(self.filters(x.view(2, 2, 9))).square().sum()


def blocks(rank, world, options):
    runs = []
    for model in (Blocks().double(), shard(Blocks().double())):
        groups = optimzoo.param_groups(model, {"qkv": {"heads": 3}})
        optimizer = Muon(groups, lr=0.1, **options)
        for step in range(3):
            optimizer.zero_grad()
            model(drawn(4, 5) + step).backward()
            optimizer.step()
        runs.append(model)
    assert distance(runs[1], runs[0])[0] < 1e-10


@pytest.mark.parametrize("options", [{}, {"momentum_rank": 2}], ids=str)
def test_sharded_stacks_heads_and_convolutions(options, tmp_path):
    spawn(blocks, 2, tmp_path, options)
