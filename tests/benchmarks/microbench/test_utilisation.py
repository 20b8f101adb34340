"""Model flops: the formula beside a count of the operations that torch makes."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.__main__ import main
from benchmarks.training.flops import flops_per_token, peak_flops, speed_text
from optimzoo.models.llama import Llama, LlamaConfig, get_config


@pytest.mark.parametrize("config", [LlamaConfig(96, 32, 80, 3, 4), LlamaConfig(64, 16, 24, 1, 2)])
@pytest.mark.parametrize("seq_len", [8, 32])
def test_the_formula_is_the_count(config, seq_len):
    model = Llama(config)
    tokens = torch.zeros(2, seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens).backward()
    # Torch counts attention without its mask, at four and ten units a pair (the backward makes the
    # scores again); the formula counts half of the pairs, at twelve.
    d, layers = config.hidden_size, config.num_hidden_layers
    by_name = {str(k): v for k, v in counter.get_flop_counts()["Global"].items()}
    products = sum(v for k, v in by_name.items() if "attention" not in k and "bmm" not in k)
    own = flops_per_token(config, seq_len) - 6 * layers * seq_len * d
    assert products == pytest.approx(own * tokens.numel(), rel=0.01)
    assert flops_per_token(config, 2 * seq_len) - flops_per_token(config, seq_len) == (
        6 * layers * seq_len * d
    )


def test_what_train_prints_on_a_gpu():
    config = get_config("60m")
    run = {"batch_size": 64, "accumulate": 1, "seq_len": 256}
    place = {"device": "NVIDIA H100 80GB HBM3"}
    row = {"config": run, "step_ms": 20.0, "optimizer_ms": 1.0, "provenance": place}
    flops = flops_per_token(config, 256) * 64 * 256 / 0.02
    assert speed_text(row, config) == (
        f"step 20.0 ms, the optimizer 5.0% of it; {flops / 1e12:.1f} model Tflop/s, "
        f"{flops / 989e12:.1%} of the GPU's peak in bf16"
    )
    row["provenance"] = {"device": "a GPU of tomorrow"}
    assert speed_text(row, config).endswith("model Tflop/s")
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H200") == 989e12


def test_the_command_measures_whole_steps_and_the_optimizer_in_them(tmp_path, capsys):
    words = ["--sizes", "dry", "--optimizers", "scale", "--steps", "3"]
    assert main(["utilisation", *words, "--out", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert 0 < row["optimizer_ms"] < row["step_ms"]
    assert capsys.readouterr().out.startswith("dry, scale: step ")
