"""Sizes of steps by role: against NumPy, for any optimizer, released, and where a step fails."""

import numpy as np
import pytest
import torch
from optimizer_db import Tiny
from release_runs import loss_of
from release_runs import make as make_for_release
from zoo_models import llama

import optimzoo
from optimzoo import create_optimizer, param_groups, update_statistics

ROLES = {"embedding": ["embed.weight"], "hidden": ["hidden.weight"], "head": ["lm_head.weight"]}


def arrays(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def expected(before, after, roles):
    result = {}
    for role, names in roles.items():
        old = np.concatenate([before[name].ravel() for name in names])
        change = np.concatenate([after[name].ravel() for name in names]) - old
        result[f"{role}/weight_rms"] = np.sqrt(np.mean(old**2))
        result[f"{role}/update_rms"] = np.sqrt(np.mean(change**2))
        result[f"{role}/update_to_weight"] = np.linalg.norm(change) / np.linalg.norm(old)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["scale", "muon", "adamw"])
def test_they_are_those_of_the_weights_before_and_after(name, dtype):
    model = Tiny(dtype=dtype)
    optimizer = create_optimizer(name, model, lr=1e-2, weight_decay=0.1)
    model().backward()
    before = arrays(model)
    with update_statistics(optimizer) as statistics:
        assert statistics == {}
        optimizer.step()
    sizes = expected(before, arrays(model), {**ROLES, "vector": ["hidden.bias"]})
    assert statistics.keys() == sizes.keys()
    assert statistics == pytest.approx(sizes, rel=1e-5)
    assert all(type(value) is float for value in statistics.values())


def test_groups_without_a_role_count_by_shape():
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model().backward()
    before = arrays(model)
    with update_statistics(optimizer) as statistics:
        optimizer.step()
    hidden = [name for names in ROLES.values() for name in names]
    roles = {"hidden": hidden, "vector": ["hidden.bias"]}
    assert statistics == pytest.approx(expected(before, arrays(model), roles), rel=1e-5)


def test_released_weights_are_measured_around_the_backward():
    both = []
    for released in (False, True):
        model = llama()
        optimizer = make_for_release("scale", model)
        if released:
            optimzoo.release(optimizer)
        with update_statistics(optimizer) as statistics:
            loss_of(model, 0).backward()
            optimizer.step()
        both.append(statistics)
    assert both[0] == both[1] and both[0]["hidden/update_to_weight"] > 0


def test_a_step_that_fails_leaves_nothing_and_weights_of_zero_divide_by_nothing():
    model = Tiny()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.0)
    with pytest.raises(RuntimeError, match="stop"), update_statistics(optimizer) as statistics:
        raise RuntimeError("stop")
    assert statistics == {}
    torch.nn.init.zeros_(model.hidden.bias)
    with update_statistics(optimizer) as statistics:
        optimizer.step()
    assert statistics["vector/update_to_weight"] == 0.0 == statistics["vector/weight_rms"]
    assert statistics["hidden/update_rms"] == 0.0 < statistics["hidden/weight_rms"]


def test_the_weights_are_left_alone():
    model = Tiny()
    optimizer = create_optimizer("scale", model, lr=1e-2)
    before = arrays(model)
    with update_statistics(optimizer):
        pass
    after = arrays(model)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())
