"""The workflows call commands that there are, on the versions that are claimed."""

import re
from pathlib import Path

import pytest
import yaml
from test_versions import PYTHONS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_is_one_of_the_repository(path):
    workflow = load(path)
    assert workflow["permissions"]["contents"] == "read", "no more than a step needs"
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands
        for command in commands:
            program, *arguments = command.split()
            if program == "make":
                assert set(arguments) <= set(TARGETS), command
            else:
                assert program == ".venv/bin/optimzoo" or (ROOT / program).exists(), command
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])


def test_every_python_that_is_claimed_is_tested():
    jobs = load(FOLDER / "workflows" / "test.yml")["jobs"]
    assert jobs["python"]["strategy"]["matrix"]["python"] == PYTHONS


def test_the_hooks_are_those_of_make():
    [repo] = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert {hook["entry"] for hook in repo["hooks"]} == {"make lint", "make type"}


@pytest.mark.parametrize("name", ["bug", "training"])
def test_the_forms_have_what_github_needs(name):
    form = load(FOLDER / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form["name"] and form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    if name == "bug":
        assert any("optimzoo doctor" in field["attributes"]["label"] for field in fields)
