"""Sharded weights train as whole ones, in two processes; `make test-distributed` has the rest."""

import copy

import pytest
import torch
import torch.distributed as dist
from sharded_runs import (
    CASES,
    HYPER,
    assert_same_state,
    distance,
    load,
    make,
    net,
    save,
    shard,
    spawn,
    train,
)
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor.debug import CommDebugMode

from optimzoo.distributed import traffic

STEPS = 8
SMALL = ["scale", "galore", "natural_galore", "swan", "sinkgd", "rmnp", "adams"]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everything(rank, world, folder, cases):
    for case in cases:
        alone, sharded = net(), shard(net())
        train(alone, make(case, alone), STEPS)
        optimizer = make(case, sharded)
        train(sharded, optimizer, STEPS)
        worst, name = distance(sharded, alone)
        assert worst <= 1e-10, f"{case}: {name} is off by {worst:.1e}"
        if case in HYPER:
            again = shard(net())
            restored = make(case, again)
            save(sharded, optimizer, f"{folder}/{case}")
            load(again, restored, f"{folder}/{case}")
            assert_same_state(sharded, optimizer, again, restored)
            for pair in ((sharded, optimizer), (again, restored)):
                train(*pair, 1, start=STEPS)
            assert distance(again, sharded) == (0, ""), case


def beside_them(rank, world):
    replicas_agree(rank, world)
    communication_is_counted()


def replicas_agree(rank, world):
    for case in ("scale", "natural_galore", "muon"):
        alone, model = net(), net()
        replica = torch.nn.parallel.DistributedDataParallel(model)
        train(alone, make(case, alone), STEPS)
        train(replica, make(case, replica), STEPS)
        assert distance(model, alone)[0] <= 1e-10, case
        end = torch.cat([p.detach().flatten() for p in model.parameters()])
        others = [torch.empty_like(end) for _ in range(world)]
        dist.all_gather(others, end)
        assert all(torch.equal(other, end) for other in others), case


def communication_is_counted():
    def sent(case, steps, **extra):
        model = shard(net())
        optimizer = make(case, model, **extra)
        train(model, optimizer, steps)
        with traffic() as count, CommDebugMode() as seen:
            optimizer.step()
        calls = sum(n for n, _ in count.values())
        assert seen.get_total_counts() == calls, case
        return {name: tuple(entry) for name, entry in count.items()}

    assert sent("scale", 1) == {"all_reduce": (1, 12 * 8)}  # d squares of the embedding's columns
    assert sent("scale sign", 1) == sent("adams", 1) == sent("adamw", 1) == sent("rmnp", 1) == {}
    # Between refreshes r x n for the two weights of fewer rows than columns, rows being cut.
    assert sent("galore", 1) == {"all_reduce": (2, 3 * (19 + 12) * 8)}
    assert sent("galore", 1, side="right") == {}
    # All maxima at once, all sums of squares at once.
    weights = len(list(net().parameters()))
    assert sent("stable_spam together", 1) == {"all_reduce": (2, 2 * weights * 8)}
    assert sent("stable_spam", 1) == {"all_reduce": (2 * weights, 2 * weights * 8)}
    # The squares of the columns of five hidden weights, five times: rows are cut.
    assert sent("sinkgd", 1) == {"all_reduce": (5 * 5, 5 * (12 + 19 + 12 + 12 + 3) * 8)}
    # Six hidden weights of which each process sends its part, and gets it back, in two rounds each.
    assert sent("swan", 1)["all_to_all"][0] == 2 * 3


@pytest.mark.thorough
def test_two_processes_do_what_one_does(tmp_path):
    spawn(everything, 2, tmp_path, str(tmp_path), SMALL)
    for case in SMALL:  # what two have saved, one loads
        model = net()
        optimizer = make(case, model)
        load(model, optimizer, str(tmp_path / case))
        train(model, optimizer, 1, start=STEPS)
        alone = net()
        train(alone, make(case, alone), STEPS + 1)
        assert distance(model, alone)[0] <= 1e-10, case
    dcp_to_torch_save(tmp_path / "galore", tmp_path / "one.pt")
    assert "optim" in torch.load(tmp_path / "one.pt", weights_only=True)


@pytest.mark.distributed
def test_replicas_agree_and_messages_are_counted(tmp_path):
    spawn(beside_them, 2, tmp_path)


@pytest.mark.distributed
def test_two_processes_do_what_one_does_by_the_other_methods(tmp_path):
    spawn(everything, 2, tmp_path, str(tmp_path), [c for c in CASES if c not in SMALL])


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("adamw", "sgd")])
def test_a_look_at_the_state_changes_nothing(case, dtype):
    """Before a load DCP takes a step with gradients and learning rate of zero.

    A first step without state has other weights in the kernel's call, and its threads other shares
    of a sum.
    """
    if (case, dtype) == ("adams", torch.bfloat16):
        dtype = torch.float64
    model = net(dtype)
    looked = copy.deepcopy(model)
    optimizer, other = make(case, model), make(case, looked)
    state = get_optimizer_state_dict(looked, other)["state"]
    train(model, optimizer, 1)
    names = {p: name for name, p in model.named_parameters()}
    for p, own in optimizer.state.items():  # the keys and shapes that a load needs are there
        shapes = {key: value.shape for key, value in own.items()}
        assert {k: v.shape for k, v in state[names[p]].items()} == shapes
    train(model, optimizer, STEPS, start=1)
    train(looked, other, STEPS + 1)
    assert distance(looked, model) == (0, "")
