"""Self-contained HTML page of the results: sortable tables, curves, memory."""

import html
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.experiments import summary
from benchmarks.experiments.cast import Comparison
from benchmarks.experiments.colors import method_colors
from benchmarks.experiments.model_sizes import MODEL_SIZES
from benchmarks.experiments.pictures import pareto_front
from benchmarks.experiments.plan import Plan, Row, read_rows, rows_of
from benchmarks.experiments.significance import by_method
from benchmarks.papers import cast, perplexity_tables
from benchmarks.papers.memory_columns import published_value
from benchmarks.papers.perplexity_tables import PaperComparison

PARTS = Path(__file__).with_name("page")
TITLE = "optimzoo: what was measured"
LEAD = (
    "Memory-efficient optimizers for language-model training, each trained on the same batches, "
    "beside what their papers state. Our runs are small: read ratios and orders, not perplexities. "
    "Every figure here is computed from the rows in benchmarks/results, and every row says how it "
    "was made."
)


def sections(own: tuple[Plan, list[Row]] | None = None) -> list[Row]:
    """Return the sections of the page: one per table that has rows, that of ``own`` first."""
    result = [] if own is None else [_protocols(*own, "own", "One's own beside ours")]
    stored = {plan.name: plan for plan in Plan.stored()}
    for size in ("nano", *MODEL_SIZES):
        for name, table in perplexity_tables.TABLES.items():
            full = table.plans == ("full",)
            names = {size} if full else {p.replace("nano", size, 1) for p in table.plans}
            if full != size.endswith("-full") or not names & stored.keys():
                continue
            rows = perplexity_tables.stored_rows(table, size.removesuffix("-full"))
            if len(rows) > 1:
                result.append(_beside_section(name, table, size, rows))
    if plan := stored.get("nano"):
        rows_of_plan = read_rows(plan.results_path)
        title = "Every method under both protocols"
        result.append(_protocols(plan, rows_of_plan, "protocols", title))
    if rows_of_cast := Comparison("nano").rows:
        result.append(_cast(rows_of_cast))
    return result


def _beside_section(
    name: str, table: PaperComparison, size: str, rows: dict[str, list[Row]]
) -> Row:
    compared = perplexity_tables.records(table, size, rows)
    flat = [row for mine in rows.values() for row in mine]
    numbers = ["paper", "paper_ratio", "paper_rank", "perplexity", "ratio", "rank", "held_bytes"]
    numbers += ["optimizer_ms", "tokens"]
    body = [
        {
            "method": record["method"],
            "cells": perplexity_tables.cells(record),
            "values": [None, *(record.get(key) for key in numbers)],
            "made": how_made(rows[record["method"]]),
        }
        for record in compared
    ]
    notes = perplexity_tables.lines_below(table, compared)
    title = f"{table.title}: {size}"
    section = _section(
        f"{name}-{size}", title, _where(flat), perplexity_tables.HEADERS, body, notes
    )
    labels = {record["method"]: record["label"] for record in compared}
    section["curves"] = _curves(flat, labels)
    section["front"] = _front(table, compared)
    return section


def _protocols(plan: Plan, rows: list[Row], name: str, title: str) -> Row:
    body = []
    for record in summary.summarise(plan, rows):
        mine = rows_of(rows, record["method"], record["protocol"])
        values = [None, None, record["rates"][0], record["perplexity"], record["held_bytes"]]
        size = record["bytes_60m"] if math.isfinite(record["bytes_60m"]) else None
        values += [size, record["optimizer_ms"]]
        cells = {"cells": summary.cells(record), "values": values}
        body.append({"method": record["method"], **cells, "made": how_made(mine)})
    headers = list(summary.HEADERS)
    section = _section(name, title, _where(rows), headers, body, [summary.LEGEND])
    labels = {method: plan.label(method) for method in plan.methods}
    drawn = "tuned" if name == "own" else "paper"
    section["curves"] = _curves([r for r in rows if r["protocol"] == drawn], labels)
    return section


def _cast(rows: list[Row]) -> Row:
    groups = by_method(rows)
    numbers = ("zeros", "paper", "paper_ratio", "perplexity", "ratio", "tokens")
    body = [
        {
            "method": record["method"],
            "cells": cast.cells(record),
            "values": [None, *(record[key] for key in numbers)],
            "made": how_made(groups[record["method"]]),
        }
        for record in cast.records(rows)
    ]
    where, notes = _where(rows), [cast.note(rows)]
    section = _section("cast", "CAST: from dense to 2:4", where, cast.HEADERS, body, notes)
    section["curves"] = _curves(rows, {m: mine[0]["label"] for m, mine in groups.items()})
    return section


def _section(
    name: str, title: str, where: str, headers: Any, body: list[Row], notes: list[str]
) -> Row:
    head = {"id": name, "title": title, "where": where, "headers": [*headers, "made"]}
    return {**head, "rows": body, "notes": notes, "curves": [], "front": []}


def how_made(rows: list[Row]) -> str:
    """Format commit, device, versions, seeds and text of a record's rows."""
    places = dict.fromkeys(
        f"{host['commit']}, {host['device']}, {host['threads']} thread"
        f"{'s' * (host['threads'] > 1)}, torch {host['torch']}"
        for host in (row["provenance"] for row in rows)
    )
    seeds = ", ".join(str(seed) for seed in sorted({row["config"]["seed"] for row in rows}))
    text = rows[0]["corpus"]
    return f"{'; '.join(places)}; seed {seeds}; {text['name']} {text['sha256'][:12]}"


