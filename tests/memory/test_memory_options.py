"""``optimzoo memory``: no option with any other is without effect; it is heeded or refused."""

import argparse
import json
from pathlib import Path

import pytest

from optimzoo.cli import main
from optimzoo.memory.options import add_arguments
from optimzoo.models import CONFIGS, LlamaConfig

pytestmark = pytest.mark.usefixtures("few_objects")
# The head outweighs its activations, and those of the blocks outweigh all else: so a step's peak is
# in the last block's backward, where the head's gradient waits, and every option moves it.
OWN = """
import torch
from torch import nn
class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 16)
        self.blocks = nn.ModuleList(self.block() for _ in range(2))
        self.head = nn.Linear(16, 1024, bias=False)
    def block(self):
        return nn.Sequential(nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 16))
    def forward(self, input_ids, labels):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1)).square().mean()
def make():
    return Own()
"""
# Another value than the default for every option.
VALUES = {
    "model": ["--model", "tiny"],
    "module": ["--module", "own.py:make"],
    "script": ["--script", "script.py"],
    "convert": ["--convert", "low_rank=8"],
    "optimizer": ["--optimizer", "adamw"],
    "hyper": ["--hyper", "rank=2"],
    "dtype": ["--dtype", "float32"],
    "shards": ["--shards", "2"],
    "batch": ["--batch", "3"],
    "seq": ["--seq", "384"],
    "checkpointing": ["--checkpointing"],
    "release": ["--release"],
    "device": ["--device", "cuda"],
    "account": ["--account"],
    "fits": ["--fits", "4MB"],
    "json": ["--json", "a.json"],
    "picture": ["--picture", "a.png"],
    "snapshot": ["--snapshot", "a.pickle"],
}
SOURCES = ("model", "module", "script")


def options() -> list[str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return [action.dest for action in parser._actions if action.dest != "help"]


def test_the_pairs_are_of_all_options():
    assert list(VALUES) == options()


class Runs:
    """What the command does with some options, each combination once."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.known: dict[tuple[str, ...], object] = {}

    def __call__(self, *names: str) -> object:
        names = tuple(sorted(names, key=lambda name: (name == "script", name)))
        if names not in self.known:
            self.known[names] = self.run(names)
        return self.known[names]

    def run(self, names: tuple[str, ...]) -> object:
        """The one line of a refusal, or figures and files."""
        values = VALUES | ({"device": ["--device", "cpu"]} if "script" in names else {})
        arguments = [word for name in names for word in values[name]]
        if "script" not in names:
            arguments += [] if {"model", "module"} & {*names} else values["module"]
            arguments += [] if "optimizer" in names else ["--optimizer", "galore"]
        figures = Path("a.json" if "json" in names else "figures.json")
        if "json" not in names:
            arguments = ["--json", str(figures), *arguments]
        for old in Path.cwd().glob("*.[jp][snpi][ogc]*"):
            old.unlink()
        try:
            status = main(["memory", *arguments])
        except SystemExit as left:
            status = left.code
        out, err = self.capsys.readouterr()
        if status == 2:
            assert err.startswith("error: ") and err.count("\n") == 1, (arguments, err)
            return err
        assert out and status in (0, 1), (arguments, status)
        found = json.loads(figures.read_text())
        if "script" in names:  # times and resident memory are never the same
            found = sorted(found)
        else:
            found = found.get("methods", found.get("fits"))
        files = sorted(p.name for p in Path.cwd().glob("a.*") if p.stat().st_size)
        return found, files


@pytest.fixture
def runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CONFIGS, "tiny", LlamaConfig(61, 16, 32, 1, 1))
    Path("own.py").write_text(OWN)
    Path("script.py").write_text("import torch\nx = torch.ones(1000)\n")
    return Runs(capsys)


def check(runs: Runs, one: str, other: str) -> None:
    both = runs(one, other)
    if isinstance(both, str):
        assert f"--{one}" in both or f"--{other}" in both
        return
    for name, without in ((one, runs(other)), (other, runs(one))):
        if name in ("model", "module"):
            continue  # a source stands alone: without one there is nothing to compare
        assert both != without, f"--{name} has no effect beside --{ {one, other} - {name} }"


@pytest.mark.parametrize(
    "one",
    # Pairs with a snapshot are all refused before any work.
    [pytest.param(n, marks=[] if n == "snapshot" else pytest.mark.thorough) for n in VALUES],
)
def test_with_every_option_before_it_is_heeded_or_refused(runs, one):
    if one == "picture":
        pytest.importorskip("matplotlib")
    names = list(VALUES)
    for other in names[: names.index(one)]:
        check(runs, one, other)


@pytest.mark.parametrize("other", ("hyper", "dtype"))
def test_exact_bytes_heed_it(runs, other):
    assert not isinstance(runs("account", other), str)
    check(runs, "account", other)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("batch", "account"), "--batch 3: it changes the peak of a step, which --account leaves"),
        (("fits", "account"), "--fits 4MB: it changes the peak of a step, which --account leaves"),
        (("optimizer", "script"), "--optimizer adamw: a script is measured as it runs; leave --op"),
        (("optimizer", "hyper"), "--hyper rank=2: adamw has no hyperparameter 'rank'; it takes lr"),
        (("model", "script"), "argument --script: not allowed with argument --model"),
    ],
    ids=str,
)
def test_a_refusal_names_the_option_its_value_and_the_way_out(runs, pair, message):
    assert message in runs(*pair)


def test_a_module_s_file_is_imported_as_a_script_is(tmp_path, monkeypatch, capsys):
    """It finds its neighbours, and itself, as dataclasses do with annotations that are text."""
    (tmp_path / "neighbour_of_own.py").write_text(OWN, encoding="utf-8")
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text += "import neighbour_of_own\n\n@dataclass\nclass Size:\n    width: int = 1\n\n"
    text += "def make():\n    return neighbour_of_own.make()\n"
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend("")
    options = ["--optimizer", "adamw", "--account"]
    assert main(["memory", "--module", str(tmp_path / "mine.py:make"), *options]) == 0
    (tmp_path / "net.txt").write_text(text, encoding="utf-8")
    capsys.readouterr()
    assert main(["memory", "--module", str(tmp_path / "net.txt:make"), *options]) == 2
    assert "does not end in .py" in capsys.readouterr().err


@pytest.mark.parametrize("hyper", ["betas=(0.9,)", "capturable=True"])
def test_options_that_torch_refuses_by_other_errors_are_one_line(hyper, capsys):
    command = ["memory", "--model", "pico", "--account", "--optimizer", "adamw", "--hyper", hyper]
    assert main(command) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
