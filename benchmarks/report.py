"""Write the committed results into the README, and as a page: no figure is typed by hand."""

import argparse
import re
from pathlib import Path

from benchmarks import beside, page
from benchmarks.plan import Plan
from benchmarks.provenance import write_atomic
from benchmarks.tables import LEGEND, caption, markdown_table, read_rows, write_report

README = Path(__file__).resolve().parent.parent / "README.md"
_PLACE = re.compile(r"(<!-- (table|beside|rows): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """``text`` with every table between its marks made anew from the committed rows."""

    def fill(match: re.Match[str]) -> str:
        body = _comparison(match[3]) if match[2] == "table" else _beside(match[3], match[2])
        return f"{match[1]}{body}\n{match[4]}"

    return _PLACE.sub(fill, text)


def _comparison(name: str) -> str:
    plan = Plan(name)
    if not plan.results_path.exists():
        raise ValueError(f"{plan.results_path} is missing; run compare --store first")
    rows = read_rows(plan.results_path)
    return f"{markdown_table(plan, rows)}\n\n{caption(rows)}. {LEGEND}"


def _beside(name: str, kind: str) -> str:
    """A paper's table beside ours, as `scale-main@nano`; `rows`: how it was made, no notes."""
    table, scale = name.split("@")
    rows = beside.stored_rows(beside.TABLES[table], scale)
    made = beside.records(beside.TABLES[table], scale, rows)
    if kind == "beside":
        return beside.markdown(beside.TABLES[table], made)
    every = [row for mine in rows.values() for row in mine]
    return f"{beside.markdown_rows(made)}\n\n{caption(every)}."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks report`."""
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would differ")
    parser.add_argument("--out", type=Path, default=Path("runs/report"))


def main(args: argparse.Namespace) -> int:
    """Write the README's tables, the page and the pictures; or check the README's tables."""
    old = README.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        if new != old:
            print("README.md differs from the results; run python -m benchmarks report")
        return int(new != old)
    write_atomic(README, new)
    write_atomic(args.out / "index.html", page.render())
    for plan in Plan.stored():
        write_report(plan, read_rows(plan.results_path), args.out / plan.name)
    print(f"written: {README.name}, {args.out}/index.html, and loss.png, memory.png by plan")
    return 0
