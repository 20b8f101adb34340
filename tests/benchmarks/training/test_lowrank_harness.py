"""Low-rank weights in the benchmarks: configuration, resuming, the plan, the memory table."""

import json
from dataclasses import replace

import pytest
import tiny_benchmarks
import torch
from reference.lowrank_numpy import recovering
from tiny_benchmarks import assert_same_bits, stop_at

from benchmarks.__main__ import main
from benchmarks.experiments import summary
from benchmarks.experiments.plan import Plan
from benchmarks.papers import memory_columns
from benchmarks.training.checkpoint import Checkpoints
from benchmarks.training.config import RunConfig, fingerprint, lr_factor
from benchmarks.training.loop import train
from benchmarks.training.run import Run
from optimzoo import get_info
from optimzoo.lowrank import FactoredLinear, LoRALinear, LowRankLinear, ReLoRA, Restarts

pytestmark = pytest.mark.usefixtures("tiny")
LOW = {"rank": 4, "alpha": 4.0}
RESTARTS = {"every": 4, "recovery_steps": 2}
CASES = {
    "low_rank": LOW,
    "restarts": {**LOW, "restarts": RESTARTS},
    "refactorize": {**LOW, "restarts": {"every": 4, "reset": False, "recovery_steps": 0}},
    "sltrain": {**LOW, "kind": "sltrain", "sparsity": 0.1, "restarts": RESTARTS},
    "relora": {**LOW, "kind": "lora", "relora": {**RESTARTS, "prune": 0.5}},
}
BASE = RunConfig(
    "adamw", 1e-2, model="tiny", steps=10, batch_size=4, seq_len=16, eval_tokens=256, warmup=0.2
)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_goes_on_to_the_same_bits(name, precision, corpus, tmp_path):
    config = replace(BASE, lowrank=CASES[name], precision=precision, clip=0.5)
    straight = train(config, corpus, eval_every=2)
    for last in (3, 4, 9):
        with pytest.raises(KeyboardInterrupt):
            train(config, corpus, out=tmp_path, eval_every=2, progress=stop_at(last))
        if name == "relora" and last == 4:  # the merge has just been, and is in the checkpoint
            state = Checkpoints(tmp_path / "checkpoints").load(4)[0]
            assert state["restarts"] == {"steps": 4}
            assert not state["model"]["model.layers.0.mlp.up_proj.B"].any()
    row = train(config, corpus, out=tmp_path, eval_every=2)
    assert_same_bits(row, straight)
    assert row["config"]["lowrank"] == CASES[name]


def test_what_a_run_makes_of_it(corpus):
    kinds = {"low_rank": LowRankLinear, "relora": LoRALinear}
    for name, cls in kinds.items():
        run = Run(replace(BASE, lowrank=CASES[name]), corpus)
        layers = [m for m in run.model.modules() if isinstance(m, FactoredLinear)]
        assert len(layers) == 2 * 7 and {type(m) for m in layers} == {cls}
    assert isinstance(run.restarts, ReLoRA) and run.restarts.every == 4
    again = Run(replace(BASE, lowrank=CASES["relora"], seed=1), corpus)
    assert not torch.equal(
        *(r.model.get_submodule("model.layers.0.mlp.up_proj").A for r in (run, again))
    )
    run = Run(replace(BASE, lowrank=CASES["restarts"]), corpus)
    assert isinstance(run.restarts, Restarts)
    rates = []
    for _ in range(10):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.train_step(log=False)
    wanted = recovering(lambda step: 1e-2 * lr_factor(step, BASE), 4, 2, 10)
    assert rates == pytest.approx(wanted)
    assert run.restarts.steps == 10
    plain = Run(BASE, corpus)
    assert plain.restarts is None
    sparse = Run(replace(BASE, lowrank=CASES["sltrain"]), corpus)
    positions = sum(m.indices.numel() for m in sparse.model.modules() if hasattr(m, "indices"))
    held = sum(p.numel() for p in sparse.model.parameters())
    assert positions > 0 and sparse.state_bytes()[0] == 4 * held + 4 * positions


def test_rows_and_checkpoints_from_before_stay_valid(corpus, tmp_path):
    assert "lowrank" not in fingerprint(BASE, corpus)
    config = replace(BASE, lowrank=LOW)
    assert fingerprint(config, corpus)["lowrank"] == LOW
    stored = json.loads((Plan("nano").results_path).read_text())["rows"]
    for row in stored[:3]:  # committed before there was a `lowrank`
        known = fingerprint(RunConfig(**row["config"]), corpus)
        assert {**known, "corpus": 0} == {**row["fingerprint"], "corpus": 0, "precision": "fp32"}
    for saved, other, message in [
        (BASE, config, r"lowrank=None, not \{'rank'"),
        (config, BASE, r"lowrank=\{'rank': 4, 'alpha': 4.0\}, not None"),
    ]:
        out = tmp_path / str(bool(saved.lowrank))
        with pytest.raises(KeyboardInterrupt):
            train(saved, corpus, out=out, progress=stop_at(2))
        with pytest.raises(ValueError, match=f"belongs to a run with {message}"):
            train(other, corpus, out=out)


REFUSED = [
    (4, "lowrank is 4; it must be an object"),
    ({"ranks": 4}, "lowrank has no key 'ranks'; it takes rank, kind"),
    ({"kind": "lora"}, "lowrank needs a rank"),
    ({**LOW, "restarts": {}, "relora": {}}, "takes restarts or relora, not both"),
]


