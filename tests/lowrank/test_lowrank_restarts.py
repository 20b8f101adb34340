"""Restarts and ReLoRA: one clock, the schedule, resuming, replicas."""

import copy
import io
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference.lowrank_numpy import recovering
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from optimzoo import create_optimizer
from optimzoo.lowrank import ReLoRA, Restarts, convert, quick_recovery, refactorize_
from optimzoo.models.llama import Llama, LlamaConfig

KINDS = ("low_rank", "sltrain", "lora")


def cosine(step: int) -> float:
    return min((step + 1) / 7, 0.1 + 0.45 * (1 + math.cos(math.pi * step / 40)))


@pytest.mark.parametrize(("every", "recovery"), [(10, 4), (10, 9), (20, 10), (3, 1), (3, 2)])
def test_the_schedule_is_the_authors(every, recovery):
    factor = quick_recovery(cosine, every, recovery)
    wanted = recovering(cosine, every, recovery, 41)
    assert [factor(step) for step in range(41)] == pytest.approx(wanted, rel=1e-12)


def test_without_recovery_the_schedule_is_the_base():
    factor = quick_recovery(cosine, 7, 0)
    assert [factor(step) for step in range(41)] == [cosine(step) for step in range(41)]


def test_ten_factors_after_a_restart_sum_to_six():
    """Their climb's first point is past when the scheduler is made: 1 to 9 ninths and the base."""
    factor = quick_recovery(lambda step: 1.0, 200)
    climb = [factor(step) for step in range(200, 210)]
    assert climb[0] == pytest.approx(0.112)
    assert climb[8:] == [1.0, 1.0]
    assert sum(climb) == pytest.approx(9 * 0.001 + 0.999 * 45 / 9 + 1)


def test_the_last_update_before_a_restart_has_the_climbs_start():
    factor = quick_recovery(cosine, 20, 10)
    assert factor(39) == pytest.approx(0.001 * cosine(50))
    assert factor(19) == cosine(19), "the first cycle has the schedule of the base"


def test_without_an_offset_the_climb_starts_at_the_restart_and_meets_its_base():
    factor = quick_recovery(cosine, 20, 10, offset=0)
    assert factor(20) == pytest.approx(0.001 * cosine(30))
    assert factor(29) == cosine(30)
    for step in (0, 5, 19, 30, 39):
        assert factor(step) == cosine(step)
    with pytest.raises(ValueError, match="recovery_steps is 20; it must be from 0 to every=20"):
        quick_recovery(cosine, 20, 20)
    with pytest.raises(ValueError, match="start is 2; it must be from 0 to 1"):
        quick_recovery(cosine, 20, 10, start=2)
    with pytest.raises(ValueError, match="offset is 2; it must be 0 or 1"):
        quick_recovery(cosine, 20, 10, offset=2)


class Session:
    """A model, its optimizer, restarts and schedule, on random tokens."""

    def __init__(self, kind="low_rank", optimizer="adamw", dtype=torch.float32, **options) -> None:
        self.model = Llama(LlamaConfig(50, 16, 24, 2, 2)).to(dtype)
        convert(self.model, 4, kind, alpha=4.0)
        self.optimizer = create_optimizer(optimizer, self.model, lr=1e-2)
        cls = ReLoRA if options.pop("relora", False) else Restarts
        self.restarts = cls(
            self.model, self.optimizer, **{"every": 6, "recovery_steps": 3, **options}
        )
        self.scheduler = self.restarts.scheduler(cosine)
        self.step = 0

    def parts(self):
        return self.model, self.optimizer, self.scheduler, self.restarts

    def run(self, steps: int, forward=None) -> list[float]:
        losses = []
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            x = torch.randint(0, 50, (2, 8), generator=generator)
            self.optimizer.zero_grad()
            loss = (forward or self.model)(x, x.roll(-1, 1))
            loss.backward()
            self.optimizer.step()
            self.restarts.step()
            self.scheduler.step()
            self.step += 1
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer", ["adamw", "scale"])
def test_a_restart_keeps_the_function_and_starts_the_moments(kind, optimizer):
    session = Session(kind, optimizer, torch.float64)
    session.run(5)
    tokens = torch.arange(16).reshape(2, 8)
    factors = [(m, m.B.clone()) for m in session.restarts.layers.values()]
    kept = []
    session.optimizer.register_step_post_hook(lambda *_: kept.append(session.model(tokens)))
    session.run(1)
    torch.testing.assert_close(session.model(tokens), kept[0], rtol=1e-9, atol=1e-9)
    for layer, old in factors:
        assert not torch.allclose(layer.B, old, atol=1e-3)
        assert layer.B.norm().item() == pytest.approx(layer.A.norm().item())
    states = list(session.optimizer.state.values())
    assert states and all(not v.any() for s in states for v in s.values())
    assert session.scheduler.get_last_lr()[0] == pytest.approx(1e-2 * (0.001 + 0.4995) * cosine(9))
    session.run(3)
    assert session.scheduler.get_last_lr()[0] == pytest.approx(1e-2 * cosine(10))


