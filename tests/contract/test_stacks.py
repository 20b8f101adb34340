"""Weights of one shape, stepped together: the same numbers, in a bounded number of operations."""

import copy

import pytest
import torch
from support.registered import create
from torch import nn
from torch.testing import assert_close

from benchmarks.microbench.operations import Operations
from optimzoo import SCALE, param_groups, stacks
from optimzoo.core import matrix_optimizer
from optimzoo.core.matrix_optimizer import MatrixOptimizer
from optimzoo.core.record import RECORDS
from optimzoo.models import llama
from optimzoo.stacks import batch_by_shape
from optimzoo.subspace.newton_schulz import orthogonalize

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
RANK = {"rank": 3, "update_proj_gap": 12}
CASES = {
    "galore": [RANK, {**RANK, "side": "both", "weight_decay": 0.1}],
    "natural_galore": [
        {**RANK, "history": 5},
        {**RANK, "history": 3, "history_dtype": "int8"},
        {**RANK, "history": 4, "relative_damping": True},
    ],
    "fira": [RANK, {**RANK, "residual_scale": "one", "weight_decay": 0.1}],
    "apollo": [RANK, {**RANK, "scale_front": True, "maximize": True}],
    "apollo_mini": [{"update_proj_gap": 12}],
    "swan": [{}, {"weight_decay": 0.1}],
    "sinkgd": [{"alpha": 1.0}, {"iterations": 2, "weight_decay": 0.1, "spectral_norm": True}],
    "muon": [
        {},
        {"other": "scale", "maximize": True},
        {"other": "adafactor", "weight_decay": 0.1},
        {"nesterov": False, "weight_decay": 0.1},
        {"momentum_rank": 3, "weight_decay": 0.1},
    ],
    "rmnp": [{}, {"nesterov": False, "weight_decay": 0.1}],
    "scale": [
        {"spectral_norm": True},
        *({"normalize": n, "weight_decay": 0.1} for n in ("column", "row", "spectral")),
    ],
    "stable_spam": [],  # by multi-tensor operations
}
CAUTIOUS = {"weight_decay": 0.5, "weight_decay_style": "cautious"}
CASES = {name: [*cases, {**(cases or [{}])[0], **CAUTIOUS}] for name, cases in CASES.items()}
FLAT = [(9, 17), (17, 9), (9, 17), (16, 16), (9, 17), (17, 9), (1, 7), (7, 1), (16, 16), (9, 17)]


DEVICES = ["cpu", pytest.param("cuda", marks=no_gpu)]


def groups_of(generator, device):
    """Every layout: plain weights, GPT-2's transposed ones, experts, convolutions, other roles."""

    def weights(*shapes):
        draws = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        return [nn.Parameter(draw.to(device)) for draw in draws]

    return [
        {"params": weights(*FLAT), "role": "hidden"},
        {"params": weights((8, 12), (12, 8), (8, 12)), "role": "hidden", "transposed": True},
        {"params": weights((3, 6, 10), (3, 6, 10)), "role": "hidden", "stacked": True},
        {"params": weights((4, 3, 2, 2), (4, 3, 2, 2)), "role": "hidden"},
        {"params": weights((20, 8), (20, 8)), "role": "embedding"},
        {"params": weights((8, 20), (8, 20)), "role": "embedding", "transposed": True},
        {"params": weights((20, 8), (20, 8)), "role": "head"},
        {"params": weights((8, 20), (8, 20)), "role": "head", "transposed": True},
        {"params": weights((8,), (8,)), "role": "vector"},
    ]


