"""Updates over their spectral norm: `spectral_norm=True`; its steps are in `test_zoo_fidelity`."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from optimzoo import SCALE, SinkGD, param_groups
from optimzoo.core.spectral_norm import KEY, divide_by_spectral_norm_
from optimzoo.memory import account
from optimzoo.optimizers.sinkgd import sinkhorn

SHAPES = [(40, 24), (24, 40), (33, 33), (1, 9), (9, 1), (1, 1), (256, 64)]


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def largest(x):
    return torch.linalg.matrix_norm(x, 2)


def hidden(*shape, dtype=torch.float64, **options):
    weight = nn.Parameter(normal(*shape, dtype=dtype))
    group = {"params": [weight], "role": "hidden"}
    group |= {key: options.pop(key) for key in ("transposed", "stacked") if key in options}
    return weight, SinkGD([group], lr=1.0, alpha=1.0, spectral_norm=True, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_estimate_tends_to_the_norm_from_below(shape):
    x, state = normal(*shape), {}
    first = largest(divide_by_spectral_norm_(x.clone(), state))
    assert 1 - 1e-12 <= first < 1.5
    for _ in range(300):
        pinned = divide_by_spectral_norm_(x.clone(), state)
    assert_close(largest(pinned), torch.ones((), dtype=x.dtype), rtol=1e-6, atol=0)
    assert_close(pinned, x / largest(x), rtol=1e-6, atol=1e-9)
    assert state[KEY].shape == (min(shape),)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_rate_is_one_spectral_norm_at_every_width(shape):
    """Of gradients that turn slowly, as those of training do, and are mostly noise."""
    weight, optimizer = hidden(*shape)
    steady = normal(*shape, seed=1)
    for step in range(30):
        before = weight.detach().clone()
        weight.grad = steady + 0.5 * normal(*shape, seed=2 + step)
        optimizer.step()
    assert 1 - 1e-9 <= largest(weight.detach() - before) < 1.25


def test_a_vector_to_which_the_matrix_is_strange_makes_no_long_step():
    x = torch.zeros(5, 8, dtype=torch.float64)
    x[0, 0] = 3.0
    state = {KEY: torch.eye(5, dtype=torch.float64)[1].clone()}
    x[1, 1] = 1e-9
    update = divide_by_spectral_norm_(x, state)
    assert_close(largest(update), torch.tensor(5.0**0.5, dtype=torch.float64))


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_a_gradient_of_zeros_or_spoiled_leaves_the_vector_as_it_was(bad):
    weight, optimizer = hidden(6, 10)
    weight.grad = normal(6, 10, seed=1)
    optimizer.step()
    vector, before = optimizer.state[weight][KEY].clone(), weight.detach().clone()
    weight.grad = torch.full((6, 10), bad, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(optimizer.state[weight][KEY], vector)
    if bad == 0:
        assert torch.equal(weight, before)


def test_transposed_weights_and_stacks_are_their_matrices():
    weight, optimizer = hidden(12, 20)
    turned, other = hidden(20, 12, transposed=True)
    stack, third = hidden(3, 12, 20, stacked=True)
    with torch.no_grad():
        turned.copy_(weight.mT)
        stack.copy_(weight.expand(3, -1, -1))
    for step in range(5):
        weight.grad = normal(12, 20, seed=step)
        turned.grad, stack.grad = weight.grad.mT.contiguous(), weight.grad.expand(3, -1, -1).clone()
        for own in (optimizer, other, third):
            own.step()
    assert_close(turned.mT, weight)
    assert_close(stack, weight.expand(3, -1, -1).clone())
    assert third.state[stack][KEY].shape == (3, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_run_to_the_bit(dtype):
    runs = []
    for resumed in (False, True):
        weight, optimizer = hidden(24, 40, dtype=dtype)
        for step in range(8):
            if resumed and step == 4:
                saved = copy.deepcopy(optimizer.state_dict())
                value = weight.detach().clone()
                weight, optimizer = hidden(24, 40, dtype=dtype)
                weight.data.copy_(value)
                optimizer.load_state_dict(saved)
            weight.grad = normal(24, 40, seed=step, dtype=dtype)
            optimizer.step()
        runs.append((weight.detach(), optimizer.state[weight][KEY]))
    assert runs[0][1].dtype == torch.float32
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_weights_of_bfloat16_are_normalised_in_float32():
    weight, optimizer = hidden(24, 40, dtype=torch.bfloat16)
    before, state = weight.detach().float(), {}
    weight.grad = normal(24, 40, seed=1, dtype=torch.bfloat16)
    optimizer.step()
    update = divide_by_spectral_norm_(sinkhorn(weight.grad, 5), state)
    assert torch.equal(weight, (before - update).bfloat16())


def test_account_counts_its_vector():
    model = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 50), nn.Linear(50, 7))
    plain, pinned = (account(model, "sinkgd", spectral_norm=on) for on in (False, True))
    assert pinned.state - plain.state == {("hidden", KEY): 4 * (20 + 20 + 7)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("foreach", [False, True])
def test_scale_divides_hidden_weights_alone(shape, foreach):
    weights = [nn.Parameter(normal(*shape, seed=i)) for i in range(3)]
    groups = [
        {"params": [p], "role": role}
        for p, role in zip(weights, ("hidden", "embedding", "head"), strict=True)
    ]
    optimizer = SCALE(groups, lr=1.0, spectral_norm=True, foreach=foreach)
    for step in range(20):
        before = weights[0].detach().clone()
        for i, p in enumerate(weights):
            p.grad = normal(*shape, seed=7 + i) + 0.5 * normal(*shape, seed=20 * i + step)
        optimizer.step()
    assert 1 - 1e-9 <= largest(weights[0].detach() - before) < 1.25
    assert [KEY in optimizer.state[p] for p in weights] == [True, False, False]


def test_scale_takes_the_kernels_for_the_other_roles_and_resumes_to_the_bit():
    runs = []
    for resumed in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleDict({"embed": nn.Embedding(11, 6), "mid": nn.Linear(6, 6)})
        optimizer = SCALE(param_groups(model), spectral_norm=True)
        for step in range(6):
            if resumed and step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = SCALE(param_groups(model), spectral_norm=True)
                optimizer.load_state_dict(saved)
            for i, p in enumerate(model.parameters()):
                p.grad = normal(*p.shape, seed=10 * step + i, dtype=torch.float32)
            optimizer.step()
        runs.append([*model.parameters(), optimizer.state[model["mid"].weight][KEY]])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_scale_takes_the_option_on_after_a_fused_step():
    """The cached launches of the kernels are of groups without it."""
    weight = nn.Parameter(normal(12, 20, dtype=torch.float32))
    optimizer = SCALE([{"params": [weight], "role": "hidden"}], lr=1.0)
    for step in range(4):
        optimizer.param_groups[0]["spectral_norm"] = step > 1
        before = weight.detach().clone()
        weight.grad = normal(12, 20, seed=step, dtype=torch.float32)
        optimizer.step()
    assert largest(weight.detach() - before) < 1.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalize": "spectral"}, "normalize='spectral' needs no spectral_norm=True"),
        ({"fused": True}, "spectral_norm=True excludes fused=True"),
        (
            {"differentiable": True},
            "spectral_norm=True excludes fused=True and differentiable=True",
        ),
    ],
    ids=str,
)
def test_scale_refuses_what_does_not_go_with_it(options, message):
    with pytest.raises(ValueError, match=message):
        SCALE([nn.Parameter(torch.ones(2, 2))], spectral_norm=True, **options)
