"""What a step sends beyond FSDP's own traffic, seen by torch and not by our own count."""

import torch
import torch.distributed as dist
from sharded_runs import HYPER, Net, make, net, shard, spawn, train
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._pytree import tree_leaves

WIDTH, INNER, RANK = 12, 19, 3
SUM = "c10d::allreduce_"
LOW_RANK = ["galore", "natural_galore", "fira", "apollo", "apollo_mini"]


class Sent(CommDebugMode):
    """Lists each collective, with the elements of the tensors that a process hands in."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.get_total_counts()
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            sizes = [t.numel() for t in tree_leaves(args) if isinstance(t, Tensor)]
            self.messages.append((func._schema.name, *sizes))
        return made


class Positions(Net):
    """Two embeddings."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(6, WIDTH)

    def forward(self, ids):
        return self.lm_head(self.norm(self.embed(ids) + self.positions.weight[: ids.shape[1]]))


def positions():
    torch.manual_seed(0)
    return Positions().double()


def large():
    """Its smallest hidden weight has 48 x 48 elements; the two with three rows do not take part."""
    model = net(torch.float32, width=48, inner=64)
    for linear in (model.few, model.back):
        linear.weight.requires_grad_(False)
    return model


def beyond_fsdp(build, case, before=1, **options):
    """What a whole step sends that SGD's does not, with forward and backward, after some steps."""
    sent = []
    for name, extra in (("sgd", {}), (case, options)):
        model = shard(build())
        optimizer = make(name, model, **extra)
        train(model, optimizer, before)
        with Sent() as seen:
            train(model, optimizer, 1, start=before)
        sent.append(seen.messages)
    plain, own = sent
    assert plain and SUM not in [name for name, *_ in plain], plain
    assert own[: len(plain)] == plain, own  # FSDP's come first
    return own[len(plain) :]


def what_is_sent(rank, world):
    assert beyond_fsdp(net, "scale") == [(SUM, WIDTH)]
    assert beyond_fsdp(positions, "scale") == [(SUM, 2 * WIDTH)]  # one message for both
    for case in ("scale sign", "adams", "adamw"):
        assert beyond_fsdp(net, case) == [], case
    # FSDP2 cuts rows: sums are needed where rows are projected, in two of the weights.
    partial = [(SUM, RANK * INNER), (SUM, RANK * WIDTH)]
    for before in (1, 6):  # a refresh is followed by six steps without
        assert beyond_fsdp(net, "galore", before) == partial, before
        assert beyond_fsdp(net, "galore", before, side="right") == [], before


def refreshed(rank, world):
    """Sketches, and never a weight."""
    for case in LOW_RANK:
        own = beyond_fsdp(large, case, before=7)
        quiet = beyond_fsdp(large, case, before=6)
        assert {name for name, _ in own} == {SUM}, (case, own)
        assert max(size for _, size in own) < 48 * 48, (case, own)
        assert sum(size for _, size in own) >= sum(size for _, size in quiet), case


def alike(rank, world):
    """The whole tensors of the state, bases among them, are the same on all processes, bitwise."""
    for case in HYPER:
        model = shard(net())
        optimizer = make(case, model)
        train(model, optimizer, 16)
        for name, p in model.named_parameters():
            for key, value in optimizer.state[p].items():
                if hasattr(value, "device_mesh"):
                    continue
                mine = torch.as_tensor(value).contiguous()
                others = [torch.empty_like(mine) for _ in range(world)]
                dist.all_gather(others, mine)
                assert all(torch.equal(other, mine) for other in others), (case, name, key)


def everything(rank, world):
    what_is_sent(rank, world)
    refreshed(rank, world)
    alike(rank, world)


def test_scale_sends_d_floats_and_galore_sums_and_sketches(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OPTIMZOO_TRAFFIC", raising=False)
    spawn(everything, 4, tmp_path)
    assert capfd.readouterr().out == ""  # nobody has asked


def three_steps(rank, world):
    model = shard(net())
    train(model, make("scale", model), 3)


def test_the_debug_flag_prints_what_each_step_sends(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPTIMZOO_TRAFFIC", "1")
    spawn(three_steps, 2, tmp_path)
    assert capfd.readouterr().out.splitlines() == ["SCALE: all_reduce 1 x, 96 bytes"] * 3
