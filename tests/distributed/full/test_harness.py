"""The harness in several processes, all of it: every method, other world sizes, twenty kills."""

from itertools import pairwise

import pytest
from processes import scenario
from toy import TOY

CHAIN = [["fsdp", 4], ["fsdp", 2], ["none", 1], ["ddp", 2], ["fsdp", 4]]


@pytest.mark.parametrize("name", [name for name in TOY if name != "adams"])
def test_every_method_goes_on_with_other_numbers_of_processes(name, tmp_path):
    """What is loaded is what was saved, bit for bit; the end is that of one process."""
    assert scenario("elastic", tmp_path, name, CHAIN) <= 1e-3


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ten_kills_cost_no_bit(kind, tmp_path):
    found = scenario("killed", tmp_path, kind, 2, len(kind), 10)
    assert {"step", "refresh"} < set(found["places"]) and len(found["places"]) == 10
    assert {"write", "sync"} & set(found["places"])
    assert all(a <= b for a, b in pairwise(found["steps"])) and found["steps"][-1] > 5, found
    assert found["distance"] == 0 and found["files"] == ["row.json", "weights.pt"]
