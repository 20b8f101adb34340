"""The README's figures come from the committed results, and its examples run."""

import re
from pathlib import Path

import pytest
import torch

import optimzoo
from benchmarks.report.marks import filled
from benchmarks.report.readme import DOCS, README
from optimzoo.models.llama import Llama, LlamaConfig, get_config

TEXT = README.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name)
def test_tables_are_made_from_the_committed_rows(page):
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text


def test_the_one_line_example_runs():
    model = Llama(LlamaConfig(64, 16, 24, 1, 2))
    codes = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    [code] = [code for code in codes if "starting_values" in code]
    scope = {"model": model, "torch": torch}
    exec(code, scope)
    assert type(scope["optimizer"]) is optimzoo.SCALE


def test_the_audit_shown_is_the_audit_printed():
    with torch.device("meta"):
        model = Llama(get_config("60m"))
    assert optimzoo.describe(model) in TEXT


def test_every_method_of_the_library_is_in_the_table():
    table = TEXT.split("<!-- methods: nano -->")[1].split("<!-- end -->")[0]
    named = {re.findall(r"`(\w+)`", line)[0] for line in table.splitlines() if line[:3] == "| `"}
    own = {
        n for n in optimzoo.list_optimizers() if "optimzoo" in optimzoo.get_info(n).make.__module__
    }
    assert named == own


def test_it_is_short_and_its_links_lead_somewhere():
    assert len(TEXT.splitlines()) <= 130
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert link.startswith("https://") or (README.parent / link).exists(), link


def test_no_path_named_in_the_contributing_guide_is_missing():
    root = Path(README).parent
    guide = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"`([\w./]+/[\w./]*)`", guide):
        assert (root / path).exists(), path
