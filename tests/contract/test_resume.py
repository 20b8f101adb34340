"""A run that is saved, loaded and continued is the run that was never interrupted, bit for bit."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import resume_run
import torch
from resume_run import DTYPES, HALF, HYPER, STEPS, start, train

TESTS = Path(__file__).resolve().parents[1]
CASES = [f"{name}-{dtype}" for name in HYPER for dtype in DTYPES]


def assert_same(a, b, path=""):
    """Equal in structure, type and every bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), path
    else:
        assert a == b, path


def values(optimizer_state):
    return [value for state in optimizer_state["state"].values() for value in state.values()]


def matrices(weights):
    """Norm weights left out: steps below their rounding in bfloat16 leave them at one."""
    return {name: p for name, p in weights.items() if p.ndim > 1}


def assert_every_weight_moved(before, after):
    assert before.keys() == after.keys()
    for name in before:
        assert not torch.equal(before[name], after[name]), f"{name} stands still"


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """Load, for a case, its `half` run, its `whole` run, or the `end` made by a new process."""
    folder = tmp_path_factory.mktemp("runs")

    def make(case):
        run = start(*case.split("-"))
        train(run, 0, HALF)
        torch.save(run.state_dict(), folder / f"{case}.half.pt")
        train(run, HALF, STEPS)
        torch.save(run.state_dict(), folder / f"{case}.whole.pt")

    def end():
        """One process for all that this session asks for."""
        resumed = (i for i in request.session.items if "uninterrupted" in i.name)
        cases = {item.callspec.params["case"] for item in resumed if item.path == request.path}
        for case in cases | {f"scale-{dtype}" for dtype in DTYPES}:
            if not (folder / f"{case}.half.pt").exists():
                make(case)
        script = [sys.executable, resume_run.__file__, str(folder), str(torch.get_num_threads())]
        path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    def load(case, part):
        file = folder / f"{case}.{part}.pt"
        if not file.exists():
            end() if part == "end" else make(case)
        # Anew each time: an optimizer goes on in the very tensors that it was given to load.
        return torch.load(file, weights_only=True)

    return load


@pytest.mark.each_method
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_uninterrupted_run(runs, case):
    end = runs(case, "end")
    assert_same(end, runs(case, "whole"))
    assert end["scheduler"]["last_epoch"] == STEPS
    assert_every_weight_moved(*(matrices(runs(case, part)["model"]) for part in ("half", "end")))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_keeps_training_after_a_resume(runs, dtype):
    """The authors' code keeps roles as strings in the state, and after a load updates nothing."""
    half, end = (runs(f"scale-{dtype}", part) for part in ("half", "end"))
    assert_every_weight_moved(half["model"], end["model"])
    for saved in (half, end):
        assert values(saved["optimizer"])
        assert all(isinstance(value, torch.Tensor) for value in values(saved["optimizer"]))
    run = start("scale", dtype)
    run.load_state_dict(half)
    for step in range(HALF, STEPS):
        before = copy.deepcopy(run.model.state_dict())
        train(run, step, step + 1)
        assert_every_weight_moved(matrices(before), matrices(run.model.state_dict()))
    assert not any(isinstance(value, str) for value in values(run.optimizer.state_dict()))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("case", CASES)
def test_a_state_mapped_to_the_cpu_goes_on_there(runs, case, tmp_path):
    """From the GPU, where there is one."""
    name, dtype = case.split("-")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = start(name, dtype)
    source.model.to(device)
    source.load_state_dict(runs(case, "half"))
    torch.save(source.state_dict(), tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", map_location="cpu", weights_only=True)
    run = start(name, dtype)
    run.load_state_dict(saved)
    assert {value.device.type for value in values(run.optimizer.state_dict())} == {"cpu"}
    train(run, HALF, STEPS)
    assert_same(run.state_dict(), runs(case, "whole"))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", CASES)
def test_a_deepcopy_in_the_middle_goes_on_by_itself(runs, case):
    original = start(*case.split("-"))
    train(original, 0, HALF)
    twin = copy.deepcopy(original)
    train(twin, HALF, STEPS)
    assert_same(twin.state_dict(), runs(case, "whole"))
    assert_same(original.state_dict(), runs(case, "half"))
    train(original, HALF, STEPS)
    assert_same(original.state_dict(), runs(case, "whole"))


@pytest.mark.parametrize("foreach", [False, True])
def test_scale_keeps_a_float32_state_under_bfloat16_weights(runs, foreach):
    saved = runs("scale-float32", "half")
    run = start("scale", "bfloat16")
    run.load_state_dict(saved)
    for group in run.optimizer.param_groups:
        group["foreach"] = foreach
    assert_same(run.optimizer.state_dict()["state"], saved["optimizer"]["state"])
    before = copy.deepcopy(run.model.state_dict())
    train(run, HALF, STEPS)
    assert_every_weight_moved(before, run.model.state_dict())
    assert {value.dtype for value in values(run.optimizer.state_dict())} == {torch.float32}
    assert {p.dtype for p in run.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_torchs_own_rules_cast_a_float32_state_to_bfloat16_weights(runs, name):
    """They fail on a mixture, so the zoo must not keep the state's dtype for them."""
    run = start(name, "bfloat16")
    run.load_state_dict(runs(f"{name}-float32", "half"))
    before = copy.deepcopy(run.model.state_dict())
    train(run, HALF, STEPS)
    assert_every_weight_moved(matrices(before), matrices(run.model.state_dict()))
    moments = [value for value in values(run.optimizer.state_dict()) if value.ndim > 0]
    assert {value.dtype for value in moments} == {torch.bfloat16}
