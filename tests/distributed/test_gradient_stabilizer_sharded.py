"""GradientStabilizer under FSDP2 and tensor parallelism: norms of whole gradients, one message."""

import pytest
import torch
from sharded_runs import assert_same_state, distance, load, make, net, save, shard, spawn, train
from torch import nn

from optimzoo import release, stabilize
from optimzoo.distributed import traffic

pytestmark = pytest.mark.distributed
STEPS = 6


def everything(rank, world, folder):
    for case in ("adamw", "scale", "muon"):
        alone, sharded = net(), shard(net())
        train(alone, stabilize(make(case, alone)), STEPS)
        optimizer = stabilize(make(case, sharded))
        train(sharded, optimizer, STEPS)
        worst, name = distance(sharded, alone)
        assert worst <= 1e-10, f"{case}: {name} is off by {worst:.1e}"

        again = shard(net())
        resumed = stabilize(make(case, again))
        save(sharded, optimizer, f"{folder}/{case}")
        load(again, resumed, f"{folder}/{case}")
        assert_same_state(sharded, optimizer, again, resumed)
        for pair in ((sharded, optimizer), (again, resumed)):
            train(*pair, 1, start=STEPS)
        assert distance(again, sharded) == (0, ""), case

    # What DCP makes to load into does not count.
    assert all(state["grad_norm_step"] == STEPS + 1 for state in resumed.state.values())
    one_message()
    released(world)
    parallel_tensors(world)


def one_message():
    model = shard(net())
    optimizer = stabilize(make("adamw", model))
    train(model, optimizer, 1)
    with traffic() as count:
        optimizer.step()
    assert count == {"all_reduce": [1, 8 * len(list(model.parameters()))]}


def released(world):
    models = [shard(net()), shard(net())]
    for i, model in enumerate(models):
        optimizer = stabilize(make("adamw", model))
        if i:
            release(optimizer)
        train(model, optimizer, STEPS)
    assert distance(*models)[0] <= 1e-12


def parallel_tensors(world):
    """A gradient that is a partial sum on each process: norms are those of the sum."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (world,))
    p = nn.Parameter(DTensor.from_local(torch.zeros(4).double(), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.full((4,), 3.0).double(), mesh, [Partial()])
    stabilize(torch.optim.SGD([p], lr=1.0)).step()
    assert p.full_tensor().norm().item() == pytest.approx(1.0)


def test_two_processes_do_what_one_does(tmp_path):
    spawn(everything, 2, tmp_path, str(tmp_path))
