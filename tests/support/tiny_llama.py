"""A small Llama of transformers, its batches, and what a step of SCALE must have done to it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import optimzoo
from optimzoo.roles import input_dim

VOCABULARY = 61


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**shape, **heads))


def rows(count, length=9, seed=1):
    """Random sentences, as a dataset of Trainer has them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


def batch(examples):
    return {key: torch.stack([e[key] for e in examples]) for key in examples[0]}


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def plain_loop(model, optimizer, batches):
    """The loop that every integration has to agree with."""
    for each in batches:
        model(**each).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def assert_stepped_by_scale(before, model, lr):
    """After one step every column (the paper's) of every matrix has moved by RMS `lr`."""
    checked = 0
    for group in optimzoo.param_groups(model):
        if group["role"] == "vector":
            continue
        dim = input_dim(group["role"], transposed=group["transposed"])
        for name, p in zip(group["param_names"], group["params"], strict=True):
            moved = (p.detach() - before[name]).square().mean(dim).sqrt()
            torch.testing.assert_close(moved, torch.full_like(moved, lr), atol=0, rtol=1e-3)
            checked += 1
    assert checked == 2 + 2 * 7


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda m, n=name: f"{n}: {m}")
