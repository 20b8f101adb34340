"""Which Pythons and torches are claimed, the same everywhere, and what is said of others."""

import configparser
import importlib.util
import re
import subprocess
import sys
import tomllib
import warnings
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest
from torch.torch_version import TorchVersion

from optimzoo._version import TESTED_TORCH, warn_of_untested_torch

ROOT = Path(__file__).resolve().parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg", encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PYTHONS = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
OLDEST, NEWEST = TESTED_TORCH


def release(version):
    return tuple(map(int, version.split(".")[:2]))


def test_the_oldest_python_is_the_same_everywhere():
    oldest = PYTHONS[0]
    assert [release(v) for v in PYTHONS] == sorted(map(release, PYTHONS))
    assert SETUP["options"]["python_requires"] == f">={oldest}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"sys.version_info < {release(oldest)})" in makefile
    assert f"optimzoo needs Python {oldest} or newer" in makefile
    assert release(oldest) <= sys.version_info[:2]


def test_the_torch_range_is_the_same_everywhere():
    assert f"\ntorch>={OLDEST}\n" in SETUP["options"]["install_requires"] + "\n"
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert release(OLDEST) <= release(pins["torch"]) <= release(NEWEST)


def test_the_readme_names_them():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"Python (3\.\d+) or newer", text) == [PYTHONS[0]]
    assert re.findall(r"torch (\d\.\d+) to (\d\.\d+)", text) == [TESTED_TORCH]


MAJOR, MINOR = release(NEWEST)
AFTER = f"{MAJOR}.{MINOR + 1}.0"


@pytest.mark.parametrize(
    "version",
    [f"{OLDEST}.0", f"{OLDEST}.1+cpu", "2.13.0+cpu", f"{NEWEST}.1", f"{NEWEST}.9+cu130"],
)
def test_a_tested_torch_is_not_spoken_of(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_untested_torch(TorchVersion(version))


@pytest.mark.parametrize(
    ("version", "effect"),
    [
        ("2.6.0+cu124", "fail"),
        (f"{OLDEST}.0a0+git1234", "fail"),
        (f"{AFTER}.dev20261101+cpu", "nobody"),
        (f"{AFTER}a0+git1234", "nobody"),
        (AFTER, "nobody"),
        ("3.0.0", "nobody"),
    ],
)
def test_another_torch_is_named_in_one_line(version, effect):
    with pytest.warns(UserWarning, match=re.escape(f"torch {version} is outside")) as caught:
        warn_of_untested_torch(TorchVersion(version))
    [warning] = caught
    message = str(warning.message)
    assert "\n" not in message and effect in message
    assert f"{OLDEST} to {NEWEST}" in message


def test_it_is_said_once_where_optimzoo_is_imported():
    program = f"""
import torch, warnings
from torch.torch_version import TorchVersion
torch.__version__ = TorchVersion({AFTER!r})
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import optimzoo
    import optimzoo
print(sum("outside" in str(w.message) for w in caught), caught[0].filename, caught[0].lineno)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout == "1 <string> 7\n"


def is_ours(module):
    lines = PYPROJECT["tool"]["pytest"]["ini_options"]["filterwarnings"]
    [pattern] = [line.split(":")[3] for line in lines if line.startswith("error::RuntimeWarning:")]
    return bool(re.match(pattern, module))


def test_a_runtime_warning_is_an_error_in_every_file_of_ours_and_in_no_other():
    for name in (
        "optimzoo",
        "optimzoo.kernels.native",
        "benchmarks.training.run",
        "__main__",
        "check_cuda",
    ):
        assert is_ours(name)
    for path in (ROOT / "tests").rglob("*.py"):
        folder = f"{path.parent.name}." if (path.parent / "__init__.py").exists() else ""
        assert is_ours(f"{folder}{path.stem}") and is_ours(path.stem), path
    for name in ("torch", "torch._dynamo.guards", "numpy.lib", "transformers.trainer"):
        assert not is_ours(name)


def test_the_filter_is_in_force():
    with warnings.catch_warnings(record=True) as caught:
        where = ("guards.py", 1, "torch._dynamo.guards")
        warnings.warn_explicit("slow guards", RuntimeWarning, *where)
    assert [str(w.message) for w in caught] == ["slow guards"]
    with pytest.raises(RuntimeWarning, match="overflow"):
        warnings.warn_explicit("overflow", RuntimeWarning, "scale.py", 1, "optimzoo.scale")


def test_a_pin_takes_the_place_of_the_usual_one(monkeypatch):
    loader = SourceFileLoader("ci_install", str(ROOT / ".ci" / "install"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("ci_install", loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    lines = module.constraints(["torch==2.9.0"]).splitlines()
    assert [line for line in lines if line.startswith("torch=")] == ["torch==2.9.0"]
    usual = module.constraints([]).splitlines()
    assert usual == (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(usual)
