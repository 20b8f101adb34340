"""AdamS under FSDP2: mask and weight stay aligned, and the run is the run of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from optimzoo import param_groups
from optimzoo.optimizers.adams import AdamS
from optimzoo.sparsity import pack, unpack

pytestmark = pytest.mark.distributed
STEPS = 6


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 5, bias=False)).double()


def make(net):
    groups = param_groups(net, {"^0": {"sparse": True}, "^2": {"sparse": False}})
    return AdamS(groups, lr=0.02, l1=0.3, total_steps=4, mask_every=2)


def step(net, optimizer, index):
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


def worker(rank, world, folder):
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        net = model()
        for layer in (net[0], net[2], net):
            fully_shard(layer)
        optimizer = make(net)
        for index in range(STEPS):
            step(net, optimizer, index)
        weight = net[0].weight  # 7 rows on 2 processes: 4 and 3
        mask = optimizer.state[weight]["mask"]
        assert mask.to_local().dtype == torch.uint8
        assert mask.to_local().shape == (weight.to_local().shape[0], 2)
        full = {n: p.full_tensor() for n, p in net.named_parameters()}
        full["mask"] = mask.full_tensor()
        if rank == 0:
            torch.save(full, f"{folder}/sharded.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_do_what_one_does(tmp_path):
    mp.spawn(worker, (2, str(tmp_path)), nprocs=2)
    sharded = torch.load(tmp_path / "sharded.pt", weights_only=True)
    net = model()
    optimizer = make(net)
    for index in range(STEPS):
        step(net, optimizer, index)
    expected = {n: p.detach() for n, p in net.named_parameters()}
    bits = optimizer.state[net[0].weight]["mask"]
    assert torch.equal(sharded.pop("mask"), bits)
    assert torch.equal(pack(unpack(bits, (7, 12))), bits)
    torch.testing.assert_close(sharded, expected, rtol=1e-10, atol=1e-12)
