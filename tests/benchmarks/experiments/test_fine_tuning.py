"""Fine-tuning: both texts' losses of what was trained, and LoRA beside the methods."""

import json
import math

import pytest
import torch
from data_helpers import write_words

from benchmarks.__main__ import main
from benchmarks.data.batches import iterate_eval
from benchmarks.data.corpus import load_corpus
from benchmarks.experiments import fine_tuning, start_check
from benchmarks.experiments.start_tasks import TASKS, Task
from benchmarks.training.models import make_model
from optimzoo.lowrank import convert
from optimzoo.models import get_config

SIZES = {"model": "pico", "steps": 2, "batch_size": 2, "seq_len": 16, "eval_tokens": 64}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fine-tuning")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "fine-tuning", Task("a test", 1e-3, SIZES, 32, pretrained=3))
        patch.setattr(start_check, "RESULTS", folder)
        patch.setattr(fine_tuning, "PATH", folder / "fine-tuning.json")
        patch.chdir(folder)
        files = [str(write_words(folder / f"{name}.jsonl", i)) for i, name in enumerate("ab")]
        words = ["--data", files[0], "--then", files[1], "--jobs", "1", "--store"]
        starts = ["starting-values", "fine-tuning", *words, "--optimizers", "adamw", "muon"]
        assert main(["fine-tuning", *words]) == 2  # nothing is tuned yet
        assert main([*starts, "--seeds", "1", "--out", "starts"]) == 0
        assert main(["fine-tuning", *words, "--seeds", "2", "--out", "out"]) == 0
        first = load_corpus(files[0], vocab_size=get_config("pico").vocab_size)
        yield folder, first, fine_tuning.read()


def loss_on(model, corpus):
    losses = []
    with torch.no_grad():
        for x, y in iterate_eval(corpus.test, 2, 16, 64):
            losses += [model(x, y).item()] * y.numel()
    return math.fsum(losses) / len(losses)


def weights_of(folder, row):
    name = f"{row['method']}-tuned-*-seed-{row['config']['seed']}"
    paths = [
        path
        for path in (folder / "out" / "runs").glob(name)
        if json.loads((path / "row.json").read_text())["fingerprint"] == row["fingerprint"]
    ]
    return torch.load(paths[0] / "weights.pt", weights_only=True)


def test_each_method_is_run_at_its_best_and_evaluated_on_both_texts(ran):
    folder, first, record = ran
    stored = json.loads((folder / "starting-values-fine-tuning.json").read_text())["rows"]
    runs = [(row["method"], row["config"]["seed"]) for row in record["rows"]]
    assert runs == [(m, seed) for m in ("adamw", "muon", "lora") for seed in (0, 1)]
    for row in record["rows"]:
        model = make_model("pico")
        if row["method"] == "lora":
            convert(model, rank=8, kind="lora", alpha=16.0)
        else:
            grid = [r["valid_loss"] for r in stored if r["method"] == row["method"]]
            assert row["config"]["seed"] or row["valid_loss"] == min(grid)
        model.load_state_dict(weights_of(folder, row))
        assert row["first_loss"] == pytest.approx(loss_on(model, first), rel=1e-6)
    pretrained = make_model("pico")
    pretrained.load_state_dict(torch.load(folder / "out/pretrained/weights.pt", weights_only=True))
    assert record["before"]["first_loss"] == pytest.approx(loss_on(pretrained, first), rel=1e-6)
    assert record["before"]["test_loss"] not in (None, record["before"]["first_loss"])


def test_lora_trains_its_factors_alone(ran):
    folder, _, record = ran
    pretrained = torch.load(folder / "out/pretrained/weights.pt", weights_only=True)
    row = record["rows"][-1]
    trained = weights_of(folder, row)
    factors = {name: t for name, t in trained.items() if name.rsplit(".", 1)[1] in "AB"}
    assert row["trained"] == sum(t.numel() for t in factors.values())
    assert row["trained"] < record["rows"][0]["trained"] / 5
    assert row["state_bytes"] < record["rows"][0]["state_bytes"] / 5
    assert any(t.ne(0).any() for name, t in factors.items() if name.endswith(".B"))
    for name, tensor in pretrained.items():
        place = name if name in trained else name.replace("weight", "frozen")
        assert torch.equal(trained[place], tensor)


def test_the_table_has_a_line_a_method_and_differences_from_adamw(ran):
    _, _, record = ran
    table = fine_tuning.table(record)
    names = {row[0]: row for row in table.rows}
    assert names.keys() == {"not fine-tuned", "AdamW", "Muon", "LoRA, rank 8"}
    muon = [row for row in record["rows"] if row["method"] == "muon"]
    mean = math.exp(sum(row["first_loss"] for row in muon) / 2)
    assert names["Muon"][3] == f"{mean:.2f}" and names["Muon"][5].count("%") == 1
    assert names["AdamW"][4:6] == ["", ""] and "2 seeds" in fine_tuning.caption(record)
