"""Peaks under FSDP2, simulated, against ``fully_shard`` of real tensors with pretended partners."""

import gc
from contextlib import nullcontext

import pytest
import torch
from memory_steps import training_step

import optimzoo
from optimzoo import create_optimizer
from optimzoo.memory import (
    account,
    checkpoint_blocks,
    measure,
    simulate,
)
from optimzoo.memory.plan import Planner
from optimzoo.memory.sharded import pretended_mesh, shard_model
from optimzoo.memory.simulate import blocks_of
from optimzoo.models import Llama, LlamaConfig

CONFIG = LlamaConfig(509, 48, 132, 3, 3)
pytestmark = pytest.mark.usefixtures("few_objects")
CASES = [
    ("adamw", 2, {"batch": 2, "seq": 33}),
    ("adamw", 5, {"batch": 1, "seq": 3}),
    ("scale", 3, {"batch": 2, "seq": 33, "checkpointing": True}),
    ("scale", 3, {"batch": 2, "seq": 33, "release": True}),
    ("galore", 2, {"batch": 1, "seq": 3, "rank": 8, "update_proj_gap": 2}),
    ("swan", 2, {"batch": 1, "seq": 3}),
    ("sinkgd", 2, {"batch": 1, "seq": 3}),
    ("rmnp", 2, {"batch": 1, "seq": 3}),
]


def on_meta() -> Llama:
    with torch.device("meta"):
        return Llama(CONFIG)


def really(name, shards, *, batch, seq, checkpointing=False, release=False, **hyper):
    """Three training steps with ``fully_shard``, above what the process holds before."""
    gc.collect()
    base = measure(lambda: None).tensors
    with pretended_mesh(shards) as mesh:
        model = Llama(CONFIG)
        if checkpointing:
            checkpoint_blocks(model)
        shard_model(model, blocks_of(model), mesh)
        optimizer = create_optimizer(name, model, lr=1e-3, **hyper)
        step = training_step(model, optimizer, batch, seq)
        with optimzoo.release(optimizer) if release else nullcontext():
            found = measure(step, steps=3).tensors
    return found.bytes - base.bytes, found.phase


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "shards", "settings"), CASES, ids=str)
def test_the_simulated_peak_is_that_of_fully_shard(name, shards, settings):
    simulated = simulate(on_meta(), name, shards=shards, **settings).peak
    measured, phase = really(name, shards, **settings)
    assert simulated.bytes == pytest.approx(measured, rel=0.002)
    assert simulated.phase == phase


@pytest.mark.thorough
@pytest.mark.parametrize("name", ("adamw", "scale", "muon"))
def test_shared_simulations_give_what_each_alone_gives(name):
    planner = Planner(on_meta(), dtype=torch.bfloat16, seq=33, shards=3)
    method = planner.method(name)
    for checkpointing in (False, True):
        settings = {"batch": 2, "checkpointing": checkpointing}
        alone = simulate(on_meta(), name, dtype=torch.bfloat16, seq=33, shards=3, **settings).peak
        assert planner.peak(method, **settings).bytes == pytest.approx(alone.bytes, rel=1e-3)
    assert method.account == account(on_meta(), name, dtype=torch.bfloat16, shards=3)


@pytest.mark.thorough
def test_more_shards_take_less():
    peaks = [simulate(on_meta(), "adamw", seq=3, shards=n).peak.bytes for n in (1, 2, 8)]
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.thorough
def test_a_method_of_torch_that_takes_no_shards_says_so():
    with pytest.raises(ValueError, match=r"Adafactor does not step sharded weights: .*leave shard"):
        account(on_meta(), "adafactor", shards=2)


def test_shards_below_one_are_refused():
    with pytest.raises(ValueError, match="Invalid shards: 0; it must be at least 1"):
        simulate(on_meta(), "adamw", shards=0)
