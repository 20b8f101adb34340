"""torch.compile of a step: one graph, one compilation, and the same bits as without it."""

import copy
import shutil

import pytest
import torch
from optimizer_db import Tiny
from torch._dynamo.testing import CompileCounterWithBackend
from toy import TOY, toy

from optimzoo import SCALE, create_optimizer, param_groups

pytestmark = [
    pytest.mark.filterwarnings("error:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.compile's own
]
MORE = {
    "scale": {"weight_decay": 0.1, "weight_decay_style": "cautious"},
    "adams": {"n": 2, "m": 5},
}
NAMES = [name for name in TOY if name not in ("adamw", "sgd")]


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(name="scale", lr=0.1, **options):
    """Two equal models and their optimizers: one to be compiled."""
    models = [Tiny(seed=3) for _ in range(2)]
    return models, [create_optimizer(name, m, lr=copy.deepcopy(lr), **options) for m in models]


def train(models, optimizers, steps, count):
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    for _ in range(count):
        for model, step in zip(models, steps, strict=True):
            model.zero_grad()
            model().backward()
            step()
        for scheduler in schedulers:
            scheduler.step()


def assert_alike(models):
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_twenty_scheduled_steps_are_one_graph_compiled_once(name, lr):
    """Over refreshes, resets and new masks; `fullgraph` makes a break an error."""
    models, optimizers = pair(name, **toy(name, rank=2, gap=3, lr=lr, **MORE.get(name, {})))
    counter = CompileCounterWithBackend("aot_eager")
    before = [p.clone() for p in models[1].parameters()]
    compiled = torch.compile(optimizers[1].step, backend=counter, fullgraph=True)
    train(models, optimizers, [optimizers[0].step, compiled], 20)
    assert counter.frame_count == 1
    assert_alike(models)
    assert not any(map(torch.equal, before, models[1].parameters()))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_steps_the_weights_themselves():
    models, optimizers = pair()
    places = [p.data_ptr() for p in models[1].parameters()]
    compiled = torch.compile(optimizers[1].step, fullgraph=True)
    train(models, optimizers, [optimizers[0].step, compiled], 4)
    assert_alike(models)
    assert places == [p.data_ptr() for p in models[1].parameters()]


def test_a_training_step_breaks_at_the_backward_alone():
    models, optimizers = pair()
    counter = CompileCounterWithBackend("aot_eager")

    def whole():
        models[1].zero_grad()
        models[1]().backward()
        optimizers[1].step()

    steps = [
        lambda: (models[0].zero_grad(), models[0]().backward(), optimizers[0].step()),
        torch.compile(whole, backend=counter),
    ]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers]
    counts = []
    for _ in range(5):
        for step, scheduler in zip(steps, schedulers, strict=True):
            step()
            scheduler.step()
        counts.append(counter.frame_count)
    assert counts[0] >= 2 and len(set(counts[1:])) == 1
    assert_alike(models)


def test_what_the_graph_does_before_and_after_the_step_is_kept():
    models, optimizers = pair()

    def around(model, optimizer):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
            optimizer.step()
            return sum(p.sum() for p in model.parameters())

    for _ in range(3):
        for model in models:
            model.zero_grad()
            model().backward()
        compiled = torch.compile(around, backend="aot_eager", fullgraph=True)
        sums = around(models[0], optimizers[0]), compiled(models[1], optimizers[1])
        torch.testing.assert_close(*sums)
        assert_alike(models)


def test_each_optimizer_of_one_compiled_function_is_its_own():
    models, optimizers = pair()
    optimizers[1] = copy.deepcopy(optimizers[0])
    models.append(Tiny(seed=3))
    optimizers.append(create_optimizer("scale", models[2], lr=0.2))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(optimizer):
        optimizer.step()

    for which in (0, 2):
        models[which]().backward()
        step(optimizers[which])
    expected = Tiny(seed=3)
    optimizer = create_optimizer("scale", expected, lr=0.2)
    expected().backward()
    optimizer.step()
    assert_alike([models[2], expected])
    assert not optimizers[1].state  # the copy has not moved
    assert optimizers[0].state and optimizers[2].state


def test_weights_without_a_gradient_stay_and_hooks_run_once():
    model = Tiny()
    optimizer = SCALE(param_groups(model), lr=0.1)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    model().backward()
    model.hidden.weight.grad = None
    still, grad = model.hidden.weight.clone(), model.lm_head.weight.grad
    torch.compile(optimizer.step, backend="aot_eager")()
    assert torch.equal(still, model.hidden.weight)
    assert model.hidden.weight.grad is None and model.lm_head.weight.grad is grad
    assert seen == [1]


def test_the_operation_keeps_to_its_schema():
    model = Tiny()
    optimizer = SCALE(param_groups(model), lr=0.1)
    model().backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    arguments = ([p.detach() for p in params], grads, list(range(len(params))))
    torch.library.opcheck(
        torch.ops.optimzoo.step_.default,
        (*arguments, optimizer._traced[0]),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda o: o.param_groups[0].update(params=[]), "add_param_group"),
        (lambda o: o.param_groups[0].update(differentiable=True), "differentiable=False"),
    ],
)
def test_what_a_graph_cannot_hold_is_an_error(spoil, match):
    model = Tiny()
    optimizer = SCALE(param_groups(model), lr=0.1)
    model().backward()
    spoil(optimizer)
    with pytest.raises(RuntimeError, match=match):
        torch.compile(optimizer.step, backend="aot_eager")()
