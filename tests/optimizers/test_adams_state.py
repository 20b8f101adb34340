"""AdamS as an optimizer: its state, resuming, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from zoo_models import normal, reloaded

from optimzoo import param_groups
from optimzoo.memory import account
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.optimizers.adams import AdamS
from optimzoo.sparsity import nm_mask, unpack

OPTIONS = {"lr": 0.01, "l1": 0.1, "total_steps": 20}


def small():
    return Llama(LlamaConfig(97, 24, 40, 2, 2), seed=3)


def make(model, **hyper):
    groups = param_groups(model) if isinstance(model, nn.Module) else model
    return AdamS(groups, **{**OPTIONS, **hyper})


def train(model, optimizer, steps, *, first=0, autocast=False):
    """A new batch each step; the losses."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 97, (2, 17), generator=generator)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def one(start, **hyper):
    weight = nn.Parameter(start.clone())
    group = {"params": [weight], "param_names": ["w"], "role": "hidden"}
    own = {name: hyper.pop(name) for name in ("sparse",) if name in hyper}
    return weight, make([{**group, **own}], **hyper)


def exact(left, right):
    torch.testing.assert_close(left, right, rtol=0, atol=0)


def test_the_state_is_two_moments_and_a_bit_a_weight():
    model = small()
    optimizer = make(model)
    assert not optimizer.state
    train(model, optimizer, 1)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            masked = {"mask"} if group["role"] == "hidden" else set()
            assert set(state) == {"step", "exp_avg", "exp_avg_sq"} | masked
            assert all(isinstance(value, torch.Tensor) for value in state.values())
            if masked:
                assert state["mask"].dtype == torch.uint8
                assert state["mask"].numel() * 8 == p.numel()
                assert unpack(state["mask"], p.shape).sum() * 2 == p.numel()


def test_the_memory_account_counts_the_masks():
    model = small()
    optimizer = make(model)
    train(model, optimizer, 1)
    counted = account(model, make)
    held = [t for s in optimizer.state.values() for t in s.values()]
    assert counted.state_total == sum(t.numel() * t.element_size() for t in held)
    layers = [p for g in param_groups(model) if g["role"] == "hidden" for p in g["params"]]
    hidden = sum(p.numel() for p in layers)
    assert counted.state["hidden", "mask"] == hidden // 8  # a 32nd of one float32 moment


