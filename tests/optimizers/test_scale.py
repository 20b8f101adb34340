"""SCALE against an independent float64 transcription of the paper, then each of its promises."""

import copy
import math

import numpy as np
import pytest
import torch
from needs import needs_cpu_kernels
from reference.scale_numpy import ScaleReference
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from optimzoo import SCALE, param_groups
from optimzoo.models.llama import Llama, LlamaConfig
from optimzoo.subspace.newton_schulz import orthogonalize

VOCAB, WIDTH, STEPS = 97, 24, 50
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5}


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is [in, out]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """A mixture whose weights are one tensor [n, out, in]."""

    def __init__(self, count, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, outputs, inputs) * 0.1)

    def forward(self, x):
        return torch.einsum("noi,bti->btno", self.weight, x).sigmoid().mean(2)


class Odd(nn.Module):
    """The layouts that Llama lacks: transposed, convolution, stack, biases."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.widen = Conv1D(WIDTH, 37)
        self.experts = Experts(3, 37, WIDTH)
        self.conv = nn.Conv2d(2, 6, (3, 5), padding=(1, 2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids, labels):
        x = self.embed(ids)
        x = x + self.experts(torch.tanh(self.widen(x)))
        image = self.conv(x.unflatten(-1, (2, -1)).transpose(1, 2)).unflatten(1, (2, 3)).mean(2)
        x = x + image.transpose(1, 2).flatten(2)
        logits = self.lm_head(self.norm(x)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


ODD_KINDS = {
    "embed.weight": "embedding",
    "widen.weight": "conv1d",
    "experts.weight": "stack",
    "conv.weight": "linear",
    "lm_head.weight": "head",
    **dict.fromkeys(("widen.bias", "conv.bias", "lm_head.bias"), "vector"),
    **dict.fromkeys(("norm.weight", "norm.bias"), "vector"),
}


def odd():
    torch.manual_seed(1)
    return Odd(), ODD_KINDS


def llama(tied=False):
    model = Llama(LlamaConfig(VOCAB, WIDTH, 37, 1, 2, tie_word_embeddings=tied), seed=1)
    kinds = {}
    for name, p in model.named_parameters():
        if name == "model.embed_tokens.weight":
            kinds[name] = "head" if tied else "embedding"
        else:
            kinds[name] = "vector" if p.ndim == 1 else "linear"
    if not tied:
        kinds["lm_head.weight"] = "head"
    return model, kinds


def tied_llama():
    return llama(tied=True)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (2, 12), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def schedule(step):
    """Warm-up over 10 steps, then a cosine to a tenth."""
    return min((step + 1) / 10, 0.55 + 0.45 * math.cos(math.pi * step / STEPS))


def random_grads(model, seed, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator) * 0.01 * factor).to(p.dtype)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def distance(value, reference):
    difference = value.detach().double().numpy() - reference
    return np.linalg.norm(difference) / np.linalg.norm(reference)


FIDELITY = {
    "plain": (llama, {}),
    "l2": (llama, {"norm": "l2", "lr": 0.1, "vector_lr": 0.01}),
    "weight_decay": (llama, {"weight_decay": 0.1}),
    "l2-weight_decay": (llama, {"norm": "l2", "weight_decay": 0.1, "vector_lr": 0.02}),
    "cautious": (llama, {"weight_decay": 0.5, "weight_decay_style": "cautious"}),
    "odd-cautious-row": (
        *(odd, {"weight_decay": 0.5, "weight_decay_style": "cautious", "normalize": "row"}),
    ),
    "vector_lr": (llama, {"vector_lr": 0.03}),
    "other_betas": (llama, {"other_betas": (0.8, 0.95), "other_eps": 1e-3}),
    "maximize": (llama, {"maximize": True, "weight_decay": 0.1}),
    "row": (llama, {"normalize": "row"}),
    "row-l2": (llama, {"normalize": "row", "norm": "l2"}),
    "sign": (llama, {"normalize": "sign"}),
    "momentum0": (llama, {"momentum": 0.0}),
    "momentum0.5": (llama, {"momentum": 0.5}),
    "nesterov": (llama, {"nesterov": True}),
    "nesterov-row": (llama, {"nesterov": True, "normalize": "row", "momentum": 0.8}),
    "nesterov-sign": (llama, {"nesterov": True, "normalize": "sign", "maximize": True}),
    "tied-nesterov": (tied_llama, {"nesterov": True, "weight_decay": 0.1}),
    "eps": (llama, {"eps": 3e-3}),
    "tied": (tied_llama, {"weight_decay": 0.1}),
    "tied-row": (tied_llama, {"normalize": "row"}),
    "odd": (odd, {}),
    "odd-l2": (odd, {"norm": "l2", "weight_decay": 0.1, "vector_lr": 0.02, "lr": 0.05}),
    "odd-row": (odd, {"normalize": "row"}),
    "odd-norm": (odd, {"spectral_norm": True, "weight_decay": 0.1, "lr": 0.1, "vector_lr": 0.01}),
    "odd-sign-norm": (odd, {"spectral_norm": True, "normalize": "sign", "lr": 0.1}),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", FIDELITY)
def test_fifty_steps_follow_the_reference(case):
    """One training run gives the gradients; every path takes them, and so does the reference."""
    make, hyper = FIDELITY[case]
    hyper = {"lr": 0.01, **hyper}
    leader, kinds = make()
    runs = []
    for dtype, foreach in [(d, f) for d in (torch.float32, torch.float64) for f in (False, True)]:
        model = copy.deepcopy(leader).to(dtype) if runs else leader
        decay = hyper.get("weight_decay", 0.0)  # the reference's is of all, vectors too
        groups = [{**group, "weight_decay": decay} for group in param_groups(model)]
        optimizer = SCALE(groups, foreach=foreach, **hyper)
        runs.append((model, optimizer, LambdaLR(optimizer, schedule)))
    start = {name: p.detach().double().numpy() for name, p in leader.named_parameters()}
    reference = ScaleReference(start, kinds, **hyper)
    for step in range(STEPS):
        leader.zero_grad()
        leader(*batch(step)).backward()
        grads = {name: p.grad for name, p in leader.named_parameters()}
        if step % 7 == 3:  # the reference's step counts are per parameter, and so must ours be
            grads = {n: None if kinds[n] in ("head", "vector") else g for n, g in grads.items()}
        given = {name: g.double().numpy() for name, g in grads.items() if g is not None}
        reference.step(given, lr_factor=schedule(step))
        for model, optimizer, scheduler in runs:
            for name, p in model.named_parameters():
                p.grad = None if grads[name] is None else grads[name].to(p.dtype)
            optimizer.step()
            scheduler.step()
            for name, p in model.named_parameters():
                assert distance(p, reference.params[name]) <= LIMITS[p.dtype], (name, step, p.dtype)
    for name, value in reference.params.items():
        travelled = np.linalg.norm(value - start[name])
        assert travelled > 0.01 * np.linalg.norm(value), f"{name} hardly moved: nothing was tested"


@needs_cpu_kernels
@pytest.mark.parametrize("normalize", ["column", "row", "sign"])
def test_kernels_look_ahead_as_the_rule_does(normalize):
    results = []
    for fused in (True, False):
        weight = nn.Parameter(torch.arange(12.0).view(3, 4))
        groups = [{"params": [weight], "role": "head"}]
        optimizer = SCALE(groups, nesterov=True, normalize=normalize, fused=fused)
        for step in range(3):
            weight.grad = (torch.arange(12.0).view(3, 4) + step).cos()
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)
    assert not torch.equal(results[0], torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_group_may_give_momentum_to_any_role(foreach, nesterov):
    model = llama()[0].double()
    overrides = {"embed_tokens": {"momentum": 0.9}, "down_proj": {"momentum": 0.5}}
    groups = param_groups(model, overrides)
    optimizer = SCALE(groups, lr=0.01, foreach=foreach, nesterov=nesterov)
    embedding, down = model.model.embed_tokens.weight, model.model.layers[0].mlp.down_proj.weight
    expected = [embedding.detach().clone(), down.detach().clone()]
    averages = [torch.zeros_like(p) for p in expected]
    for step in range(10):
        model.zero_grad()
        model(*batch(step)).backward()
        for i, (p, beta, dim) in enumerate([(embedding, 0.9, 0), (down, 0.5, 1)]):
            averages[i] = beta * averages[i] + (1 - beta) * p.grad
            update = beta * averages[i] + (1 - beta) * p.grad if nesterov else averages[i]
            rms = update.square().mean(dim, keepdim=True).sqrt()
            expected[i] -= 0.01 * update / rms
        optimizer.step()
        assert_close([embedding.detach(), down.detach()], expected, rtol=1e-10, atol=1e-13)
    assert {id(p) for p, state in optimizer.state.items() if p.ndim > 1 and state} == {
        id(p) for p in (embedding, down, model.lm_head.weight)
    }


def gaussian(*shape, rank=None):
    generator = np.random.default_rng(sum(shape))
    if rank is None:
        return generator.normal(size=shape)
    return generator.normal(size=(shape[0], rank)) @ generator.normal(size=(rank, shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "matrices",
    [
        gaussian(61, 17),
        gaussian(17, 61),
        gaussian(32, 32),
        gaussian(1, 7),
        gaussian(7, 1),
        gaussian(1, 1),
        gaussian(3, 19, 33) * [[[1e-3]], [[1.0]], [[1e3]]],
        gaussian(2, 3, 33, 19),
        gaussian(40, 29, rank=5),
        gaussian(29, 40, rank=1),
        gaussian(61, 17) * 1e-5,
    ],
    ids=lambda m: "x".join(map(str, m.shape)),
)
def test_orthogonalize_sets_every_singular_value_to_about_one(matrices, dtype):
    result = orthogonalize(torch.tensor(matrices, dtype=dtype)).double().numpy()
    assert result.shape == matrices.shape
    slices = [x.reshape(-1, *x.shape[-2:]) for x in (matrices, result)]
    for matrix, orthogonal in zip(*slices, strict=True):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        rank = int((s > 1e-9 * s[0]).sum())
        u, vt = u[:, :rank], vt[:rank]
        core = u.T @ orthogonal @ vt.T  # in the basis of the input's own singular vectors
        values = np.diag(core)
        assert ((values >= 0.6) & (values <= 1.3)).all(), values
        assert np.linalg.norm(orthogonal - (u * values) @ vt) < 1e-3


def test_orthogonalize_keeps_zero_at_zero():
    stack = torch.zeros(2, 5, 9)
    stack[1] = torch.tensor(gaussian(5, 9))
    result = orthogonalize(stack)
    assert torch.equal(result[0], torch.zeros(5, 9))
    assert_close(result[1], orthogonalize(stack[1]))


@pytest.mark.parametrize("foreach", [False, True])
def test_spectral_updates_are_orthogonal_of_rms_one(foreach):
    moves = {}
    for norm in ("rms", "l2"):
        model, kinds = odd()
        before = weights(model)
        optimizer = SCALE(
            param_groups(model), lr=1.0, normalize="spectral", norm=norm, foreach=foreach
        )
        random_grads(model, seed=3)
        optimizer.step()
        moves[norm] = {
            name: (before[name] - p.detach()).double().numpy()
            for name, p in model.named_parameters()
            if kinds[name] != "vector"
        }
    for name, move in moves["l2"].items():
        assert 0.7 < np.sqrt(np.mean(moves["rms"][name] ** 2)) < 1.2, name
        matrices = move if move.ndim == 3 else [move.reshape(move.shape[0], -1)]
        for matrix in matrices:
            values = np.linalg.svd(matrix, compute_uv=False)
            assert 0.6 < values.min() <= values.max() < 1.3, name


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("normalize", ["column", "row", "sign", "spectral"])
def test_hidden_and_embedding_updates_ignore_the_gradients_scale(normalize, foreach):
    """The head must not: its average weighs each step's gradient by its size."""
    ends = []
    for factors in ((1.0, 1.0, 1.0, 1.0), (1e-4, 1e4, 1.0, 1e-4)):
        model, kinds = odd()
        optimizer = SCALE(param_groups(model), lr=0.01, normalize=normalize, foreach=foreach)
        for seed, factor in enumerate(factors):
            random_grads(model, seed, factor)
            optimizer.step()
        ends.append(weights(model))
    for name in kinds:
        if kinds[name] in ("head", "vector"):
            assert (ends[0][name] - ends[1][name]).abs().max() > 1e-3, name
        else:
            assert_close(ends[1][name], ends[0][name], rtol=1e-5, atol=1e-6)


