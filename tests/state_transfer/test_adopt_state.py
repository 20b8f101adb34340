"""A run that changes its optimizer on the way: what the new one takes over, and in what form."""

import copy
import io
import re
import types

import numpy as np
import pytest
import torch
from optimizer_db import Tiny
from optimizer_db import train as train_tiny
from reference.bitsandbytes_numpy import adam_state, decoded
from sharded_runs import Net, loss_of
from torch import nn

import optimzoo
from optimzoo import adopt_state, create_optimizer, param_groups
from optimzoo.lowbit import quantize

ADAM = {"lr": 2**-8, "betas": (0.9, 0.99), "eps": 1e-15, "weight_decay": 0.0}
OTHER = {f"other_{key}": value for key, value in ADAM.items()}
# By name, what makes the Adam of its other roles AdamW's of `ADAM`.
METHODS = {
    "scale": {"other_lr": ADAM["lr"], "other_betas": ADAM["betas"], "other_eps": ADAM["eps"]},
    "muon": OTHER,
    "rmnp": OTHER,
    "swan": ADAM,
    "sinkgd": {**ADAM, "alpha": 1.0},
    "galore": {**ADAM, "rank": 3},
    "natural_galore": {**ADAM, "rank": 3, "history": 3},
    "fira": {**ADAM, "rank": 3},
    "apollo": {**ADAM, "rank": 3},
    "apollo_mini": ADAM,
    "stable_spam": ADAM,
    "adams": {**ADAM, "l1": 1e-3, "total_steps": 20, "n": 1, "m": 1},
}
STEPS = 7


def net(dtype=torch.float32):
    """Weights of 4,096 elements and up, and smaller ones."""
    torch.manual_seed(0)
    return Net(vocab=70, width=64, inner=66).to(dtype)


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step, vocab=70).backward()
        optimizer.step()


def adamw(model, **options):
    """By names, in the order of the model, which is not that of the roles."""
    return torch.optim.AdamW(model.named_parameters(), **{**ADAM, **options})


def running(make, model=None):
    model = Tiny() if model is None else model
    optimizer = make(model)
    (train_tiny if isinstance(model, Tiny) else train)(model, optimizer, STEPS)
    return model, optimizer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def states(model, optimizer):
    return {name: optimizer.state.get(p, {}) for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_same(value, b[key])
        else:
            assert torch.as_tensor(value).dtype == torch.as_tensor(b[key]).dtype, key
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}, {"amsgrad": True}, {"maximize": True}]
)
def test_adamw_goes_on_in_adamw_to_the_bit(options):
    """Groups by role, in another order than the old ones, and another rate until it is set."""
    model, old = running(lambda m: adamw(m, **options))
    other, other_old = copy.deepcopy((model, old))
    new = torch.optim.AdamW(param_groups(model), **{**ADAM, **options, "lr": 0.5})
    assert [g["lr"] for g in new.param_groups] == [0.5] * 4
    report = adopt_state(new, old)
    assert [g["lr"] for g in new.param_groups] == [0.5] * 4
    assert set(report.used) == {name for name, _ in model.named_parameters()}
    assert not report.converted and not report.not_used
    for group in new.param_groups:
        group["lr"] = ADAM["lr"]
    train_tiny(model, new, 3)
    train_tiny(other, other_old, 3)
    assert_same(weights(model), weights(other))
    assert_same(states(model, new), states(other, other_old))


@pytest.mark.parametrize("fused", [False, True])
def test_adam_goes_on_in_an_adamw_of_other_options(fused):
    """Through the moments, not a copy of all: without decay both are the same rule."""
    adam = {key: ADAM[key] for key in ("lr", "betas", "eps")}
    model, old = running(lambda m: torch.optim.Adam(m.parameters(), **adam, fused=fused))
    other, other_old = copy.deepcopy((model, old))
    new = torch.optim.AdamW(param_groups(model), **ADAM, fused=fused)
    assert len(adopt_state(new, old).used) == 4
    train_tiny(model, new, 3)
    train_tiny(other, other_old, 3)
    assert_same(weights(model), weights(other))
    assert_same(states(model, new), states(other, other_old))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", METHODS)
