"""When it does not train: each section of the page has its symptom here, and its cure."""

import inspect
import re
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from processes import needs_gloo
from torch import nn

import optimzoo
from docs.hooks import pages

pytest.importorskip("transformers", reason="pip install '.[test]'")
from tiny_llama import VOCABULARY, tiny_llama, weights

PAGE = (pages.ROOT / "docs/when_it_does_not_train.md").read_text(encoding="utf-8")


def section(title):
    """Mark a test as that of a section."""

    def mark(test):
        test.section = title
        return test

    return mark


def code(title):
    """Return the only block of Python in a section."""
    [text] = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    [block] = re.findall(r"```python\n(.*?)```", text, re.S)
    return block


def ran(title, **scope):
    """Run a section's code and return the names that it sets."""
    scope |= {"torch": torch, "optimzoo": optimzoo}
    exec(code(title), scope)
    return scope


def counting(steps, seed=1):
    """Return batches of sentences in which each token is the one after the last."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, VOCABULARY, (steps, 8, 1), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in (first + torch.arange(12)) % VOCABULARY]


def train(model, optimizer, steps):
    """Train and return the losses."""
    losses = []
    for batch in counting(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_head(name, head):
    """Return a small model whose last layer has a name."""
    return nn.Sequential(
        OrderedDict({"embed": nn.Embedding(32, 8), "inner": nn.Linear(8, 8), name: head})
    )


def test_every_section_has_its_test():
    tests = dict(inspect.getmembers(sys.modules[__name__], inspect.isfunction)).values()
    tested = [test.section for test in tests if hasattr(test, "section")]
    assert sorted(tested) == sorted(re.findall(r"^## (.*)$", PAGE, re.M))


SLOW = "The loss falls slowly, or rises from the first steps"


@section(SLOW)
def test_rates_of_another_unit():
    model = tiny_llama()
    adamw_rate = optimzoo.create_optimizer("muon", model, lr=1e-3)
    assert "embedding: lr" in optimzoo.describe(adamw_rate)
    slow = train(model, adamw_rate, 40)
    model = tiny_llama()
    optimizer = ran(SLOW, model=model)["optimizer"]
    assert "starting value" not in optimzoo.describe(optimizer)
    assert train(model, optimizer, 40)[-1] < 1 < 2 < slow[-1]


BFLOAT16 = "It trains in float32 and stands still in bfloat16"


@section(BFLOAT16)
def test_changes_that_bfloat16_loses():
    moved = []
    for cured in (False, True):
        model = tiny_llama().bfloat16()
        before = weights(model)
        optimizer = optimzoo.create_optimizer("scale", model, lr=1e-5)
        if cured:
            optimizer = ran(BFLOAT16, model=model)["optimizer"]
        train(model, optimizer, 30)
        hidden = [(name, p) for name, p in model.named_parameters() if "_proj" in name]
        changed = torch.cat([(p != before[name]).flatten() for name, p in hidden])
        moved.append(changed.float().mean().item())
    assert moved[0] < 0.4 < 0.6 < moved[1]


SPIKE = "The loss spikes"


@section(SPIKE)
def test_a_gradient_of_a_thousand_times_its_size():
    def way_after(optimizer, weight):
        """Return the way of ten steps after a spike over that of the ten before."""
        generator = torch.Generator().manual_seed(0)
        path = []
        for i in range(40):
            weight.grad = torch.randn(16, 16, generator=generator) * (1000 if i == 30 else 1)
            optimizer.step()
            path.append(weight.detach().clone())
        return ((path[39] - path[29]).norm() / (path[29] - path[19]).norm()).item()

    def layer():
        return nn.Linear(16, 16, bias=False)

    model = layer()
    plain = way_after(torch.optim.AdamW(model.parameters(), lr=1e-3), model.weight)
    model = layer()
    cured = way_after(ran(SPIKE, model=model)["optimizer"], model.weight)
    model = layer()
    groups = optimzoo.param_groups(model, {"weight": "hidden"})
    bounded = way_after(optimzoo.SCALE(groups, lr=1e-3), model.weight)
    assert plain > 1.5 > 1.3 > max(cured, bounded)


OVERWRITTEN = "Every group has one rate after the first step"


@section(OVERWRITTEN)
def test_a_loop_that_overwrites_the_rates():
    def optimizer_of(model):
        rates = {"lr": 1e-3, "embedding_lr": 8e-3, "vector_lr": 1e-2}
        return optimzoo.create_optimizer("scale", model, **rates)

    model = tiny_llama()
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["lr"] = 5e-4
    with pytest.warns(UserWarning, match=r"keep their ratios: base = \[g\['lr'\]"):
        train(model, optimizer, 1)
    optimizer = optimizer_of(model)
    ran(OVERWRITTEN, optimizer=optimizer, factor=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
    assert [g["lr"] for g in optimizer.param_groups] == [5e-4, 4e-3, 5e-4, 5e-3]


BARE = '"was given bare parameters"'


@section(BARE)
def test_bare_parameters():
    model = tiny_llama()
    with pytest.warns(UserWarning, match="was given bare parameters"):
        optimizer = optimzoo.SCALE(model.parameters(), lr=1e-3)
    train(model, optimizer, 1)
    assert not optimizer.state[model.lm_head.weight]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = ran(BARE, model=model)["optimizer"]
    train(model, optimizer, 1)
    assert "exp_avg" in optimizer.state[model.lm_head.weight]


NO_HEAD = '"no output head was found"'


@section(NO_HEAD)
def test_a_head_of_another_name():
    model = with_head("to_logits", nn.Linear(8, 20))
    assert "no output head was found" in optimzoo.describe(model)
    groups = ran(NO_HEAD, model=model)["groups"]
    assert "no output head" not in optimzoo.describe(groups)
    [head] = [group for group in groups if group["role"] == "head"]
    assert head["params"] == [model.to_logits.weight]


@section('"does not support sparse gradients"')
@pytest.mark.parametrize("name", ["scale", "muon", "galore"])
def test_sparse_embeddings(name):
    def step(sparse):
        model = nn.Sequential(nn.Embedding(16, 8, sparse=sparse), nn.Linear(8, 16))
        optimizer = optimzoo.create_optimizer(name, model, lr=1e-3)
        model(torch.arange(4)).square().sum().backward()
        before = model[0].weight.detach().clone()
        optimizer.step()
        return (model[0].weight - before).abs().sum().item()

    with pytest.raises(RuntimeError, match="sparse gradients; build the embedding with sparse=F"):
        step(True)
    assert step(False) > 0


UNFROZEN = "A layer that was unfrozen does not move"


@section(UNFROZEN)
def test_unfrozen_weights():
    model = with_head("head", nn.Linear(8, 32).requires_grad_(False))
    optimizer = optimzoo.create_optimizer("scale", model, lr=1e-3)
    model.head.requires_grad_(True)

    def moved():
        before = model.head.weight.detach().clone()
        model(torch.arange(8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return not torch.equal(before, model.head.weight)

    assert not moved()
    ran(UNFROZEN, model=model, optimizer=optimizer)
    assert moved() and "exp_avg" in optimizer.state[model.head.weight]


@section("The weights do not move under FSDP2")
@needs_gloo
def test_groups_made_before_sharding(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        moved = []
        for early in (True, False):
            model = tiny_llama()
            if early:
                optimizer = optimzoo.create_optimizer("scale", model, lr=1e-3)
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
            if not early:
                optimizer = optimzoo.create_optimizer("scale", model, lr=1e-3)
            before = weights(model)
            train(model, optimizer, 1)
            after = weights(model)
            pairs = [(after[name].full_tensor(), before[name].full_tensor()) for name in after]
            moved.append(not all(torch.equal(*pair) for pair in pairs))
        assert moved == [False, True]
    finally:
        destroy_process_group()


@section("A checkpoint of another optimizer")
def test_another_optimizer_s_checkpoint():
    model = tiny_llama()
    one_group = torch.optim.AdamW(model.parameters(), lr=1e-3)
    adamw = optimzoo.create_optimizer("adamw", model, lr=1e-3)
    for optimizer in (one_group, adamw):
        train(model, optimizer, 1)
    muon = optimzoo.create_optimizer("muon", model, lr=1e-2)
    with pytest.raises(ValueError, match="group"):
        muon.load_state_dict(one_group.state_dict())
    muon.load_state_dict(adamw.state_dict())
    train(model, muon, 1)
    hidden = muon.param_groups[0]
    assert hidden["role"] == "hidden" and hidden["lr"] == 1e-3
    assert {"exp_avg", "exp_avg_sq"} <= muon.state[hidden["params"][0]].keys()
    galore = optimzoo.create_optimizer("galore", model, lr=1e-2, rank=2)
    galore.load_state_dict(adamw.state_dict())
    with pytest.raises(ValueError, match="the state is of another rank or method"):
        train(model, galore, 1)