def ulps_apart(a, b):
    """How many bfloat16 values lie between, elementwise; the codes of negatives run backwards."""
    codes = [x.detach().view(torch.int16).int() for x in (a, b)]
    first, second = (torch.where(c < 0, -32768 - c, c) for c in codes)
    return (first - second).abs()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"weight_decay": 0.1},
        {"lr": 0.1, "weight_decay": 1.0},
        {"normalize": "row", "norm": "l2"},
        {"normalize": "sign", "lr": 0.003},
        {"normalize": "spectral"},
    ],
    ids=str,
)
def test_a_bf16_step_is_the_fp32_step_rounded_once(hyper, foreach):
    hyper = {"lr": 0.01, **hyper}
    low = odd()[0].bfloat16()
    high = copy.deepcopy(low).float()
    random_grads(low, seed=5)
    optimizer = SCALE(param_groups(low), foreach=foreach, **hyper)
    optimizer.step()
    head, average = low.lm_head.weight, optimizer.state[low.lm_head.weight]["exp_avg"]
    assert average.dtype == torch.bfloat16
    assert ulps_apart(average, (head.grad.float() * 0.1).bfloat16()).max() <= 1
    for p, q in zip(low.parameters(), high.parameters(), strict=True):
        q.grad = (average if p is head else p.grad).float()
    reference = SCALE(param_groups(high), foreach=foreach, **hyper, momentum=0.0)
    reference.step()
    for (name, p), q in zip(low.named_parameters(), high.parameters(), strict=True):
        apart = ulps_apart(p, q.bfloat16())
        assert apart.max() <= 1, name
        assert apart.float().mean() < 0.005, name
    for key in ("exp_avg", "exp_avg_sq"):
        moment = optimizer.state[low.norm.bias][key]
        assert moment.dtype == torch.float32
        assert torch.equal(moment, reference.state[high.norm.bias][key])


