"""The whole of the sharding tests, on two and four processes: `make test-distributed`."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded_runs import (
    CASES,
    HYPER,
    assert_same_state,
    distance,
    load,
    loss_of,
    make,
    net,
    put,
    save,
    shard,
    spawn,
    state_dicts,
    train,
    whole,
)
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

WORLDS = (2, 4)  # `few` has 3 rows and `norm` 12: of four processes one has nothing of the first
DTYPES = {"float64": 1e-10, "float32": 1e-4}


def each(function, cases):
    """All cases, and then the errors of all, so that one does not hide the others."""
    failed = []
    for case in cases:
        try:
            function(case)
        except AssertionError as error:
            failed.append(f"{case}: {error}")
    assert not failed, "\n".join(failed)


def fsdp2(rank, world, dtype, limit, cases, shape):
    def alike(case):
        alone, sharded = net(dtype, **shape), shard(net(dtype, **shape))
        train(alone, make(case, alone), 20)
        train(sharded, make(case, sharded), 20)
        worst, name = distance(sharded, alone)
        if rank == 0:
            print(f"fsdp2 {world} {dtype} {shape} {case}: {worst:.1e}")
        assert worst <= limit, f"{name} is off by {worst:.1e}"

    each(alike, cases)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world", WORLDS)
def test_fsdp2(tmp_path, world, dtype):
    spawn(fsdp2, world, tmp_path, getattr(torch, dtype), DTYPES[dtype], list(CASES), {})


@pytest.mark.parametrize("world", WORLDS)
def test_fsdp2_with_1001_rows(tmp_path, world):
    """Of the embedding, the head and a hidden weight."""
    shape = {"inner": 1001, "vocab": 1001}
    cases = [case for case in HYPER if case != "adams"]
    for dtype, limit in DTYPES.items():
        spawn(fsdp2, world, tmp_path / dtype, getattr(torch, dtype), limit, cases, shape)


def ddp(rank, world, dtype, limit, cases):
    def alike(case):
        alone, model = net(dtype), net(dtype)
        train(alone, make(case, alone), 20)
        replica = nn.parallel.DistributedDataParallel(model)
        train(replica, make(case, replica), 20)
        worst, name = distance(model, alone)
        assert worst <= limit, f"{name} is off by {worst:.1e}"

    each(alike, cases)


@pytest.mark.parametrize("world", WORLDS)
def test_ddp(tmp_path, world):
    for dtype, limit in DTYPES.items():
        spawn(ddp, world, tmp_path / dtype, getattr(torch, dtype), limit, list(CASES))


def followed(model, case, steps, limit):
    """Step a whole model with the gradients of the sharded one: the forward does not matter."""
    alone = net(next(model.parameters()).dtype, inner=model.tall.weight.shape[0])
    optimizer, other = make(case, model), make(case, alone)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.grad = whole(p.grad).clone()
        optimizer.step()
        other.step()
    worst, name = distance(model, alone)
    assert worst <= limit, f"{name} is off by {worst:.1e}"


def other_ways(rank, world, cases):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ways = {
        "mixed precision": {"mp_policy": mixed},
        "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "hybrid": {"mesh": init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s"))},
    }
    for way, options in ways.items():
        limit = 1e-10 if way == "hybrid" else 1e-4
        dtype = torch.float64 if way == "hybrid" else torch.float32

        def alike(case, options=options, dtype=dtype, limit=limit):
            followed(fully_shard(net(dtype), **options), case, 8, limit)

        each(alike, cases)


def test_mixed_precision_offload_and_hybrid_sharding(tmp_path):
    spawn(other_ways, 4, tmp_path, list(HYPER))


def tensor_parallel(rank, world, cases, refusing):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))

    def model():
        plan = {"tall": ColwiseParallel(), "wide": RowwiseParallel()}
        cut = parallelize_module(net(inner=32), mesh["tp"], plan)
        return fully_shard(cut, mesh=mesh["dp"])

    each(lambda case: followed(model(), case, 8, 1e-10), cases)
    for case in refusing:
        with pytest.raises(RuntimeError, match=r"cut along 2 dimensions of its mesh") as caught:
            followed(model(), case, 1, 0)
        assert "\n" not in str(caught.value)


def test_tensor_parallel(tmp_path):
    refusing = ["swan", "muon", "scale spectral"]
    spawn(tensor_parallel, 4, tmp_path, [c for c in CASES if c not in refusing], refusing)


def cut_masks(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from optimzoo import AdamS

    mesh = init_device_mesh("cpu", (world,))
    for transposed, dim in ((False, 1), (True, 0)):
        weight = nn.Parameter(distribute_tensor(torch.ones(12, 12), mesh, [Shard(dim)]))
        group = {"params": [weight], "role": "hidden", "transposed": transposed}
        with pytest.raises(ValueError, match=r"is cut into 2 parts, which are not multiples"):
            AdamS([group], l1=0.1, total_steps=4)


def test_a_cut_group_of_a_mask_is_refused_by_every_process(tmp_path):
    spawn(cut_masks, 2, tmp_path)


def saved(rank, world, cases, dtype, folder, previous):
    """Train on from the last checkpoint, and leave another."""
    for case in cases:
        kind = torch.float32 if case == "adams" else dtype
        model = shard(net(kind)) if world > 1 else net(kind)
        optimizer = make(case, model)
        if previous:
            load(model, optimizer, f"{folder}/{case}-{previous}")
            again = shard(net(kind)) if world > 1 else net(kind)
            other = make(case, again)
            load(again, other, f"{folder}/{case}-{previous}")
            assert_same_state(model, optimizer, again, other)
        else:
            train(model, optimizer, 9)
        path = f"{folder}/{case}-{previous}{world}"
        dcp.async_save(state_dicts(model, optimizer), checkpoint_id=path).result()
        if previous:  # the state is the one that was saved, whatever the number of processes
            held = state_dicts(model, optimizer)
            dcp.load(held, checkpoint_id=path)
            put(model, optimizer, held)
            assert_same_state(again, other, model, optimizer)
        train(model, optimizer, 1, start=9)
        ends = {n: whole(p.detach()) for n, p in model.named_parameters()}
        if rank == 0:
            torch.save(ends, f"{path}.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_from_four_to_two_to_one_and_back(tmp_path, dtype):
    folder, cases, previous = str(tmp_path), list(HYPER), ""
    for world in (4, 2, 1, 2, 4):
        spawn(saved, world, tmp_path / f"meet{previous}{world}", cases, dtype, folder, previous)
        previous += str(world)
    limit = 1e-5 if dtype == torch.float32 else 0.02
    for case in cases:
        ends = [torch.load(f"{folder}/{case}-{w}.pt", weights_only=True) for w in ("4", previous)]
        for name, first in ends[0].items():
            assert (ends[1][name] - first).abs().max() <= limit * first.abs().max(), (case, name)
        states = []
        for name in ("4", previous):
            file = tmp_path / f"{case}-{name}-whole.pt"
            dcp_to_torch_save(tmp_path / f"{case}-{name}", file)
            states.append(torch.load(file, weights_only=True))
        assert_equal(states[0], states[1], case)


def assert_equal(one, other, where):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            assert_equal(value, other[key], f"{where} {key}")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def test_consolidated_files_load_in_one_process(tmp_path):
    spawn(consolidated, 2, tmp_path, str(tmp_path))
    for case in HYPER:
        file = tmp_path / f"{case}.pt"
        dcp_to_torch_save(tmp_path / case, file)
        model, other = net(), net()
        optimizer, second = make(case, model), make(case, other)
        put(model, optimizer, torch.load(file, weights_only=True))
        load(other, second, str(tmp_path / case))
        assert_same_state(model, optimizer, other, second)


def consolidated(rank, world, folder):
    for case in HYPER:
        model = shard(net())
        optimizer = make(case, model)
        train(model, optimizer, 5)
        save(model, optimizer, f"{folder}/{case}")
