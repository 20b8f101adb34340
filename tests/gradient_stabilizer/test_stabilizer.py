"""GradientStabilizer: the rule, any optimizer beside it, its checkpoints and its refusals."""

import copy
import io
import math

import numpy as np
import pytest
import torch
from reference.stabilizer_numpy import StabilizerReference
from registered import NAMES
from release_runs import DEVICE, assert_equal, llama, loss_of, make, train
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import optimzoo
import optimzoo.integrations.transformers
from optimzoo import SCALE, GradientStabilizer, create_optimizer, release, stabilize
from optimzoo.gradient_stabilizer import MOMENTS
from optimzoo.lowrank import MomentumReset
from optimzoo.memory import account

SHAPES = {"tall": (11, 3), "wide": (2, 9), "vector": (5,), "number": (), "empty": (0, 4)}


def params(dtype=torch.float64, shapes=SHAPES):
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
        for name, shape in shapes.items()
    }


def gradients(step, weights):
    """Sizes that wander over a factor of e; at step 12 a thousand times as large, at 20 zero."""
    generator = torch.Generator().manual_seed(step)
    size = {12: 1e3, 20: 0.0}.get(step, math.exp(math.sin(step)))
    return {
        name: (torch.randn(p.shape, generator=generator) * size).to(p.device, p.dtype)
        for name, p in weights.items()
    }


def step(optimizer, weights, number):
    grads = gradients(number, weights)
    for name, p in weights.items():
        p.grad = grads[name].clone()
    optimizer.step()
    return grads


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]
)
@pytest.mark.parametrize("gammas", [{}, {"gamma1": 0.0, "gamma2": 0.9, "eps": 1e-3}], ids=str)
@pytest.mark.parametrize("method", ["sgd", "adamw"])
def test_gradients_are_those_of_the_reference(method, gammas, dtype, near):
    weights = params(dtype)
    optimizer = create_optimizer(method, list(weights.values()), lr=1e-2)
    assert stabilize(optimizer, **gammas) is optimizer
    references = {name: StabilizerReference(**gammas) for name in weights}
    for number in range(30):
        grads = step(optimizer, weights, number)
        for name, p in weights.items():
            expected = references[name](grads[name].double().cpu().numpy())
            assert np.linalg.norm(p.grad.double().cpu().numpy() - expected) <= near * max(
                1.0, np.linalg.norm(expected)
            ), (name, number)
    for name, p in weights.items():
        state = optimizer.state[p]
        assert state["grad_norm_step"] == (0 if name == "empty" else 29)  # one gradient was zero
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {state[key].dtype for key in MOMENTS} == {wide}


