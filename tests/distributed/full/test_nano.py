"""Twenty steps of every method on nano: DDP and FSDP2 by layers are the run of one process."""

import itertools

import torch
from distributed_full import DTYPES, each
from sharded_runs import HYPER, distance, spawn, whole
from torch import nn
from torch.distributed.fsdp import fully_shard

from optimzoo import param_groups
from optimzoo.models.llama import Llama, get_config
from optimzoo.registry import get_info


def nano(dtype):
    model = Llama(get_config("nano"))
    model.reset_parameters(0)
    return model.to(dtype)


def by_layers(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def alike(name, dtype, wrap):
    """Twenty steps; one process takes them with the gradients of the others.

    By itself it would have others soon: at these rates a training amplifies the last place of
    float64 a million times in a step.
    """
    alone, model = nano(dtype), nano(dtype)
    forward = wrap(model)
    hyper = {**HYPER[name], "lr": HYPER[name]["lr"] / 4}
    make = get_info(name).make
    ours, other = (make([dict(g) for g in param_groups(m)], **hyper) for m in (model, alone))
    for step in range(20):
        ids = torch.randint(0, 2048, (2, 17), generator=torch.Generator().manual_seed(step))
        ours.zero_grad()
        forward(ids[:, :-1], ids[:, 1:]).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.grad = whole(p.grad).clone()
        ours.step()
        other.step()
    worst, where = distance(model, alone)
    assert worst <= DTYPES[dtype], f"{where} is off by {worst:.1e}"


def everything(rank, world, names):
    wraps = (nn.parallel.DistributedDataParallel, by_layers)
    each(lambda at: alike(*at), itertools.product(names, DTYPES, wraps))


def test_every_method_on_nano(tmp_path):
    spawn(everything, 2, tmp_path, list(HYPER))
