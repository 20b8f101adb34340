"""Sharded weights train as whole ones: FSDP2 and DDP in two processes, every method."""

import torch
import torch.distributed as dist
from sharded_runs import CASES, distance, make, net, shard, spawn, train

STEPS = 10


def trained_alike(rank, world, cases):
    for case in cases:
        alone, sharded = net(), shard(net())
        train(alone, make(case, alone), STEPS)
        train(sharded, make(case, sharded), STEPS)
        worst, name = distance(sharded, alone)
        assert worst <= 1e-10, f"{case}: {name} is off by {worst:.1e}"


def replicated_alike(rank, world, cases):
    for case in cases:
        alone, model = net(), net()
        replica = torch.nn.parallel.DistributedDataParallel(model)
        train(alone, make(case, alone), STEPS)
        train(replica, make(case, replica), STEPS)
        worst, name = distance(model, alone)
        assert worst <= 1e-10, f"{case}: {name} is off by {worst:.1e}"
        ends = [torch.cat([p.detach().flatten() for p in model.parameters()])]
        others = [torch.empty_like(ends[0]) for _ in range(world)]
        dist.all_gather(others, ends[0])
        assert all(torch.equal(other, ends[0]) for other in others), case


def test_every_method_under_fsdp2(tmp_path):
    spawn(trained_alike, 2, tmp_path, list(CASES))


def test_every_method_under_ddp(tmp_path):
    spawn(replicated_alike, 2, tmp_path, list(CASES))
