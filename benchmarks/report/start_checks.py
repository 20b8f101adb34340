"""The check of starting values as text: on its page, and on each method's."""

from functools import cache

from benchmarks.common.provenance import made_on
from benchmarks.common.tables import Table
from benchmarks.experiments.plan import Row
from benchmarks.experiments.start_check import Check, stored
from benchmarks.experiments.starting_values import adamw_text, moved_text, outcomes, summary, table


def text(task: str) -> str:
    """Return the table of a task, with what was trained and how many methods are near their best.

    Raises:
        ValueError: there are no rows of the task.
    """
    if task not in _stored():
        raise ValueError(f"{Check(task).path} is missing; run starting-values {task} --store first")
    check, rows = _stored()[task]
    sizes, shown = check.task.sizes, table(check, rows).markdown()
    others = "; the others say far" * (not all(o.within for o in outcomes(check, rows)))
    tokens = f" x {sizes['seq_len']} tokens"
    batch = f"{sizes['batch_size']}{tokens if check.task.batch_tokens else ' images'}"
    caption = (
        f"{summary(check, rows)}{others}{moved_text(check)}. "
        f"{check.task.text[0].upper()}{check.task.text[1:]}: "
        f"{sizes['steps']} steps of {batch}; "
        f"{adamw_text(check)}; test perplexity; {made_on(rows[0]['provenance'])}."
    )
    return f"{shown}\n\n{caption}"


def of_method(name: str) -> Table | None:
    """Return a method's rows of every task, or None if there are none."""
    headers: tuple[str, ...] = ()
    lines = []
    for check, rows in _stored().values():
        methods = [m for m, r in check.plan.methods.items() if r.get("optimizer", m) == name]
        mine = table(check, [row for row in rows if row["method"] in methods])
        headers = ("task", *mine.headers)
        lines += [[check.name, *row] for row in mine.rows]
    return Table(headers, lines, left=2) if lines else None


@cache
def _stored() -> dict[str, tuple[Check, list[Row]]]:
    """Return the committed rows by task, read once: each method's page asks for them."""
    return {check.name: (check, rows) for check, rows in stored()}
