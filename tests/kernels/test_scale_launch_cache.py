"""SCALE keeps its calls of the kernels: what changes between steps changes no result."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from needs import needs_cpu_kernels
from torch import nn

import optimzoo
from optimzoo.kernels import dispatch

pytestmark = needs_cpu_kernels
no_gpu = pytest.mark.skipif(dispatch.backend("cuda") is None, reason="torch finds no GPU")


def make(device="cpu"):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(11, 7),
            "hidden": nn.Linear(7, 5),
            "norm": nn.LayerNorm(5),
            "lm_head": nn.Linear(5, 11, bias=False),
        }
    )
    groups = optimzoo.param_groups(model.to(device))
    return model, optimzoo.SCALE(groups, lr=1e-2, vector_lr=1e-2, weight_decay=0.1)


def give_grads(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def replace_state(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def replace_entry(model, optimizer):
    state = optimizer.state[model["lm_head"].weight]
    state["exp_avg"] = state["exp_avg"] * 2


def move_weights(model, optimizer):
    for p in model.parameters():
        p.data = p.data.clone()


def halve_rates(model, optimizer):
    for group in optimizer.param_groups:
        group["lr"] *= 0.5


def change_options(model, optimizer):
    for group in optimizer.param_groups:
        group.update(norm="l2", momentum=0.5, maximize=True, weight_decay=0.0, eps=1e-3)


def part_ways(model, optimizer):
    for group, momentum in zip(optimizer.param_groups, (0.9, 0.8, 0.9, 0.5, 0.9), strict=False):
        group.update(momentum=momentum, weight_decay=momentum / 9, lr=0.03 * momentum)


def stop_momentum(model, optimizer):
    for group in optimizer.param_groups:
        group["momentum"] = 0.0


def sign(model, optimizer):
    for group in optimizer.param_groups:
        group["normalize"] = "sign"


def miss_gradients(model, optimizer):
    model["hidden"].weight.grad = None
    model["norm"].bias.grad = None


def cut_gradient(model, optimizer):
    wide = torch.randn(5, 14, generator=torch.Generator().manual_seed(9))
    model["hidden"].weight.grad = wide.to(model["hidden"].weight)[:, ::2]


def grow(model, optimizer):
    extra = nn.Parameter(torch.ones(3, 4).to(model["hidden"].weight))
    extra.grad = torch.arange(12.0).view(3, 4).to(extra)
    model["extra"] = nn.ParameterList([extra])
    optimizer.add_param_group({"params": [("extra", extra)], "role": "hidden"})


def shape_anew(model, optimizer):
    weight = model["hidden"].weight
    weight.data, weight.grad = weight.data.view(7, 5), weight.grad.view(7, 5)


CHANGES = [
    *(replace_state, replace_entry, move_weights, halve_rates, change_options, part_ways),
    *(stop_momentum, sign, miss_gradients, cut_gradient, grow, shape_anew),
]


def run(change, device, *, keep):
    model, optimizer = make(device)
    for step in range(6):
        give_grads(model, step)
        if step == 3:
            change(model, optimizer)
        if not keep:
            optimizer._launch_cache._launches = []
        optimizer.step()
    return [p.detach() for p in model.parameters()], optimizer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_kept_call_gives_the_same_bits(change, device):
    """On a GPU the norm's steps are counted on the CPU, and the embedding needs scratch."""
    kept, optimizer = run(change, device, keep=True)
    anew, _ = run(change, device, keep=False)
    assert len(optimizer._launch_cache._launches) == (3 if change is part_ways else 1)
    for one, other in zip(kept, anew, strict=True):
        assert torch.equal(one, other)


def test_it_is_used_where_nothing_has_changed():
    model, optimizer = make()
    for step in range(2):
        give_grads(model, step)
        optimizer.step()
    give_grads(model, 2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert len(optimizer._launch_cache._launches) == 1
    assert optimizer._launch_cache.replay(optimizer.state, optimizer.param_groups)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_counts_elsewhere_are_counted_there_and_moved_in_one_copy():
    counts = [torch.tensor(3.0), None, torch.zeros((), device="meta"), torch.tensor(5.0)]
    moved = dispatch.increment_steps(counts, torch.device("meta"))
    assert [c.item() for c in counts[::3]] == [4.0, 6.0]
    assert [m if m is None else m.device.type for m in moved] == ["meta", None, "meta", "meta"]
    assert moved[2] is counts[2] and moved[0].untyped_storage() is not moved[2].untyped_storage()
    beside = dispatch.increment_steps(counts[::3], torch.device("cpu"))
    assert [b.item() for b in beside] == [5.0, 7.0]


def test_copies_and_pickles_keep_no_call():
    model, optimizer = make()
    give_grads(model, 0)
    optimizer.step()
    assert optimizer._launch_cache._launches
    assert not copy.deepcopy(optimizer)._launch_cache._launches


def test_a_stochastic_step_is_not_kept():
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    groups = [{"params": [weight], "role": "hidden"}]
    optimizer = optimzoo.SCALE(groups, lr=1e-2, rounding="stochastic")
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert not optimizer._launch_cache._launches


@pytest.mark.parametrize("clip", [False, True], ids=["", "unscaled first"])
def test_a_gradient_scaler_leaves_unscaling_and_skipping_to_the_kernels(clip):
    """Its steps equal those with plain gradients, and a step with an infinity is none at all."""
    results = []
    for scaled in (True, False):
        model, _ = make()
        groups = optimzoo.param_groups(model)
        optimizer = optimzoo.SCALE(groups, lr=1e-2, vector_lr=1e-2, weight_decay=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        for step in range(5):
            give_grads(model, step)
            if step == 3:
                if not scaled:
                    continue
                model["norm"].weight.grad[0] = torch.inf
            for p in model.parameters():
                p.grad *= 64.0 if scaled else 1.0
            scaler.scale(torch.zeros(()))  # as a loss is scaled: makes the scale
            if clip:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(64.0 if scaled else None)
        counts = [state["step"].item() for state in optimizer.state.values() if "step" in state]
        assert counts == [4.0] * 3
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_a_scaler_unscales_by_itself_where_steps_may_be_eager():
    _, optimizer = make()
    assert not optimizer._step_supports_amp_scaling


def test_a_replayed_step_is_in_six_files():
    model, optimizer = make()
    for step in range(2):
        give_grads(model, step)
        optimizer.step()
    files = set()
    package = Path(optimzoo.__file__).parent

    def record(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(package):
            files.add(str(path.relative_to(package)))

    sys.setprofile(record)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    kernels = {f"kernels/{name}.py" for name in ("dispatch", "launch_cache", "native")}
    assert files == kernels | {"core/group_rates.py", "core/optimizer.py", "optimizers/scale.py"}