def test_the_roles_that_take_adam_step_as_the_old_adamw(name):
    model, old = running(adamw, net(torch.float64))
    other, other_old = copy.deepcopy((model, old))
    new = create_optimizer(name, model, **{"lr": ADAM["lr"], **METHODS[name]})
    report = adopt_state(new, old)
    before = weights(model)
    train(model, new, 1, STEPS)
    train(other, other_old, 1, STEPS)
    names = [name for name, what in report.used.items() if what == "exp_avg, exp_avg_sq, step"]
    assert len(names) >= (0 if name == "stable_spam" else 3)
    ours, theirs = weights(model), weights(other)
    for key in names:
        step, expected = ours[key] - before[key], theirs[key] - before[key]
        assert expected.abs().max() > 0.1 * ADAM["lr"]
        assert (step - expected).abs().max() < 1e-6 * ADAM["lr"], key


@pytest.mark.sampled(8)
@pytest.mark.parametrize(
    "options", [{}, {"state_bits": 8}, {"rounding": "stochastic"}, {"capturable": True}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_adopted_state_is_laid_out_as_a_first_step_does_it(name, dtype, options):
    nearest = dtype == torch.bfloat16 and "rounding" not in options
    if name == "adams" and ("state_bits" in options or nearest):
        pytest.skip("AdamS refuses it")
    hyper = {"lr": ADAM["lr"], **METHODS[name], **options}
    if name in ("muon", "sinkgd"):
        hyper["other"] = {"muon": "adafactor", "sinkgd": "scale"}[name]
    stepped = net(dtype)
    fresh = create_optimizer(name, stepped, **hyper)
    train(stepped, fresh, 1)
    model, old = running(adamw, net(dtype))
    new = create_optimizer(name, model, **hyper)
    report = adopt_state(new, old)
    adopted = report.used | report.converted
    for key, state in states(model, new).items():
        assert bool(state) == (key in adopted), key
        if not state:
            continue
        expected = states(stepped, fresh)[key]
        expected = {k: v for k, v in expected.items() if k != "rounding_step"}
        assert list(state) == list(expected), key
        for entry, value in state.items():
            a, b = value, expected[entry]
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), (key, entry)
            assert a.stride() == b.stride() and not a.requires_grad, (key, entry)
    train(model, new, 2, STEPS)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", METHODS)
def test_a_checkpoint_after_adoption_goes_on_to_the_bit(name):
    hyper = {"lr": ADAM["lr"], **METHODS[name]}
    model, old = running(adamw)
    new = create_optimizer(name, model, **hyper)
    adopt_state(new, old)
    file = io.BytesIO()
    torch.save([model.state_dict(), new.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = Tiny()
    again = create_optimizer(name, other, **hyper)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert_same(states(model, new), states(other, again))
    train_tiny(model, new, 3)
    train_tiny(other, again, 3)
    assert_same(weights(model), weights(other))
    assert_same(states(model, new), states(other, again))


def test_other_betas_leave_the_corrected_moments_what_they_are():
    """By float64: m / (1 − βᵗ) of the old betas is that of the new ones."""
    model, old = running(adamw, net(torch.float64))
    moments = {
        k: (s["exp_avg"].clone(), s["exp_avg_sq"].clone()) for k, s in states(model, old).items()
    }
    new = torch.optim.AdamW(param_groups(model), lr=1e-3, betas=(0.8, 0.999))
    report = adopt_state(new, old)
    assert set(report.converted.values()) == {"exp_avg, exp_avg_sq, step; rescaled for other betas"}
    for key, state in states(model, new).items():
        assert state["step"] == STEPS
        for moment, was, beta, after in zip(
            (state["exp_avg"], state["exp_avg_sq"]),
            moments[key],
            ADAM["betas"],
            (0.8, 0.999),
            strict=True,
        ):
            expected = was.numpy() / (1 - beta**STEPS) * (1 - after**STEPS)
            np.testing.assert_allclose(moment.numpy(), expected, rtol=1e-12)


def test_the_momentum_of_muon_and_of_scales_head_is_the_first_moment():
    model, old = running(adamw, net(torch.float64))
    mean = {k: s["exp_avg"].clone() for k, s in states(model, old).items()}
    muon = create_optimizer("muon", model, lr=1e-2, momentum=0.8, other_betas=ADAM["betas"])
    report = adopt_state(muon, old)
    assert report.used["tall.weight"] == "exp_avg -> momentum_buffer" and not report.not_used
    scale = create_optimizer("scale", model, lr=1e-2, momentum=0.7)
    report = adopt_state(scale, old)
    assert report.used["lm_head.weight"] == "exp_avg"
    assert report.not_used["tall.weight"] == "SCALE keeps no moments of it"
    # SCALE's step from there, by its formula.
    before = weights(model)
    loss_of(model, STEPS, vocab=70).backward()
    grad = model.lm_head.weight.grad.numpy().copy()
    averaged = 0.7 * mean["lm_head.weight"].numpy() + 0.3 * grad
    rms = np.sqrt((averaged**2).mean(1, keepdims=True))
    expected = before["lm_head.weight"].numpy() - 1e-2 * averaged / rms
    muon.step()
    state = states(model, muon)["tall.weight"]["momentum_buffer"].numpy()
    mixed = 0.8 * mean["tall.weight"].numpy() + 0.2 * model.tall.weight.grad.numpy()
    np.testing.assert_allclose(state, mixed, rtol=1e-12, atol=1e-18)
    model.load_state_dict(before)
    scale.step()
    np.testing.assert_allclose(model.lm_head.weight.detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("nesterov", [True, False])
def test_torchs_muon_and_the_adamw_beside_it_go_on_in_ours(nesterov):
    hyper = {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    model = net()
    groups = {group["role"]: group["params"] for group in param_groups(model)}
    old = [
        torch.optim.Muon(groups["hidden"], **hyper),
        torch.optim.AdamW(
            [p for role in ("head", "vector", "embedding") for p in groups[role]], **ADAM
        ),
    ]
    for step in range(STEPS):
        step_all(model, old, step)
    other, other_old = copy.deepcopy((model, old))
    new = create_optimizer("muon", model, **hyper, ns_dtype="bfloat16", **OTHER)
    report = adopt_state(new, old)
    assert not report.converted and not report.not_used
    for step in range(STEPS, STEPS + 3):
        step_all(model, [new], step)
        step_all(other, other_old, step)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        is_own = new.state[p].keys() == {"momentum_buffer"}
        assert is_own == (
            name.endswith("weight") and name.split(".")[0] not in ("embed", "norm", "lm_head")
        )
        # Products in bfloat16; the limits are those of the tests of Muon.
        limit = 2**-8 if is_own else 1e-6
        torch.testing.assert_close(p, q, rtol=limit, atol=limit, msg=name)


def step_all(model, optimizers, step):
    model.zero_grad()
    loss_of(model, step, vocab=70).backward()
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("dampening", [0.0, 0.5])
def test_sgds_sum_becomes_an_average_and_back(dampening):
    """Against the average of the same gradients from the first step on, in float64."""
    model = net(torch.float64)
    old = torch.optim.SGD(model.named_parameters(), lr=1e-3, momentum=0.9, dampening=dampening)
    mean = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, step, vocab=70).backward()
        for name, p in model.named_parameters():
            # A dampened sum has the first gradient undampened.
            first = 1 / (1 - dampening) if step == 0 else 1.0
            mean[name] = 0.9 * mean[name] + 0.1 * first * p.grad.numpy()
        old.step()
    new = create_optimizer("rmnp", model, lr=1e-3)
    report = adopt_state(new, old)
    factor = 0.1 / (1 - dampening)
    assert report.converted["tall.weight"] == (
        f"momentum_buffer; times {factor:.3g}: a sum and an average"
    )
    assert report.not_used["norm.weight"] == "there is no second moment"
    state = states(model, new)["tall.weight"]["momentum_buffer"]
    np.testing.assert_allclose(state.numpy(), mean["tall.weight"], rtol=1e-11, atol=1e-18)
    assert not new.state[model.norm.weight]
    back = torch.optim.SGD(model.named_parameters(), lr=1e-3, momentum=0.8)
    adopt_state(back, [new])
    state = states(model, back)["tall.weight"]["momentum_buffer"]
    np.testing.assert_allclose(state.numpy(), mean["tall.weight"] / 0.2, rtol=1e-11, atol=1e-18)


def test_a_momentum_that_says_nothing_of_gradients_is_not_used():
    for make, why in (
        (lambda m: torch.optim.RMSprop(m.parameters(), momentum=0.9), "RMSprop's momentum is of"),
        (lambda m: torch.optim.SGD(m.parameters(), momentum=0.9, dampening=1.0), "dampening=1"),
        (lambda m: torch.optim.SGD(m.parameters()), "no state: "),
        (lambda m: torch.optim.Adagrad(m.parameters()), "nothing is read of step, sum"),
        (lambda m: create_optimizer("stable_spam", m), "Stable-SPAM's normalised gradients"),
        (lambda m: create_optimizer("galore", m, rank=2), "of low rank"),
        (lambda m: adamw(m, maximize=True), "one optimizer minimizes, the other maximizes"),
    ):
        model, old = running(make)
        new = create_optimizer("muon", model)
        assert why in adopt_state(new, old).not_used[name_of(model, new)]
        assert not new.state[model.hidden.weight]
        train_tiny(model, new, 1)
    unknown = {"momentum": 0.9, "params": [model.hidden.weight]}
    state = {model.hidden.weight: {"momentum_buffer": torch.zeros(7, 5)}}
    muon = optimzoo.Muon([{"params": [model.hidden.weight], "role": "hidden"}])
    old = types.SimpleNamespace(param_groups=[unknown], state=state)
    assert adopt_state(muon, old).not_used == {
        "parameter 0": "a momentum_buffer of an unknown rule may be a sum or a mean"
    }


def name_of(model, new):
    return next(n for n, p in model.named_parameters() if p is model.hidden.weight)


def test_moments_with_the_old_decay_in_them_say_so():
    model, old = running(lambda m: torch.optim.Adam(m.named_parameters(), weight_decay=0.1))
    report = adopt_state(create_optimizer("adamw", model), old)
    assert report.used["hidden.bias"].endswith("; with the old weight decay in them")
    assert len(report.used) == 4


def test_adamss_second_moment_is_its_own():
    model, old = running(lambda m: create_optimizer("adams", m, **METHODS["adams"]))
    muon = create_optimizer("muon", model)
    assert adopt_state(muon, old).used["hidden.weight"] == "exp_avg -> momentum_buffer"
    report = adopt_state(create_optimizer("adamw", model), old)
    assert report.not_used == {
        "hidden.weight": "AdamS's second moment is of its modified first one"
    }
    new = create_optimizer("adams", model, **METHODS["adams"])
    report = adopt_state(new, running(adamw, model)[1])
    assert list(report.not_used) == ["hidden.weight"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", METHODS)
def test_the_same_method_goes_on_whole_whatever_the_order_of_its_groups(name):
    hyper = {"lr": ADAM["lr"], **METHODS[name]}
    model, old = running(lambda m: create_optimizer(name, m, **hyper))
    other, other_old = copy.deepcopy((model, old))
    groups = [{**g, "params": list(g["params"])} for g in reversed(param_groups(model))]
    new = create_optimizer(name, groups, **hyper)
    adopt_state(new, old)
    assert_same(states(model, new), states(other, other_old))
    assert not {v.data_ptr() for s in new.state.values() for v in s.values() if v.numel()} & {
        v.data_ptr() for s in old.state.values() for v in s.values() if v.numel()
    }
    if name not in (
        "galore",
        "natural_galore",
        "fira",
        "apollo",
        "apollo_mini",
    ):  # these draw by position
        train_tiny(model, new, 2)
        train_tiny(other, other_old, 2)
        assert_same(weights(model), weights(other))


def test_codes_of_8_bits_are_those_of_the_moments():
    model, old = running(adamw, net())
    new = create_optimizer("muon", model, state_bits=8, other_betas=ADAM["betas"])
    report = adopt_state(new, old)
    for key, first in (("tall.weight", "momentum_buffer"), ("embed.weight", "exp_avg")):
        assert report.converted[key].endswith("; to 8-bit codes")
        state = states(model, new)[key]
        codes, scale = quantize(states(model, old)[key]["exp_avg"], signed=True)
        assert torch.equal(state[f"{first}_codes"], codes)
        assert torch.equal(state[f"{first}_scale"], scale)
    codes, _ = quantize(states(model, old)["embed.weight"]["exp_avg_sq"], signed=False)
    assert torch.equal(states(model, new)["embed.weight"]["exp_avg_sq_codes"], codes)
    assert "norm.weight" in report.used  # too small for codes
    # And from codes on, to within half a code.
    plain = create_optimizer("muon", model, other_betas=ADAM["betas"])
    report = adopt_state(plain, new)
    assert report.converted["tall.weight"] == "momentum_buffer; from 8-bit codes"
    momentum = states(model, plain)["tall.weight"]["momentum_buffer"]
    expected = states(model, old)["tall.weight"]["exp_avg"]
    assert (momentum - expected).abs().max() < expected.abs().max() / 100


def test_bfloat16_moments_are_rounded_once_and_only_where_they_must_be():
    model, old = running(
        lambda m: create_optimizer("adamw", m, rounding="stochastic", **ADAM), net(torch.bfloat16)
    )
    wide = states(model, old)["norm.weight"]["exp_avg_sq"].clone()
    assert wide.dtype == torch.float32
    new = torch.optim.AdamW(model.named_parameters(), **ADAM)
    report = adopt_state(new, old)
    assert report.converted["norm.weight"].endswith("; rounded to bfloat16")
    assert torch.equal(new.state[model.norm.weight]["exp_avg_sq"], wide.bfloat16())
    scale = create_optimizer("scale", model, other_betas=ADAM["betas"])
    report = adopt_state(scale, old)
    assert report.used["norm.weight"] == "exp_avg, exp_avg_sq, step"
    assert torch.equal(scale.state[model.norm.weight]["exp_avg_sq"], wide)
    again = create_optimizer("adamw", model, rounding="stochastic", **ADAM)
    adopt_state(again, new)
    assert again.state[model.norm.weight]["exp_avg_sq"].dtype == torch.float32
    train(model, again, 1)


def test_adafactors_means_are_those_of_the_second_moment():
    model, old = running(adamw, net(torch.float64))
    new = create_optimizer("muon", model, other="adafactor", other_betas=ADAM["betas"])
    report = adopt_state(new, old)
    assert report.converted["embed.weight"] == (
        "exp_avg_sq, step -> row_var, col_var, step; means over rows and columns"
    )
    second = states(model, old)["embed.weight"]["exp_avg_sq"].numpy()
    state = states(model, new)["embed.weight"]
    np.testing.assert_allclose(state["row_var"].numpy(), second.mean(1), rtol=1e-12)
    np.testing.assert_allclose(state["col_var"].numpy(), second.mean(0), rtol=1e-12)
    assert state["step"] == STEPS


@pytest.mark.parametrize("stabilized", [False, True])
def test_moments_for_normalised_gradients_are_over_the_gradients_norm(stabilized):
    model, old = running(adamw, net(torch.float64))
    if stabilized:
        new = optimzoo.stabilize(torch.optim.AdamW(model.named_parameters(), **ADAM))
    else:
        new = create_optimizer("stable_spam", model, **ADAM)
    report = adopt_state(new, old)
    assert len(report.converted) == len(list(model.parameters()))
    for key, state in states(model, old).items():
        first, second = state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()
        size = (second / (1 - ADAM["betas"][1] ** STEPS)).sum()
        adopted = states(model, new)[key]
        np.testing.assert_allclose(adopted["exp_avg"].numpy(), first / size**0.5, rtol=1e-11)
        np.testing.assert_allclose(adopted["exp_avg_sq"].numpy(), second / size, rtol=1e-11)
        assert adopted["step" if stabilized else "moment_step"] == STEPS
    # A first step is then about as long as the old optimizer's next.
    other, other_old = copy.deepcopy((model, old))
    before = weights(model)
    train(model, new, 1, STEPS)
    train(other, other_old, 1, STEPS)
    for key, value in weights(model).items():
        ratio = (value - before[key]).norm() / (weights(other)[key] - before[key]).norm()
        assert 0.5 < ratio < 2, key
    plain = create_optimizer("adamw", model)
    assert set(adopt_state(plain, new).not_used) == {name for name, _ in model.named_parameters()}


def test_a_stabilized_optimizer_gives_its_norms_to_another():
    model, old = running(lambda m: optimzoo.stabilize(adamw(m)))
    other, other_old = copy.deepcopy((model, old))
    optimzoo.stabilize(other_old)  # a copy has lost the hooks, not the norms
    new = optimzoo.stabilize(torch.optim.Adam(model.named_parameters(), **ADAM))
    assert len(adopt_state(new, old).used) == 4
    train_tiny(model, new, 2)
    train_tiny(other, other_old, 2)
    assert_same(weights(model), weights(other))
    assert_same(states(model, new), states(other, other_old))


def test_a_stack_is_normalised_matrix_by_matrix_in_the_rules_layout():
    torch.manual_seed(0)
    experts = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))
    group = {"params": [experts], "role": "hidden", "stacked": True, "transposed": True}
    old = torch.optim.AdamW([experts], **ADAM)
    for _ in range(STEPS):
        experts.grad = torch.randn_like(experts)
        old.step()
    new = optimzoo.StableSPAM([group], **ADAM)
    adopt_state(new, old)
    second = old.state[experts]["exp_avg_sq"].numpy() / (1 - ADAM["betas"][1] ** STEPS)
    size = second.sum((1, 2), keepdims=True) ** 0.5
    expected = (old.state[experts]["exp_avg"].numpy() / size).transpose(0, 2, 1)
    np.testing.assert_allclose(new.state[experts]["exp_avg"].numpy(), expected, rtol=1e-11)
    new.step()


def test_a_parameter_without_a_gradient_so_far_starts_at_zero():
    model = Tiny()
    old = adamw(model)
    for _ in range(STEPS):
        old.zero_grad()
        model().backward()
        model.hidden.bias.grad = None
        old.step()
    assert model.hidden.bias not in old.state
    new = create_optimizer("adamw", model, **ADAM)
    report = adopt_state(new, old)
    assert list(report.not_used) == ["hidden.bias"]
    assert report.not_used["hidden.bias"].startswith("no state: no gradient so far")
    assert model.hidden.bias not in new.state
    train_tiny(model, new, 1)
    assert [new.state[p]["step"].item() for p in model.parameters()] == [8, 8, 1, 8]


@pytest.mark.parametrize("form", ["names", "params", "groups", "named", "keys"])
def test_a_state_dict_gives_what_the_optimizer_gives(form):
    named = form in ("names", "keys")
    model, old = running(
        lambda m: torch.optim.AdamW(m.named_parameters() if named else m.parameters(), **ADAM)
    )
    expected = create_optimizer("muon", model)
    adopt_state(expected, old)
    saved = copy.deepcopy(old.state_dict())
    if form == "keys":  # of torch.distributed.checkpoint, whose parameters go by name
        names = saved["param_groups"][0].pop("param_names")
        saved["state"] = {names[i]: state for i, state in saved["state"].items()}
        saved["param_groups"][0]["params"] = names
    params = {
        "params": model.parameters(),
        "named": model.named_parameters(),
        "groups": [{"params": list(model.parameters())}],
    }
    new = create_optimizer("muon", model)
    report = adopt_state(new, saved, params=params.get(form))
    assert_same(states(model, new), states(model, expected))
    assert not report.not_used and len(report.parameters) == 4


@pytest.mark.parametrize("block", [256, 2048])
@pytest.mark.parametrize("wrapped", [False, True])
def test_bitsandbytes_state_is_read(block, wrapped):
    """By a transcription of its format; wrapped, as its `state_dict()` hides it from FSDP."""
    generator = np.random.default_rng(0)
    model = net(torch.float64)
    held, state = {}, {}
    for i, (name, p) in enumerate(model.named_parameters()):
        spread = np.exp(3 * generator.normal(size=p.shape))
        first, second = 1e-3 * spread * generator.normal(size=p.shape), 1e-6 * spread**2
        arrays = adam_state(first, second, 12, block)
        held[name] = (arrays, first, second)
        state[i] = {"step": 12}
        quant = {k: torch.as_tensor(v) for k, v in arrays.items() if k != "step"}
        for k, v in quant.items():
            quant[k] = v if v.dtype == torch.uint8 else v.float()
        state[i] |= {"__bnb_optimizer_quant_state__": quant} if wrapped else quant
    group = {**ADAM, "alpha": 0.0, "t_alpha": None, "params": list(range(len(state)))}
    old = {"state": state, "param_groups": [group]}
    new = torch.optim.AdamW(model.named_parameters(), **ADAM)
    report = adopt_state(new, old, params=model.parameters())
    assert report.converted["embed.weight"] == (
        "state1, state2, step -> exp_avg, exp_avg_sq, step; from 8-bit codes"
    )
    assert report.used["norm.weight"] == "state1, state2, step -> exp_avg, exp_avg_sq, step"
    for name, (arrays, first, second) in held.items():
        for key, number, exact in (("exp_avg", "1", first), ("exp_avg_sq", "2", second)):
            value = states(model, new)[name][key].numpy()
            expected = exact
            if f"qmap{number}" in arrays:
                parts = (arrays[f"{word}{number}"] for word in ("state", "qmap", "absmax"))
                expected = decoded(*parts, block)
            np.testing.assert_allclose(value, expected, rtol=3e-7)
            off = np.abs(value - exact)
            assert off.max() < 0.02 * np.abs(exact).max(), name  # the format's own error
        assert states(model, new)[name]["step"] == 12
    muon = create_optimizer("muon", model, state_bits=8)
    adopt_state(muon, old, params=model.parameters())
    train(model, muon, 1)
    state[0].pop("__bnb_optimizer_quant_state__" if wrapped else "state2")
    fresh = create_optimizer("muon", model)
    adopt_state(fresh, old, params=model.parameters())
    assert not fresh.state[model.embed.weight]


def test_bitsandbytes_state_that_is_no_block_wise_code_is_refused():
    model = net()
    codes = torch.zeros_like(model.embed.weight, dtype=torch.uint8)
    state = {"step": 3, "state1": codes, "state2": codes, "qmap1": torch.zeros(256)}
    old = types.SimpleNamespace(
        param_groups=[{"params": list(model.parameters()), "betas": (0.9, 0.99)}],
        state={model.embed.weight: {**state, "max1": torch.ones(1)}},
    )
    with pytest.raises(ValueError, match="without absmax1: bitsandbytes' block_wise=False"):
        adopt_state(create_optimizer("adamw", model), old)
    numbers = {f"{word}{i}": torch.ones(4) for word in ("qmap", "absmax") for i in (1, 2)}
    old.state[model.embed.weight] = {**state, **numbers}
    with pytest.raises(ValueError, match="4 blocks of 4480 codes: none of"):
        adopt_state(create_optimizer("adamw", model), old)


def test_a_scheduler_that_is_there_already_goes_on_with_the_optimizer():
    model, old = running(adamw)
    new = create_optimizer("scale", model, lr=0.01)
    groups = list(map(id, new.param_groups))
    scheduler = torch.optim.lr_scheduler.LinearLR(new, 0.5, total_iters=2)
    adopt_state(new, old)
    assert list(map(id, new.param_groups)) == groups
    train_tiny(model, new, 2, [scheduler])
    assert [g["lr"] for g in new.param_groups] == pytest.approx([0.01] * 4)


def test_parameters_that_the_new_optimizer_does_not_train_are_listed():
    model, old = running(adamw)
    new = torch.optim.Muon([model.hidden.weight])
    report = adopt_state(new, old)
    assert report.used == {"hidden.weight": "exp_avg -> momentum_buffer"}
    assert set(report.not_used.values()) == {"the new optimizer does not train it"}
    assert len(report.not_used) == 3
    saved = old.state_dict()
    new = torch.optim.Muon([("hidden.weight", model.hidden.weight)])
    assert adopt_state(new, saved).not_used == report.not_used


def test_the_report_is_a_table_of_80_columns():
    model, old = running(adamw, net())
    new = create_optimizer("stable_spam", model, state_bits=8, **ADAM)
    text = str(adopt_state(new, old))
    assert max(map(len, text.splitlines())) <= 80
    assert text.splitlines()[0] == "role       tensors  old state  what, or why not"
    assert re.search(r"^hidden +3  converted  exp_avg, exp_avg_sq, step -> exp_avg,", text, re.M)
    new = create_optimizer("scale", model, other_betas=ADAM["betas"])
    assert str(adopt_state(new, old)).splitlines()[1:] == [
        "hidden           5  not used   SCALE keeps no moments of it",
        "embedding        1  not used   SCALE keeps no moments of it",
        "head             1  used       exp_avg",
        "vector           3  used       exp_avg, exp_avg_sq, step",
    ]


def test_refusals_are_one_line_and_leave_the_new_optimizer_as_it_was():
    model, old = running(adamw)
    _, other = running(adamw)

    def refused(new, old, message, error=ValueError, **options):
        with pytest.raises(error, match=message) as info:
            adopt_state(new, old, **options)
        assert "\n" not in str(info.value)

    stepped = running(lambda m: create_optimizer("muon", m), model)[1]
    refused(stepped, old, "Muon has stepped already; adopt the state before its first step")
    stateless = running(lambda m: optimzoo.SWAN([m.hidden.weight]), model)[1]
    refused(stateless, old, "SWAN has stepped already")
    new = create_optimizer("muon", model)
    refused(new, other, r"parameters differ: the old optimizer has no hidden\.weight; give that")
    refused(new, torch.optim.AdamW([model.hidden.weight]), "has no embed.weight; .* a list of all")
    refused(new, {"state": {}}, "a state_dict has 'state' and 'param_groups'")
    unnamed = torch.optim.AdamW(model.parameters()).state_dict()
    refused(new, unnamed, r"no names of its parameters; give params=model\.parameters\(\)")
    refused(new, unnamed, "the state_dict has 4, params has 1", params=[model.hidden.weight])
    refused(new, old, "params goes with one state_dict", params=model.parameters())
    refused(new, model, "takes an optimizer or its state_dict.., not Tiny", TypeError)
    refused(model, old, "adopt_state takes a torch.optim.Optimizer, not Tiny", TypeError)
    refused(
        torch.optim.Adagrad(model.parameters()), old, "the state of Adagrad; .* Muon", TypeError
    )
    rounded = create_optimizer("rmsprop", model, rounding="stochastic")
    refused(rounded, old, "does not know the state of RMSprop", TypeError)
    wrapper = types.new_class("Wrapper", (torch.optim.Optimizer,))
    refused(object.__new__(wrapper), old, "Wrapper wraps an optimizer", TypeError)
    old.state[model.hidden.bias]["exp_avg_diff"] = torch.zeros(7)
    refused(new, old, "unknown state 'exp_avg_diff' of hidden.bias")
    del old.state[model.hidden.bias]["exp_avg_diff"]
    saved = old.state_dict()
    order = list(model.parameters())[::-1]
    refused(
        new,
        saved,
        r"exp_avg of hidden\.bias is \[7\], the parameter \[7, 5\]: .* another",
        params=order,
    )
    assert not any(new.state.values())
    assert not adopt_state(new, old).not_used
