"""Stochastic rounding of sharded weights: each process rounds its rows with their own counters."""

import pytest
import torch
from sharded_runs import HYPER, make, net, shard, spawn, train, whole

pytestmark = pytest.mark.distributed
STEPS = 4


def rounded_in_parts(rank, world, names):
    for name in names:
        ends = []
        for sharded in (False, True, True):
            model = net(torch.bfloat16)
            model = shard(model) if sharded else model
            optimizer = make(name, model, rounding="stochastic")
            train(model, optimizer, STEPS)
            assert all(state["rounding_step"] == STEPS for state in optimizer.state.values())
            ends.append([whole(p.detach()).float() for p in model.parameters()])
        alone, first, again = ends
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name
        # The bits differ from those of a whole weight, so the weights do, by their spacing.
        for a, b in zip(alone, first, strict=True):
            assert (a - b).norm() < 0.1 * a.norm() + 0.1, name


def vectors_refused(rank, world):
    model = shard(net())
    with pytest.raises(RuntimeError, match="spectral_norm=True does not step sharded hidden"):
        train(model, make("scale", model, spectral_norm=True), 1)


def test_a_vector_of_the_spectral_norm_is_refused(tmp_path):
    spawn(vectors_refused, 2, tmp_path)


def test_sharded_runs_are_their_own_and_reproducible(tmp_path):
    names = [name for name in HYPER if name not in ("adamw", "sgd")]
    spawn(rounded_in_parts, 2, tmp_path, names)