def _where(rows: list[Row]) -> str:
    config, text = rows[0]["config"], rows[0]["corpus"]
    batch = config["batch_size"] * config["accumulate"] * config["seq_len"]
    return (
        f"{config['model']}, {text['name']} text, {config['steps']:,} steps of {batch:,} tokens, "
        f"{rows[0]['precision']}"
    )


def _curves(rows: list[Row], labels: dict[str, str]) -> list[Row]:
    """Return the curve of each method's lowest seed."""
    chosen: dict[tuple[str, str], Row] = {}
    for row in sorted(rows, key=lambda r: r["config"]["seed"]):
        if row.get("curve") and row["method"] in labels:
            chosen.setdefault((row["method"], row.get("protocol", "")), row)
    return [
        {
            "method": method,
            "protocol": protocol,
            "label": labels[method],
            "points": [[step, round(loss, 4)] for step, loss in row["curve"]],
        }
        for (method, protocol), row in chosen.items()
    ]


def _front(table: PaperComparison, made: list[Row]) -> list[Row]:
    """Return the points of ratio to Adam against memory at 60M, ours and the paper's.

    `best` is true for those of ours that no other of ours beats.
    """
    ours: list[Row] = []
    theirs: list[Row] = []
    reference = next((r["perplexity"] for r in made if r["method"] == table.reference), None)
    if reference is None or table.log or table.size != "60M":
        return []
    for record in made:
        base = {"method": record["method"], "label": record["label"]}
        spread = (record["spread"] or 0.0) / reference
        if math.isfinite(record["ratio"]):
            x = record["bytes_60m"] / 1e6
            ours.append({**base, "x": x, "y": record["ratio"], "spread": spread, "paper": False})
        name = perplexity_tables.TABLES["scale-main"].methods.get(record["method"])
        memory = published_value("SCALE", "memory params", name or "", "60M")
        if memory is not None and record["paper_ratio"] is not None:
            y = record["paper_ratio"]
            theirs.append({**base, "x": 1e3 * memory, "y": y, "spread": 0.0, "paper": True})
    best = pareto_front([(point["x"], point["y"]) for point in ours])
    return [{**point, "best": i in best} for i, point in enumerate([*ours, *theirs])]


def _table(section: Row) -> str:
    heads = "".join(
        f'<th scope="col"><button type="button">{html.escape(name)}</button></th>'
        for name in section["headers"]
    )
    ways = list(dict.fromkeys(row["made"] for row in section["rows"]))
    colors = _colors(section)
    lines = []
    for row in section["rows"]:
        dot = f'<span class="dot" style="--color: {colors[row["method"]]}"></span>'
        cells = []
        for i, (text, value) in enumerate(zip(row["cells"], row["values"], strict=True)):
            sort_key = "" if value is None and text == "-" else value
            order = f' data-value="{sort_key}"' if sort_key is not None else ""
            cells.append(f"<td{order}>{dot * (i == 0)}{html.escape(text)}</td>")
        way = f'<a href="#{section["id"]}-made">{_letter(ways.index(row["made"]))}</a>'
        lines.append(f'<tr>{"".join(cells)}<td title="{html.escape(row["made"])}">{way}</td></tr>')
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _colors(section: Row) -> dict[str, str]:
    return method_colors(row["method"] for row in section["rows"])


def _letter(number: int) -> str:
    return chr(ord("a") + number)


def _ways(section: Row) -> str:
    ways = dict.fromkeys(row["made"] for row in section["rows"])
    items = "".join(f"<dt>{_letter(i)}</dt><dd>{html.escape(w)}</dd>" for i, w in enumerate(ways))
    return f'<dl class="ways" id="{section["id"]}-made">{items}</dl>'


def _figure(name: str, title: str, text: str) -> str:
    caption = f"<figcaption>{title}<small>{text}</small></figcaption>"
    return f'<figure class="{name}">{caption}</figure>'


def _html(section: Row) -> str:
    figures = ""
    if section["curves"]:
        text = "mean of five neighbouring values, one seed; press a name to hide it"
        figures += _figure("curves", "Training loss", text)
    if section["front"]:
        text = (
            "to Adam = 1; filled: ours, with the spread of seeds, and the line of those that no "
            "other beats; ring: the paper's"
        )
        figures += _figure("front", "Perplexity ratio against memory", text)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in section["notes"])
    return (
        f'<section id="{section["id"]}"><h2>{html.escape(section["title"])}</h2>'
        f'<p class="where">{html.escape(section["where"])}</p>'
        f'<div class="scroll" tabindex="0">{_table(section)}</div>'
        f'<div class="charts">{figures}</div><div class="notes">{notes}{_ways(section)}</div>'
        "</section>"
    )


def render(own: tuple[Plan, list[Row]] | None = None) -> str:
    """Return the page as HTML; with ``own``, a comparison that is not in the repository."""
    parts = sections(own)
    style = (PARTS / "page.css").read_text(encoding="utf-8")
    script = (PARTS / "page.js").read_text(encoding="utf-8")
    keys = ("id", "curves", "front")
    drawn = [{**{key: part[key] for key in keys}, "colors": _colors(part)} for part in parts]
    data = json.dumps(drawn)
    data = data.replace("<", "\\u003c")  # no text of a row can end the script
    links = "".join(f'<a href="#{s["id"]}">{html.escape(s["title"])}</a>' for s in parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{TITLE}</title>\n<style>\n{style}</style></head>\n<body><header><h1>{TITLE}</h1>"
        f'<p class="lead">{LEAD}</p><nav>{links}</nav></header>\n<main>\n'
        + "\n".join(map(_html, parts))
        + "\n</main><footer><p>Made by <code>python -m benchmarks report</code>.</p></footer>\n"
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>\n{script}</script></body></html>\n"
    )
