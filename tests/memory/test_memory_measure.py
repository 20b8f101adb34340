"""Live peaks: of callables, of scripts, of scripts that fail."""

import gc

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from optimzoo.memory import measure, measure_script

MIB = 2**20
pytestmark = pytest.mark.usefixtures("few_objects")


def test_a_known_peak_to_the_byte():
    held = torch.ones(MIB)  # 4 MiB that were there before

    def step():
        a = torch.ones(10 * MIB)  # 40 MiB
        b = a + 1  # 40 more
        del a
        return (b.view(2, -1)[:1] * 2).sum()  # a view is nothing; 20 more, when `a` is gone

    base = measure(lambda: None).tensors.bytes
    result = measure(step, steps=3)
    assert result.tensors.bytes - base == 80 * MIB
    assert result.error is None
    assert (result.cuda_allocated is None) == (not torch.cuda.is_available())
    del held
    gc.collect()
    assert base - measure(lambda: None).tensors.bytes == 4 * MIB


def test_the_resident_peak_shows_a_large_block():
    # A block over 32 MiB is never taken from what the process already holds. It is this large
    # because the kernel keeps the count per CPU, off by tens of MiB where there are many, and may
    # take pages of files back meanwhile.
    result = measure(lambda: torch.ones(128 * MIB))
    assert result.rss_peak - result.rss_before >= 256 * MIB


def test_categories_of_a_training_loop_that_nobody_introduced():
    def train():
        model = nn.Sequential(nn.Linear(256, 256, bias=False), nn.ReLU(), nn.Linear(256, 256))
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(4, 256)).square().mean().backward()
            optimizer.step()

    base = measure(lambda: None).tensors
    found = measure(train).tensors
    weights = 4 * (2 * 256 * 256 + 256)
    assert found.phase == "optimizer step"
    # The process may hold models and optimizers of others.
    grown = {k: v - base.by_category.get(k, 0) for k, v in found.by_category.items()}
    assert grown["parameters"] == weights
    assert grown["gradients"] == weights
    assert grown["optimizer state"] == 2 * weights + 3 * 4
    assert found.by_category["optimizer temporaries"] >= 4 * 256 * 256
    assert sum(found.by_category.values()) == found.bytes


def test_it_stops_watching():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    before = dict(_global_optimizer_pre_hooks)

    def step():
        weight.sum().backward()
        optimizer.step()

    measure(step)
    assert not weight._post_accumulate_grad_hooks
    assert dict(_global_optimizer_pre_hooks) == before


SCRIPT = """
import sys
import torch
weight = torch.nn.Parameter(torch.ones(1024, 1024))
optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
for step in range(int(sys.argv[1])):
    (weight * 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
if len(sys.argv) > 2:
    fail = {"raise": lambda: 1 / 0, "exit": lambda: sys.exit(3), "stop": lambda: sys.exit(0)}
    fail[sys.argv[2]]()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_a_script_runs_with_its_arguments(script):
    base = measure(lambda: None).tensors.by_category
    result = measure_script(script, ["2"])
    assert result.error is None
    for name in ("gradients", "optimizer state"):
        assert result.tensors.by_category[name] - base.get(name, 0) == 4 * MIB
    assert measure_script(script, ["1", "stop"]).error is None


def test_a_script_that_fails_half_way_gives_what_it_had(script):
    result = measure_script(script, ["2", "raise"])
    assert result.tensors.by_category["gradients"] == 4 * MIB
    assert result.error.startswith(f'  File "{script}", line 12')
    assert result.error.endswith("ZeroDivisionError: division by zero")
    assert measure_script(script, ["1", "exit"]).error == "SystemExit: 3"
    script.write_text("def broken(:")
    assert "SyntaxError" in measure_script(script).error


def test_bad_input_is_one_line(script, tmp_path):
    with pytest.raises(ValueError, match=r"there is no script '.*nothing.py'"):
        measure_script(tmp_path / "nothing.py")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch finds no CUDA device"):
            measure(lambda: None, snapshot=tmp_path / "s.pickle")
