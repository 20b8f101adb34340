"""Simulated peaks against real steps: against our tracker, and against torch's own allocator."""

import copy
import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import optimzoo
from optimzoo import create_optimizer, list_optimizers
from optimzoo.kernels import dispatch, native
from optimzoo.memory import (
    account,
    checkpoint_blocks,
    language_model_step,
    measure,
    simulate,
)
from optimzoo.memory.tracker import MODEL, STEP
from optimzoo.models import Llama, LlamaConfig

# Wide enough that weights outweigh the scalars, and of odd sizes.
CONFIG = LlamaConfig(509, 48, 132, 1, 3)
NEEDS = {"adams": {"l1": 1e-4, "total_steps": 100}}
PROJECTED = ("galore", "natural_galore", "fira")
NAMES = list_optimizers()
pytestmark = pytest.mark.usefixtures("few_objects")


def on_meta(config: LlamaConfig = CONFIG) -> Llama:
    with torch.device("meta"):
        return Llama(config)


def hyper_of(name: str) -> dict:
    # Rank below the smaller side; the third real step is a refresh, as the third simulated one is.
    ranked = {"rank": 8} if name in (*PROJECTED, "apollo") else {}
    gap = {"update_proj_gap": 2} if name in (*PROJECTED, "apollo", "apollo_mini") else {}
    return {**NEEDS.get(name, {}), **ranked, **gap}


def really(
    name, dtype, *, batch=2, seq=33, checkpointing=False, micro_batches=1, release=False, **hyper
):
    """Three real training steps of the same model, above what the process holds before."""
    base = measure(lambda: None).tensors
    model = Llama(CONFIG).to(dtype)
    if checkpointing:
        checkpoint_blocks(model)
    optimizer = create_optimizer(name, model, lr=1e-3, **hyper)
    released = optimzoo.release(optimizer) if release else nullcontext()
    loss_of = language_model_step(batch, seq)

    def step():
        for _ in range(micro_batches):
            loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    with released:
        found = measure(step, steps=3).tensors
    held = base.by_category
    parts = {name: bytes_ - held.get(name, 0) for name, bytes_ in found.by_category.items()}
    return SimpleNamespace(bytes=found.bytes - base.bytes, phase=found.phase, by_category=parts)


@pytest.mark.sampled(11)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in NAMES]
    + [(name, torch.bfloat16) for name in ("adamw", "scale", "galore", "swan", "adams")],
    ids=str,
)
def test_the_simulated_peak_is_that_of_real_steps(name, dtype):
    if name == "adams" and dtype == torch.bfloat16:
        with pytest.raises(ValueError, match="bfloat16"):
            simulate(on_meta(), name, dtype=dtype, **hyper_of(name))
        return
    hyper = hyper_of(name)
    simulated = simulate(on_meta(), name, batch=2, seq=33, dtype=dtype, **hyper).peak
    measured = really(name, dtype, **hyper)
    assert simulated.bytes == pytest.approx(measured.bytes, rel=0.002)
    assert simulated.phase == measured.phase
    for category, bytes_ in measured.by_category.items():
        assert simulated.by_category.get(category, 0) == pytest.approx(bytes_, rel=0.01, abs=4096)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ("adamw", "scale", "galore"))
@pytest.mark.parametrize(
    "more", ({"checkpointing": True}, {"micro_batches": 3}, {"release": True}), ids=str
)
def test_checkpointing_micro_batches_and_release(name, more):
    hyper = hyper_of(name)
    simulated = simulate(on_meta(), name, batch=2, seq=33, dtype=torch.float32, **more, **hyper)
    measured = really(name, torch.float32, **more, **hyper)
    assert simulated.peak.bytes == pytest.approx(measured.bytes, rel=0.002)
    assert simulated.peak.phase == measured.phase


