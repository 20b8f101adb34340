"""The momentum reset: any optimizer, in place, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from reference.lowrank_numpy import adam_with_resets
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from optimzoo import create_optimizer
from optimzoo.lowrank import MomentumReset

# name, options, the state that is zeroed, the counts, what stays
TABLE = [
    ("sgd", {"momentum": 0.9}, {"momentum_buffer"}, set(), set()),
    ("adamw", {"amsgrad": True}, {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}, {"step"}, set()),
    ("adam", {"foreach": True}, {"exp_avg", "exp_avg_sq"}, {"step"}, set()),
    ("adamw", {"fused": True}, {"exp_avg", "exp_avg_sq"}, {"step"}, set()),
    ("nadam", {}, {"exp_avg", "exp_avg_sq"}, {"step", "mu_product"}, set()),
    ("radam", {}, {"exp_avg", "exp_avg_sq"}, {"step"}, set()),
    ("adamax", {}, {"exp_avg", "exp_inf"}, {"step"}, set()),
    ("adagrad", {}, {"sum"}, {"step"}, set()),
    ("adadelta", {}, {"square_avg", "acc_delta"}, {"step"}, set()),
    (
        "rmsprop",
        {"momentum": 0.9, "centered": True},
        {"square_avg", "momentum_buffer", "grad_avg"},
        {"step"},
        set(),
    ),
    ("adafactor", {}, {"row_var", "col_var", "variance"}, {"step"}, set()),
    ("scale", {}, {"exp_avg", "exp_avg_sq"}, {"step"}, set()),
    ("swan", {}, {"exp_avg", "exp_avg_sq"}, {"step"}, set()),
    ("sinkgd", {}, {"exp_avg", "exp_avg_sq"}, {"step"}, set()),
    ("rmnp", {}, {"momentum_buffer", "exp_avg", "exp_avg_sq"}, {"step"}, set()),
    (
        "muon",
        {"momentum_rank": 2},
        {"momentum_left", "exp_avg", "exp_avg_sq"},
        {"step"},
        {"momentum_right"},
    ),
    ("galore", {"rank": 2}, {"exp_avg", "exp_avg_sq"}, {"step"}, {"projector_left"}),
    ("fira", {"rank": 2}, {"exp_avg", "exp_avg_sq"}, {"step"}, {"projector_left", "update_norm"}),
    ("apollo", {"rank": 2}, {"exp_avg", "exp_avg_sq"}, {"step"}, {"projector_seed", "update_norm"}),
    (
        "natural_galore",
        {"rank": 2, "history": 3},
        {"exp_avg", "exp_avg_sq", "history", "gram"},
        {"step"},
        {"projector_left"},
    ),
    (
        "stable_spam",
        {},
        {"exp_avg", "exp_avg_sq", "max_avg", "norm_avg", "norm_avg_sq"},
        {"step", "moment_step"},
        set(),
    ),
]
IDS = [f"{row[0]}{i}" for i, row in enumerate(TABLE)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4), nn.Linear(4, 9))


def train(net, optimizer, steps, after=None, start=0):
    for i in range(start, start + steps):
        generator = torch.Generator().manual_seed(i)
        x = torch.randint(0, 9, (5,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x.roll(1)).backward()
        optimizer.step()
        if after is not None:
            after(i)


@pytest.mark.parametrize(("name", "options", "moments", "counts", "kept"), TABLE, ids=IDS)
@pytest.mark.parametrize("what", ["all", "moments"])
def test_any_optimizer_is_reset_where_its_state_is(name, options, moments, counts, kept, what):
    net = network()
    optimizer = create_optimizer(name, net, lr=1e-3, **options)
    reset = MomentumReset(optimizer, every=3, what=what)
    train(net, optimizer, 2, lambda _: reset.step())
    states = list(optimizer.state.values())
    assert {k for s in states for k in s} == moments | counts | kept
    train(net, optimizer, 1)
    held = [dict(s) for s in states]
    before = copy.deepcopy(states)
    assert reset.step()
    for state, old, first in zip(optimizer.state.values(), before, held, strict=True):
        for key, value in state.items():
            assert not isinstance(value, torch.Tensor) or value is first[key], key
            if key in moments:
                assert not value.any() and old[key].isfinite().all()
            elif key in counts and what == "all":
                assert float(value) == (1.0 if key == "mu_product" else 0.0)
            else:
                torch.testing.assert_close(value, old[key], rtol=0, atol=0)
    assert any(old[key].any() for old in before for key in moments & old.keys())
    train(net, optimizer, 2, lambda _: reset.step(), start=3)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("what", ["all", "moments"])
def test_adam_with_resets_is_the_numpy_transcription(what):
    rng = np.random.default_rng(0)
    start, grads = rng.normal(size=(5, 3)), [rng.normal(size=(5, 3)) for _ in range(20)]
    wanted = adam_with_resets(start, grads, 0.01, every=6, what=what)
    p = nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.Adam([p], lr=0.01)
    reset = MomentumReset(optimizer, every=6, what=what)
    for grad, value in zip(grads, wanted, strict=True):
        p.grad = torch.tensor(grad)
        optimizer.step()
        reset.step()
        np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-12)


def test_after_all_it_goes_on_as_a_new_optimizer_would():
    """The authors' code builds the optimizer anew."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    reset = MomentumReset(optimizer, every=4)
    train(net, optimizer, 4, lambda _: reset.step())
    other = copy.deepcopy(net)
    train(other, torch.optim.AdamW(other.parameters(), lr=1e-2), 3, start=4)
    train(net, optimizer, 3, start=4)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_only_what_is_named():
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    weight = net[1].weight
    train(net, optimizer, 3)
    before = copy.deepcopy(optimizer.state[weight])
    MomentumReset(optimizer, what=["exp_avg"], params=[weight]).fire()
    state = optimizer.state[weight]
    assert not state["exp_avg"].any() and state["step"] == before["step"] == 3
    assert torch.equal(state["exp_avg_sq"], before["exp_avg_sq"]) and state["exp_avg_sq"].any()
    assert optimizer.state[net[2].weight]["exp_avg"].any()


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
def test_schedulers_hooks_and_a_compiled_step_go_on():
    nets, rates = [], []
    for compiled in (False, True):
        net = network()
        optimizer = torch.optim.Adam(net.parameters(), lr=1.0)
        scheduler = LambdaLR(optimizer, lambda step: 1e-2 / (1 + step))
        reset = MomentumReset(optimizer, every=2)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        if not compiled:
            optimizer.register_step_post_hook(lambda *_, reset=reset: reset.step())
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.arange(9)).square().mean().backward()
            step()
            if compiled:
                reset.step()
            scheduler.step()
        assert reset.steps == 5
        nets.append(net)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [1e-2 / 6] * 2
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q)


