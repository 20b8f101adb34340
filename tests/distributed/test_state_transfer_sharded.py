"""A run of FSDP2 changes its optimizer: each process takes over its own shards."""

import copy

import pytest
import torch
from sharded_runs import distance, loss_of, net, shard, spawn, train, whole

from optimzoo import adopt_state, create_optimizer, update_statistics
from optimzoo.lowbit import dequantize, moments

pytestmark = pytest.mark.distributed
STEPS = 5
ADAM = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.0}
OTHER = {"other_betas": ADAM["betas"], "other_lr": 0.01}
NEW = {"adamw": ADAM, "muon": OTHER, "scale": OTHER, "stable_spam": {"betas": ADAM["betas"]}}


def switched(model, name):
    old = torch.optim.AdamW(model.named_parameters(), **ADAM)
    train(model, old, STEPS)
    new = create_optimizer(name, model, **{"lr": 0.01, **NEW[name]})
    report = adopt_state(new, old)
    saved = old.state_dict()
    train(model, new, 3, start=STEPS)
    return new, report, saved


def everything(rank, world):
    for name in NEW:
        alone, sharded = net(), shard(net())
        expected, report, plain = switched(alone, name)
        optimizer, ours, _ = switched(sharded, name)
        assert ours == report, name
        worst, where = distance(sharded, alone)
        assert worst <= 1e-10, f"{name}: {where} is off by {worst:.1e}"
        for p, q in zip(sharded.parameters(), alone.parameters(), strict=True):
            for key, value in expected.state[q].items():
                other = optimizer.state[p][key]
                assert hasattr(other, "device_mesh") == (value.ndim > 0), (name, key)
                torch.testing.assert_close(whole(other), value, rtol=1e-9, atol=1e-12)
    statistics(sharded, alone)
    refused(sharded, plain)
    coded(sharded)


def refused(model, plain):
    """Moments of whole weights are not cut behind the caller's back."""
    new = torch.optim.AdamW(model.named_parameters(), **ADAM)
    with pytest.raises(ValueError, match=r"is not sharded, the parameter \(Shard.* adopt from"):
        adopt_state(new, copy.deepcopy(plain))
    assert not any(new.state.values())


def coded(model):
    """Moments become codes of blocks of the whole weight, to the nearest."""
    moments.SMALLEST = 1  # of this process, which ends with the test
    new = create_optimizer("muon", model, state_bits=8)
    old = torch.optim.AdamW(model.named_parameters(), **ADAM)
    train(model, old, 1)
    adopt_state(new, old)
    for name, p in model.named_parameters():
        key = "exp_avg" if "exp_avg_codes" in new.state[p] else "momentum_buffer"
        codes, scales = (whole(new.state[p][f"{key}_{part}"]) for part in ("codes", "scale"))
        exact = whole(old.state[p]["exp_avg"]).flatten()
        error = (dequantize(codes, scales).flatten() - exact).abs()
        assert (error <= scales.repeat_interleave(256)[: len(exact)] / 100).all(), name


def statistics(*models):
    both = []
    for model in models:
        optimizer = create_optimizer("scale", model, lr=0.01)
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        with update_statistics(optimizer) as values:
            optimizer.step()
        both.append(values)
    assert both[0] == pytest.approx(both[1], rel=1e-6)


def test_each_process_takes_over_its_shards(tmp_path):
    spawn(everything, 2, tmp_path)
