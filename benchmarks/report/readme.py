"""`python -m benchmarks report`: tables, pictures and an HTML page of the committed rows."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.files import ROOT, write_atomic
from benchmarks.experiments import pictures
from benchmarks.experiments.own import read_comparison, write_csv
from benchmarks.experiments.plan import Plan, read_rows
from benchmarks.experiments.summary import tuned_records, write_report
from benchmarks.report import batches, results_page, tuned_rates
from benchmarks.report.marks import filled
from optimzoo.options import refuse
from optimzoo.tuned_rates import tuned_settings

README, DOCS = ROOT / "README.md", ROOT / "docs"


def _front(name: str) -> Any:
    """Draw perplexity against memory of a plan's tuned runs."""
    return pictures.memory_figure(Plan(name), list(tuned_records(name).values()))


# By the mark of the text that shows it.
_PICTURES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "headline": ("memory.svg", _front),
    "batches": ("batches.svg", batches.figure),
}


def _svg(draw: Callable[[str], Any], name: str) -> bytes:
    """Draw a figure of the rows as reproducible SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        return pictures.saved(draw(name), format="svg", metadata={"Date": None})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m benchmarks report`."""
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    parser.add_argument("--out", type=Path, default=Path("runs/report"))
    parser.add_argument(
        "--own", type=Path, metavar="FOLDER", help="an --out of compare, shown on the page first"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all rows as CSV, too")


def _pages() -> dict[Path, str]:
    """Return the README and the pages of the documentation with their tables made anew."""
    return {
        path: filled(path.read_text(encoding="utf-8"))
        for path in (README, *sorted(DOCS.glob("*.md")))
    }


def main(args: argparse.Namespace) -> int:
    """Write the tables of README and docs, the starting values, the page and the pictures.

    Or check them.
    """
    if args.check:
        refuse(
            args, ["out", "own", "csv"], args.given, "--check writes nothing; leave {option} out"
        )
    own = read_comparison(args.own) if args.own else None
    if args.check:
        new = {tuned_rates.PATH: tuned_rates.text(), **_pages()}
        differ = [path.name for path, text in new.items() if text != path.read_text("utf-8")]
        for name in differ:
            print(f"{name} differs from the results; run python -m benchmarks report")
        return int(bool(differ))
    write_atomic(tuned_rates.PATH, tuned_rates.text())
    tuned_settings.cache_clear()  # the pages show what is in that file
    for path, text in _pages().items():
        write_atomic(path, text)
        for mark, name in re.findall(r"<!-- (\w+): (\S+) -->", text):
            if mark in _PICTURES:
                file, draw = _PICTURES[mark]
                write_atomic(DOCS / file, _svg(draw, name))
    stored = [(plan, read_rows(plan.results_path)) for plan in Plan.stored()]
    write_atomic(args.out / "index.html", results_page.render(own))
    for plan, rows in stored:
        write_report(plan, rows, args.out / plan.name)
    if own:
        write_report(*own, args.out / "own")
    if args.csv:
        write_csv(args.csv, [*stored, *([own] if own else [])])
    print(
        f"written: {README.name}, {DOCS.name}/ and its pictures, {args.out}/index.html, and "
        "loss.png, memory.png by plan"
    )
    return 0
