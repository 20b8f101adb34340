"""Stable-SPAM and AdamS over all tensors at once: the numbers of one by one, in few operations."""

import copy

import emulated_cuda
import pytest
import torch
from needs import needs_cpu_kernels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from optimzoo import create_optimizer
from optimzoo.kernels import dispatch, native
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.optimizers import adams, stable_spam

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
STEPS, GAP = 30, 7
SHAPES = {
    "square": (8, 8),
    "query": (12, 8),
    "key": (12, 8),
    "late": (12, 8),
    "row": (1, 12),
    "tall": (129, 4),
    "wide": (5, 132),
    "convolution": (6, 2, 2, 3),
    "stack": (3, 5, 12),
    "other_stack": (3, 5, 12),
    "transposed": (8, 5),
    "embedding": (13, 8),
    "head": (13, 8),
    "vector": (7,),
    "number": (),
}
STACKED, TRANSPOSED = ("stack", "other_stack"), ("transposed",)
SPAM = {"update_proj_gap": GAP}
ADAMS = {"l1": 0.3, "total_steps": 20, "mask_every": GAP}
CASES = {
    "stable_spam": {**SPAM, "weight_decay": 0.1, "maximize": True, "total_steps": 25},
    "stable_spam, clean": {**SPAM, "reset_step": "clean", "total_steps": 25},
    "stable_spam, no cosine": {**SPAM, "betas": (0.8, 0.95), "eps": 1e-3},
    "adams": ADAMS,
    "adams, up": {**ADAMS, "weight_decay": 0.1, "maximize": True},
    "adams, l2": {**ADAMS, "decay": "l2"},
}


class Count(TorchDispatchMode):
    """Count operations that are no views, and reads of a value."""

    def __init__(self):
        super().__init__()
        self.operations, self.reads = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returns = func._schema.returns
        self.operations += not any(r.alias_info and not r.alias_info.is_write for r in returns)
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def groups(params):
    """One group for each layout; the head's has rates of its own, that of `wide` another rule."""
    layouts = {}
    for name, p in params.items():
        role = name if name in ("embedding", "head") else "hidden" if p.ndim > 1 else "vector"
        key = (role, name in STACKED, name in TRANSPOSED, name == "wide")
        layouts.setdefault(key, []).append(name)
    result = []
    for (role, stacked, transposed, alone), names in layouts.items():
        group = {"params": [params[n] for n in names], "param_names": names, "role": role}
        rates = {"lr": 0.005, "weight_decay": 0.2} if role == "head" else {}
        rule = {"betas": (0.7, 0.9)} if alone else {}
        result.append({**group, "stacked": stacked, "transposed": transposed, **rates, **rule})
    return result


def gradient(name, step, dtype):
    """With a spike now and then, missing now and then; one weight joins late."""
    index = list(SHAPES).index(name)
    if (5 * step + 3 * index) % 11 == 0 or (name == "late" and step < 5):
        return None
    generator = torch.Generator().manual_seed(100 * step + index)
    grad = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)
    if step % 6 == 4:
        grad.view(-1)[-1] = 40.0
    return grad.to(dtype)


def trajectory(case, dtype=torch.float64, steps=STEPS, device="cpu", **options):
    generator = torch.Generator().manual_seed(0)
    draws = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}
    params = {name: nn.Parameter(draw.to(device, dtype)) for name, draw in draws.items()}
    method = case.partition(",")[0]
    options = {"lr": 0.01, **CASES[case], **options}
    optimizer = create_optimizer(method, groups(params), **options)
    for step in range(steps):
        for name, p in params.items():
            grad = gradient(name, step, dtype)
            p.grad = None if grad is None else grad.to(device)
        optimizer.step()
    return params, optimizer