@pytest.mark.parametrize(("refactorize", "reset"), [(True, False), (False, True), (False, False)])
def test_each_trick_alone(refactorize, reset):
    session = Session(refactorize=refactorize, reset=reset, recovery_steps=0)
    layer = next(iter(session.restarts.layers.values()))
    session.run(6)
    balanced = layer.B.norm().item() == pytest.approx(layer.A.norm().item(), rel=1e-5)
    assert balanced == refactorize
    assert session.optimizer.state[layer.B]["exp_avg"].any() != reset
    rates = session.scheduler.get_last_lr()
    assert rates == pytest.approx([1e-2 * cosine(6)] * len(rates))


CASES = [
    {"kind": "low_rank"},
    {"kind": "sltrain"},
    {"kind": "lora", "relora": True},
    {"kind": "lora", "relora": True, "prune": 0.5, "seed": 3},
]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("stop", [3, 6, 11])
def test_resumed_to_the_same_bits(case, stop):
    straight = Session(**case)
    losses = straight.run(15)
    first = Session(**case)
    first.run(stop)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first.parts()], buffer)
    buffer.seek(0)
    second = Session(**case)
    second.step = stop
    for part, state in zip(second.parts(), torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert second.run(15 - stop) == losses[stop:]
    for p, q in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_relora_merges_and_prunes_the_factors_alone():
    session = Session("lora", relora=True, prune=0.9, dtype=torch.float64)
    session.run(5)
    frozen = {n: m.frozen.clone() for n, m in session.restarts.layers.items()}
    tokens, kept = torch.arange(16).reshape(2, 8), []
    session.optimizer.register_step_post_hook(lambda *_: kept.append(session.model(tokens)))
    session.run(1)
    torch.testing.assert_close(session.model(tokens), kept[0], rtol=1e-9, atol=1e-9)
    shares = []
    for name, layer in session.restarts.layers.items():
        assert not layer.B.any() and not torch.equal(layer.frozen, frozen[name])
        for p in (layer.A, layer.B):
            state = session.optimizer.state[p]
            assert state["step"] == 6
            shares += [
                (state[key] == 0).double().mean().item() for key in ("exp_avg", "exp_avg_sq")
            ]
    assert 0.85 < sum(shares) / len(shares) < 0.95
    head = session.optimizer.state[session.model.lm_head.weight]
    assert head["exp_avg"].all()
    start = next(iter(session.restarts.layers.values())).A.clone()
    session.run(6)
    assert not torch.equal(next(iter(session.restarts.layers.values())).A, start)
    unpruned = Session("lora", relora=True, prune=0)
    unpruned.run(6)
    layer = next(iter(unpruned.restarts.layers.values()))
    assert unpruned.optimizer.state[layer.B]["exp_avg"].all()


def replica(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=2, rank=rank)
    torch.set_num_threads(1)
    found = {}
    for name, case in {"restarts": CASES[1], "relora": CASES[3]}.items():
        session = Session(**copy.deepcopy(case))
        session.step = 100 * rank  # other data at each rank
        session.run(14, DistributedDataParallel(session.model))
        found[name] = session.model.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
def test_replicas_stay_equal_to_the_bit(tmp_path):
    mp.spawn(replica, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("restarts", "relora"):
        assert first[name].keys() == second[name].keys()
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), (name, key)


def test_bad_input():
    net = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(net.parameters())
    for cls in (Restarts, ReLoRA):
        with pytest.raises(ValueError, match="Sequential has no low-rank layer; convert it first"):
            cls(net, optimizer)
    convert(net, 2)
    optimizer = torch.optim.Rprop(net.parameters())
    with pytest.raises(ValueError, match="0 has no frozen weight to merge into; convert with"):
        ReLoRA(net, optimizer)
    with pytest.raises(ValueError, match="every is 0"):
        Restarts(net, optimizer, every=0, recovery_steps=0)
    with pytest.raises(ValueError, match="recovery_steps is 10; it must be from 0 to every=5"):
        Restarts(net, optimizer, every=5)
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    restarts, before = Restarts(net, optimizer), net[0].B.clone()
    with pytest.raises(ValueError, match=r"Rprop has the state .* not recognised"):
        restarts.step()
    with pytest.raises(ValueError, match="Rprop has the state"):
        restarts.fire()
    assert torch.equal(net[0].B, before)  # neither half of the restart was done
    assert Restarts(net, optimizer, reset=False).step() is False
    assert refactorize_(net) == 1


@pytest.mark.parametrize("kind", [Restarts, ReLoRA])
def test_an_optimizer_of_the_weights_before_is_refused(kind):
    model = Llama(LlamaConfig(32, 16, 24, 1, 2, 64), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    convert(model, 2, "lora")
    with pytest.raises(
        ValueError, match=r"no factor of the model's low-rank layers; make it after"
    ):
        kind(model, optimizer, every=20)
