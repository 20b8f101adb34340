"""The workflows call commands that there are, on the versions that are claimed."""

import re
from pathlib import Path

import pytest
import yaml
from test_versions import PYTHONS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))
PUBLISH = "pypa/gh-action-pypi-publish@release/v1"
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
        actions = [step["uses"] for step in job["steps"] if "uses" in step]
        assert commands or PUBLISH in actions
        for command in commands:
            program, *arguments = command.split()
            if program == "make":
                assert {word for word in arguments if "=" not in word} <= set(TARGETS), command
            else:
                assert program == ".venv/bin/optimzoo" or (ROOT / program).exists(), command
        for action in actions:
            assert action == PUBLISH or re.fullmatch(r"actions/[\w-]+@v\d+", action)


def test_every_python_that_is_claimed_is_tested():
    jobs = load(FOLDER / "workflows" / "test.yml")["jobs"]
    assert jobs["python"]["strategy"]["matrix"]["python"] == PYTHONS


def test_wheels_are_published_for_a_tag_alone_after_their_checks_and_without_a_token():
    text = (FOLDER / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    publish = jobs["publish"]
    assert publish["if"] == "github.ref_type == 'tag'"
    assert publish["needs"] == "check" and jobs["check"]["needs"] == "build"
    assert publish["permissions"] == {"contents": "read", "id-token": "write"}
    assert publish["environment"]["name"] == "pypi" and "secrets." not in text
    assert publish["steps"][-1]["uses"] == PUBLISH
    downloaded = publish["steps"][0]["with"]
    assert downloaded["path"] == "dist"  # where the action looks
    for job in ("build", "check"):
        machines = [row["machine"] for row in jobs[job]["strategy"]["matrix"]["include"]]
        assert machines == ["x86_64", "aarch64"]
    [setup] = [step for step in jobs["check"]["steps"] if "setup-python" in step.get("uses", "")]
    assert sorted(setup["with"]["python-version"].split()) == PYTHONS


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
