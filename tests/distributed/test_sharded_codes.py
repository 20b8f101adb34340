"""Moments in 8 bits of sharded weights: blocks and codes of one process, whoever holds them."""

import pytest
import torch
from sharded_runs import (
    assert_same_state,
    distance,
    load,
    make,
    net,
    save,
    shard,
    spawn,
    train,
    whole_state,
)
from torch import nn

from optimzoo import Muon
from optimzoo.distributed import local_part, traffic
from optimzoo.memory import account

STEPS = 4
BATCH = {"vocab": 97}
# Shards of the embedding and the head begin inside of a block, those of hidden weights do not.
SIZES = {"vocab": 97, "width": 64, "inner": 96}
BITS = {"state_bits": 8, "rounding": "stochastic"}
LOW_RANK = {"rank": 3, "update_proj_gap": 3}
CASES = {
    "muon": {},
    "rmnp": {"nesterov": False},
    "scale": {},
    "scale spectral": {},
    "galore": LOW_RANK,
    "fira": LOW_RANK,
    "natural_galore": LOW_RANK,
    "apollo": LOW_RANK,
    "swan": {},
    "stable_spam": {},
    "sinkgd other scale": {},
    "muon other adafactor": {},
}
SMALL = ["muon", "galore", "scale", "stable_spam"]


def built(case, sharded, **options):
    low_rank = CASES[case] is LOW_RANK  # 3 x 1,400 moments, cut inside of a block too
    model = net(**{**SIZES, "inner": 1400 if low_rank else SIZES["inner"]})
    model = shard(model) if sharded else model
    return model, make(case, model, **{**BITS, **CASES[case], **options})


def assert_codes_of_one_process(case, sharded, alone):
    """A gradient's last digit may move a code to its neighbour, now and then."""
    found = 0
    ours, theirs = whole_state(*sharded), whole_state(*alone)
    for name, state in ours.items():
        assert state.keys() == theirs[name].keys(), (case, name)
        for key, value in state.items():
            expected, what = theirs[name][key], (case, name, key)
            assert value.shape == expected.shape and value.dtype == expected.dtype, what
            if key.endswith("_codes"):
                found += 1
                apart = (value.int() - expected.int()).abs()
                assert apart.max() <= 1 and (apart > 0).double().mean() <= 1e-3, what
            elif key.endswith("_scale"):
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=0.0)
    assert found, case


def like_one_process(rank, world, folder, cases):
    for case in cases:
        for rounding in ("nearest", "stochastic"):
            alone, sharded = (built(case, cut, rounding=rounding) for cut in (False, True))
            train(*alone, STEPS, **BATCH)
            train(*sharded, STEPS, **BATCH)
            assert_codes_of_one_process(case, sharded, alone)
            worst, name = distance(sharded[0], alone[0])
            assert worst <= 1e-3, f"{case}: {name} is off by {worst:.1e}"
        again = built(case, True)
        save(*sharded, f"{folder}/{case}")
        load(*again, f"{folder}/{case}")
        assert_same_state(*sharded, *again)
        for run in (sharded, again):
            train(*run, 2, start=STEPS, **BATCH)
        assert distance(again[0], sharded[0]) == (0, ""), case
        assert_same_state(*sharded, *again)


def resharded(folder, cases):
    """What two processes have saved, one loads: both have codes of the same blocks."""
    for case in cases:
        alone, loaded = built(case, False), built(case, False)
        load(*loaded, f"{folder}/{case}")
        train(*loaded, 2, start=STEPS, **BATCH)
        train(*alone, STEPS + 2, **BATCH)
        assert_codes_of_one_process(case, loaded, alone)
        assert distance(loaded[0], alone[0])[0] <= 1e-3, case


@pytest.mark.thorough
def test_sharded_codes_are_those_of_one_process(tmp_path):
    spawn(like_one_process, 2, tmp_path, str(tmp_path), SMALL)
    resharded(tmp_path, SMALL)


@pytest.mark.distributed
def test_sharded_codes_are_those_of_one_process_by_the_other_methods(tmp_path):
    cases = [case for case in CASES if case not in SMALL]
    spawn(like_one_process, 2, tmp_path, str(tmp_path), cases)
    resharded(tmp_path, cases)


def held_bytes(rank, world, folder):
    """Codes go by elements of the whole weight, scales by 256 of them; `account` says the same."""
    model, optimizer = built("muon", True)
    train(model, optimizer, 1, **BATCH)
    params = dict(model.named_parameters())
    square = optimizer.state[params["square.weight"]]  # 4,096 elements, half of them here
    assert local_part(square["momentum_buffer_codes"]).shape == (32, 64)
    assert local_part(square["momentum_buffer_scale"]).shape == (32 * 64 // 256,)
    few = optimizer.state[params["few.weight"]]
    assert local_part(few["momentum_buffer"]).dtype == torch.float64  # 192 elements
    head = optimizer.state[params["lm_head.weight"]]  # 49 and 48 rows: every process has all scales
    assert head["exp_avg_codes"].shape == (97, 64) and head["exp_avg_scale"].shape == (25,)
    assert not hasattr(head["exp_avg_scale"], "device_mesh")
    # Two moments of the embedding and two of the head send the maxima of their blocks; Muon deals
    # out its matrices.
    with traffic() as count:
        optimizer.step()
    assert tuple(count["all_reduce"]) == (4, 4 * 25 * 4)
    if rank == 0:
        tensors = [t for s in optimizer.state.values() for t in s.values()]
        held = [local_part(t) for t in tensors if isinstance(t, torch.Tensor)]
        torch.save(sum(t.numel() * t.element_size() for t in held), f"{folder}/bytes")


@pytest.mark.distributed
def test_bytes_of_sharded_codes(tmp_path):
    spawn(held_bytes, 2, tmp_path, str(tmp_path))
    counted = account(net(**SIZES), "muon", shards=2, **BITS)
    assert counted.state_total == torch.load(tmp_path / "bytes")
    codes = {key: size for (_, key), size in counted.state.items() if key.endswith("_codes")}
    assert codes["momentum_buffer_codes"] == 96 // 2 * 64 + 64 // 2 * 96 + 32 * 64


def cut_inside_of_rows(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    weight = nn.Parameter(distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)]))
    weight.grad = distribute_tensor(torch.ones(64, 64), mesh, [Shard(1)])
    optimizer = Muon([{"params": [weight], "role": "hidden"}], state_bits=8)
    message = r"a moment \[64, 64\] is cut along dimension 1; .* or leave state_bits=None"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()


@pytest.mark.distributed
def test_codes_that_are_cut_inside_of_rows_are_refused(tmp_path):
    spawn(cut_inside_of_rows, 2, tmp_path)