def assert_alike(ours, theirs, **tolerance):
    """Weights and states, which have the same entries in the same places."""
    for (name, p), (_, q) in zip(ours[0].items(), theirs[0].items(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
        states = ours[1].state[p], theirs[1].state[q]
        assert states[0].keys() == states[1].keys(), name
        for key, value in states[0].items():
            what = f"{key} of {name}"
            torch.testing.assert_close(
                value, states[1][key], **tolerance, msg=lambda m, w=what: f"{w}: {m}"
            )


@pytest.mark.parametrize("case", CASES)
def test_all_at_once_are_one_by_one(case):
    assert_alike(
        trajectory(case, foreach=True), trajectory(case, foreach=False), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_kernels_take_all_at_once(dtype, rounding):
    """Sums are over the same blocks in the same order, so rounding falls as it does one by one."""
    options = {"rounding": rounding, "seed": 3}
    runs = [trajectory("stable_spam", dtype, foreach=f, **options) for f in (True, False)]
    assert_alike(*runs, rtol=1e-5, atol=1e-6)


@needs_cpu_kernels
@pytest.mark.parametrize("foreach", [None, False])
def test_the_kernels_are_called_three_times_on_a_cpu_too(foreach, monkeypatch):
    calls = []
    for name in ("reduce_", "adam_"):
        kernel = getattr(native.CPU, name)

        def counted(*lists, kernel=kernel, **options):
            calls.append(len(lists[0]))
            kernel(*lists, **options)

        monkeypatch.setattr(native.CPU, name, counted)
    params = [nn.Parameter(torch.ones(4, 8 + i)) for i in range(5)]
    groups = [{"params": params, "role": "hidden"}]
    optimizer = create_optimizer("stable_spam", groups, lr=0.01, foreach=foreach)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert calls == ([5] * 3 if foreach is None else [1] * 15)


def operations(case, layers, **options):
    """Operations and reads of each step but the first, which creates the state."""
    model = Llama(LlamaConfig(97, 64, 172, layers, 4))
    options = {"lr": 1e-3, **CASES[case], "update_proj_gap": 3, "mask_every": 1000, **options}
    unknown = "update_proj_gap" if case.startswith("adams") else "mask_every"
    del options[unknown]
    optimizer = create_optimizer(case.partition(",")[0], model, **options)
    counts = []
    for _ in range(5):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with Count() as count:
            optimizer.step()
        counts.append((count.operations, count.reads))
    return counts[1:]


@pytest.mark.parametrize("case", CASES)
def test_operations_do_not_grow_with_the_layers(case):
    few, many = (operations(case, layers, foreach=True, fused=False) for layers in (8, 24))
    for (operations_few, reads_few), (operations_many, reads_many) in zip(few, many, strict=True):
        assert operations_many <= 120
        assert operations_many <= 1.1 * operations_few
        assert reads_few == reads_many == 0


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("case", CASES)
def test_capturable_is_the_same_training(case, foreach, fused):
    """Resets, masks and the ends of ramps fall within the steps."""
    options = {"foreach": foreach, "fused": fused}
    runs = [trajectory(case, capturable=c, **options) for c in (True, False)]
    assert_alike(*runs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_capturable_takes_a_rate_that_is_a_tensor(case):
    runs = [
        trajectory(case, steps=10, lr=torch.tensor(2.0**-7), capturable=c, foreach=True)
        for c in (True, False)
    ]
    assert_alike(*runs, rtol=1e-12, atol=1e-12)


@needs_cpu_kernels
def test_capturable_by_kernels():
    runs = [
        trajectory("stable_spam, no cosine", torch.float32, foreach=True, capturable=c)
        for c in (True, False)
    ]
    assert_alike(*runs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_capturable_reads_nothing(case, monkeypatch):
    """Not by a list either, which no dispatch mode sees."""
    for module in (adams, stable_spam):
        monkeypatch.setattr(module, "read_counts", None)
    for foreach, fused in ((True, False), (False, False), (None, None)):
        counts = operations(case, 2, foreach=foreach, fused=fused, capturable=True)
        assert [reads for _, reads in counts] == [0] * len(counts)


@pytest.mark.parametrize("case", ["stable_spam", "adams"])
def test_counts_follow_the_option_through_a_load(case):
    """A state of either kind goes on in the other."""
    whole = trajectory(case, steps=8)
    for before, after in ((True, False), (False, True)):
        params, optimizer = trajectory(case, steps=5, capturable=before)
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            group["capturable"] = after
        optimizer.load_state_dict(state)
        for step in range(5, 8):
            for name, p in params.items():
                p.grad = gradient(name, step, torch.float64)
            optimizer.step()
        assert_alike((params, optimizer), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", ["stable_spam", "adams"])
def test_capturable_refuses_counts_in_python(case):
    with pytest.raises(ValueError, match=r"rounding='stochastic' .* it excludes capturable=True"):
        trajectory(case, capturable=True, rounding="stochastic")
    if case == "stable_spam":
        with pytest.raises(ValueError, match=r"state_bits=8 .* it excludes capturable=True"):
            trajectory(case, capturable=True, state_bits=8)


def test_cuda_kernels_take_all_at_once(monkeypatch):
    """On a CPU, emulated: a call with the rates of each tensor, and with its count."""
    theirs = trajectory("stable_spam, no cosine", torch.float32, steps=10, fused=False)
    monkeypatch.setattr(dispatch, "_backend", lambda device_type: emulated_cuda.backend())
    with emulated_cuda.streams():
        for capturable in (False, True):
            options = {"steps": 10, "foreach": True, "capturable": capturable}
            ours = trajectory("stable_spam, no cosine", torch.float32, **options)
            assert_alike(ours, theirs, rtol=1e-4, atol=1e-5)


@no_gpu
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_steps_as_a_cpu_does(case, fused):
    options = {"fused": fused, "dtype": torch.float32 if fused is None else torch.float64}
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if fused is None else {"rtol": 1e-10, "atol": 1e-10}
    theirs = trajectory(case, **options)
    for capturable in (False, True):
        params, _ = trajectory(case, device="cuda", capturable=capturable, **options)
        for name, p in params.items():
            torch.testing.assert_close(
                p.cpu(), theirs[0][name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
            )


@no_gpu
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_replays(case, fused):
    """Over resets and masks, with another rate each time."""
    lr, ends = torch.tensor(0.01, device="cuda"), []
    for captured in (False, True):
        options = {"device": "cuda", "fused": fused, "lr": lr.fill_(0.01), "capturable": True}
        params, optimizer = trajectory(case, torch.float32, steps=8, **options)
        for p in params.values():
            p.grad = torch.ones_like(p)
        torch.cuda.synchronize()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
        for step in range(12):
            lr.fill_(0.01 / (step + 1))
            for p in params.values():
                p.grad.fill_(1.0 + step % 3)
            graph.replay() if captured else optimizer.step()
        ends.append([p.detach().cpu() for p in params.values()])
    assert all(map(torch.equal, *ends))
