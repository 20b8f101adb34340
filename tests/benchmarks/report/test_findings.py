"""What the pages may say: tuned rows alone, and verdicts that follow from the rows."""

import re

import pytest

from benchmarks.common.files import ROOT
from benchmarks.experiments import cast
from benchmarks.experiments.plan import Plan, read_rows
from benchmarks.experiments.significance import paired
from benchmarks.experiments.start_check import stored
from benchmarks.experiments.starting_values import outcomes
from benchmarks.experiments.summary import summarise
from benchmarks.papers import perplexity_tables
from benchmarks.report import findings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = [
    (page.name, *mark)
    for page in PAGES
    for mark in re.findall(r"<!-- (\w+): (\S+) -->", page.read_text(encoding="utf-8"))
]


def records(kind: str, name: str):
    """The records of the rows that a mark's table shows."""
    if kind in ("table", "results", "headline"):
        plan = Plan(name)
        made = summarise(plan, read_rows(plan.results_path))
        return [r for r in made if kind == "table" or r["protocol"] == "tuned"]
    table, size = perplexity_tables.TABLES[name.split("@")[0]], name.split("@")[1]
    return perplexity_tables.records(table, size, perplexity_tables.stored_rows(table, size))


@pytest.mark.parametrize(
    ("page", "kind", "name"),
    [m for m in MARKS if m[1] in ("table", "results", "headline", "beside", "rows")],
)
def test_no_row_of_a_page_has_its_best_rate_at_an_edge(page, kind, name):
    made = records(kind, name)
    if kind == "table":  # leaves out those whose search has not ended
        text = next(path for path in PAGES if path.name == page).read_text(encoding="utf-8")
        block = text.split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
        made = [r for r in made if f"| {r['label']} | {r['protocol']} |" in block]
        assert len(made) == block.count(" | tuned | ") + block.count(" | paper | ")
    assert made and {r["label"]: r["edges"] for r in made if r["edges"]} == {}


def test_the_marks_that_are_checked_are_there():
    assert {(page, kind) for page, kind, _ in MARKS} >= {
        *(("README.md", kind) for kind in ("headline", "methods", "results")),
        *((page, "table") for page in ("choosing.md", "results.md")),
        ("results.md", "findings"),
    }


def test_findings_are_of_tuned_methods_on_the_same_batches():
    lines = findings.table().rows
    assert lines
    shown = [q for q in findings.QUESTIONS if q.text in {line[0] for line in lines}]
    for question in findings.QUESTIONS:
        ours, theirs = question.rows()
        if question in shown and (ours and theirs):
            assert question.edges() == []
            same = {
                tuple(row["config"][k] for k in ("model", "steps", "batch_size", "seq_len"))
                for row in [*ours, *theirs]
            }
            assert len(same) == 1 and len({row["corpus"]["sha256"] for row in ours + theirs}) == 1


def test_a_verdict_turns_with_its_rows(monkeypatch):
    question = next(q for q in findings.QUESTIONS if q.ours == ("nano", "scale"))
    ours, theirs = question.rows()
    monkeypatch.setattr(findings.Question, "rows", lambda self: (theirs, ours))
    monkeypatch.setattr(findings.Question, "edges", lambda self: [])
    there, back = paired(ours, theirs), paired(theirs, ours)
    assert there.mean == -back.mean and there.p == pytest.approx(back.p)
    cells = {line[0]: line[1] for line in findings.table().rows}
    assert cells[question.text] == back.text() != there.text()


def test_questions_name_methods_that_plans_have():
    for question in findings.QUESTIONS:
        for plan, method in (question.ours, question.theirs):
            if plan == "nano-cast":
                assert cast.METHODS[method].trained
            else:
                assert "tuned" in Plan(plan).methods[method]


def test_what_scale_loses_to_adamw_is_lost_at_the_embedding_and_the_head():
    """docs/results.md says it; SinkGD and SCALE agree on what Adam is worth there."""
    pairs = {(q.ours, q.theirs): q.difference() for q in findings.QUESTIONS}
    whole = pairs[("nano", "scale"), ("nano", "adamw")]
    roles = pairs[("nano", "sinkgd_scale"), ("nano", "sinkgd")]
    assert whole.mean > 0.05 and roles.mean > 0.05
    assert abs(whole.mean - roles.mean) < 2 * (whole.error + roles.error)


def test_spectral_normalisation_gains_on_adamw_with_the_batch_and_muon_leads_at_each():
    """docs/results.md says it."""
    pairs = {(q.ours, q.theirs): q.difference() for q in findings.QUESTIONS}
    verdicts = {"1k": "behind", "4k": "level", "16k": "ahead"}
    for batch, verdict in verdicts.items():
        plan = f"nano-{batch}"
        spectral, adamw, muon = ((plan, m) for m in ("scale_spectral", "adamw", "muon"))
        assert pairs[spectral, adamw].text().endswith(verdict)
        assert "ahead" in pairs[muon, adamw].text() and "behind" in pairs[spectral, muon].text()


def test_the_table_of_cast_is_whole_on_a_terminal_of_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    cast.table(cast.Comparison("nano").rows).print()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in "".join(lines)
    assert any(line.startswith(" CAST ") for line in lines)


def test_restarts_bring_nothing_and_their_reset_costs():
    """docs/weights.md says it of 1,600 steps."""
    plan = "nano-lowrank-long"
    pairs = {(q.ours[1], q.theirs[1]): q.difference() for q in findings.QUESTIONS}
    verdicts = {
        ("restarts", "low_rank"): "level",
        ("reset", "low_rank"): "behind",
        ("refactorize", "low_rank"): "ahead",
        ("refactorize", "low_rank_slow"): "level",
        ("restarts_slow", "low_rank_slow"): "behind",
    }
    for (ours, theirs), verdict in verdicts.items():
        assert pairs[f"low_rank_{ours}", theirs].text().endswith(verdict), (ours, theirs)
    rates = [Plan(plan).best(f"low_rank_{name}", "tuned") for name in ("slow", "reset")]
    assert rates[1]["lr"] == 2 * rates[0]["lr"]


def test_two_of_three_start_at_twice_the_best_rate_of_a_tied_head_by_scale_s_rule():
    """What docs/starting_values.md says of the small GPT."""
    [(check, rows)] = [pair for pair in stored() if pair[0].name == "script"]
    found = {o.method: o for o in outcomes(check, rows)}
    ratios = {
        name: found[name].start["config"]["hyper"]["head_lr"]
        / found[name].best["config"]["hyper"]["head_lr"]
        for name in ("scale", "sinkgd_scale", "muon_8bit_scale")
    }
    assert ratios == {"scale": 2.0, "sinkgd_scale": 2.0, "muon_8bit_scale": 1.0}
    assert [o.method for o in found.values() if not o.within] == ["sinkgd_scale", "scale"]