REDUCED = {"embed": VOCAB, "widen": WIDTH, "experts": 37, "conv": 2 * 3 * 5, "lm_head": WIDTH}
LONGEST = {"embed": VOCAB, "widen": 37, "experts": 37, "conv": 2 * 3 * 5, "lm_head": VOCAB}


@pytest.mark.parametrize(("normalize", "lengths"), [("column", REDUCED), ("spectral", LONGEST)])
def test_l2_is_rms_with_the_learning_rate_times_the_root_of_the_length(normalize, lengths):
    ends = []
    for norm in ("rms", "l2"):
        model = odd()[0].double()
        overrides = {
            rf"^{layer}\.weight": {"lr": 0.01 * (math.sqrt(n) if norm == "l2" else 1.0)}
            for layer, n in lengths.items()
        }
        optimizer = SCALE(
            param_groups(model, overrides), vector_lr=0.01, norm=norm, normalize=normalize
        )
        for step in range(3):
            model.zero_grad()
            model(*batch(step)).backward()
            optimizer.step()
        ends.append(weights(model))
    assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("normalize", ["column", "row", "sign", "spectral"])
def test_what_has_no_gradient_does_not_move(normalize, foreach):
    model, _ = odd()
    optimizer = SCALE(param_groups(model), lr=0.1, normalize=normalize, foreach=foreach)
    before = weights(model)
    random_grads(model, seed=7)
    model.embed.weight.grad[5:90] = 0  # tokens not in the batch
    model.embed.weight.grad[:, 3] = 0
    model.lm_head.weight.grad[11] = 0
    model.experts.weight.grad[1] = 0  # an expert without tokens
    model.conv.weight.grad.zero_()
    still = {name: p.grad == 0 for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        moved = p.detach() != before[name]
        assert not moved[still[name]].any(), name
        assert moved[~still[name]].all(), name


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_the_heads_average_and_the_vectors_moments(dtype, foreach):
    model, kinds = odd()
    model.to(dtype)
    optimizer = SCALE(param_groups(model), foreach=foreach)
    assert not optimizer.state
    for step in range(2):
        random_grads(model, step)
        optimizer.step()
    names = {p: name for name, p in model.named_parameters()}
    keys = {names[p]: set(state) for p, state in optimizer.state.items() if state}
    vectors = [name for name, kind in kinds.items() if kind == "vector"]
    moments = {"step", "exp_avg", "exp_avg_sq"}
    assert keys == {"lm_head.weight": {"exp_avg"}, **dict.fromkeys(vectors, moments)}
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    total = sum(t.untyped_storage().nbytes() for t in tensors)
    elements = 37 + 6 + VOCAB + 2 * WIDTH
    assert total == VOCAB * WIDTH * dtype.itemsize + 8 * elements + 4 * len(vectors)