@pytest.mark.parametrize("at", [7, 10, 23])
def test_resumes_to_the_bit_within_and_after_the_ramp(at):
    """At 7 the mask is between two updates, at 10 on one, at 23 the ramp is over."""
    model = small()
    optimizer = make(model)
    train(model, optimizer, at)
    saved = reloaded({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    again = small()
    again.load_state_dict(saved["model"])
    other = make(again, lr=1.0, l1=5.0, total_steps=1000, mask_every=3)  # the checkpoint's win
    other.load_state_dict(saved["optimizer"])
    exact(other.state_dict()["state"], optimizer.state_dict()["state"])
    masks = [s["mask"] for s in other.state.values() if "mask" in s]
    assert {mask.dtype for mask in masks} == {torch.uint8}
    assert {g["total_steps"] for g in other.param_groups} == {20}
    assert train(again, other, 8, first=at) == train(model, optimizer, 8, first=at)
    exact(again.state_dict(), model.state_dict())
    exact(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_a_copy_goes_its_own_way():
    model = small()
    optimizer = make(model)
    train(model, optimizer, 3)
    twin, other = copy.deepcopy((model, optimizer))
    assert train(twin, other, 3, first=3) == train(model, optimizer, 3, first=3)
    exact(twin.state_dict(), model.state_dict())


@pytest.mark.parametrize("decay", ["l1", "l2"])
def test_the_multi_tensor_path_is_the_specification(decay):
    runs = []
    for foreach in (False, True):
        model = small().double()
        optimizer = make(model, foreach=foreach, decay=decay, weight_decay=0.1)
        train(model, optimizer, 25)
        runs.append((model.state_dict(), optimizer.state_dict()["state"]))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-10)


def test_the_second_moment_is_that_of_the_momentum_for_kept_weights_too():
    """So a first step is lr / (1 - beta1), not Adam's lr; the default betas make it 10 lr."""
    start = normal(6, 8)
    weight, optimizer = one(start, n=4)
    weight.grad = normal(6, 8, seed=1)
    optimizer.step()
    state = optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"], 0.1 * weight.grad)
    torch.testing.assert_close(state["exp_avg_sq"], 0.001 * state["exp_avg"] ** 2)
    moved = start - weight.detach()
    torch.testing.assert_close(moved, 10 * 0.01 * weight.grad.sign(), rtol=1e-4, atol=0)


def test_the_decay_pulls_masked_weights_to_zero_and_no_others():
    """Without gradients only the masked weights move, by lr a step at the end of the ramp."""
    start = normal(4, 8)
    weight, optimizer = one(start, total_steps=1, lr=1e-3)
    mask = nm_mask(start, 2, 4)
    for _ in range(5):
        weight.grad = torch.zeros(4, 8, dtype=torch.float64)
        optimizer.step()
    assert torch.equal(weight[mask], start[mask])
    assert torch.equal(unpack(optimizer.state[weight]["mask"], (4, 8)), mask)
    moved = (start - weight)[~mask] * start[~mask].sign()
    assert (moved > 0).all()
    assert (optimizer.state[weight]["exp_avg"] == 0).all()  # the decay never enters it


def test_the_mask_is_made_anew_every_so_many_steps_at_the_top():
    weight, optimizer = one(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), mask_every=3)
    seen = []
    for step in range(7):
        if step == 1:
            with torch.no_grad():
                weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        weight.grad = torch.zeros(1, 4)
        optimizer.step()
        seen.append(unpack(optimizer.state[weight]["mask"], (1, 4))[0, 0].item())
    assert seen == [True, True, True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_refused_wherever_they_come_from(dtype):
    message = rf"^w is {dtype}, whose rounding swallows the decay.*keep float32 weights"
    with pytest.raises(ValueError, match=message) as caught:
        one(normal(4, 8, dtype=dtype))
    assert "\n" not in str(caught.value)
    layer = nn.Linear(8, 4, bias=False)
    optimizer = make([{"params": [layer.weight], "param_names": ["w"], "role": "hidden"}])
    layer.to(dtype)  # after the optimizer was built
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    one(normal(4, 8, dtype=dtype), sparse=False)  # Adam's own weights may be of any type


def test_what_bfloat16_would_lose():
    """Why they are refused: the decay of one step is less than half of the last bit."""
    start = torch.full((1, 4), 1.0)
    weight, optimizer = one(start, lr=1e-3, total_steps=1)
    for _ in range(50):
        weight.grad = torch.zeros(1, 4)
        optimizer.step()
    assert weight[0, 2] < 0.97
    moved = start.bfloat16()
    for _ in range(50):
        moved -= 1e-3
    assert (moved == 1.0).all()


def test_autocast_trains_float32_weights():
    model = small()
    optimizer = make(model)
    losses = train(model, optimizer, 12, autocast=True)
    assert all(loss == loss for loss in losses)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_group_without_sparsity_takes_adam():
    start = normal(4, 7)  # no multiple of 4
    weight, optimizer = one(start, sparse=False)
    vector = nn.Parameter(start.clone())
    rest = make([{"params": [vector], "role": "head"}])
    for step in range(5):
        for p, o in ((weight, optimizer), (vector, rest)):
            p.grad = normal(4, 7, seed=step)
            o.step()
    exact(weight.detach(), vector.detach())
    assert "mask" not in optimizer.state[weight]
    model = small()
    groups = param_groups(model, {"mlp": {"sparse": False}})
    optimizer = make(groups)
    train(model, optimizer, 1)
    masked = [n for n, p in model.named_parameters() if "mask" in optimizer.state[p]]
    assert masked and not any("mlp" in name for name in masked)


@pytest.mark.parametrize("shape", [(4, 6), (8, 7), (4, 3, 2)])
def test_weights_without_groups_are_named(shape):
    inputs = 7 if shape == (8, 7) else 6
    message = rf"^w \[{', '.join(map(str, shape))}\]: {inputs} inputs are not a multiple of m=4; .*"
    with pytest.raises(ValueError, match=message + "sparse=False in its group") as caught:
        one(normal(*shape))
    assert "\n" not in str(caught.value)
    optimizer = make([nn.Parameter(normal(4, 4))])
    with pytest.raises(ValueError, match="parameter 0"):
        optimizer.add_param_group({"params": [nn.Parameter(normal(*shape))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"betas": (0.9, 1.0)}, "beta parameter at index 1: 1.0"),
        ({"eps": -1.0}, "Invalid eps value: -1.0"),
        ({"l1": -1.0}, "Invalid l1 value: -1.0"),
        ({"l1": float("nan")}, "Invalid l1 value: nan"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"total_steps": 0}, "Invalid total_steps: 0; it must be at least 1"),
        ({"mask_every": 0}, "Invalid mask_every: 0; it must be at least 1"),
        ({"n": 0}, "Invalid n:m: 0:4; n must be from 1 to m"),
        ({"n": 5}, "Invalid n:m: 5:4"),
        ({"decay": "l3"}, "Invalid decay: 'l3'; it must be one of l1, l2"),
    ],
)
def test_refuses_in_one_line(hyper, message):
    parameters = [nn.Parameter(normal(4, 4))]
    with pytest.raises(ValueError, match=message) as caught:
        make(parameters, **hyper)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        make([{"params": parameters, **hyper}])


def test_l1_and_total_steps_have_no_default():
    with pytest.raises(TypeError, match="l1"):
        AdamS([nn.Parameter(normal(4, 4))])


def test_a_state_of_adam_is_no_start_for_the_ramp():
    weight, optimizer = one(normal(4, 8))
    adam = torch.optim.Adam([weight], lr=0.1)
    weight.grad = normal(4, 8)
    for _ in range(3):
        adam.step()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": adam.state_dict()["state"]})
    with pytest.raises(RuntimeError, match="counts 3 steps without a mask; the ramp") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)


def test_empty_and_missing_gradients_are_left_alone():
    empty, idle = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(normal(4, 4))
    wide = nn.Parameter(torch.zeros(4, 0))
    optimizer = make([empty, idle, wide])
    empty.grad, wide.grad = torch.zeros(0, 4), torch.zeros(4, 0)
    before = idle.detach().clone()
    optimizer.step()
    exact(idle.detach(), before)
    assert not optimizer.state.get(idle)


def test_a_closure_is_called_once():
    weight, optimizer = one(normal(4, 8))
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == calls[0]
    assert len(calls) == 1