@pytest.mark.parametrize("method", ["scale", "muon", "adamw", "stable_spam", "galore"])
def test_a_method_gets_the_stabilized_gradients_and_no_more(method):
    """As if the gradients had been rescaled by hand between backward and step."""
    models = [llama(torch.float64), llama(torch.float64)]
    own, other = [make(method, m, lr=1e-2, weight_decay=0.1) for m in models]
    stabilize(own)
    references = [StabilizerReference() for _ in models[1].parameters()]
    for number in range(30):
        factor = 1000.0 if number == 12 else 1.0
        for model, optimizer in zip(models, (own, other), strict=True):
            optimizer.zero_grad()
            (factor * loss_of(model, number)).backward()
        for reference, p in zip(references, models[1].parameters(), strict=True):
            p.grad.copy_(torch.from_numpy(reference(p.grad.cpu().numpy())))
        own.step()
        other.step()
    # Muon's and GaLore's iterations stretch the rounding of the factors.
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def norms_around(spike, after=1, steady=2000):
    """Stabilized norms from the spike on, which comes after `steady` equal norms."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = stabilize(torch.optim.SGD([p], lr=0.0))
    norms = []
    for number in range(steady + after):
        p.grad = torch.full_like(p, spike / 2 if number == steady else 0.5)
        optimizer.step()
        norms.append(p.grad.norm().item())
    assert norms[:steady] == pytest.approx([1.0] * steady)
    return norms[steady:]


def test_a_spike_is_bounded_however_high():
    """(1 - γ₁) / √(1 - γ₂) in the limit, after many steps of one norm."""
    limit = 0.4 * math.sqrt((1 - 0.999**2001) / 0.001)
    for spike in (1e6, 1e9, 1e12):
        assert norms_around(spike) == pytest.approx([limit], rel=1e-3)


def test_a_spike_is_remembered_as_the_page_says():
    norms = norms_around(1e3, after=2001)
    shown = [round(norms[i], 3) for i in (0, 1, 20, 2000)]
    assert shown == pytest.approx([11.8, 7.1, 0.030, 0.085], rel=0.01)


def test_norms_that_grow_for_long_come_near_the_bound():
    """√(Σ w₁² / w₂) of the two weights of each step, by the inequality of Cauchy and Schwarz."""
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = stabilize(torch.optim.SGD([p], lr=0.0))
    for number in range(-2000, 60):  # at last as the ratio of the weights
        p.grad = torch.full_like(p, 1e-3 * (0.999 / 0.6) ** max(number, 0))
        optimizer.step()
    bound = math.sqrt(0.4**2 / 0.001 / (1 - 0.6**2 / 0.999))
    assert 0.9 * bound < p.grad.item() < bound < 15.9


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_passes_and_does_not_count(value):
    weights = params()
    optimizer = stabilize(torch.optim.SGD(weights.values(), lr=0.0))
    step(optimizer, weights, 0)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights["tall"].grad = torch.full_like(weights["tall"], value)
    for name in SHAPES.keys() - {"tall"}:
        weights[name].grad = None
    optimizer.step()
    assert not weights["tall"].grad.isfinite().any()
    torch.testing.assert_close(optimizer.state_dict()["state"], before, rtol=0, atol=0)


def test_a_small_float16_gradient_stays_finite():
    """Its factor, 1 / ‖g‖, is above float16's largest number."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.float16))
    optimizer = stabilize(torch.optim.SGD([p], lr=0.0))
    p.grad = torch.full_like(p, 2**-20)
    optimizer.step()
    torch.testing.assert_close(p.grad, torch.full_like(p, 0.5))


def test_complex_and_non_contiguous_gradients():
    numbers = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    turned = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64).T)
    optimizer = stabilize(torch.optim.SGD([numbers, turned], lr=0.0))
    numbers.grad, turned.grad = torch.full_like(numbers, 3 + 4j), torch.ones(3, 5).double().T
    optimizer.step()
    for p in (numbers, turned):
        assert p.grad.norm().item() == pytest.approx(1.0, rel=1e-12)


def test_a_closure_gradient_is_stabilized_too():
    runs = []
    for closing in ("no", "positional", "keyword"):
        model = llama()
        optimizer = make("adamw", model, stabilize=True)
        scheduler = LinearLR(optimizer, 0.1, total_iters=4)
        for number in range(4):

            def closure(model=model, optimizer=optimizer, number=number):
                optimizer.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            if closing == "no":
                closure()
                optimizer.step()
            elif closing == "positional":
                assert optimizer.step(closure) > 0
            else:
                assert optimizer.step(closure=closure) > 0
            scheduler.step()
        runs.append(model)
    assert_equal(runs[0], runs[1])
    assert_equal(runs[0], runs[2])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "adams"])