@pytest.mark.parametrize(("lowrank", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_a_lowrank_that_is_none(lowrank, message):
    with pytest.raises(ValueError, match=message):
        replace(BASE, lowrank=lowrank)


RUN_REFUSED = [
    ({"rank": 17}, "q_proj: rank is 17; for a 16 x 16 weight"),
    ({**LOW, "kind": "lorra"}, "kind 'lorra' is not one of"),
    ({**LOW, "relora": {}}, "has no frozen weight to merge into"),
    ({**LOW, "restarts": {"evry": 3}}, "restarts {'evry': 3} does not fit"),
    ({**LOW, "restarts": {"every": 3}}, "recovery_steps is 10; it must be from 0 to every=3"),
]


@pytest.mark.parametrize(("lowrank", "message"), RUN_REFUSED, ids=[m for _, m in RUN_REFUSED])
def test_a_run_that_cannot_be(lowrank, message, corpus):
    with pytest.raises(ValueError, match=message):
        Run(replace(BASE, lowrank=lowrank), corpus)


def test_the_command_line(tmp_path, capsys):
    words = tiny_benchmarks.train_words(tmp_path, optimizer="adamw", lr=1e-2)
    words += ["--out", str(tmp_path / "run")]
    assert main([*words, "--lowrank", json.dumps(CASES["restarts"])]) == 0
    row = json.loads((tmp_path / "run" / "row.json").read_text())
    assert row["config"]["lowrank"] == CASES["restarts"]
    assert main([*words[:-1], str(tmp_path / "other"), "--lowrank", '{"rank": 0}']) == 2
    assert "rank is 0; for a 16 x 16" in capsys.readouterr().err


def test_the_committed_plan():
    plan = Plan("nano-lowrank")
    assert set(plan.methods) == {
        *("adamw", "galore", "fira", "low_rank", "low_rank_restarts", "low_rank_refactorize"),
        *("low_rank_reset", "lora", "relora", "sltrain", "sltrain_restarts"),
    }
    searches, ranks, configs = set(), set(), []
    for method, protocol in plan.pairs(plan.select(None), ["tuned", "paper"]):
        assert protocol == "tuned"
        search = plan.search(method, "tuned")
        runs = [entry.config for entry in plan.tuning_runs(method, "tuned", [])]
        get_info(runs[0].optimizer)
        searches.add((search.axes, str(search.choices), search.start["clip"]))
        ranks.add(runs[0].lowrank.get("rank", runs[0].hyper.get("rank")))
        configs += runs
    assert len(searches) == 1 and ranks == {None, 32}
    common = ("model", "steps", "batch_size", "seq_len", "accumulate", "eval_tokens", "seed")
    assert len({tuple(getattr(config, name) for name in common) for config in configs}) == 1


def test_each_method_of_the_plan_trains(corpus):
    plan = Plan("nano-lowrank")
    found = {}
    for method in plan.methods:
        entry = plan.tuning_runs(method, "tuned", [])[0]
        lowrank = dict(entry.config.lowrank)
        for key in ("restarts", "relora"):
            if key in lowrank:
                lowrank[key] = {**lowrank[key], "every": 6}
        if lowrank:
            lowrank["rank"] = 8
        run = Run(replace(BASE, optimizer=entry.config.optimizer, lowrank=lowrank, steps=8), corpus)
        found[method] = [run.train_step(log=False)[0] for _ in range(8)]
        assert found[method][-1] < found[method][0]
    # The first steps are those of the same weights; the restart after the sixth parts them.
    for method in ("low_rank_restarts", "low_rank_refactorize", "low_rank_reset"):
        assert found[method][:6] == found["low_rank"][:6]
        assert found[method][7] != found["low_rank"][7]
    assert found["relora"][:6] == found["lora"][:6] and found["relora"] != found["lora"]


def test_bytes_at_60m():
    low = json.dumps({"rank": 128})
    params = 42_770_944  # embedding, head and norms; and 8 blocks of rank 128
    blocks = 8 * 128 * (4 * (512 + 512) + 3 * (512 + 1376))
    assert 2 * 32000 * 512 + 17 * 512 + blocks == params
    scalars = 4 * (2 + 17 + 8 * 7 * 2)  # a step count for each tensor
    assert summary.bytes_at("60m", "adamw", "{}", low) == 6 * params + scalars
    sparse = summary.bytes_at("60m", "adamw", "{}", json.dumps({"rank": 128, "kind": "sltrain"}))
    values = 8 * (4 * round(0.03 * 512 * 512) + 3 * round(0.03 * 512 * 1376))
    assert sparse == 6 * (params + values) + 4 * values + scalars + 4 * 8 * 7
    dense = summary.bytes_at("60m", "adamw", "{}")
    assert dense == summary.bytes_at("60m", "adamw", "{}", "{}") > sparse


@pytest.mark.thorough
def test_the_memory_table(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reproduce", "low-rank", "--memory-only"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if "." in line[:18]}
    assert rows["Low-Rank"][6:8] == ["3.57", "3.66?"] and rows["GaLore"][6:8] == ["4.38", "4.76?"]
    sentence = " ".join(text.split())
    assert "Low-Rank holds 3.66 GB, 23.2 % less than GaLore" in sentence
    assert "published: about 25 %." in sentence
    # A product of rank 512 for each weight, and six bytes for a weight of any kind.
    params = 2 * 32000 * 2048 + 49 * 2048 + 24 * 512 * (4 * 4096 + 3 * (2048 + 5461))
    scalars = 4 * (2 + 49 + 24 * 7 * 2)
    assert 1e9 * sum(
        memory_columns.memory_gigabytes(*memory_columns.LOW_RANK["Low-Rank"]["1B"], "1B")
    ) == (pytest.approx(6 * params + scalars, abs=1))


def test_a_saving_that_is_not_the_published_one_fails(capsys, monkeypatch):
    monkeypatch.setattr(memory_columns, "published_value", lambda *_: 40.0)
    assert memory_columns.low_rank_saving()[1] is False
