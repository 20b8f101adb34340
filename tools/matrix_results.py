"""Results of the rows of ``tools/test_matrix.py``: read from pytest, stored, shown."""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any


def tree_key(root: Path) -> str | None:
    """Return a key of the tree's content: the commit, and a hash of uncommitted changes."""

    def git(*args: str) -> bytes:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").decode().strip()
        changes = hashlib.sha256(git("diff", "--binary", "HEAD"))
        clean = changes.digest() == hashlib.sha256().digest()
        for name in git("ls-files", "-oz", "--exclude-standard").split(b"\0")[:-1]:
            changes.update(name + b"\0" + (root / os.fsdecode(name)).read_bytes())
            clean = False
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit if clean else f"{commit}+{changes.hexdigest()[:12]}"


def stored(folder: Path, name: str, tree: str | None) -> dict[str, Any] | None:
    """Return the result of a row for this tree, if it has one."""
    try:
        result = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = tree is not None and isinstance(result, dict) and result.get("tree") == tree
    return result if fits else None


def store(folder: Path, result: dict[str, Any]) -> None:
    """Write a row's result, whole or not at all."""
    path = folder / f"{result['row']}.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def summary(output: str, status: int) -> dict[str, Any]:
    """Return the counts, the failures and the status in pytest's output.

    Args:
        output: output of the run, to its end.
        status: the run's exit status.
    """
    closing = r"^=* ?((?:\d+ [a-z]+(?:, )?)+) in [\d.]+s(?: \([\d:]+\))? ?=*$"
    lines = re.findall(closing, output, re.MULTILINE)
    counts = {w.rstrip("s"): int(n) for n, w in re.findall(r"(\d+) ([a-z]+)", "".join(lines[-1:]))}
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)$", output, re.MULTILINE)
    passed = status == 0 and counts.get("passed", 0) > 0
    if not passed and not failures:
        last = [line for line in output.splitlines() if line.strip()][-1:]
        failures = [f"exit status {status}: {''.join(last) or 'no output'}"]
    return {
        "status": "passed" if passed else "failed",
        "passed": counts.get("passed", 0),
        "skipped": counts.get("skipped", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
        "failures": failures,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Return the results as text, one line per row with its first failures below it."""
    head = ("row", "result", "seconds", "passed", "skipped", "failed", "with")
    lines = [head]
    notes: dict[int, list[str]] = {}
    for result in results:
        counts = [str(result.get(key, "-")) for key in ("seconds", "passed", "skipped", "failed")]
        versions = str(result.get("versions", ""))
        lines.append((result["row"], result["status"], *counts, versions))
        failures = result.get("failures", [])
        more = [f"and {len(failures) - 3} more in {result['log']}"] if len(failures) > 3 else []
        notes[len(lines) - 1] = [*failures[:3], *more]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for number, line in enumerate(lines):
        cells = [
            cell.rjust(width) if 2 <= i <= 5 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
        text += [f"    {note}" for note in notes.get(number, [])]
    return "\n".join(text)
