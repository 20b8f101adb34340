"""A loop that writes one rate into all groups, over rates that were set apart, is told of it."""

import copy
import pickle
import warnings

import pytest
import torch
from optimizer_db import Tiny
from registered import NAMES, create, others
from torch.optim import lr_scheduler

from optimzoo import SCALE, create_optimizer, param_groups, release

HYPER = {"lr": 2**-8, **others(2**-6)}


def make(name="scale", **hyper):
    model = Tiny()
    return model, create(name, model, **{**HYPER, **hyper})


def step(model, optimizer):
    """One step along a gradient of ones; what was warned of."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    return [str(w.message) for w in caught if "learning rate" in str(w.message)]


def write(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate


def quiet(model, optimizer, after, steps=12):
    """Train with ``after`` called after each step: nothing is warned of; the last rates."""
    for _ in range(steps):
        assert step(model, optimizer) == []
        after()
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("name", NAMES)
def test_a_loop_that_writes_one_rate_into_all_groups_is_told_once(name):
    model, optimizer = make(name)
    write(optimizer, 2**-9)
    (line,) = step(model, optimizer)
    assert "\n" not in line and "0.00195312" in line and "hidden 0.00390625" in line
    assert "vector 0.015625" in line and "g['lr']" in line
    write(optimizer, 2**-10)
    assert step(model, optimizer) == []


def test_a_loop_that_writes_after_the_step_is_told_at_the_next_rate():
    model, optimizer = make()
    found = []
    for number in range(4):
        found.append(len(step(model, optimizer)))
        write(optimizer, 2**-9 / (1 + number))
    assert found == [0, 0, 1, 0]


def test_a_loop_that_warms_up_from_nothing_is_told_at_the_first_rate():
    model, optimizer = make()
    write(optimizer, 0.0)
    assert step(model, optimizer) == []
    write(optimizer, 1e-5)
    assert len(step(model, optimizer)) == 1


def test_rates_that_were_equal_from_the_start_may_stay_equal():
    for hyper in (others(None), others(HYPER["lr"])):
        model, optimizer = make(**hyper)
        for number in range(3):
            write(optimizer, 2**-9 / (1 + number))
            assert step(model, optimizer) == []
    model = Tiny()
    optimizer = SCALE(param_groups(model), lr=torch.tensor(1e-3), vector_lr=torch.tensor(1e-2))
    write(optimizer, torch.tensor(1e-4))  # read by a graph, not by Python
    assert step(model, optimizer) == []


def test_a_loop_that_keeps_the_ratios_is_left_alone():
    model, optimizer = make()
    base = [group["lr"] for group in optimizer.param_groups]
    for number in range(4):
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * number / 4
        assert step(model, optimizer) == []


SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 4)),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "cosine to a floor": lambda o: lr_scheduler.CosineAnnealingLR(o, 6, eta_min=1e-6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, [10 * g["lr"] for g in o.param_groups], total_steps=16
    ),
    "linear": lambda o: lr_scheduler.LinearLR(o, 1e-3, total_iters=5),
    "cyclic": lambda o: lr_scheduler.CyclicLR(
        o, [g["lr"] / 9 for g in o.param_groups], [g["lr"] for g in o.param_groups], 3,
        cycle_momentum=False,
    ),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 3), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("method", ["scale", "adamw"])
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedulers_that_keep_the_ratios_are_left_alone(name, method):
    model, optimizer = make(method)
    quiet(model, optimizer, SCHEDULERS[name](optimizer).step)


@pytest.mark.parametrize("method", ["scale", "muon", "adamw"])
def test_a_plateau_that_reaches_its_floor_is_left_alone(method):
    if method not in NAMES:
        pytest.skip("torch has no Muon")
    model, optimizer = make(method)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0, min_lr=1e-4)
    rates = quiet(model, optimizer, lambda: scheduler.step(1.0))
    assert set(rates) == {1e-4}
    # All at once, and with a state that is loaded in between.
    model, optimizer = make(method)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=1e-3, patience=0, min_lr=1e-4)
    quiet(model, optimizer, lambda: scheduler.step(1.0), steps=3)
    again = make(method)[1]
    again.load_state_dict(optimizer.state_dict())
    assert {group["lr"] for group in again.param_groups} == {1e-4}


def test_schedulers_that_write_one_rate_into_all_groups_are_told_of():
    for build in (
        lambda o: lr_scheduler.OneCycleLR(o, 1e-2, total_steps=9),
        lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, cycle_momentum=False),
    ):
        model, optimizer = make()
        build(optimizer)
        assert len(step(model, optimizer)) == 1


@pytest.mark.parametrize("method", ["scale", "muon", "adamw"])
def test_a_loaded_state_goes_on_without_a_word_and_a_loop_after_it_is_told(method):
    if method not in NAMES:
        pytest.skip("torch has no Muon")
    model, optimizer = make(method)
    step(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["lr"] = 1e-4  # such as a plateau's floor
    model, again = make(method)
    again.load_state_dict(saved)
    assert [step(model, again) for _ in range(2)] == [[], []]
    write(again, 2e-4)
    assert len(step(model, again)) == 1


def test_copies_watch_by_themselves():
    model, optimizer = make()
    step(model, optimizer)
    for twin_model, twin in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        for rate, expected in ((1e-4, 0), (2e-4, 1), (3e-4, 0)):
            write(twin, rate)
            assert len(step(twin_model, twin)) == expected
    assert step(model, optimizer) == []


def test_released_parameters_are_stepped_without_a_word():
    """Each is stepped by a likeness of the optimizer that has one group."""
    model, optimizer = make()
    with release(optimizer):
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                model().backward()
                optimizer.step()


def test_a_group_that_is_added_counts_and_a_refused_one_does_not():
    model, optimizer = make(**others(None))
    with pytest.raises(ValueError, match="unknown role"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "role": "no"})
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [("extra", extra)], "role": "vector", "lr": 0.25})
    write(optimizer, 1e-3)
    assert len(step(model, optimizer)) == 1


@pytest.mark.parametrize("method", ["scale", "adamw"])
def test_a_compiled_step_is_told_too_or_left_alone(method):
    model, optimizer = make(method)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    write(optimizer, 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled()
    told = [w for w in caught if "parameter group" in str(w.message)]
    assert len(told) <= 1 and (method != "scale" or len(told) == 1)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_the_warning_points_at_the_loop():
    model, optimizer = make()
    write(optimizer, 1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="parameter group") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    made = create_optimizer("adamw", Tiny(), lr=1e-3, **others(1e-2))
    write(made, 1e-3)
    with pytest.warns(UserWarning, match="parameter group") as caught:
        made.step()
    assert caught[0].filename == __file__
