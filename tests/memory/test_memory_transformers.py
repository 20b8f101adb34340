"""Account and simulated peaks of models from transformers, against real steps of theirs.

Dense and mixture-of-experts ones, tied heads, sliding windows, dropout; converted and frozen ones.
"""

import gc
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from memory_steps import training_step

from optimzoo import create_optimizer, list_optimizers
from optimzoo.cli import main
from optimzoo.memory import account, measure, simulate
from optimzoo.memory.sharded import pretended_mesh, shard_model
from optimzoo.memory.simulate import blocks_of
from optimzoo.memory.sources import convert_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("few_objects")

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {
    **{"vocab_size": 509, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    **{"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 6, "num_experts_per_tok": 2}
MODELS = {
    "llama": SHAPE,
    "gpt2": {"vocab_size": 509, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma3_text": {**SHAPE, "head_dim": 16, "sliding_window": 16},
    "qwen3_moe": {**SHAPE, "head_dim": 16, **EXPERTS},
}
REQUIRED = {"adams": {"l1": 1e-4, "total_steps": 100}}
RANKED = {name: {"rank": 8} for name in ("galore", "natural_galore", "fira", "apollo")}
CONVERSIONS = ("low_rank=8", "sltrain=8", "lora=4", "cast=2:4")


def make(kind, device="cpu", conversion=None):
    config = transformers.AutoConfig.for_model(kind, **MODELS[kind], use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config).train()
    if conversion:
        convert_model(model, conversion)
    return model


def really(make_model, name, batch, seq, **hyper):
    """Three training steps: their peak above what the process held, and what they hold then."""
    gc.collect()
    base = measure(lambda: None).tensors.bytes
    model = make_model()
    optimizer = create_optimizer(name, model, lr=1e-3, **hyper)
    step = training_step(model, optimizer, batch, seq)
    peak = measure(step, steps=3).tensors
    state = [v for values in optimizer.state.values() for v in values.values()]
    held = sum(v.numel() * v.element_size() for v in state if isinstance(v, torch.Tensor))
    params = sum(p.numel() * p.element_size() for p in model.parameters())
    return SimpleNamespace(bytes=peak.bytes - base, phase=peak.phase, state=held, params=params)


@pytest.mark.sampled(7)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", list_optimizers())
def test_bytes_are_those_of_real_steps(name, kind):
    hyper = {**REQUIRED.get(name, {}), **RANKED.get(name, {})}
    counted = account(make(kind, "meta"), name, **hyper)
    found = really(lambda: make(kind), name, 1, 8, **hyper)
    assert (counted.state_total, counted.params) == (found.state, found.params)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ("adamw", "scale", "muon"))
@pytest.mark.parametrize(("batch", "seq"), ((1, 8), (4, 64)))
def test_peaks_are_those_of_real_steps(name, kind, batch, seq):
    simulated = simulate(make(kind, "meta"), name, batch=batch, seq=seq).peak
    found = really(lambda: make(kind), name, batch, seq)
    assert simulated.bytes == pytest.approx(found.bytes, rel=0.01)
    assert simulated.phase == found.phase


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ("llama", "gpt2", "qwen3_moe"))
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_converted_models(conversion, kind):
    shapes = make(kind, "meta", conversion)
    counted = account(shapes, "adamw")
    simulated = simulate(shapes, "adamw", batch=2, seq=33).peak
    found = really(lambda: make(kind, "cpu", conversion), "adamw", 2, 33)
    assert (counted.state_total, counted.params) == (found.state, found.params)
    assert simulated.bytes == pytest.approx(found.bytes, rel=0.01)


def test_frozen_weights():
    """As an adapter's: one block trains, and nothing below it takes gradients or activations."""

    def half(device="cpu"):
        model = make("llama", device)
        for name, p in model.named_parameters():
            p.requires_grad_("layers.1." in name)
        return model

    counted = account(half("meta"), "adamw")
    simulated = simulate(half("meta"), "adamw", batch=2, seq=33).peak
    found = really(half, "adamw", 2, 33)
    assert (counted.state_total, counted.params) == (found.state, found.params)
    assert counted.grads < counted.params / 3
    assert simulated.bytes == pytest.approx(found.bytes, rel=0.01)
    whole = simulate(make("llama", "meta"), "adamw", batch=2, seq=33).peak
    assert simulated.bytes < 0.8 * whole.bytes


def test_adapters_alone_by_a_module(tmp_path, monkeypatch, capsys):
    """The example of docs/memory.md, of a small model."""
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text(json.dumps({"model_type": "llama", **MODELS["llama"]}))
    Path("own.py").write_text(code.replace("Llama-3.1-8B", "config.json"))
    options = ("--optimizer", "adamw", "--dtype", "float32", "--seq", "8", "--json", "out.json")
    assert main(["memory", "--module", "own.py:make", *options]) == 0
    [found] = json.loads(Path("out.json").read_text())["methods"]
    layer = 2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 100)  # q and o, k and v, the MLP
    adapters, tensors = 2 * 16 * layer, 2 * 2 * 7
    assert found["gradients"] == 4 * adapters
    assert sum(found["state"]["hidden"].values()) == 4 * (2 * adapters + tensors)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ("adamw", "scale", "muon"))
def test_peaks_of_shards_are_those_of_fully_shard(name, kind):
    simulated = simulate(make(kind, "meta"), name, batch=2, seq=33, shards=3).peak
    with pretended_mesh(3) as mesh:

        def sharded():
            model = make(kind)
            shard_model(model, blocks_of(model), mesh)
            return model

        found = really(sharded, name, 2, 33)
    assert simulated.bytes == pytest.approx(found.bytes, rel=0.002)
    assert simulated.phase == found.phase
    counted = account(make(kind, "meta"), name, shards=3)
    assert simulated.by_category["optimizer state"] == counted.state_total


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_experts_are_simulated_in_every_dtype(dtype):
    model = make("qwen3_moe", "meta")
    peak = simulate(model, "scale", dtype=dtype, seq=8).peak
    weights = sum(p.numel() for p in model.parameters())
    assert peak.by_category["parameters"] == dtype.itemsize * weights
