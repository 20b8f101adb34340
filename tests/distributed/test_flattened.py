"""Weights that FSDP1 or DeepSpeed has flattened, emptied or cut: refused, with a way out."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from optimizer_db import Tiny
from registered import NAMES, create
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from optimzoo import SCALE, StableSPAM, create_optimizer, describe, param_groups, registry

OURS = [name for name in NAMES if registry.get_info(name).make.__module__.startswith("optimzoo")]
WAY_OUT = "torch.distributed.fsdp.fully_shard (FSDP2)"

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo"),
    pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning"),
]


def refusal(function):
    """The one line with which ``function`` refuses."""
    with pytest.raises(ValueError) as caught:
        function()
    line = str(caught.value)
    assert "\n" not in line and WAY_OUT in line, line
    return line


def wrapped(use_orig_params):
    return FullyShardedDataParallel(
        Tiny(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
    )


def refuse_fsdp1():
    """All that must be refused of models wrapped by FSDP1, in this process group."""
    for use_orig_params in (False, True):
        model = wrapped(use_orig_params)
        assert "FullyShardedDataParallel" in refusal(lambda model=model: param_groups(model))
        assert "FullyShardedDataParallel" in refusal(lambda model=model: describe(model))
        holder = nn.ModuleDict({"body": model})
        assert "body" in refusal(lambda holder=holder: param_groups(holder))
        for name in NAMES:
            for params in (model, list(model.parameters()), list(model.named_parameters())):
                line = refusal(lambda name=name, params=params: create(name, params))
                assert "FSDP1" in line, (name, line)
        for name in OURS:
            for role in ("hidden", "vector", None):
                group = {"params": list(model.parameters()), "role": role}
                line = refusal(lambda name=name, group=group: create(name, [group]))
                assert "FSDP1" in line, (name, line)
    model = Tiny()  # wrapped after the optimizer was built: its weights are no longer the model's
    optimizer = SCALE(param_groups(model), lr=0.1)
    FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    assert "FSDP1" in refusal(optimizer.step)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meet", world_size=1, rank=0)
    yield
    dist.destroy_process_group()


def test_fsdp1_is_refused_in_one_process(alone):
    refuse_fsdp1()


def of_two(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=2, rank=rank)
    refuse_fsdp1()
    dist.destroy_process_group()


@pytest.mark.distributed
def test_fsdp1_is_refused_in_two_processes(tmp_path):
    mp.spawn(of_two, (str(tmp_path),), nprocs=2)


def zero_init(model):
    """What DeepSpeed's ``zero.Init`` leaves of each parameter."""
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape = number, p.shape
        p.data = torch.empty(0)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_partitions_of_zero_init_are_refused(name):
    model = zero_init(Tiny())
    first = next(n for n, _ in model.named_parameters())
    line = refusal(lambda: param_groups(model))
    assert "zero.Init" in line and first in line
    for params in (model, model.named_parameters()):
        assert first in refusal(lambda params=params: create(name, params))
    assert "zero.Init" in refusal(lambda: create(name, model.parameters()))


def test_what_is_partitioned_after_the_optimizer_was_built_is_refused_at_the_step():
    for make in (SCALE, StableSPAM):
        model = Tiny()
        optimizer = make(param_groups(model), lr=0.1)
        zero_init(model)
        assert "zero.Init" in refusal(optimizer.step)


@pytest.mark.parametrize("name", OURS)
def test_a_flat_buffer_put_into_a_group_is_refused_at_the_step(name):
    """DeepSpeed's stages 1 and 2 replace the parameters of a group by one flat part of them."""
    optimizer = create(name, Tiny())
    group = next(g for g in optimizer.param_groups if g["role"] == "hidden")
    flat = nn.Parameter(torch.zeros(sum(p.numel() for p in group["params"])))
    flat.grad = torch.zeros_like(flat)
    group["params"][:] = [flat]
    line = refusal(optimizer.step)
    assert re.search(rf"\({flat.numel()},\)", line) and "hidden" in line


@pytest.mark.parametrize("shape", [(12,), (0,)])
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(3, 4), lambda: nn.Embedding(4, 3), lambda: nn.Conv1d(3, 2, 2)]
)
def test_the_weight_of_a_layer_has_two_dimensions(layer, shape):
    model = nn.Sequential(nn.Linear(3, 3), layer())
    model[1].weight = nn.Parameter(torch.zeros(shape))
    line = refusal(lambda: param_groups(model))
    assert line.startswith("1.weight") and str(shape) in line and type(model[1]).__name__ in line
    model[1].weight.requires_grad_(False)  # what is not trained may be stored as it likes
    assert len(param_groups(model)) == 2


def test_plain_empty_weights_stay_what_torch_makes_of_them():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(0, 3))
    model.nothing = nn.Parameter(torch.zeros(0))
    roles = {n: g["role"] for g in param_groups(model) for n in g["param_names"]}
    assert roles["1.weight"] in ("hidden", "head") and roles["nothing"] == "vector"
    for name in ("scale", "muon", "adamw"):
        optimizer = create_optimizer(
            name, [nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(2))]
        )
        optimizer.step()