def test_a_resumed_run_is_the_same_to_the_bit(name, dtype):
    if dtype == torch.bfloat16 and name in ("asgd", "nadam"):
        dtype = torch.float32  # torch loads their own float32 numbers in bfloat16
    model = llama(dtype)
    optimizer = make(name, model, stabilize=True)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = llama(dtype)
    other.load_state_dict(weights)
    resumed = make(name, other, stabilize=True)
    resumed.load_state_dict(state)
    for each in (model, optimizer), (other, resumed):
        train(*each, range(5, 10))
    assert_equal(model, other)
    own, loaded = (o.state_dict()["state"] for o in (optimizer, resumed))
    torch.testing.assert_close(own, loaded, rtol=0, atol=0)
    assert {own[0][key].dtype for key in MOMENTS} == {torch.float32}


def test_a_state_of_before_starts_the_moments_anew():
    model = llama()
    optimizer = make("adamw", model)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    resumed = make("adamw", model, stabilize=True)
    resumed.load_state_dict(copy.deepcopy(state))
    train(model, resumed, range(3, 5))
    for p in model.parameters():
        assert (resumed.state[p]["step"], resumed.state[p]["grad_norm_step"]) == (5, 2)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "adams"])
def test_released_weights_get_the_same_bits(name):
    models = [llama(), llama()]
    for i, model in enumerate(models):
        optimizer = make(name, model, lr=1e-2, stabilize=True)
        if i:
            release(optimizer)
        train(model, optimizer, range(6))
    assert_equal(*models)


