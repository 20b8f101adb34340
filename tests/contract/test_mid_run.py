"""Options, dtypes and layouts that change what a step reads, in mid-run or from the first step."""

import copy

import pytest
import torch
from torch import nn

from optimzoo import create_optimizer, param_groups, release

RANKED = ("galore", "fira", "natural_galore", "apollo")


def hidden(*shape, dtype=torch.float32, seed=0):
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return nn.Parameter(draw.to(dtype))


def stepped(name, weight, grads, **options):
    optimizer = create_optimizer(name, [{"params": [weight], "role": "hidden"}], lr=0.01, **options)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return optimizer


def drawn(shape, steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(steps)
    ]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", ["muon", "rmnp"])
def test_a_transposed_convolution_is_stepped_along_its_gradient(name, fused):
    model = nn.ConvTranspose2d(6, 10, 3, bias=False)
    groups = param_groups(model, {"weight": {"role": "hidden", "transposed": True}})
    optimizer = create_optimizer(name, groups, lr=0.01, fused=fused)
    before = model.weight.detach().clone()
    [grad] = drawn(model.weight.shape, 1)
    model.weight.grad = grad.clone()
    optimizer.step()
    step = before - model.weight.detach()
    assert torch.cosine_similarity(step.flatten(), grad.flatten(), 0) > 0.8


@pytest.mark.parametrize("name", RANKED)
def test_another_rank_in_mid_run_is_an_error_that_names_it(name):
    weight = hidden(24, 16)
    optimizer = stepped(name, weight, drawn((24, 16), 2), rank=4, update_proj_gap=2)
    optimizer.param_groups[0]["rank"] = 3
    with pytest.raises(ValueError, match=r"rank=3.*a new (rank takes a new )?optimizer"):
        for grad in drawn((24, 16), 2):
            weight.grad = grad
            optimizer.step()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", [*RANKED, "stable_spam", "muon", "rmnp"])
def test_moments_have_the_dtype_of_a_wider_weight(name, foreach):
    """With gradients of 16 bits for weights of 32, a second moment in 16 bits would stand still."""
    if not hasattr(nn.Parameter(torch.zeros(1)), "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    weights = [hidden(16, 8, seed=i) for i in range(2)]
    for weight in weights:
        weight.grad_dtype = torch.bfloat16
        weight.grad = drawn((16, 8), 1, torch.bfloat16)[0]
    options = {"rank": 4} if name in RANKED else {}
    groups = [{"params": weights, "role": "hidden"}]
    optimizer = create_optimizer(name, groups, lr=0.01, foreach=foreach, **options)
    optimizer.step()
    for key, value in optimizer.state[weights[0]].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert value.dtype == torch.float32, key


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("saved", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("scale", {"spectral_norm": True}),
        ("sinkgd", {"spectral_norm": True}),
        ("muon", {"other": "adafactor"}),
        ("adams", {"l1": 1e-3, "total_steps": 10}),
        ("natural_galore", {"rank": 4}),
        ("stable_spam", {}),
    ],
)
def test_a_state_of_a_model_of_another_dtype_goes_on(name, options, saved, foreach):
    def made(dtype):
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "up": nn.Linear(8, 24, bias=False)})
        model.to(dtype)
        extra = {} if name == "scale" else {"foreach": foreach}
        extra |= {"rounding": "stochastic"} if name == "adams" and dtype == torch.bfloat16 else {}
        return model, create_optimizer(name, model, lr=0.01, **options, **extra)

    def train(model, optimizer, steps):
        for step in range(steps):
            for i, p in enumerate(model.parameters()):
                p.grad = drawn(p.shape, 1 + step + i, p.dtype)[-1]
            optimizer.step()

    old, before = made(saved)
    train(old, before, 3)
    new, after = made(torch.float32)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    for group in after.param_groups:
        group["rounding"] = "nearest"
    train(new, after, 2)
    assert all(p.isfinite().all() for p in new.parameters())


def test_averages_of_float64_do_not_reach_the_kernels():
    weight = hidden(16, 8)
    optimizer = stepped("stable_spam", weight, drawn((16, 8), 2))
    twin = nn.Parameter(weight.detach().clone())
    other = create_optimizer("stable_spam", [{"params": [twin], "role": "hidden"}], lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key in ("max_avg", "norm_avg", "norm_avg_sq"):
        other.state[twin][key] = other.state[twin][key].double()
    for p, o in ((weight, optimizer), (twin, other)):
        p.grad = drawn((16, 8), 1)[0]
        o.step()
    torch.testing.assert_close(twin, weight)


@pytest.mark.parametrize("size", [1e-7, 1e-6, 1.0, 1e5])
def test_newton_schulz_in_float16_does_not_depend_on_the_gradient_s_size(size):
    [grad] = drawn((24, 16), 1)
    steps = []
    for factor in (1.0, size):
        weight = hidden(24, 16)
        before = weight.detach().clone()
        stepped("muon", weight, [grad * factor], ns_dtype="float16")
        steps.append(before - weight.detach())
    torch.testing.assert_close(steps[1], steps[0], rtol=0.02, atol=2e-4)


def test_rmnp_has_its_own_rate_for_the_others_unless_one_is_given():
    model = nn.ModuleDict({"embed": nn.Embedding(11, 8), "up": nn.Linear(8, 24)})
    rates = []
    for options in ({}, {"other_lr": None}):
        optimizer = create_optimizer("rmnp", model, **options)
        rates.append({group["role"]: group["lr"] for group in optimizer.param_groups})
    assert rates[0] == rates[1] and rates[0]["vector"] == 1e-3


@pytest.mark.parametrize("name", ["galore", "fira", "natural_galore"])
def test_a_subspace_stays_where_steps_become_capturable(name):
    weight = hidden(24, 16)
    optimizer = stepped(name, weight, drawn((24, 16), 3), rank=4, update_proj_gap=100)
    before = optimizer.state[weight]["projector_right"].clone()
    group = optimizer.param_groups[0]
    group["capturable"] = True
    for grad in drawn((24, 16), 2):
        weight.grad = grad
        optimizer.step()
    assert torch.equal(optimizer.state[weight]["projector_right"], before)
    assert group["calls"] == int(optimizer.state[weight]["step"]) == 5


def test_a_released_step_renews_its_subspace_when_an_unreleased_one_does():
    """The round's last call has no gradients left: its steps are counted already."""
    runs = []
    for released in (False, True):
        layer = nn.Linear(16, 24, bias=False)
        layer.weight.data = hidden(24, 16).data
        groups = [{"params": [layer.weight], "role": "hidden"}]
        options = {"rank": 4, "update_proj_gap": 3, "capturable": True}
        optimizer = create_optimizer("galore", groups, lr=0.01, **options)
        if released:
            release(optimizer)
        for x in drawn((8, 16), 8):
            layer(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((layer.weight.detach(), optimizer.param_groups[0]["calls"]))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1] == 8