def trained(name, options, *, foreach, monkeypatch, missing=True, device="cpu"):
    """Thirty steps, resumed in the middle in stacks of another size."""
    generator = torch.Generator().manual_seed(3)
    groups = groups_of(generator, device)
    params = [p for group in groups for p in group["params"]]
    rates = {"lr": 1e-2, "foreach": foreach, "fused": False}
    optimizer = create(name, groups, **rates, **options)
    for step in range(30):
        if step == 15:
            monkeypatch.setattr(stacks, "STACK", 2 * 9 * 17)
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = create(name, groups, **rates, **options)
            optimizer.load_state_dict(saved)
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(device)
            # One joins late, some miss a step, one begins with a gradient of zero.
            if not missing:
                continue
            if (i == 4 and step < 7) or (step % 5 == 4 and i % 3 == 0):
                p.grad = None
            elif i == 2 and step < 2:
                p.grad.zero_()
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(n, o, id=f"{n}-{i}") for n, cases in CASES.items() for i, o in enumerate(cases)],
)
def test_stacks_step_as_each_weight_alone(name, options, device, monkeypatch):
    how = {"device": device, "monkeypatch": monkeypatch}
    alone, one = trained(name, options, foreach=False, **how)
    monkeypatch.undo()
    together, many = trained(name, options, foreach=True, **how)
    for p, q in zip(alone, together, strict=True):
        assert_close(q, p, rtol=1e-12, atol=1e-12)
        assert one.state[p].keys() == many.state[q].keys()
        for key, value in one.state[p].items():
            other = many.state[q][key]
            assert other.shape == value.shape
            assert other.untyped_storage().nbytes() == other.numel() * other.element_size()
            assert_close(other, value, rtol=1e-10, atol=1e-10)


@no_gpu
@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(n, cases[-1], id=n) for n, cases in CASES.items()]
)
@pytest.mark.parametrize("how", [{}, {"fused": False}, {"state_bits": 8}], ids=str)
def test_a_captured_step_on_cuda_is_the_step(name, options, how):
    """Replays with another gradient and rate each, and a new subspace by a step between them."""
    if name == "scale" and "state_bits" in how:
        pytest.skip("SCALE refuses both together")
    if "update_proj_gap" in options:
        options = {**options, "update_proj_gap": 4}
    runs = []
    for captured in (False, True):
        generator = torch.Generator().manual_seed(3)
        groups = [g for g in groups_of(generator, "cuda") if not g.get("stacked")]
        large = [torch.randn(70, 64, generator=generator).cuda() for _ in range(3)]  # in 8 bits
        groups[0]["params"] += large
        groups = [g | {"params": [nn.Parameter(p.float()) for p in g["params"]]} for g in groups]
        params = [p for group in groups for p in group["params"]]
        rate = torch.tensor(1e-2, device="cuda")
        optimizer = create(name, groups, lr=rate, capturable=True, **how, **options)
        grads = [torch.empty_like(p) for p in params]
        graph = torch.cuda.CUDAGraph()
        for step in range(7):
            rate.fill_(1e-2 / (1 + step))
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.copy_(torch.randn(p.shape, generator=generator))
            if captured and step == 2:
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and step >= 2 and step != 4:
                graph.replay()
                continue
            for group in optimizer.param_groups:  # which a replay does not count
                group["calls"] = step
            optimizer.step()
        runs.append(params)
    for p, q in zip(*runs, strict=True):
        assert_close(q, p, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [pytest.param(n, cases[-1], id=n) for n, cases in CASES.items()]
)
def test_capturable_steps_are_the_same(name, options, foreach, monkeypatch):
    if name == "scale":
        pytest.skip("SCALE's has tests of its own")
    runs = []
    for capturable in (False, True):
        how = {"foreach": foreach, "missing": False, "monkeypatch": monkeypatch}
        runs.append(trained(name, {**options, "capturable": capturable}, **how)[0])
        monkeypatch.undo()
    for p, q in zip(*runs, strict=True):
        assert_close(q, p, rtol=1e-9, atol=1e-9)


def test_every_method_with_stacks_is_tested():
    methods = {n for n, r in RECORDS.items() if issubclass(r.make, MatrixOptimizer | SCALE)}
    assert {*CASES} == methods


