"""torch's schedulers, a learning-rate range test, and compiled training, on SCALE and others."""

import copy

import pytest
import torch
from tiny_llama import (
    assert_same,
    batch,
    plain_loop,
    rows,
    tiny_llama,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

import optimzoo

BATCHES = [batch(rows(2, seed=i)) for i in range(6)]
HYPER = {"lr": 3e-3, "vector_lr": 1e-2}


def step_and_measure(model, optimizer, inputs):
    """Train on one batch; the RMS by which one row of a hidden weight has moved."""
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight[3].detach().clone()
    loss = model(**inputs).loss
    plain_loop(model, optimizer, [inputs])
    return loss.item(), float((weight[3].detach() - before).square().mean().sqrt())


def make(name, optimizer):
    if name == "one_cycle":
        peaks = [10 * g["lr"] for g in optimizer.param_groups]
        return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=6)
    if name == "plateau":
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=3)


@pytest.mark.parametrize("name", ["one_cycle", "plateau", "warm_restarts"])
def test_every_step_has_the_size_that_the_scheduler_set(name):
    model = tiny_llama()
    optimizer = optimzoo.SCALE(optimzoo.param_groups(model), **HYPER)
    scheduler = make(name, optimizer)
    sizes = []
    for inputs in BATCHES:
        lrs = [g["lr"] for g in optimizer.param_groups]
        assert lrs[-1] / lrs[0] == pytest.approx(HYPER["vector_lr"] / HYPER["lr"])
        _, moved = step_and_measure(model, optimizer, inputs)
        # One cycle ends near 0, where float32 weights cannot resolve the step.
        assert moved == pytest.approx(lrs[0], rel=1e-3, abs=1e-9)
        sizes.append(lrs[0])
        scheduler.step(*([1.0] if name == "plateau" else []))
    if name == "one_cycle":
        assert 0.9 * 3e-2 < max(sizes) <= 3e-2 and max(sizes) > 5 * sizes[0] > 5 * sizes[-1]
    elif name == "plateau":  # the metric never falls
        assert sizes[:2] == [3e-3, 3e-3] and sizes[2:] == [3e-3 * 0.5**k for k in range(1, 5)]
    else:
        assert sizes[:3] == pytest.approx(sizes[3:]) and sizes[0] > sizes[1] > sizes[2]


def test_one_cycle_moves_the_momentum_of_the_head_alone():
    model = tiny_llama()
    optimizer = optimzoo.SCALE(optimzoo.param_groups(model), **HYPER)
    scheduler = make("one_cycle", optimizer)
    for inputs in BATCHES[:2]:
        plain_loop(model, optimizer, [inputs])
        scheduler.step()
    assert all(0.85 <= g["momentum"] <= 0.95 for g in optimizer.param_groups)
    kept = {id(p) for p, state in optimizer.state.items() if "exp_avg" in state and p.ndim == 2}
    assert kept == {id(model.lm_head.weight)}


@pytest.mark.parametrize("name", ["scale", "galore", "muon"])
def test_a_scheduler_resumes_from_its_state(name):
    def start():
        model = tiny_llama()
        optimizer = optimzoo.create_optimizer(name, model, lr=1e-3)
        return model, optimizer, make("warm_restarts", optimizer)

    def run(model, optimizer, scheduler, batches):
        for inputs in batches:
            plain_loop(model, optimizer, [inputs])
            scheduler.step()

    model, *ours = start()
    run(model, *ours, BATCHES[:4])
    saved = copy.deepcopy([x.state_dict() for x in (model, *ours)])
    run(model, *ours, BATCHES[4:])
    other, *theirs = start()
    for each, state in zip((other, *theirs), saved, strict=True):
        each.load_state_dict(state)
    run(other, *theirs, BATCHES[4:])
    for key, value in weights(model).items():
        assert torch.equal(value, other.get_parameter(key)), key
    assert [g["lr"] for g in ours[0].param_groups] == [g["lr"] for g in theirs[0].param_groups]


def test_a_range_test_is_an_exponential_schedule():
    model = tiny_llama()
    optimizer = optimzoo.SCALE(optimzoo.param_groups(model), lr=1e-5)
    ramp = lr_scheduler.LambdaLR(optimizer, lambda step: 10 ** (step / 4))
    found = []
    for _ in range(24):
        loss, moved = step_and_measure(model, optimizer, BATCHES[0])
        assert moved == pytest.approx(optimizer.param_groups[0]["lr"], rel=5e-2)
        found.append((ramp.get_last_lr()[0], loss))
        ramp.step()
    losses = [loss for _, loss in found]
    best = losses.index(min(losses))
    assert found[-1][0] == pytest.approx(1e-5 * 10 ** (23 / 4))
    assert 1e-4 < found[best][0] and losses[-1] > losses[best] + 0.5


class Words(nn.Module):
    """As small as a language model can be: dynamo takes seconds a layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(61, 24)
        self.hidden = nn.Linear(24, 37)
        self.lm_head = nn.Linear(37, 61, bias=False)

    def forward(self, ids):
        logits = self.lm_head(self.hidden(self.embed(ids[:, :-1])).relu())
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def test_a_compiled_model_and_a_compiled_step():
    torch._dynamo.reset()
    runs = []
    for compiled in (True, False):
        words = Words()
        model = torch.compile(words, backend="aot_eager") if compiled else words
        optimizer = optimzoo.SCALE(optimzoo.param_groups(model), lr=3e-3)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        roles = [g["role"] for g in optimizer.param_groups]
        assert roles == ["hidden", "embedding", "head", "vector"]
        start = words.hidden.weight.detach().clone()
        for inputs in BATCHES[:3]:
            before = words.hidden.weight.detach().clone()
            model(inputs["input_ids"]).backward()
            step()
            moved = (words.hidden.weight.detach() - before).square().mean(-1).sqrt()
            alive = words.hidden.weight.grad.any(-1)
            torch.testing.assert_close(moved, 3e-3 * alive, atol=1e-6, rtol=1e-3)
            optimizer.zero_grad()
        assert not torch.equal(words.hidden.weight, start)
        runs.append(weights(words))
    assert_same(*runs)
