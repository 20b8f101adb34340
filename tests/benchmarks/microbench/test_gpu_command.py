"""`python -m benchmarks gpu` keeps to its time, and says what it had none left for."""

import dataclasses
import json
import sys
from argparse import Namespace

import pytest

from benchmarks.microbench import gpu_suite as gpu


def stage(name, code, seconds=60):
    return gpu.Stage(name, [sys.executable, "-c", code], seconds)


def arguments(tmp_path, **options):
    return Namespace(**{"out": tmp_path, "dry_run": True, "minutes": 1.0, "only": None, **options})


def ended(tmp_path):
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    return {row["stage"]: row["ended"] for row in stages}


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    plan = [
        stage("fails", "raise SystemExit(3)"),
        stage("hangs", "import time; time.sleep(60)", 1),
        stage("goes", ""),
    ]
    monkeypatch.setattr(gpu, "stages", lambda out, dry: plan)
    assert gpu.main(arguments(tmp_path)) == 1
    assert ended(tmp_path) == {
        "fails": "failed with status 3",
        "hangs": "stopped after 1 s",
        "goes": "ok",
    }
    assert "look at gpu.log for fails, hangs" in capsys.readouterr().out


def test_tests_run_side_by_side_and_measurements_alone(tmp_path, monkeypatch):
    note = "import sys, time; print(time.monotonic()); time.sleep(0.6); print(time.monotonic())"
    plan = [stage("a", note), stage("b", note), stage("c", note)]
    plan[:2] = [dataclasses.replace(s, beside=True) for s in plan[:2]]
    monkeypatch.setattr(gpu, "stages", lambda out, dry: plan)
    assert gpu.main(arguments(tmp_path)) == 0
    parts = (tmp_path / "gpu.log").read_text().split("=== ")[1:]
    spans = {part[0]: [float(x) for x in part.splitlines()[1:3]] for part in parts}
    assert max(spans["a"][0], spans["b"][0]) < min(spans["a"][1], spans["b"][1])
    assert spans["c"][0] > max(spans["a"][1], spans["b"][1])


def test_what_the_whole_has_no_time_for_is_named(tmp_path, monkeypatch):
    plan = [stage("long", "import time; time.sleep(60)"), stage("late", "")]
    monkeypatch.setattr(gpu, "stages", lambda out, dry: plan)
    assert gpu.main(arguments(tmp_path, minutes=2.2 / 60)) == 1
    assert ended(tmp_path) == {"long": "stopped after 2 s", "late": "not run: no time left"}
    assert gpu.main(arguments(tmp_path, only=["late"])) == 0
    assert ended(tmp_path) == {"late": "ok"}


def test_an_unknown_stage_is_refused_with_the_names(tmp_path):
    with pytest.raises(ValueError, match="no stage 'kernel'; there are: build, kernels"):
        gpu.main(arguments(tmp_path, only=["kernel"]))
