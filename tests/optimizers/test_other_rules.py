"""The rules of the embedding and the head; `test_zoo_fidelity` has their steps."""

import pytest
import torch
from torch import nn
from zoo_models import llama, train

from optimzoo import Muon, create_optimizer, param_groups

VOCAB, WIDTH = 97, 24
METHODS = ["muon", "swan", "sinkgd", "galore"]


def role_state(optimizer, role):
    """Shapes of the state of a role's weights, its counts left out."""
    shapes = {}
    for group in optimizer.param_groups:
        for p in group["params"] if group["role"] == role else []:
            shapes |= {k: tuple(v.shape) for k, v in optimizer.state[p].items() if k != "step"}
    return shapes


def stepped(grad, role, other, before=(), **options):
    """The update of a weight of zeros at a learning rate of one."""
    weight = nn.Parameter(torch.zeros_like(grad))
    group = {"params": [weight], "role": role, **options}
    optimizer = Muon([group], other=other, other_lr=1.0, other_eps=1e-8)
    for g in (*before, grad):
        with torch.no_grad():
            weight.zero_()
        weight.grad = g.clone()
        optimizer.step()
    assert torch.equal(weight.grad, grad)
    return -weight.detach()


def normal(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", METHODS)
def test_the_state_is_what_the_docs_say(name):
    options = {"rank": 4} if name == "galore" else {}
    moments = {"exp_avg": (VOCAB, WIDTH), "exp_avg_sq": (VOCAB, WIDTH)}
    factors = {"row_var": (VOCAB,), "col_var": (WIDTH,)}
    expected = {
        "adam": {"embedding": moments, "head": moments},
        "scale": {"embedding": {}, "head": {"exp_avg": (VOCAB, WIDTH)}},
        "adafactor": {"embedding": factors, "head": factors},
    }
    for other, roles in expected.items():
        model = llama()
        optimizer = create_optimizer(name, model, other=other, **options)
        train(model, optimizer, 2)
        for role, shapes in roles.items():
            assert role_state(optimizer, role) == shapes, (other, role)
        assert set(role_state(optimizer, "vector")) == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("other", ["scale", "adafactor"])
@pytest.mark.parametrize("name", METHODS)
def test_it_trains(name, other):
    options = {"rank": 4} if name == "galore" else {}
    model = llama()
    optimizer = create_optimizer(name, model, lr=0.01, other_lr=0.01, other=other, **options)
    losses = train(model, optimizer, 30)
    assert losses[-1] < 0.7 * losses[0]


def test_a_group_may_have_its_own():
    groups = param_groups(llama())
    for group in groups:
        if group["role"] == "head":
            group["other"] = "adafactor"
    model_groups = [dict(group) for group in groups]
    optimizer = Muon(model_groups, other="scale")
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(role_state(optimizer, "head")) == {"row_var", "col_var"}
    assert role_state(optimizer, "embedding") == {}


def test_an_unknown_rule_and_a_method_without_others_are_refused():
    with pytest.raises(ValueError, match="other"):
        create_optimizer("swan", llama(), other="adamw")
    with pytest.raises(ValueError, match="trains every role by its own rule"):
        create_optimizer("stable_spam", llama(), other="scale")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("other", ["scale", "adafactor"])
@pytest.mark.parametrize("role", ["embedding", "head"])
def test_zero_rows_and_columns_are_not_moved(role, other, dtype):
    grad = normal(12, 7, dtype=dtype)
    grad[[0, 5]] = 0
    grad[:, [2]] = 0
    update = stepped(grad, role, other)
    assert update.isfinite().all()
    assert torch.equal(update != 0, grad != 0)
    assert not stepped(torch.zeros_like(grad), role, other).any()


@pytest.mark.parametrize("role", ["embedding", "head"])
def test_a_transposed_weight_takes_the_transposed_step(role):
    grads = [normal(12, 7) * scale for scale in (1.0, 3.0, 0.5)]
    for other in ("scale", "adafactor"):
        expected = stepped(grads[-1], role, other, before=grads[:-1])
        turned = [g.mT.contiguous() for g in grads]
        update = stepped(turned[-1], role, other, before=turned[:-1], transposed=True)
        torch.testing.assert_close(update.mT, expected)


def test_a_token_seen_for_the_first_time_is_not_thrown_far():
    """Its second moment is young: what it would move by is the limit's business."""
    common = normal(50, 8)
    common[7] = 0
    rare = torch.zeros_like(common)
    rare[7] = 100.0
    update = stepped(rare, "embedding", "adafactor", before=[common] * 200)
    assert update.square().mean().sqrt() <= 1.0 + 1e-5
    assert not update[:7].any()


def test_the_heads_momentum_has_eight_bits():
    head = nn.Parameter(torch.zeros(128, 64))
    optimizer = Muon([{"params": [head], "role": "head"}], other="scale", state_bits=8)
    head.grad = normal(128, 64)
    optimizer.step()
    state = optimizer.state[head]
    assert state["exp_avg_codes"].dtype == torch.int8 and "exp_avg" not in state
    assert sum(t.numel() * t.element_size() for t in state.values()) == 128 * 64 * (1 + 4 / 256)
