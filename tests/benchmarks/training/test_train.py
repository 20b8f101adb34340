"""The training loop: what it computes, what it records, what it refuses."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_benchmarks
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F
from toy import run_config

import benchmarks.training.cli as train_module
from benchmarks.__main__ import main
from benchmarks.data.batches import Batches
from benchmarks.training.config import RunConfig, lr_factor
from benchmarks.training.loop import train
from benchmarks.training.run import Run
from optimzoo.memory import account

pytestmark = pytest.mark.usefixtures("tiny")
HYPER = {name: run_config(name, gap=10) for name in ("adamw", "muon", "scale", "galore")}
SGD = RunConfig("sgd", 0.5, model="tiny", steps=6, batch_size=4, seq_len=16, eval_tokens=256)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16"])
@pytest.mark.parametrize("name", HYPER)
def test_the_loss_falls(name, precision, corpus, tmp_path):
    config = replace(SGD, optimizer=name, steps=40, precision=precision, **HYPER[name])
    row = train(config, corpus)
    assert row["precision"] == precision and not row["diverged"]
    assert row["curve"][0] == (1, pytest.approx(math.log(tiny_benchmarks.VOCAB), abs=0.1))
    for loss in (row["curve"][-1][1], row["valid_loss"], row["test_loss"]):
        assert loss < row["curve"][0][1] - 1
    run = Run(config, corpus)
    run.train_step(False)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in run.model.parameters()} == {dtype}
    counted = account(run.model, name, **config.hyper)
    assert (row["parameter_bytes"], row["state_bytes"]) == (counted.params, counted.state_total)
    assert list(tmp_path.iterdir()) == []  # without `out`, nothing is written


def test_the_row_says_how_it_was_made(corpus):
    row = train(replace(SGD, accumulate=2), corpus, eval_every=2)
    assert row["config"]["optimizer"] == "sgd" and row["config"]["accumulate"] == 2
    assert row["corpus"] == {"name": corpus.name, "sha256": corpus.sha256, "vocab_size": 320}
    assert set(row["provenance"]) == {
        *("commit", "device", "threads", "python", "torch", "optimzoo")
    }
    assert row["tokens"] == 6 * 2 * 4 * 16
    assert row["peak_bytes"] > row["parameter_bytes"] > 0
    assert row["tokens_per_second"] > 0 and row["optimizer_ms"] > 0
    assert [step for step, _ in row["curve"]] == [1, 6]
    assert [step for step, _ in row["valid_curve"]] == [2, 4, 6]
    assert row["valid_curve"][-1][1] == row["valid_loss"]
    assert json.loads(json.dumps(row))["test_loss"] == row["test_loss"]


def test_all_methods_see_the_same_batches(corpus, monkeypatch):
    seen = []
    get = Batches.__getitem__

    def spy(self, step):
        seen[-1].append(get(self, step))
        return get(self, step)

    monkeypatch.setattr(Batches, "__getitem__", spy)
    for name, seed in (("adamw", 0), ("scale", 0), ("galore", 0), ("adamw", 1)):
        seen.append([])
        train(replace(SGD, optimizer=name, seed=seed, **HYPER[name]), corpus)
    assert [len(batches) for batches in seen] == [6] * 4
    first = torch.stack([torch.stack(pair) for pair in seen[0]])
    assert first.shape == (6, 2, 4, 16)
    for other in seen[1:3]:
        assert torch.equal(first, torch.stack([torch.stack(pair) for pair in other]))
    assert not torch.equal(first[0], torch.stack(seen[3][0]))
    assert torch.equal(first[:, 0, :, 1:], first[:, 1, :, :-1])  # a label is the next token


def test_the_seed_decides_the_weights_and_nothing_else_does(corpus):
    torch.manual_seed(1)
    one = weights(Run(SGD, corpus))
    torch.manual_seed(2)
    two, other = weights(Run(SGD, corpus)), weights(Run(replace(SGD, seed=1), corpus))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_accumulation_is_a_larger_batch(corpus):
    whole, parts = (
        Run(replace(SGD, batch_size=b, accumulate=a, clip=0.5), corpus) for b, a in ((8, 1), (4, 2))
    )
    for _ in range(4):
        losses = [run.train_step(False)[0] for run in (whole, parts)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], value, rtol=1e-4, atol=1e-6)


def test_learning_rates_warm_up_and_follow_a_cosine(corpus, tmp_path):
    config = replace(SGD, steps=20, warmup=0.25)
    by_hand = {0: 0.2, 1: 0.4, 4: 1.0, 5: 1.0, 10: 0.775, 15: 0.325, 19: 0.10983357966978}
    for step, factor in by_hand.items():
        assert lr_factor(step, config) == pytest.approx(factor, rel=1e-12)
    assert lr_factor(19, replace(config, min_lr_ratio=0.0)) == pytest.approx(0.01092619963309)
    assert lr_factor(0, replace(config, warmup=0.0)) == 1.0
    assert lr_factor(19, replace(config, warmup=1.0)) == 1.0
    assert lr_factor(9, replace(config, warmup=1.0)) == 0.5
    run = Run(replace(config, optimizer="scale", lr=0.5, other_lr=0.25), corpus, tmp_path)
    for step in range(20):
        _, values = run.train_step(True)
        rates = [lr * lr_factor(step, config) for lr in (0.5, 0.25)]
        assert values["lr/hidden"] == pytest.approx(rates[0])
        for role in ("embedding", "head", "vector"):
            assert values[f"lr/{role}"] == pytest.approx(rates[1])


@pytest.mark.parametrize("clip", [0.0, 0.25])
def test_clipping_bounds_the_norm_of_the_gradient(clip, corpus):
    run = Run(replace(SGD, clip=clip), corpus)
    norms = []

    def look(*_):
        grads = [p.grad.flatten() for p in run.model.parameters()]
        norms.append(torch.cat(grads).norm().item())

    run.optimizer.register_step_pre_hook(look)
    logged = [run.train_step(True)[1]["train/gradient_norm"] for _ in range(4)]
    assert min(logged) > 0.3  # what is logged is the norm before the clipping
    expected = [clip] * 4 if clip else logged
    assert norms == pytest.approx(expected, rel=1e-4)


def test_evaluation_is_the_mean_over_all_tokens(corpus):
    run = Run(replace(SGD, eval_tokens=10**6, batch_size=7), corpus)
    run.train_step(False)
    for split in ("valid", "test"):
        tokens = np.asarray(getattr(corpus, split)).astype(np.int64)
        windows = (len(tokens) - 1) // 16
        assert windows % 7  # the last batch has fewer rows
        total = 0.0
        for first in range(0, windows * 16, 16):
            ids = torch.from_numpy(tokens[first : first + 17])
            with torch.no_grad():
                logits = run.model(ids[None, :-1])[0]
            total += F.cross_entropy(logits.double(), ids[1:], reduction="sum").item()
        assert run.evaluate(split) == pytest.approx(total / (windows * 16), rel=1e-6)


def test_evaluation_changes_nothing(corpus):
    run = Run(replace(SGD, optimizer="adamw", lr=1e-2), corpus)
    run.train_step(False)
    before, state = weights(run), run.optimizer.state_dict()["state"]
    moments = {k: v["exp_avg"].clone() for k, v in state.items()}
    generators = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    assert run.evaluate("valid") == run.evaluate("valid") != run.evaluate("test")
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == generators[1:]
    assert all(torch.equal(value, before[name]) for name, value in weights(run).items())
    assert all(torch.equal(state[k]["exp_avg"], value) for k, value in moments.items())
    assert all(p.grad is None for p in run.model.parameters())
    often, never = (train(SGD, corpus, eval_every=n) for n in (1, 0))
    assert often["curve"] == never["curve"] and often["test_loss"] == never["test_loss"]


def test_tensorboard_has_the_scalars(corpus, tmp_path):
    config = replace(SGD, optimizer="scale", lr=1e-2, other_lr=2e-2, steps=25, clip=1.0)
    row = train(config, corpus, out=tmp_path / "run", eval_every=10)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    names = {"train/loss", "train/tokens_per_second", "train/gradient_norm", "memory/peak_bytes"}
    roles = ("hidden", "embedding", "head", "vector")
    names |= {f"{kind}/{role}" for kind in ("lr", "update_ratio") for role in roles}
    assert set(events.Tags()["scalars"]) == names | {"valid/loss", "hparam/valid_loss"}
    curve = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert [step for step, _ in curve] == [1, 11, 21, 25]
    assert curve == [(step, pytest.approx(loss)) for step, loss in row["curve"]]
    for name in names:
        values = [e.value for e in events.Scalars(name)]
        assert len(values) == 4 and all(math.isfinite(v) and v > 0 for v in values), name
    assert [e.step for e in events.Scalars("valid/loss")] == [10, 20]
    rates = [1e-2 * lr_factor(step, config) for step in (0, 10, 20, 24)]
    assert [e.value for e in events.Scalars("lr/hidden")] == pytest.approx(rates)
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer" in plugin and b"scale" in plugin and b"accumulate" in plugin
    (final,) = events.Scalars("hparam/valid_loss")
    assert final.value == pytest.approx(row["valid_loss"])


def test_update_ratios_are_those_of_the_step(corpus):
    run = Run(replace(SGD, optimizer="scale", lr=1e-2), corpus)
    before = weights(run)
    _, values = run.train_step(True)
    after = weights(run)
    for role, name in (("embedding", "model.embed_tokens.weight"), ("head", "lm_head.weight")):
        ratio = (after[name] - before[name]).norm() / before[name].norm()
        assert values[f"update_ratio/{role}"] == pytest.approx(ratio.item(), rel=1e-4)


def test_a_run_that_diverges_says_so(corpus, tmp_path):
    row = train(replace(SGD, lr=1e6, steps=50), corpus, out=tmp_path / "run")
    assert row["diverged"] and row["valid_loss"] is None and row["test_loss"] is None
    assert len(row["curve"]) < 4 and all(math.isfinite(loss) for _, loss in row["curve"])
    assert json.loads((tmp_path / "run" / "row.json").read_text())["diverged"]
    # In the last step, after which no loss is left to show it:
    row = train(replace(SGD, lr=1e38, steps=1, warmup=0.0), corpus)
    assert row["diverged"] and row["valid_loss"] is None


def test_the_command_prints_the_result(tmp_path, capsys):
    options = {"optimizer": "scale", "lr": 1e-2, "hyper": '{"momentum": 0}'}
    words = tiny_benchmarks.train_words(tmp_path, **options)
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    row = json.loads((tmp_path / "run" / "row.json").read_text())
    assert row["config"]["hyper"] == {"momentum": 0} and row["state_bytes"] < 5000
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"scale: validation perplexity {math.exp(row['valid_loss']):.2f}, ")
    assert f"test {math.exp(row['test_loss']):.2f}, " in line


def test_the_command_fails_where_the_run_diverges(tmp_path, capsys):
    assert main(tiny_benchmarks.train_words(tmp_path, lr=1e6)) == 1
    assert capsys.readouterr().out == "sgd diverged; try a smaller --lr than 1e+06\n"


REFUSED = [
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"seq_len": -1}, "seq_len is -1"),
    ({"accumulate": 0}, "accumulate is 0"),
    ({"eval_tokens": 0}, "eval_tokens is 0"),
    ({"eval_tokens": 15}, "eval_tokens is 15, less than one window of seq_len 16"),
    ({"warmup": -0.1}, "warmup is -0.1; it is a share of the steps"),
    ({"warmup": 1.5}, "warmup is 1.5"),
    ({"min_lr_ratio": -0.1}, "min_lr_ratio is -0.1; it must be from 0 to 1"),
    ({"clip": -1.0}, "clip is -1.0; it must be >= 0"),
    ({"clip": math.nan}, "clip is nan"),
    ({"precision": "fp16"}, "precision 'fp16' is not one of auto, fp32, bf16-autocast, bf16"),
]
REFUSED_BY_RUN = [
    ({"optimizer": "scal"}, "unknown optimizer 'scal'; did you mean scale"),
    ({"model": "tin"}, "unknown model 'tin': did you mean tiny"),
    ({"hyper": {"moment": 1}}, "sgd has no hyperparameter 'moment'"),
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"batch_size": 10**6}, "too few for batch_size 1000000"),
    ({"seq_len": 1990, "batch_size": 1, "eval_tokens": 1990}, "too few for one window"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=str)
def test_bad_settings_are_refused_in_one_line(values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        replace(SGD, **values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("values", "message"), REFUSED_BY_RUN, ids=str)
def test_what_does_not_fit_is_refused_before_a_step(values, message, corpus, monkeypatch):
    monkeypatch.setattr(Run, "train_step", None)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        train(replace(SGD, **values), corpus)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer=scal", "--lr=1"], "unknown optimizer 'scal'; did you mean"),
        (["--optimizer=scale", "--lr=nan"], "Invalid learning rate: nan"),
        (["--optimizer=galore", "--lr=1", '--hyper={"ranc": 3}'], "galore has no hyperparameter"),
        (["--optimizer=scale", "--lr=1", "--out=file/a"], "--out file/a cannot be made: "),
    ],
    ids=str,
)
def test_what_needs_no_text_is_refused_before_it_is_read(options, message, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "corpus_from", None)
    Path("file").touch()
    assert main(["train", "--model=tiny", *options]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_what_is_not_json_says_so(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--optimizer=scale", "--lr=1", "--hyper={rank"])
    assert "argument --hyper: '{rank' is not JSON (" in capsys.readouterr().err


def test_a_run_goes_on_from_the_weights_that_another_kept(corpus, tmp_path):
    train(SGD, corpus, out=tmp_path / "first")
    assert not (tmp_path / "first" / "weights.pt").exists()
    row = train(SGD, corpus, out=tmp_path / "first", keep_weights=True)  # again, to keep them
    kept = tmp_path / "first" / "weights.pt"
    config = replace(SGD, weights=str(kept), seed=1)
    run = Run(config, corpus)
    assert run.evaluate("valid") == row["valid_loss"]
    assert weights(run).keys() == torch.load(kept, weights_only=True).keys()
    on = train(config, corpus, out=tmp_path / "on")
    assert on["valid_loss"] < row["valid_loss"]
    written = kept.stat().st_mtime_ns
    assert train(config, corpus, out=tmp_path / "on") == json.loads(
        (tmp_path / "on" / "row.json").read_text()
    )
    assert kept.stat().st_mtime_ns == written
    torch.save({n: t + 1 for n, t in torch.load(kept, weights_only=True).items()}, kept)
    assert train(config, corpus, out=tmp_path / "on")["valid_loss"] != on["valid_loss"], "others"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights", "weights w.pt are not of this model: UnpicklingError"),
        (None, "No such file or directory: 'w.pt'"),
    ],
)
def test_weights_that_will_not_do_are_refused(content, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("w.pt").write_bytes(content)
    command = ["train", "--model", "tiny", "--optimizer", "sgd", "--lr", "1", "--weights", "w.pt"]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_weights_of_another_model_are_refused(corpus, tmp_path):
    torch.save({"x": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="are not of this model: RuntimeError"):
        Run(replace(SGD, weights=str(tmp_path / "w.pt")), corpus)