def test_a_fraction_is_drawn_by_seed_and_step():
    def run(seed, steps):
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        options = {"what": "moments", "fraction": 0.75, "seed": seed}
        reset = MomentumReset(optimizer, every=2, **options)
        train(net, optimizer, 1)
        with torch.no_grad():
            for state in optimizer.state.values():
                state["exp_avg"].fill_(1.0)
                state["exp_avg_sq"].fill_(1.0)
        reset.steps = steps
        reset.fire()
        assert all(s["step"] == 1 for s in optimizer.state.values())
        states = optimizer.state.values()
        return torch.cat([s[k].ravel() for s in states for k in ("exp_avg", "exp_avg_sq")])

    first = run(0, 2)
    assert set(first.tolist()) == {0.0, 1.0}
    assert 0.6 < 1 - first.mean().item() < 0.9
    assert torch.equal(first, run(0, 2))
    assert not torch.equal(first, run(1, 2)) and not torch.equal(first, run(0, 4))


def test_the_count_is_its_state():
    optimizer = torch.optim.SGD(network().parameters(), lr=1e-2, momentum=0.9)
    reset = MomentumReset(optimizer, every=3)
    assert [reset.step() for _ in range(4)] == [False, False, True, False]
    other = MomentumReset(optimizer, every=3)
    other.load_state_dict(reset.state_dict())
    assert [other.step() for _ in range(2)] == [False, True]


def test_an_optimizer_without_state_is_left_alone():
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    reset = MomentumReset(optimizer, every=1)
    train(net, optimizer, 3, lambda _: reset.step())
    assert reset.steps == 3


@pytest.mark.parametrize("name", ["Rprop", "ASGD", "LBFGS"])
def test_a_state_that_is_not_recognised(name):
    net = network()
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=1e-3)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.arange(9)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    reset = MomentumReset(optimizer)
    with pytest.raises(ValueError, match=f"^{name} has the state .* is not recognised") as caught:
        reset.step()  # at once, not after 200 steps
    assert "\n" not in str(caught.value) and "what=[" in str(caught.value)
    if name == "Rprop":
        before = copy.deepcopy(optimizer.state[net[1].weight])
        MomentumReset(optimizer, what=["prev"]).fire()
        after = optimizer.state[net[1].weight]
        assert before["prev"].any() and not after["prev"].any()
        assert torch.equal(after["step_size"], before["step_size"])


OPTIONS = [
    ({"every": 0}, "every is 0; it must be at least 1"),
    ({"what": "momentum"}, "what is 'momentum'; it is 'all', 'moments' or a list of state names"),
    ({"fraction": 0.0}, r"fraction is 0\.0; it must be in \(0, 1\]"),
    ({"fraction": 1.5}, "fraction is 1.5"),
    ({"params": [torch.zeros(3, 2)]}, r"a parameter of shape \(3, 2\) is not in the optimizer"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[m for _, m in OPTIONS])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MomentumReset(torch.optim.Adam(network().parameters()), **options)


def test_a_name_that_the_state_does_not_have():
    net = network()
    optimizer = torch.optim.Adam(net.parameters())
    train(net, optimizer, 1)
    with pytest.raises(ValueError, match="Adam has no state 'momentum'; it has step, exp_avg"):
        MomentumReset(optimizer, what=["momentum"]).fire()


@pytest.mark.parametrize(
    ("name", "options"),
    [("muon", {}), ("natural_galore", {"rank": 32, "history": 2})],
)
def test_moments_of_eight_bits_are_reset_too(name, options):
    model = nn.Linear(128, 96, bias=False)
    optimizer = create_optimizer(name, model, state_bits=8, **options)
    model.weight.grad = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    coded = {k: v for k, v in optimizer.state[model.weight].items() if v.dtype == torch.int8}
    assert coded and all(codes.any() for codes in coded.values())
    MomentumReset(optimizer, every=1).fire()
    for key, codes in coded.items():
        assert optimizer.state[model.weight][key] is codes and not codes.any()


def test_the_ramp_of_adams_goes_on():
    """Its step count is the ramp's too: it is refused to begin anew."""
    weight = nn.Parameter(torch.ones(4, 8))
    groups = [{"params": [weight], "role": "hidden"}]
    optimizer = create_optimizer("adams", groups, lr=1e-2, l1=1e-3, total_steps=10)
    resets = [MomentumReset(optimizer, 1), MomentumReset(optimizer, 1, what="moments")]
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(ValueError, match=r"AdamS counts its moments and its ramp in one"):
        resets[0].fire()
    resets[1].fire()
    state = optimizer.state[weight]
    assert int(state["step"]) == 1 and not state["exp_avg"].any()
