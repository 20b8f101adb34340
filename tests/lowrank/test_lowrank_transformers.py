"""Conversion of Hugging Face models: GPT-2's transposed Conv1D, and a Llama."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from optimzoo import param_groups  # noqa: E402
from optimzoo.lowrank import LoRALinear, LowRankLinear, convert, merge, refactorize_  # noqa: E402

TOKENS = torch.arange(12).reshape(2, 6)


def gpt2():
    torch.manual_seed(0)
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 40}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()


def llama():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads)).eval()


@pytest.mark.parametrize(("make", "layers"), [(gpt2, 2 * 4), (llama, 2 * 7)])
@pytest.mark.parametrize("kind", ["low_rank", "sltrain", "lora"])
def test_there_and_back(make, layers, kind):
    model = make()
    names = {n: p.shape for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    before = model(TOKENS).logits
    audit = convert(model, 4, kind)
    assert len(audit) == layers
    assert not any("lm_head" in r.name or "embed" in r.name or "wte" in r.name for r in audit)
    if kind == "lora":
        torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".B"):
                p.normal_()
    assert refactorize_(model) == layers
    converted = model(TOKENS).logits
    roles = {n: g["role"] for g in param_groups(model) for n in g["param_names"]}
    assert {role for n, role in roles.items() if n.endswith((".A", ".B"))} == {"hidden"}
    assert merge(model) == layers
    torch.testing.assert_close(model(TOKENS).logits, converted, rtol=1e-3, atol=1e-4)
    assert {n: p.shape for n, p in model.named_parameters()} == names
    assert [type(m) for m in model.modules()] == kinds


def test_a_transposed_weight_is_turned():
    model = gpt2()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    assert weight.shape == (16, 64)
    convert(model, 4, "lora", targets="c_fc")
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, LoRALinear) and layer.was_conv1d
    assert torch.equal(layer.frozen, weight.T) and layer.B.shape == (64, 4)
    merge(model)
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, weight)
    convert(model, 4, targets="c_fc")
    assert isinstance(model.transformer.h[1].mlp.c_fc, LowRankLinear)
    loss = model(TOKENS, labels=TOKENS).loss
    loss.backward()
    assert model.transformer.h[1].mlp.c_fc.A.grad.any()
