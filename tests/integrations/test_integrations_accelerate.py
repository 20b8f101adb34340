"""Accelerate: prepare, gradient accumulation, save_state and load_state."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate", reason="pip install '.[test]'")
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from tiny_llama import (  # noqa: E402
    assert_same,
    assert_stepped_by_scale,
    batch,
    plain_loop,
    rows,
    tiny_llama,
    weights,
)

import optimzoo  # noqa: E402

pytestmark = pytest.mark.thorough


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings in singletons."""
    for state in (GradientState, AcceleratorState, PartialState):
        state._reset_state()


def prepared(name="scale", accumulate=1, **hyper):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = tiny_llama()
    hyper = hyper or {"lr": 3e-3, "vector_lr": 1e-2}
    optimizer = optimzoo.create_optimizer(name, model, **hyper)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    data = DataLoader(rows(8), batch_size=2, collate_fn=batch)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler, data)


def train(accelerator, model, optimizer, scheduler, batches):
    for each in batches:
        with accelerator.accumulate(model):
            accelerator.backward(model(**each).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("name", ["scale", "apollo"])
def test_prepared_training_is_the_plain_loop(name):
    hyper = {"scale": {"lr": 3e-3, "vector_lr": 1e-2}, "apollo": {"lr": 3e-3, "rank": 4}}[name]
    accelerator, model, optimizer, scheduler, data = prepared(name, **hyper)
    assert type(optimizer.optimizer) is optimzoo.get_info(name).make
    before, batches = weights(model), list(data)
    train(accelerator, model, optimizer, scheduler, batches[:1])
    if name == "scale":
        assert_stepped_by_scale(before, model, 3e-3)
    train(accelerator, model, optimizer, scheduler, batches[1:])
    plain = tiny_llama()
    expected = optimzoo.create_optimizer(name, plain, **hyper)
    follow = LambdaLR(expected, lambda step: 1 / (1 + step))
    for each in batches:
        plain_loop(plain, expected, [each])
        follow.step()
    assert_same(weights(model), weights(plain))
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in expected.param_groups]


def test_accumulated_gradients_are_those_of_the_large_batch():
    accelerator, model, optimizer, scheduler, data = prepared(accumulate=4)
    batches = list(data)
    train(accelerator, model, optimizer, scheduler, batches[:3])
    assert not optimizer.optimizer.state  # no step yet
    train(accelerator, model, optimizer, scheduler, batches[3:])
    plain = tiny_llama()
    groups = optimzoo.param_groups(plain)
    plain_loop(plain, optimzoo.SCALE(groups, lr=3e-3, vector_lr=1e-2), [batch(rows(8))])
    assert_same(weights(model), weights(plain))


def test_a_saved_state_goes_on_to_the_same_bits(tmp_path):
    accelerator, model, optimizer, scheduler, data = prepared()
    batches = list(data)
    train(accelerator, model, optimizer, scheduler, batches[:2])
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, scheduler, batches[2:])
    fresh_accelerator, other, *rest, _ = prepared()
    fresh_accelerator.load_state(tmp_path)
    train(fresh_accelerator, other, *rest, batches[2:])
    assert type(rest[0].optimizer) is optimzoo.SCALE
    for name, value in weights(model).items():
        assert torch.equal(value, other.get_parameter(name)), name
