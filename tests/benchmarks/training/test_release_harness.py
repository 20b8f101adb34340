"""`--release` in the benchmark's loop: the same run, interrupted or not."""

import json
from dataclasses import replace

import pytest
import tiny_benchmarks

from benchmarks.__main__ import main
from benchmarks.training.config import RunConfig
from benchmarks.training.loop import train

pytestmark = pytest.mark.usefixtures("tiny")
SIZES = {"steps": 9, "batch_size": 4, "seq_len": 16, "accumulate": 2, "eval_tokens": 256}
SCALE = RunConfig("scale", 1e-2, other_lr=2e-2, model="tiny", **SIZES)
SAME = ("curve", "valid_loss", "test_loss", "state_bytes", "tokens")


@pytest.mark.parametrize("config", [SCALE, replace(SCALE, optimizer="adamw")], ids=str)
def test_a_released_run_is_the_same(config, corpus, tmp_path):
    straight = train(config, corpus)
    row = train(replace(config, release=True), corpus, out=tmp_path / "run")
    assert [row[key] for key in SAME] == [straight[key] for key in SAME]
    assert row["optimizer_ms"] is None
    assert row["fingerprint"]["release"] and "release" not in straight["fingerprint"]


def test_interrupted_and_clipped_it_goes_on_to_the_same_bits(corpus, tmp_path):
    config = replace(SCALE, clip=0.5, release=True)
    straight = train(config, corpus)
    with pytest.raises(KeyboardInterrupt):
        train(config, corpus, out=tmp_path / "run", progress=tiny_benchmarks.stop_at(4))
    row = train(config, corpus, out=tmp_path / "run")
    assert [row[key] for key in SAME] == [straight[key] for key in SAME]
    unreleased = train(replace(config, release=False), corpus)
    assert row["valid_loss"] == pytest.approx(unreleased["valid_loss"], rel=1e-5)


def test_what_cannot_be_clipped_is_refused_in_one_line(tmp_path, capsys):
    words = tiny_benchmarks.train_words(tmp_path, optimizer="adamw", clip=1)
    assert main([*words, "--release"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # after the tokenizer's
    assert "AdamW cannot clip what it releases" in line


@pytest.mark.thorough
def test_the_bytes_of_gradients(tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert main(["release-memory", "--model=tiny", "--seq-len=16", f"--out={out}"]) == 0
    kept, released, clipped = json.loads(out.read_text())["rows"]
    assert kept["gradient_bytes"] == kept["parameter_bytes"]
    assert released["gradient_bytes"] < clipped["gradient_bytes"] < kept["gradient_bytes"]
    assert main(["release-memory", "--model=tiny", "--seq-len=16", "--optimizer=sgd"]) == 0
    assert "SGD cannot clip what it releases" in capsys.readouterr().out
