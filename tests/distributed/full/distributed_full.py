"""The whole of the sharding tests, on two and four processes: `make test-distributed`."""

import itertools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded_runs import (
    CASES,
    HYPER,
    TORCH,
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
from torch.distributed.checkpoint.state_dict import StateDictOptions

WORLDS = (2, 4)  # `few` has 3 rows and `norm` 12: of four processes one has nothing of the first
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4}


def each(function, cases):
    """All cases, and then the errors of all, so that one does not hide the others."""
    failed = []
    for case in cases:
        try:
            function(case)
        except AssertionError as error:
            failed.append(f"{case}: {error}")
    assert not failed, "\n".join(failed)


def alike(case, dtype, wrap, *, amplifies=False, **shape):
    """The largest difference of twenty steps of one process from those of all.

    Where training itself ``amplifies`` rounding beyond the bound, ten times what becomes of a
    one-process run whose start is moved by about a last place.
    """
    alone, model = net(dtype, **shape), net(dtype, **shape)
    train(alone, make(case, alone), 20)
    wrapped = wrap(model)
    train(wrapped, make(case, wrapped), 20)
    worst, name = distance(model, alone)
    limit = DTYPES[dtype]
    if amplifies and worst > limit:
        limit = 10 * amplified(case, dtype, alone, **shape)
    assert worst <= limit, f"{name} is off by {worst:.1e}, more than {limit:.1e}"


def amplified(case, dtype, alone, **shape):
    """How far a run ends from ``alone`` whose start is moved by at most a last place."""
    nudged = net(dtype, **shape)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nudged.parameters():
            share = 2 * torch.rand(p.shape, generator=generator, dtype=dtype) - 1
            p.mul_(1 + torch.finfo(dtype).eps * share)
    train(nudged, make(case, nudged), 20)
    return distance(nudged, alone)[0]


def fsdp2(rank, world, cases):
    each(lambda at: alike(*at, shard), itertools.product(cases, DTYPES))


@pytest.mark.parametrize("world", WORLDS)
def test_fsdp2(tmp_path, world):
    spawn(fsdp2, world, tmp_path, [*CASES, *TORCH])


def ddp(rank, world, cases):
    wrap = nn.parallel.DistributedDataParallel
    each(lambda at: alike(*at, wrap), itertools.product(cases, DTYPES))


@pytest.mark.parametrize("world", WORLDS)
def test_ddp(tmp_path, world):
    spawn(ddp, world, tmp_path, list(CASES))


def followed(model, case, steps, limit, **options):
    """Step a whole model with the gradients of the sharded one: the forward does not matter."""
    tall, embed = model.tall.weight, model.embed.weight
    alone = net(tall.dtype, inner=tall.shape[0], vocab=embed.shape[0])
    optimizer, other = make(case, model, **options), make(case, alone, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            q.grad = whole(p.grad).clone()
        optimizer.step()
        other.step()
    worst, name = distance(model, alone)
    assert worst <= limit, f"{name} is off by {worst:.1e}"


def long(rank, world, cases):
    shape = {"inner": 1001, "vocab": 1001}

    def same(at):
        case, dtype = at
        followed(shard(net(dtype, **shape)), case, 20, DTYPES[dtype])
        alike(case, dtype, shard, amplifies=dtype == torch.float32, **shape)

    each(same, itertools.product(cases, DTYPES))


@pytest.mark.parametrize("world", WORLDS)
def test_fsdp2_with_1001_rows(tmp_path, world):
    """Of the embedding, the head and a hidden weight."""
    spawn(long, world, tmp_path, [case for case in HYPER if case != "adams"])


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
    whole = [case for case, (name, _) in CASES.items() if name in ("swan", "muon")]
    refusing = [*whole, "scale spectral"]
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


def checkpoint_cases():
    """Each method in float32 and bfloat16, and some of those whose rounding has counters."""
    for name in [*HYPER, *TORCH]:
        yield f"{name} fp32"
        # AdamS refuses to be rounded to nearest; torch loads these two's counters as bfloat16.
        if name not in ("adams", "nadam", "asgd"):
            yield f"{name} bf16"
    for name in ("adams", "scale", "natural_galore", "apollo"):
        yield f"{name} rounded"


def begun(case, world):
    """Model and optimizer of a case, sharded where there is somebody to share with."""
    name, kind = case.split()
    model = net(torch.float32 if kind == "fp32" else torch.bfloat16)
    model = shard(model) if world > 1 else model
    return model, make(name, model, **({"rounding": "stochastic"} if kind == "rounded" else {}))


def resumed(cases, world, path):
    """All cases, loaded from one checkpoint."""
    runs = {case: begun(case, world) for case in cases}
    held = {case: state_dicts(*run) for case, run in runs.items()}
    dcp.load(held, checkpoint_id=path)
    for case, run in runs.items():
        put(*run, held[case])
    return runs


def saved(rank, world, cases, folder, previous):
    """Go on from the last checkpoint, save what was loaded, load it again, take one step more."""
    if previous:
        runs = resumed(cases, world, f"{folder}/{previous}")
    else:
        runs = {case: begun(case, world) for case in cases}
        for run in runs.values():
            train(*run, 9)
    path = f"{folder}/{previous}{world}"
    held = {case: state_dicts(*run) for case, run in runs.items()}
    dcp.async_save(held, checkpoint_id=path).result()
    others, ends = resumed(cases, world, path), {}

    def same(case):
        (model, optimizer), (other, second) = runs[case], others[case]
        assert_same_state(model, optimizer, other, second)
        for run in (runs[case], others[case]):
            train(*run, 1, start=9)
        assert distance(other, model) == (0, "")
        ends[case] = {n: whole(p.detach()) for n, p in model.named_parameters()}

    each(same, cases)
    if rank == 0:
        torch.save(ends, f"{path}.pt")


def test_checkpoints_from_four_to_two_to_one_and_back(tmp_path):
    """The state has the same bits in all five; the next step has them wherever as many take it."""
    cases, previous, states, ends = list(checkpoint_cases()), "", [], []
    for world in (4, 2, 1, 2, 4):
        spawn(saved, world, tmp_path / f"meet-{previous}", cases, str(tmp_path), previous)
        previous += str(world)
        file = tmp_path / f"{previous}-whole.pt"
        dcp_to_torch_save(tmp_path / previous, file)
        states.append(torch.load(file, weights_only=True))
        ends.append(torch.load(tmp_path / f"{previous}.pt", weights_only=True))
    assert states[0].keys() == set(cases)
    for state in states[1:]:
        assert_equal(state, states[0], "")
    assert_equal(ends[4], ends[0], "on four")
    assert_equal(ends[3], ends[1], "on two")
    for end, case in itertools.product(ends[1:3], cases):
        # Sums over other parts round otherwise; for a rounding, one place of bfloat16.
        limit = 1e-5 if case.endswith("fp32") else 0.02
        for name, first in ends[0][case].items():
            assert (end[case][name] - first).abs().max() <= limit * first.abs().max(), (case, name)


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
        # Not strict: weights without state are not in the file.
        held = torch.load(file, weights_only=True)
        put(model, optimizer, held, StateDictOptions(strict=False))
        load(other, second, str(tmp_path / case))
        assert_same_state(model, optimizer, other, second)


def consolidated(rank, world, folder):
    for case in HYPER:
        model = shard(net())
        optimizer = make(case, model)
        train(model, optimizer, 5)
        save(model, optimizer, f"{folder}/{case}")