def test_released_weights_cannot_be_clipped_too():
    message = "max_norm=1.0 of a stabilized SCALE: .* without max_norm"
    with pytest.raises(ValueError, match=message):
        release(make("scale", llama(), stabilize=True), max_norm=1.0)
    model = llama()
    optimizer = make("scale", model)
    release(optimizer, max_norm=1.0)
    stabilize(optimizer)
    with pytest.raises(ValueError, match=message):
        loss_of(model, 0).backward()


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=str)
def test_loss_scaling_is_divided_out_first(options):
    """Fused, the optimizer divides by itself, after the stabilizer, and skips what overflows."""
    runs = []
    for scaled in (False, True):
        model = llama()
        optimizer = make("adamw", model, stabilize=True, **options)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, enabled=scaled)
        for number in range(6):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, number)).backward()
            if number == 3:
                model.lm_head.weight.grad[0, 0] = math.inf
            if scaled:
                scaler.step(optimizer)
                scaler.update(2.0**10)
            elif number != 3:
                optimizer.step()
        counts = {optimizer.state[p]["grad_norm_step"].item() for p in model.parameters()}
        assert counts == {5.0}
        runs.append(model)
    for p, q in zip(*(model.parameters() for model in runs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["scale", "adamw", "muon"])
def test_memory_counts_three_numbers_a_tensor(name):
    model = llama(torch.bfloat16)
    plain, stabilized = account(model, name), account(model, name, stabilize=True)
    numbers = 3 * 4 * len(list(model.parameters()))
    assert stabilized.state_total == plain.state_total + numbers
    optimizer = create_optimizer(name, model, stabilize=True)
    train(model, optimizer, range(1))
    held = [t for state in optimizer.state.values() for t in state.values()]
    assert stabilized.state_total == sum(t.nbytes for t in held if isinstance(t, torch.Tensor))


@pytest.mark.parametrize(
    "options",
    [{"rounding": "stochastic"}, {"rounding": "stochastic", "state_bits": 8}, {"foreach": True}],
    ids=str,
)
def test_it_works_beside_other_options(options):
    model = llama(torch.bfloat16)
    optimizer = make("muon", model, stabilize=True, **options)
    train(model, optimizer, range(3))
    state = optimizer.state[model.lm_head.weight]
    assert state["grad_norm_step"] == 3
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_momentum_reset_leaves_the_norms():
    model = llama()
    optimizer = make("adamw", model, stabilize=True)
    optimizer.register_step_post_hook(lambda *_: reset.step())
    reset = MomentumReset(optimizer, every=2)
    train(model, optimizer, range(2))
    state = optimizer.state[model.lm_head.weight]
    assert not state["exp_avg"].any()
    assert state["grad_norm_step"] == 2


def test_removed_it_does_nothing():
    models = [llama(), llama()]
    for i, model in enumerate(models):
        optimizer = make("adamw", model)
        if i:
            GradientStabilizer(optimizer).remove()
        train(model, optimizer, range(2))
        assert not has_moments(optimizer)
    assert_equal(*models)
    train(models[1], stabilize(optimizer), range(1))  # there is none: it may have another
    assert has_moments(optimizer)


def has_moments(optimizer):
    return all(key in state for state in optimizer.state.values() for key in MOMENTS)


def test_refusals():
    p = nn.Parameter(torch.zeros(3, 2))
    adamw = torch.optim.AdamW([p])
    for options, message in [
        ({"gamma1": 1.0}, r"Invalid gamma1 at index 0: 1.0; it must be in \[0, 1\)"),
        ({"gamma2": -0.1}, r"Invalid gamma2 at index 0: -0.1"),
        ({"eps": 0.0}, "Invalid eps value: 0.0; it must be > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            stabilize(adamw, **options)
    stabilize(adamw)
    with pytest.raises(ValueError, match="this AdamW is stabilized already"):
        stabilize(adamw)
    with pytest.raises(ValueError, match="LBFGS"):
        stabilize(torch.optim.LBFGS([p]))
    with pytest.raises(ValueError, match="differentiable=True"):
        stabilize(SCALE([{"params": [p], "role": "hidden"}], differentiable=True))
    with pytest.raises(TypeError, match=r"takes a torch.optim.Optimizer, not Linear"):
        stabilize(nn.Linear(2, 2))
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = stabilize(torch.optim.SparseAdam(embedding.parameters()))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients; build the"):
        optimizer.step()


def test_a_wrapper_of_accelerate_is_named():
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    wrapped = AcceleratedOptimizer(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]))
    with pytest.raises(TypeError, match="AcceleratedOptimizer wraps an optimizer; stabilize that"):
        stabilize(wrapped)


def test_a_name_of_the_registry_and_the_trainer_take_it():
    assert "stabilize" in optimzoo.registry.hyperparameters(optimzoo.get_info("scale"))
    model = llama()
    _, options = optimzoo.integrations.transformers.trainer_optimizer(
        "adamw", lr=1e-3, stabilize=True
    )
    options.pop("overrides")
    optimizer = create_optimizer(options.pop("name"), model, **options)
    train(model, optimizer, range(1))
    assert MOMENTS[0] in optimizer.state[model.lm_head.weight]


def test_nothing_is_read_by_the_host():
    """A tensor on meta has nothing to read."""
    weights = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES.values()]
    optimizer = stabilize(torch.optim.SGD(weights, lr=0.1))
    for _ in range(2):
        for p in weights:
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert has_moments(optimizer)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "scale", "muon"])
def test_a_captured_step_is_the_same(name):
    models = [llama(), llama()]
    for captured, model in enumerate(models):
        optimizer = make(name, model, stabilize=True, capturable=True)
        take_step = optimizer.step
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for number in range(6):
            torch.manual_seed(number)
            for p in model.parameters():
                p.grad.copy_(torch.randn_like(p) * (1e3 if number == 3 else 1.0))
            take_step()
            if captured and number == 1:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    optimizer.step()
                take_step = graph.replay
        assert {optimizer.state[p]["grad_norm_step"].item() for p in model.parameters()} == {6.0}
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_state_that_was_loaded_into_16_bits_is_refused():
    """Without the hooks of the stabilizer torch has cast its norms to the weights' dtype."""

    def made():
        weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        return torch.optim.AdamW([weight], lr=1e-3)

    saved = stabilize(made())
    saved.step()
    loaded = made()
    loaded.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="stabilize the optimizer before load_state_dict"):
        stabilize(loaded)
    first = stabilize(made())
    first.load_state_dict(saved.state_dict())
    first.step()
