"""Optimizer-in-backward: loss scaling, unusual graphs, and gradients of several processes."""

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from needs import needs_cpu_kernels
from release_runs import DEVICE, assert_equal, distance, llama, loss_of, make, train
from torch import nn
from torch.utils.checkpoint import checkpoint
from zoo_models import values

from optimzoo import release


class Shared(nn.Module):
    """A weight used twice, one that is not used, a frozen one; a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.twice = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.reentrant = None  # else: each use of the weight under a checkpoint

    def forward(self, ids):
        x = self.frozen(self.embed(ids))
        for _ in range(2):
            if self.reentrant is None:
                x = self.twice(x).tanh()
            else:
                use = self.reentrant
                x = checkpoint(lambda x: self.twice(x).tanh(), x, use_reentrant=use)
        return nn.functional.cross_entropy(self.lm_head(x), ids)


IDS = torch.arange(11, device=DEVICE)


def run(model, optimizer, steps=5):
    for _ in range(steps):
        model(IDS).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("name", ["scale", "adamw", "muon", "apollo"])
def test_tied_twice_used_idle_and_frozen_weights(name, reentrant):
    models = [Shared().to(DEVICE), Shared().to(DEVICE)]
    for i, model in enumerate(models):
        model.reentrant = reentrant
        optimizer = make(name, model)
        if i:
            release(optimizer)
        run(model, optimizer)
        model.frozen.requires_grad_(True)  # waits for the step: it had no hook
        model.idle.requires_grad_(False)
        run(model, optimizer)
    assert_equal(*models)


def test_a_reentrant_checkpoint_of_a_shared_weight_is_refused():
    model = Shared().to(DEVICE)
    model.reentrant = True
    optimizer = make("adamw", model)
    release(optimizer)
    with pytest.raises(RuntimeError, match="use_reentrant=False gives one"):
        model(IDS).backward()


def test_autocast_and_evaluations_between():
    models = [llama(), llama()]
    for i, model in enumerate(models):
        optimizer = make("scale", model)
        if i:
            release(optimizer)
        for step in range(5):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = loss_of(model, step)
            loss.backward()
            model.eval()
            with torch.no_grad():
                loss_of(model, step)
            model.train()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(*models)


def test_a_backward_that_raises_leaves_whole_steps():
    model, expected = llama(), llama()
    train(expected, make("adamw", expected), range(1))
    optimizer = make("adamw", model)
    released = release(optimizer)
    start = values(model)
    fail = model.model.layers[0].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss_of(model, 0).backward()
    fail.remove()
    moved = [not torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True)]
    assert 0 < sum(moved) < len(moved)
    triples = zip(model.parameters(), expected.parameters(), moved, strict=True)
    assert all(torch.equal(p, q) for p, q, has_moved in triples if has_moved)
    with pytest.raises(RuntimeError, match=r"released.discard"):
        loss_of(model, 0).backward()
    released.discard()
    train(model, optimizer, range(2))
    steps = [optimizer.state[p]["step"].item() for p in model.parameters()]
    assert steps == [2 + has_moved for has_moved in moved]


def scaled_steps(name, *, released, clip=None, explicit=False, steps=6, **hyper):
    model = llama()
    optimizer = make(name, model, **hyper)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12, growth_interval=2)
    handle = release(optimizer, max_norm=clip, scaler=scaler) if released else None
    for step in range(steps):
        scaler.scale(loss_of(model, step)).backward()
        if explicit or clip:
            scaler.unscale_(optimizer)
        if clip and not released:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    if handle is not None:
        handle.remove()
        assert "_unscale_grads_" not in vars(scaler)
    return model, scaler.get_scale(), optimizer


@pytest.mark.parametrize(
    ("name", "hyper"),
    [("scale", {}), ("apollo", {}), ("adamw", {}), ("adamw", {"fused": True})],
    ids=str,
)
@pytest.mark.parametrize("explicit", [False, True])
def test_loss_scaling_gives_the_same_bits(name, hyper, explicit):
    model, scale, optimizer = scaled_steps(name, released=False, explicit=explicit, **hyper)
    own = scaled_steps(name, released=True, explicit=explicit, **hyper)
    assert_equal(model, own[0])
    assert own[1] == scale == 2.0**15
    flags = [getattr(o, "_step_supports_amp_scaling", None) for o in (optimizer, own[2])]
    assert flags[0] == flags[1]


def test_loss_scaling_and_clipping():
    model, scale, _ = scaled_steps("scale", released=False, clip=0.3)
    own, own_scale, _ = scaled_steps("scale", released=True, clip=0.3)
    assert distance(model, own) < 1e-6
    assert own_scale == scale


@pytest.mark.parametrize("bad", ["model.embed_tokens.weight", "lm_head.weight"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_not_applied(bad, clip, value):
    model = llama()
    optimizer = make("scale", model)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    released = release(optimizer, max_norm=clip, scaler=scaler)
    start = values(model)
    spoiled = model.get_parameter(bad)
    spoil = spoiled.register_hook(lambda grad: torch.full_like(grad, value))
    for round_ in range(2):  # the second: a skipped step ends the round
        scaler.scale(loss_of(model, round_)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**10
    for (name, p), old in zip(model.named_parameters(), start, strict=True):
        waits = clip is not None and (p.ndim == 1 or p is model.lm_head.weight)
        assert torch.equal(p, old) == (p is spoiled or waits), name
        assert p.isfinite().all(), name
    spoil.remove()
    scaler.scale(loss_of(model, 2)).backward()
    scaler.step(optimizer)
    assert not torch.equal(spoiled, start[[n for n, _ in model.named_parameters()].index(bad)])
    released.remove()


def test_two_optimizers_and_one_scaler():
    models = [llama(), llama()]
    for i, model in enumerate(models):
        params = list(model.parameters())
        both = [torch.optim.AdamW(params[:9]), torch.optim.SGD(params[9:], lr=0.01)]
        scaler = torch.amp.GradScaler(DEVICE)
        handles = [release(o, scaler=scaler) for o in both] if i else []
        for step in range(3):
            scaler.scale(loss_of(model, step)).backward()
            for optimizer in both:
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        for handle in handles:
            handle.remove()
    assert_equal(*models)
    scaler.scale(loss_of(models[1], 3)).backward()
    scaler.step(both[0])  # as before the release, in whatever order that was removed


def test_float16_gradients_cannot_be_unscaled():
    weight = nn.Parameter(torch.ones(3, 2, dtype=torch.float16, device=DEVICE))
    scaler = torch.amp.GradScaler(DEVICE)
    release(torch.optim.SGD([weight], lr=0.1), scaler=scaler)
    with pytest.raises(RuntimeError, match="float16 gradients cannot be unscaled; keep float32"):
        scaler.scale(weight.float().sum()).backward()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group(
        "nccl" if DEVICE == "cuda" else "gloo", f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_replicas_are_refused(one_process):
    early, late = llama(), llama()
    replica = nn.parallel.DistributedDataParallel(early)
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel averages.*fully_shard"):
        release(make("scale", early))
    released = release(make("scale", late))
    replica = nn.parallel.DistributedDataParallel(late)
    start = values(late)
    with pytest.raises(RuntimeError, match=r"DistributedDataParallel averages.*fully_shard"):
        loss_of(replica, 0).backward()
    released.remove()
    assert all(torch.equal(p, old) for p, old in zip(late.parameters(), start, strict=True))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_sharded_weights(one_process, clip):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    models = [llama(), llama()]
    for i, model in enumerate(models):
        mesh = dist.device_mesh.init_device_mesh(DEVICE, (1,))
        for part in (*model.model.layers, model):
            fsdp.fully_shard(part, mesh=mesh)
        optimizer = make("scale", model)
        released = release(optimizer, max_norm=clip) if i else None
        norms = train(model, optimizer, range(5), clip=clip, released=released)
    assert distance(*models) < (1e-6 if clip else 1e-30)
    assert bool(norms) == bool(clip)


def test_what_is_dropped_is_freed():
    """Also the weights: a garbage collector does not see what a parameter's hooks hold."""

    def trained():
        model = llama()
        optimizer = make("scale", model)
        released = release(optimizer, max_norm=1.0)
        train(model, optimizer, range(2), released=released)
        return weakref.ref(model.lm_head.weight), weakref.ref(optimizer)

    refs = trained()
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_without_its_optimizer_a_backward_says_so():
    model = llama()
    release(make("scale", model))
    gc.collect()
    with pytest.raises(RuntimeError, match=r"was released to is gone; keep it, or end the release"):
        loss_of(model, 0).backward()
    model.zero_grad()
    optimizer = make("scale", model)
    release(optimizer)  # takes the place of what is gone
    before = values(model)
    loss_of(model, 0).backward()
    after = values(model)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@needs_cpu_kernels
def test_clipping_where_the_optimizer_unscales_by_itself():
    """With `fused=True` the scaler leaves unscaling to the kernels; the norm is unscaled."""
    norms = []
    for fused in (None, True):
        model = llama()
        optimizer = make("scale", model, fused=fused)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
        with release(optimizer, max_norm=0.3, scaler=scaler) as released:
            scaler.scale(loss_of(model, 0)).backward()
            scaler.step(optimizer)
            norms.append(float(released.grad_norm))
        assert optimizer.state[model.lm_head.weight]["exp_avg"].norm() > 1e-4
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_wrapper_of_an_optimizer_is_refused_and_nothing_is_left():
    model = llama()

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

    with pytest.raises(TypeError, match="Wrapper wraps an optimizer; release that one"):
        release(Wrapper(make("scale", model)))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
