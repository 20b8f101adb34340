"""`python -m benchmarks oracle`: its model in float64 NumPy, its text, its rule, its verdict."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import PACK

from benchmarks.__main__ import main
from benchmarks.data.batches import Batches
from benchmarks.data.characters import character_corpus
from benchmarks.experiments import oracle
from benchmarks.training.config import lr_factor
from benchmarks.training.gpt import GPT, GPTConfig
from benchmarks.training.run import Run, make_optimizer
from optimzoo import param_groups

SMALL = GPTConfig(vocab_size=11, context=8, layers=2, heads=2, width=6)
PUBLISHED = GPTConfig(vocab_size=65)
erf = np.vectorize(math.erf)


def write_text(folder: Path, characters: int = 3000) -> Path:
    words = ["the", "king", "of", "night", "and", "sea:", "said", "to\n", "naïve", "🙂"]
    rng = random.Random(0)
    text = ""
    while len(text) < characters:
        text += rng.choice(words) + " "
    (folder / "made.txt").write_text(text[:characters], encoding="utf-8", newline="")
    return folder / "made.txt"


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setitem(oracle.SETTING, "steps", 3)


def run(text, out, *words):
    return main(["oracle", "shakespeare", "--data", str(text), "--out", str(out), *map(str, words)])


# The model.


def normalised(x, weight):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * weight


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(x, qkv, out, heads):
    """One head after the other; a query sees the keys up to its own."""
    length, width = x.shape
    later = np.triu(np.full((length, length), -np.inf), k=1)
    parts = []
    for q, k, v in zip(*(np.split(x @ w.T, heads, axis=1) for w in np.split(qkv, 3)), strict=True):
        parts.append(softmax(q @ k.T / math.sqrt(width // heads) + later) @ v)
    return np.concatenate(parts, axis=1) @ out.T


def logits_of(w, tokens, config):
    x = w["embedding.weight"][tokens] + w["positions.weight"][: len(tokens)]
    for i in range(config.layers):
        name = f"layers.{i}."
        y = normalised(x, w[name + "attention_norm.weight"])
        x = x + attention(
            y, w[name + "attention.qkv.weight"], w[name + "attention.out.weight"], config.heads
        )
        y = normalised(x, w[name + "mlp_norm.weight"]) @ w[name + "mlp.up.weight"].T
        y = y * 0.5 * (1 + erf(y / math.sqrt(2)))
        x = x + y @ w[name + "mlp.out.weight"].T
    return normalised(x, w["norm.weight"]) @ w["embedding.weight"].T


def loss_of(logits, labels):
    return -np.log(softmax(logits)[np.arange(len(labels)), labels]).mean()


def weights_of(model):
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def bent(config):
    """A model of which no two weights are alike: norms and residual projections far from init."""
    model = GPT(config, seed=3).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype), alpha=0.4)
    return model


@pytest.mark.parametrize("length", [1, 5, 8])
def test_the_model_is_the_numpy_one(length):
    model, rng = bent(SMALL), np.random.default_rng(length)
    tokens, labels = rng.integers(SMALL.vocab_size, size=(2, 3, length))
    expected = np.stack([logits_of(weights_of(model), row, SMALL) for row in tokens])
    logits = model(torch.from_numpy(tokens))
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-10, atol=1e-10)
    loss = model(torch.from_numpy(tokens), torch.from_numpy(labels)).item()
    pairs = zip(expected, labels, strict=True)
    assert loss == pytest.approx(np.mean([loss_of(*pair) for pair in pairs]), rel=1e-10)


def test_no_logit_hangs_on_a_later_token():
    model = bent(SMALL)
    tokens = torch.arange(8)[None]
    for t in range(8):
        changed = tokens.clone()
        changed[0, t] = 9
        differs = (model(tokens) != model(changed)).any(-1)[0].tolist()
        assert differs == [False] * t + [True] * (8 - t)


def test_the_published_size():
    model = GPT(PUBLISHED)
    count = sum(p.numel() for p in model.parameters())
    layer = 12 * 128**2 + 2 * 128
    assert count == 65 * 128 + 64 * 128 + 4 * layer + 128
    assert f"{(count - 64 * 128) / 1e6:.2f}" == "0.80"  # as nanoGPT counts, without positions


def test_head_and_embedding_are_one_weight_and_nothing_has_a_bias():
    model = GPT(PUBLISHED)
    assert model.lm_head.weight is model.embedding.weight
    assert not [name for name, _ in model.named_parameters() if "bias" in name]
    model(torch.arange(8)[None], torch.arange(8)[None]).backward()
    assert model.embedding.weight.grad[60].abs().sum() > 0  # no input: the head's gradient


def test_the_initial_weights():
    model = GPT(PUBLISHED, seed=1)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.ones_like(p))
            continue
        expected = 0.02 / math.sqrt(8) if name.endswith("out.weight") else 0.02
        assert p.std().item() == pytest.approx(expected, rel=0.05), name
        assert abs(p.mean().item()) < 5 * expected / math.sqrt(p.numel()), name
    same, other = GPT(PUBLISHED, seed=1), GPT(PUBLISHED, seed=2)
    assert all(map(torch.equal, model.parameters(), same.parameters()))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


def test_what_the_model_refuses():
    with pytest.raises(ValueError, match="9 tokens exceed context=8: shorten the sequence"):
        GPT(SMALL)(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="width=6 is not a multiple of 4 heads"):
        GPTConfig(vocab_size=11, width=6)


# The text.


@pytest.mark.parametrize("suffix", PACK)
def test_the_text_by_characters(text, suffix):
    plain = text.read_bytes().decode()
    packed = text.with_name(f"made.txt{suffix}")
    packed.write_bytes(PACK[suffix](text.read_bytes()))
    corpus = character_corpus(packed, seq_len=64)
    vocabulary = sorted(set(plain))
    assert corpus.vocab_size == len(vocabulary)
    assert "".join(vocabulary[i] for i in corpus.train) == plain[:2700]
    assert "".join(vocabulary[i] for i in corpus.valid) == plain[2700:]
    assert corpus.sha256 == character_corpus(text, seq_len=64).sha256


def test_the_batches_are_the_text_and_the_next_character(text):
    corpus = character_corpus(text, seq_len=64)
    plain = text.read_bytes().decode()
    vocabulary = np.array(sorted(set(plain)))
    batches = Batches(corpus.train, 12, 64, seed=0)
    assert len(batches) == 2699 // 64 // 12
    for step in range(len(batches)):
        inputs, labels = batches[step]
        assert inputs.shape == labels.shape == (12, 64)
        for x, y in zip(inputs, labels, strict=True):
            window = "".join(vocabulary[x.numpy()]) + vocabulary[y[-1]]
            assert window in plain[:2700]
            assert "".join(vocabulary[y.numpy()]) == window[1:]


def test_the_loss_is_that_of_the_whole_validation_split(text):
    corpus = character_corpus(text, seq_len=64)
    config = oracle.make_config(0, corpus)
    run = Run(config, corpus)
    weights, losses = weights_of(run.model), []
    for start in range(0, len(corpus.valid) - 64, 64):
        window = corpus.valid[start : start + 65].astype(np.int64)
        losses.append(loss_of(logits_of(weights, window[:-1], run.model.config), window[1:]))
    assert len(losses) == (300 - 1) // 64
    assert run.evaluate("valid") == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("missing.txt", None, "missing.txt does not exist; check the path"),
        ("made.bin", 3000, "made.bin: unknown suffix; give .txt or .jsonl"),
        ("made.txt", 640, "made.txt has 640 characters; its last tenth must have more than 64"),
        ("made.txt", 0, "made.txt has 0 characters"),
    ],
)
def test_a_text_that_will_not_do_is_refused(tmp_path, capsys, name, size, message):
    if size is not None:
        (tmp_path / name).write_text("x" * size)
    assert run(tmp_path / name, tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The rule.


def test_the_learning_rate_is_nanogpts(text):
    config = oracle.make_config(0, character_corpus(text, 64))

    def published(step):  # after its warm-up, which reaches 1e-3 a step later than ours
        decay = (step - 100) / (2000 - 100)
        return 1e-4 + 0.5 * (1 + math.cos(math.pi * decay)) * (1e-3 - 1e-4)

    for step in (100, 101, 1050, 1999, 2000):
        assert config.lr * lr_factor(step, config) == pytest.approx(published(step), rel=1e-12)
    for step in (0, 49, 99):
        assert config.lr * lr_factor(step, config) == pytest.approx((step + 1) / 100 * 1e-3)
    assert (config.batch_size, config.seq_len, config.clip) == (12, 64, 1.0)


def test_matrices_decay_and_vectors_do_not(text):
    config = oracle.make_config(0, character_corpus(text, 64))
    model = GPT(PUBLISHED)
    optimizer = make_optimizer(config, model)
    assert type(optimizer) is torch.optim.AdamW
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        group = groups[id(p)]
        assert group["weight_decay"] == (0.1 if p.dim() >= 2 else 0.0), name
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (1e-3, (0.9, 0.99), 1e-8)


@pytest.mark.parametrize("config", [PUBLISHED, GPTConfig(vocab_size=20)])
def test_the_tied_weight_is_the_head_also_of_few_characters(config):
    groups = param_groups(GPT(config))
    roles = {name: group["role"] for group in groups for name in group["param_names"]}
    assert roles["embedding.weight"] == "head"
    assert roles["positions.weight"] == "embedding"
    assert roles["layers.0.attention.qkv.weight"] == "hidden"
    assert roles["norm.weight"] == "vector"


# The verdict.


@pytest.mark.parametrize(
    ("losses", "line"),
    [
        ([1.9014], "validation loss 1.901, published 1.88 ± 0.03: agrees"),
        ([1.9101], "validation loss 1.910, published 1.88 ± 0.03: differs"),
        ([1.8499], "validation loss 1.850, published 1.88 ± 0.03: differs"),
        (
            [1.92, 1.89, 1.9],
            "validation loss 1.903 (3 seeds: 1.890 to 1.920), published 1.88 ± 0.03: agrees",
        ),
        ([1.88, None], "validation loss diverged (2 seeds: -), published 1.88 ± 0.03: differs"),
        ([None], "validation loss diverged, published 1.88 ± 0.03: differs"),
    ],
)
def test_the_verdict(losses, line):
    assert oracle.verdict(losses) == (line, line.endswith("agrees"))


# The command.


def test_a_run_its_files_and_its_verdict(text, tmp_path, capsys, monkeypatch, short):
    monkeypatch.setattr(oracle, "RESULTS", tmp_path / "results")
    sha256 = character_corpus(text, 64).sha256
    monkeypatch.setitem(oracle.PUBLISHED, "sha256", sha256)
    monkeypatch.setitem(oracle.PUBLISHED, "valid_loss", 0.5)
    assert run(text, tmp_path / "out", "--seeds", 2, "--store") == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith("published 0.5 ± 0.03: differs")
    assert "AdamW" in printed and "note" not in printed
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [row["config"]["seed"] for row in rows] == [0, 1]
    assert rows[0]["valid_loss"] != rows[1]["valid_loss"]
    for row in rows:
        assert row["method"] == "adamw"
        assert row["corpus"]["sha256"] == sha256
        assert [step for step, _ in row["curve"]] == [1, 3]
        assert row["config"]["steps"] == 3 and row["provenance"]["torch"] == torch.__version__
        params = sum(p.numel() for p in GPT(GPTConfig(row["corpus"]["vocab_size"])).parameters())
        tensors = 2 + 4 * 6 + 1
        assert row["state_bytes"] == 2 * 4 * params + 4 * tensors  # moments, and counts of steps
    stored = json.loads((tmp_path / "results" / "shakespeare.json").read_text())
    assert stored == {"published": oracle.PUBLISHED, "rows": rows}

    loss = rows[0]["valid_loss"]
    monkeypatch.setitem(oracle.PUBLISHED, "valid_loss", round(loss, 2))
    monkeypatch.setattr(Run, "train_step", None)  # a finished run is read
    assert run(text, tmp_path / "out") == 0
    assert f"validation loss {loss:.3f}" in capsys.readouterr().out.splitlines()[-1]


def test_a_run_is_the_same_again(text, tmp_path, short):
    losses = []
    for name in ("a", "b"):
        run(text, tmp_path / name)
        rows = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        losses.append((rows[0]["valid_loss"], rows[0]["curve"]))
    assert losses[0] == losses[1]


def test_a_run_that_diverges_differs(text, tmp_path, capsys, monkeypatch, short):
    monkeypatch.setitem(oracle.ADAMW, "weight_decay", 1e30)
    assert run(text, tmp_path / "out") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("validation loss diverged, ")


def test_another_text_is_named_and_not_stored(text, tmp_path, capsys, short):
    run(text, tmp_path / "out")
    assert "is not the text of the published run" in capsys.readouterr().out
    assert run(text, tmp_path / "out", "--store") == 2
    assert "--store: " in capsys.readouterr().err


def test_no_seed_is_refused(text, tmp_path, capsys):
    assert run(text, tmp_path / "out", "--seeds", 0) == 2
    assert "--seeds is 0; it must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_committed_run_agrees():
    path = oracle.RESULTS / "shakespeare.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert stored["published"] == oracle.PUBLISHED
    rows = stored["rows"]
    assert [row["config"]["seed"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["corpus"]["sha256"] == oracle.PUBLISHED["sha256"]
        assert {name: row["config"][name] for name in oracle.SETTING} == oracle.SETTING
        assert not row["provenance"]["commit"].endswith("dirty")
    assert oracle.verdict([row["valid_loss"] for row in rows])[1]


def test_a_run_has_the_model_that_its_seed_draws(text):
    corpus = character_corpus(text, 64)
    run = Run(oracle.make_config(4, corpus), corpus)
    assert isinstance(run.model, GPT)
    expected = GPT(GPTConfig(corpus.vocab_size), seed=4)
    assert all(map(torch.equal, run.model.parameters(), expected.parameters()))
