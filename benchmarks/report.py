"""Put the committed results into the README: no figure there is typed by hand."""

import argparse
import re
from pathlib import Path

from benchmarks.plan import Plan
from benchmarks.provenance import write_atomic
from benchmarks.tables import LEGEND, caption, markdown_table, read_rows

README = Path(__file__).resolve().parent.parent / "README.md"
_PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """``text`` with every table between its marks made anew from the committed rows."""

    def fill(match: re.Match[str]) -> str:
        plan = Plan(match[2])
        if not plan.results_path.exists():
            raise ValueError(f"{plan.results_path} is missing; run compare --store first")
        rows = read_rows(plan.results_path)
        body = f"{markdown_table(plan, rows)}\n\n{caption(rows)}. {LEGEND}\n"
        return f"{match[1]}{body}{match[3]}"

    return _PLACE.sub(fill, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks report`."""
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")


def main(args: argparse.Namespace) -> int:
    """Write the README's tables, or check them."""
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        if new != old:
            print("README.md differs from the results; run python -m benchmarks report")
        return int(new != old)
    write_atomic(README, new)
    return 0
