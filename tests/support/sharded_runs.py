"""Runs of the zoo in several processes, for the tests of sharding: models, methods, comparison."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from toy import TOY, toy

from optimzoo import param_groups
from optimzoo.registry import get_info

# What a name of the registry is run with: refreshes, resets and masks fall within the steps.
HYPER = {name: toy(name, rank=3, gap=7, weight_decay=0.1) for name in TOY}
VARIANTS = {
    "scale row": ("scale", {"normalize": "row"}),
    "scale nesterov": ("scale", {"nesterov": True, "normalize": "row"}),
    "scale sign": ("scale", {"normalize": "sign"}),
    "scale spectral": ("scale", {"normalize": "spectral"}),
    "scale cautious": ("scale", {"weight_decay_style": "cautious"}),
    "galore cautious": ("galore", {"weight_decay_style": "cautious"}),
    "muon cautious": ("muon", {"weight_decay_style": "cautious"}),
    "galore both": ("galore", {"side": "both"}),
    "galore power": ("galore", {"projector": "power", "rotate": False}),
    "natural_galore both": ("natural_galore", {"side": "both", "relative_damping": True}),
    "sinkgd other scale": ("sinkgd", {"other": "scale"}),
    "sinkgd spectral norm": ("sinkgd", {"lr": 0.05, "spectral_norm": True}),
    "muon other adafactor": ("muon", {"other": "adafactor"}),
    "muon low rank": ("muon", {"momentum_rank": 2}),
    "natural_galore int8": ("natural_galore", {"history_dtype": "int8"}),
    "stable_spam together": ("stable_spam", {"foreach": True}),
    "apollo tensor": ("apollo", {"scale_type": "tensor", "scale_front": True}),
}
CASES = {**{name: (name, {}) for name in HYPER}, **VARIANTS}
# The rest of torch's, but for those that refuse sharded weights (REFUSING).
TORCH = {
    "adam": {"lr": 0.01, "amsgrad": True},
    "nadam": {"lr": 0.01},
    "radam": {"lr": 0.01},
    "adamax": {"lr": 0.01},
    "adagrad": {"lr": 0.02},
    "adadelta": {"lr": 0.5},
    "rmsprop": {"lr": 0.005, "momentum": 0.9},
    "asgd": {"lr": 0.1, "t0": 5},
}
REFUSING = ["adafactor", "rprop"]


class Net(nn.Module):
    """The four roles; weights that are tall, wide and square, of rows that no cut divides."""

    def __init__(self, vocab=13, width=12, inner=19):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.tall = nn.Linear(width, inner)
        self.wide = nn.Linear(inner, width, bias=False)
        self.square = nn.Linear(width, width, bias=False)
        self.few = nn.Linear(width, 3, bias=False)
        self.back = nn.Linear(3, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.wide(torch.tanh(self.tall(x)))
        x = x + self.back(torch.tanh(self.few(self.square(x))))
        return self.lm_head(self.norm(x))


def net(dtype=torch.float64, **shape):
    torch.manual_seed(0)
    return Net(**shape).to(dtype)


def make(case, model, **options):
    name, extra = CASES.get(case, (case, {}))
    hyper = {**{**HYPER, **TORCH}.get(name, {}), **extra, **options}
    model = getattr(model, "module", model)
    overrides = {}
    if name == "adams":  # four of its inputs make a group
        overrides = {r"(wide|back)\.": {"role": "hidden", "sparse": False}}
    groups = [dict(group) for group in param_groups(model, overrides)]
    return get_info(name).make(groups, **hyper)


def loss_of(model, step, vocab=13, rows=8):
    """Of a batch of one step: the same batch in every process, so that the gradients are too."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, vocab, (rows, 6), generator=generator)
    logits = model(ids[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten())


def train(model, optimizer, steps, start=0, **batch):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step, **batch).backward()
        optimizer.step()


def shard(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distance(model, expected):
    """The largest difference of a weight, as a part of the largest entry of that weight."""
    worst, where = 0.0, ""
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p, q = whole(p.detach()), whole(q.detach())
        off = (p - q).abs().max() / q.abs().max()
        if not off.item() <= worst:
            worst, where = off.item(), name
    return worst, where


def state_dicts(model, optimizer):
    return {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
    }


def save(model, optimizer, folder):
    dcp.save(state_dicts(model, optimizer), checkpoint_id=folder)


def load(model, optimizer, folder):
    held = state_dicts(model, optimizer)
    dcp.load(held, checkpoint_id=folder)
    put(model, optimizer, held)


def put(model, optimizer, held, options=None):
    set_model_state_dict(model, held["model"])
    set_optimizer_state_dict(model, optimizer, held["optim"], options=options)


def whole_state(model, optimizer):
    """Of each parameter, as one process would have it."""
    return {
        name: {k: torch.as_tensor(whole(v)).clone() for k, v in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }


def assert_same_state(model, optimizer, other_model, other):
    first, second = whole_state(model, optimizer), whole_state(other_model, other)
    for name, own in first.items():
        assert own.keys() == second[name].keys(), name
        for key, value in own.items():
            assert value.dtype == second[name][key].dtype, (name, key)
            assert torch.equal(value, second[name][key]), (name, key)


def _entry(rank, world, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        function(rank, world, *args)
        dist.barrier()  # none leaves while another may still talk to it
    finally:
        dist.destroy_process_group()


def spawn(function, world, folder, *args):
    """Run ``function(rank, world, *args)`` in ``world`` processes of one gloo group."""
    folder.mkdir(parents=True, exist_ok=True)
    mp.spawn(_entry, (world, str(folder), function, args), nprocs=world)