def allocator_peak(step, steps: int) -> int:
    """The peak of torch's CPU allocator over ``steps`` calls, above what is allocated before."""
    memory = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    gc.collect()
    with memory:
        for _ in range(steps):
            step()
    events = [e for e in memory.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


@pytest.mark.parametrize("name", ("adamw", "scale", "galore"))
def test_the_simulated_peak_is_that_of_torchs_allocator(name):
    """An oracle that is not ours, which sees what operations hold inside themselves, too."""
    hyper = hyper_of(name)
    counted = account(on_meta(), name, dtype=torch.float32, **hyper)
    simulated = simulate(on_meta(), name, batch=2, seq=33, dtype=torch.float32, **hyper).peak
    model = Llama(CONFIG)
    optimizer = create_optimizer(name, model, lr=1e-3, **hyper)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    loss_of = language_model_step(2, 33)

    def step():
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    highest = allocator_peak(step, 3) + counted.params + buffers
    assert simulated.bytes == pytest.approx(highest, rel=0.02)


def test_phases_and_categories_add_up(monkeypatch):
    simulated = simulate(on_meta(), "adamw", batch=8, seq=64)
    assert list(simulated.steps) == ["first", "next"]
    assert simulated.steps["first"].phase == MODEL  # many tokens: activations outweigh the state
    for peak in simulated.steps.values():
        assert sum(peak.by_category.values()) == peak.bytes
    few = simulate(on_meta(), "adamw", batch=1, seq=2).peak
    assert few.phase == STEP
    counted = account(on_meta(), "adamw")
    assert few.by_category["parameters"] == counted.params
    assert few.by_category["gradients"] == counted.grads
    assert few.by_category["optimizer state"] == counted.state_total
    # By the kernels, of which shapes ask nothing: an eager step may hold more than a refresh.
    monkeypatch.setattr(dispatch, "backend", lambda kind: native.CPU)
    refreshed = simulate(on_meta(), "galore", rank=8, seq=2)
    assert list(refreshed.steps) == ["first", "next", "refresh"]
    assert refreshed.steps["refresh"].bytes > refreshed.steps["next"].bytes


def test_on_a_gpu_steps_are_multi_tensor_and_sizes_rounded():
    model = on_meta(LlamaConfig(97, 48, 132, 3, 3))
    cpu, gpu = (simulate(model, "adamw", seq=2, device=d).peak for d in ("cpu", "cuda"))
    hidden = 4 * 3 * (4 * 48 * 48 + 3 * 48 * 132)
    assert cpu.by_category["optimizer temporaries"] < hidden
    assert gpu.by_category["optimizer temporaries"] >= hidden
    assert all(bytes_ % 512 == 0 for bytes_ in gpu.by_category.values())
    assert "library workspaces" not in cpu.by_category
    with pytest.raises(ValueError, match="cannot simulate device 'tpu'; it must be cpu or cuda"):
        simulate(on_meta(), "adamw", device="tpu")


def test_a_model_and_a_loss_of_ones_own():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 3))
    before = [float(p.detach().sum()) for p in model.parameters()]

    def loss_of(module):
        return module(torch.ones(16, 64)).square().mean()

    def make(groups):
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    simulated = simulate(model, make, step=loss_of).peak
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    others = measure(lambda: None).tensors.bytes - weights  # what else the process holds
    optimizer = make(model.parameters())

    def step():
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert before == [float(p.detach().sum()) for p in model.parameters()]
    assert simulated.bytes == measure(step, steps=2).tensors.bytes - others


@pytest.mark.parametrize("experts", (1, 4))
def test_natural_galore_of_stacked_experts(experts):
    """The Fisher matrix of shapes alone is positive definite, in a stack as by itself."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(experts, 64, 32, device="meta"))

    def loss_of(module):
        return torch.einsum("eoi,ti->eto", module.weight, torch.ones(5, 32)).square().mean()

    hyper = {"rank": 4, "history": 3}
    counted = account(Experts(), "natural_galore", **hyper)
    assert counted.state["hidden", "gram"] == 4 * experts * 3 * 3
    found = simulate(Experts(), "natural_galore", step=loss_of, **hyper)
    assert found.steps["next"].by_category["optimizer state"] == counted.state_total


def test_a_module_that_cannot_be_faked_is_one_line():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

        def forward(self, input_ids, labels):
            return torch.tensor(self.weight.detach().numpy().sum()) * self.weight.sum()

    with pytest.raises(ValueError, match=r"Reads cannot be simulated on fake tensors: .*; measure"):
        simulate(Reads(), "sgd")
    with pytest.raises(ValueError, match=r"Linear has no nn\.ModuleList of blocks"):
        simulate(nn.Linear(4, 4), "sgd", checkpointing=True)
    with pytest.raises(ValueError, match="unknown optimizer 'scal'; did you mean scale"):
        simulate(on_meta(), "scal")


def test_a_copy_of_a_checkpointed_model_runs_its_own_blocks():
    model = Llama(CONFIG)
    checkpoint_blocks(model)
    other = copy.deepcopy(model)
    tokens = torch.arange(6).view(1, 6)
    other(tokens, tokens).backward()
    assert all(p.grad is not None for p in other.parameters())
    assert all(p.grad is None for p in model.parameters())
    peak = simulate(model, "adamw", batch=1, seq=6).peak.bytes
    assert peak == simulate(on_meta(), "adamw", batch=1, seq=6, checkpointing=True).peak.bytes
    assert all(p.grad is None for p in model.parameters())