@pytest.mark.parametrize("device", DEVICES)
def test_a_rule_of_stacks_is_that_of_each_matrix(device, monkeypatch):
    monkeypatch.setattr(stacks, "STACK", 600)
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 24), (24, 8), (8, 24), (3, 8, 24), (8, 24), (0, 4), (30, 30), (30, 30), (8, 24)]
    matrices = [torch.randn(s, generator=generator).to(device) for s in shapes]
    calls = []

    def rule(x):
        calls.append(tuple(x.shape))
        return orthogonalize(x)

    together = dict(batch_by_shape(rule, matrices, True))
    assert sorted(together) == list(range(len(shapes)))
    # At most 600 elements: three of 192; one of 900 is alone.
    expected = [(3, 8, 24), (8, 24), (3, 8, 24), (24, 8), (0, 4), (30, 30), (30, 30)]
    assert sorted(calls) == sorted(expected)
    for i, x in enumerate(matrices):
        alone = orthogonalize(x)
        assert together[i].shape == x.shape
        assert (together[i] - alone).norm() <= (0.02 if x.is_cuda else 1e-5) * alone.norm()


# Three chunks a step: the projections of queries and outputs, of the gate, of its way back.
MOST = {
    "scale": 40,
    "spectral": 132,
    "muon": 90,
    "muon_low_rank": 205,
    "rmnp": 38,
    "swan": 180,
    "sinkgd": 140,
    "galore": 52,
    "apollo": 118,
    "apollo_mini": 118,
    "fira": 108,
    "natural_galore": 185,
}


def operations(name, layers, **options):
    """Return those of a step between two refreshes, of a Llama, without kernels."""
    model = llama.Llama(llama.LlamaConfig(97, 64, 96, layers, 2), seed=1)
    options |= {"rank": 16} if name in ("galore", "apollo", "fira", "natural_galore") else {}
    options = {"foreach": True, "fused": False, "lr": 1e-3} | options
    groups = param_groups(model)
    if name == "spectral":
        optimizer = SCALE(groups, normalize="spectral", **options)
    elif name == "muon_low_rank":
        optimizer = create("muon", groups, momentum_rank=16, **options)
    else:
        optimizer = create(name, groups, **options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        with Operations() as counted:
            optimizer.step()
    return counted


@pytest.mark.parametrize("name", MOST)
def test_operations_do_not_grow_with_the_layers(name):
    small, large = operations(name, 8), operations(name, 24)
    assert small.count <= MOST[name]
    assert large.count <= 1.1 * small.count
    assert large.reads == small.reads <= (3 if name == "natural_galore" else 0)


@pytest.mark.parametrize("name", MOST)
@pytest.mark.parametrize("bits", [None, 8])
def test_a_capturable_step_reads_nothing(name, bits):
    if bits and name in ("scale", "spectral"):
        pytest.skip("SCALE refuses both together")
    options = {"state_bits": bits} if bits else {}
    assert operations(name, 2, capturable=True, **options).reads == 0


def test_a_tensor_subclass_is_stepped_alone():
    class Quantized(torch.Tensor):
        """Such as torchao's: a stack would be of another type."""

    plain = torch.randn(6, 4)
    assert stacks.stackable(plain, True) and stacks.stackable(nn.Parameter(plain), True)
    assert not stacks.stackable(plain.as_subclass(Quantized), True)
    assert not stacks.stackable(plain, None) and not stacks.stackable(plain, False)


def test_the_first_step_cannot_be_captured(monkeypatch):
    weight = nn.Parameter(torch.randn(6, 4))
    weight.grad = torch.randn(6, 4)
    optimizer = create("galore", [{"params": [weight], "role": "hidden"}], capturable=True, rank=2)
    monkeypatch.setattr(matrix_optimizer, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call step\\(\\) once, then capture"):
        optimizer.step()
    monkeypatch.undo()
    optimizer.step()
    projector = optimizer.state[weight]["projector_right"].clone()
    optimizer.param_groups[0]["update_proj_gap"] = 1  # due at each step, but not inside of a graph
    weight.grad = torch.randn(6, 4)
    monkeypatch.setattr(matrix_optimizer, "is_capturing", lambda: True)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["projector_right"], projector)
