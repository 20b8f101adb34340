"""The examples: each runs alone, by the command in its docstring, and does what it says."""

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import needs_gloo

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
SMALL = ["--width", "32", "--layers", "1", "--length", "32"]


def commands(name):
    """Return the commands in an example's docstring, as lists of words."""
    doc = ast.get_docstring(ast.parse(EXAMPLES[name].read_text(encoding="utf-8")))
    joined = doc.replace("\\\n", " ")
    return [shlex.split(c) for c in re.findall(r"^    ((?:python|torchrun) .*)$", joined, re.M)]


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a command beside a copy of the one file that it names."""

    def started(words, **options):
        [name] = [Path(word).stem for word in words if word.startswith("examples/")]
        (tmp_path / "examples").mkdir(exist_ok=True)
        shutil.copy(EXAMPLES[name], tmp_path / "examples")
        program = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[words[0]]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-u", *program, *words[1:]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=tmp_path, env=env, **pipes, **options)

    def finished(words):
        process = started(words)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return out

    finished.started = started
    return finished


def losses(out):
    return [float(x) for x in re.findall(r"(?:train )?loss ([\d.]+)", out)]


def test_each_example_is_one_file_with_its_command_first():
    assert len(EXAMPLES) == 9
    for name in EXAMPLES:
        first = commands(name)[0]
        assert f"examples/{name}.py" in first, name


@pytest.mark.thorough
def test_pretrain_by_its_command(run):
    out = run(commands("pretrain")[0])
    found = losses(out)
    assert found[0] > 5 and found[-1] < 3
    role = re.search(r"^head +1 +([\d,]+)", out, re.M)
    state = re.search(r"scale holds ([\d,]+) bytes of state", out)
    head, held = (int(m[1].replace(",", "")) for m in (role, state))
    assert 4 * head < held < 5 * head  # the head's momentum; the vectors' moments are small


def test_pretrain_has_the_tuned_rates_of_the_rows():
    source = EXAMPLES["pretrain"].read_text(encoding="utf-8")
    scope = {}
    exec("TUNED = {" + re.search(r"^TUNED = \{(.*?)^\}", source, re.M | re.S)[1] + "}", scope)
    rows = json.loads((ROOT / "benchmarks/results/nano-compare.json").read_text())["rows"]
    for name, rates in scope["TUNED"].items():
        tuned = [
            {"lr": row["config"]["lr"], **row["config"]["hyper"]}
            for row in rows
            if row["config"]["optimizer"] == name and "head_lr" in row["config"]["hyper"]
        ]
        assert any(rates.items() <= row.items() for row in tuned), name


@pytest.mark.thorough
def test_pretrain_killed_and_resumed_is_the_run_that_was_not(run, tmp_path):
    words = [*commands("pretrain")[0], *SMALL, "--steps", "30", "--save-every", "10"]
    whole = run([*words, "--checkpoint", "whole.pt"])
    process = run.started([*words, "--optimizer", "scale"])
    for line in process.stdout:
        if "saved" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    resumed = run([*words, "--resume"])
    assert 10 <= int(re.search(r"resumed at step (\d+)", resumed)[1]) <= 30
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    files = [tmp_path / "whole.pt", tmp_path / "pretrain.pt"]
    ends = [torch.load(file, weights_only=True)["model"] for file in files]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    other = run.started([*words, "--resume", "--optimizer", "adamw"])
    assert "was trained with scale, not adamw" in other.communicate()[1] and other.returncode == 2


@pytest.mark.distributed
@needs_gloo
def test_fsdp2_goes_on_in_another_number_of_processes(run):
    whole, four, resumed = (losses(run(words)) for words in commands("fsdp2"))
    assert whole[0] > 5 and whole[-1] < 3
    assert four[0] == pytest.approx(whole[0], abs=1e-4)
    assert resumed[0] < 3  # not from the start
    assert resumed[-1] == pytest.approx(whole[-1], abs=1e-3)


@pytest.mark.thorough
def test_trainer_trains_by_the_method_that_is_named(run):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate; pip install '.[test]'")
    out = run(commands("trainer")[0])
    train = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", out)]
    assert train[0] > 5 and train[-1] < 3
    assert re.search(r"^SCALE: validation loss 2\.\d", out, re.M)


@pytest.mark.thorough
@pytest.mark.parametrize("options", [[], ["--optimizer", "muon", "--bf16"]], ids=["scale", "bf16"])
def test_trl_trains_by_the_optimizer_that_was_given(run, options):
    pytest.importorskip("trl", reason="pip install '.[test]'")
    out = run([*commands("trl_sft")[0], *options, "--steps", "90"])
    ended = re.search(r"^(\w+): validation loss (\S+), then (\S+)$", out, re.M)
    name, before, after = ended.groups()
    assert name == ("Muon" if options else "SCALE")
    assert float(before) > 5 and float(after) < 2.5  # of six letters: 1.8 without the prompt


@pytest.mark.thorough
def test_accelerate_loop_goes_on_from_its_state(run):
    pytest.importorskip("accelerate", reason="pip install '.[test]'")
    [words] = commands("accelerate_loop")
    whole = losses(run(words))
    assert whole[0] > 5 and whole[-1] < 3.5
    half = run([*words, "--steps", "20"])
    assert losses(half) == whole[:3]
    assert losses(run([*words, "--resume"])) == whole[3:]


@pytest.mark.thorough
def test_lightning_module_trains(run):
    pytest.importorskip("lightning", reason="pip install '.[test]'")
    found = losses(run(commands("lightning_module")[0]))
    assert found[0] > 5 and max(found[-2:]) < 3.2


@pytest.mark.thorough
def test_gradient_release_holds_a_part_of_the_gradients(run):
    out = run(commands("gradient_release")[0])
    first, last, *again = losses(out)
    assert first > 5 and last < 3 and again == pytest.approx([first, last], abs=1e-2)
    usual, released = (int(x.replace(",", "")) for x in re.findall(r"at most ([\d,]+) bytes", out))
    assert usual == 4 * sum(
        int(x.replace(",", "")) for x in re.findall(r"^\w+ +\d+ +([\d,]+) ", out, re.M)
    )
    assert 5 * released < usual


@pytest.mark.thorough
def test_sparse_ends_with_an_exact_mask_and_the_same_loss(run):
    out = run(commands("sparse")[0])
    assert losses(out)[0] > 5
    dense, trained, pruned = (
        float(re.search(rf"^{label}: loss ([\d.]+)", out, re.M)[1])
        for label in ("dense", "trained with AdamS", "pruned to 2:4")
    )
    assert dense < 3 and trained < 3 and pruned == pytest.approx(trained, abs=1e-3)
    assert ("it needs a CUDA device" in out) is not torch.cuda.is_available()


@pytest.mark.thorough
def test_low_rank_restarts_and_merges_to_the_same_loss(run):
    out = run(commands("low_rank")[0])
    train = [float(x) for x in re.findall(r"train loss ([\d.]+)", out)]
    assert train[0] > 5 and max(train[-2:]) < 3.5
    assert re.findall(r"step (\d+): .*, restarted", out) == ["40", "80"]
    low, merged = re.findall(r"^(?:low rank|14 layers merged): loss ([\d.]+)", out, re.M)
    assert float(low) == pytest.approx(float(merged), abs=1e-3)


@pytest.mark.thorough
def test_tasks_of_slurm_share_the_runs_of_a_table(tmp_path):
    """Two tasks, started by a stand-in for srun, train each run once and print one table."""
    pytest.importorskip("accelerate", reason="pip install '.[test]'")
    (tmp_path / "examples").mkdir()
    for name in ("reproduce.slurm", "accelerate_one_gpu.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    srun = tmp_path / "srun"
    start = 'while [[ $1 == --* ]]; do shift; done\n"$@" > 0.log 2>&1 &\n"$@" > 1.log 2>&1\nwait -n'
    srun.write_text(f"#!/bin/bash\n{start}\n")
    srun.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": path}
    env["SLURM_SUBMIT_DIR"] = str(tmp_path)
    words = [
        "scale-main",
        "--methods",
        "adamw",
        "scale",
        "--size",
        "dry",
        "--seeds",
        "1",
        "--fresh",
    ]
    script = ["bash", str(tmp_path / "examples" / "reproduce.slurm"), *words]
    ended = subprocess.run(script, env=env, capture_output=True, text=True)
    logs = [(tmp_path / f"{task}.log").read_text() for task in range(2)]
    assert ended.returncode == 0, ended.stderr + logs[1]
    tables = [re.findall(r"^ (?:SCALE|AdamW),? .*$", log, re.M) for log in logs]
    assert tables[0] == tables[1] and len(tables[0]) == 2, logs
    runs = [set(re.findall(r"^\[\d+/\d+\] (.*) $", log, re.M)) for log in logs]
    assert runs[0] == runs[1] and len(runs[0]) >= 8


def test_the_readme_of_the_examples_has_each_command():
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.py` \| `(.*?)` \|", text, re.M)
    assert {name: shlex.split(row) for name, row in rows} == {n: commands(n)[0] for n in EXAMPLES}
    assert "(examples/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
