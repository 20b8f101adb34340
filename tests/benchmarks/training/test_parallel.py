"""The harness in several processes: the run of one process, also after a fault or elsewhere."""

from itertools import pairwise

import pytest
import torch
from processes import needs_gloo, scenario

from benchmarks.__main__ import main
from benchmarks.training.distributed import ALONE, Parallel


@needs_gloo
@pytest.mark.distributed
def test_a_run_goes_on_with_other_numbers_of_processes(tmp_path):
    chain = [["fsdp", 2], ["none", 1], ["ddp", 2]]
    assert scenario("elastic", tmp_path, "galore", chain) <= 1e-4


@needs_gloo
@pytest.mark.distributed
def test_a_killed_process_costs_no_bit(tmp_path):
    found = scenario("killed", tmp_path, "ddp", 2, 0, 3)
    assert all(a <= b for a, b in pairwise(found["steps"])), found
    assert found["distance"] == 0 and found["files"] == ["row.json", "weights.pt"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 5])
def test_the_rows_of_all_processes_are_the_batch(size, count):
    values = torch.arange(1.0, count + 1)
    seen, mean = [], 0.0
    for rank in range(size):
        rows, weight = Parallel("ddp", rank, size).rows(count)
        assert len(values[rows]) > 0  # everybody has something to run
        seen += values[rows].tolist() if weight else []
        mean += values[rows].mean().item() * weight / size
    assert sorted(seen) == values.tolist()
    assert mean == pytest.approx(values.mean().item())
    assert ALONE.rows(count) == (slice(0, None, 1), 1.0)


def test_what_cannot_be_is_refused_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--optimizer=sgd", "--lr=0.1"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main([*words, "--parallel=ddp"]) == 2
    assert "--parallel ddp needs torchrun: torchrun --nproc-per-node" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words) == 2
    error = "error: 2 processes would all train the same; add --parallel ddp or fsdp"
    assert capsys.readouterr().err.splitlines() == [error]
