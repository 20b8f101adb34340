"""Roles in models of Hugging Face transformers, and in the harness's own Llama."""

import re

import pytest
import torch
from test_roles import assert_complete, names

from optimzoo import SCALE, describe, param_groups
from optimzoo.models.llama import Llama, LlamaConfig

transformers = pytest.importorskip("transformers")

TOKENS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEO = {
    **{k: v for k, v in LLAMA.items() if "num" not in k},
    **{"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
}
OPT = {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 16}
BLOOM = {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MAMBA = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
T5 = {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
EXPERTS = {**LLAMA, "num_local_experts": 3, "head_dim": 8}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
OSS = {**EXPERTS, "rope_parameters": {**YARN, "rope_theta": 1e4}}

UNTIED, TIED = ("lm_head.weight", False), ("model.embed_tokens.weight", True)
TOKEN = {"model.embed_tokens.weight"}
WORDS = ("transformer.word_embeddings.weight", True)
CAUSAL = {  # model type: options of its configuration, (head, tied), embeddings
    "gpt2": (GPT2, ("transformer.wte.weight", True), {"transformer.wpe.weight"}),
    "gpt_neo": (NEO, ("transformer.wte.weight", True), {"transformer.wpe.weight"}),
    "gpt_neox": (LLAMA, UNTIED, {"gpt_neox.embed_in.weight"}),
    "llama": (LLAMA, UNTIED, TOKEN),
    "mistral": (LLAMA, UNTIED, TOKEN),
    "mixtral": (EXPERTS, UNTIED, TOKEN),
    "qwen2": (LLAMA, UNTIED, TOKEN),
    "qwen3": ({**LLAMA, "head_dim": 8}, UNTIED, TOKEN),
    "gemma": ({**LLAMA, "head_dim": 8}, TIED, set()),
    "gemma2": ({**LLAMA, "head_dim": 8}, TIED, set()),
    "opt": (
        OPT,
        ("model.decoder.embed_tokens.weight", True),
        {"model.decoder.embed_positions.weight"},
    ),
    "bloom": (BLOOM, WORDS, set()),
    "falcon": ({**TOKENS, **LLAMA}, WORDS, set()),
    "phi": (LLAMA, UNTIED, TOKEN),
    "mamba": (MAMBA, ("backbone.embeddings.weight", True), set()),
    "gpt_oss": (OSS, UNTIED, TOKEN),
    "stablelm": (LLAMA, UNTIED, TOKEN),
    "olmo": (LLAMA, UNTIED, TOKEN),
}
# In these the rest of two dimensions and more is not one hidden matrix [out, in] each.
TRANSPOSED = {"gpt2": r"\.(c_attn|c_proj|c_fc)\.weight$", "gpt_oss": r"\.experts\.\w+_proj$"}
STACKED = {"mixtral": r"\.experts\.\w+_proj$", "gpt_oss": r"\.experts\.\w+_proj$"}
VECTORS = {"mamba": r"\.A_log$", "gpt_oss": r"\.experts\.\w+_bias$"}


def causal_lm(kind, **options):
    config = transformers.AutoConfig.for_model(kind, **CAUSAL[kind][0] | options)
    return transformers.AutoModelForCausalLM.from_config(config)


def matching(model, pattern):
    """The names that `pattern` matches: some, unless there is no pattern."""
    found = {n for n, _ in model.named_parameters() if pattern and re.search(pattern, n)}
    assert bool(found) == bool(pattern), pattern
    return found


def assert_described(groups, model):
    text = describe(groups)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    counted = sum(int(line.split()[2].replace(",", "")) for line in lines[1 : len(groups) + 1])
    assert counted == model.num_parameters()
    assert [line.split()[0] for line in lines[1:]] == [group["role"] for group in groups]
    assert ("tied" in text) == any(group["tied"] for group in groups)


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_language_models(kind):
    _, (head, tied), embeddings = CAUSAL[kind]
    model = causal_lm(kind)
    groups = param_groups(model)
    assert_complete(groups, model)
    assert names(groups, "head") == {head}
    assert names(groups, tied=True) == ({head} if tied else set())
    assert names(groups, "embedding") == embeddings
    vectors = {n for n, p in model.named_parameters() if p.ndim < 2}
    assert names(groups, "vector") == vectors | matching(model, VECTORS.get(kind))
    assert names(groups, transposed=True) == matching(model, TRANSPOSED.get(kind))
    assert names(groups, stacked=True) == matching(model, STACKED.get(kind))
    assert_described(groups, model)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "qwen2", "bloom"])
def test_tying_is_read_from_the_weights(kind):
    for tied in (False, True):
        model = causal_lm(kind, tie_word_embeddings=tied)
        groups = param_groups(model)
        assert_complete(groups, model)
        assert bool(names(groups, tied=True)) == tied
        assert names(groups, "head") == (
            {"lm_head.weight"} if not tied else names(groups, tied=True)
        )
        table = model.get_input_embeddings().weight
        role = next(g["role"] for g in groups for p in g["params"] if p is table)
        assert role == ("head" if tied else "embedding")


def test_transposed_weights_are_normalised_per_output():
    model = causal_lm("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight  # [in, out]
    optimizer = SCALE(param_groups(model), lr=0.5)
    before = weight.detach().clone()
    weight.grad = torch.randn_like(weight) * torch.logspace(-3, 3, weight.shape[1])
    optimizer.step()
    per_output = (weight - before).detach().square().mean(0).sqrt()
    torch.testing.assert_close(per_output, torch.full_like(per_output, 0.5), atol=1e-5, rtol=1e-5)


def test_a_sequence_to_sequence_model():
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    groups = param_groups(model)
    assert_complete(groups, model)
    assert names(groups, "head") == {"shared.weight"} == names(groups, tied=True)
    assert all("relative_attention_bias" in name for name in names(groups, "embedding"))
    assert len(names(groups, "embedding")) == 2
    assert all("layer_norm" in name for name in names(groups, "vector"))
    assert_described(groups, model)


def test_a_classifier():
    config = transformers.LlamaConfig(**LLAMA, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config)
    groups = param_groups(model)
    assert_complete(groups, model)
    assert names(groups, "head") == {"score.weight"}
    assert names(groups, "embedding") == TOKEN
    assert_described(groups, model)


def test_a_model_without_a_head_says_so():
    groups = param_groups(transformers.LlamaModel(transformers.LlamaConfig(**LLAMA)))
    assert names(groups, "head") == set()
    assert describe(groups).endswith("name it with overrides={'REGEX': 'head'}")


@pytest.mark.parametrize("tied", [False, True])
def test_the_harness_llama_has_the_roles_of_transformers(tied):
    ours = Llama(LlamaConfig(97, 32, 48, 2, 4, tie_word_embeddings=tied))
    theirs = causal_lm("llama", num_key_value_heads=4, tie_word_embeddings=tied)
    groups = param_groups(ours)
    assert_complete(groups, ours)
    expected = param_groups(theirs)
    assert [set(g["param_names"]) for g in groups] == [set(g["param_names"]) for g in expected]
    assert describe(groups) == describe(expected)
