"""Findings: differences of two methods, as the committed rows have them."""

from dataclasses import dataclass

from benchmarks.common.tables import Table
from benchmarks.experiments.cast import Comparison
from benchmarks.experiments.plan import Plan, Row, read_rows, rows_of
from benchmarks.experiments.significance import Difference, by_method, paired
from benchmarks.training.config import RunConfig


@dataclass(frozen=True)
class Question:
    """A method against another, both tuned.

    Attributes:
        text: what the difference tells.
        ours: plan and method.
        theirs: plan and method that it is compared with, of the same model, batch and steps.
    """

    text: str
    ours: tuple[str, str]
    theirs: tuple[str, str]

    def rows(self) -> tuple[list[Row], list[Row]]:
        """Return the committed rows of both."""
        return _rows(*self.ours), _rows(*self.theirs)

    def difference(self) -> Difference | None:
        """Return the paired difference; None where one of them has no rows yet."""
        return paired(*self.rows())

    def edges(self) -> list[str]:
        """Return the methods whose best rate is at the edge of what was tried."""
        return [method for plan, method in (self.ours, self.theirs) if _edges(plan, method)]


def _at(plan: str, text: str, ours: str, theirs: str) -> Question:
    return Question(text, (plan, ours), (plan, theirs))


_CAST = "nano-cast"  # no plan: rows of `benchmarks cast`
QUESTIONS = (
    _at("nano", "SCALE against AdamW", "scale", "adamw"),
    _at("nano", "spectral normalisation against AdamW", "scale_spectral", "adamw"),
    _at("nano", "spectral normalisation against Muon", "scale_spectral", "muon"),
    _at("nano", "Muon against AdamW", "muon", "adamw"),
    _at("nano", "SWAN against AdamW", "swan", "adamw"),
    _at("nano", "SWAN against Muon", "swan", "muon"),
    _at("nano", "SinkGD against AdamW", "sinkgd", "adamw"),
    _at("nano", "RMNP against AdamW", "rmnp", "adamw"),
    _at("nano", "RMNP against Muon", "rmnp", "muon"),
    _at("nano", "Muon with momentum in rank 16 against Muon", "muon_rank16", "muon"),
    _at("nano", "in rank 4 against rank 16", "muon_rank4", "muon_rank16"),
    _at("nano", "in rank 16 against SWAN, without momentum", "muon_rank16", "swan"),
    _at("nano", "Muon in 8 bits, other=scale, against Muon", "muon_8bit_scale", "muon"),
    _at("nano", "the same against AdamW", "muon_8bit_scale", "adamw"),
    _at("nano", "the same against SCALE spectral", "muon_8bit_scale", "scale_spectral"),
    _at("nano", "SinkGD, other=scale, against SCALE", "sinkgd_scale", "scale"),
    _at("nano", "the same against SinkGD, other=adam", "sinkgd_scale", "sinkgd"),
    _at("nano", "Stable-SPAM against AdamW", "stable_spam", "adamw"),
    _at("nano", "APOLLO against AdamW", "apollo", "adamw"),
    _at("nano", "APOLLO-Mini against SCALE", "apollo_mini", "scale"),
    _at("nano", "Fira against AdamW", "fira", "adamw"),
    _at("nano", "Fira against GaLore", "fira", "galore"),
    _at("nano", "Natural GaLore against GaLore", "natural_galore", "galore"),
    _at("nano-history", "a history of 20 in 8 bits against 32", "history_20_8", "history_20_32"),
    _at("nano-history", "of 1 in 8 bits against 20 in 32", "history_1_8", "history_20_32"),
    _at("nano-history", "of 20 in 32 bits against GaLore's rule", "history_20_32", "galore"),
    *(
        Question(f"{text} with 8 bits of state against 32", ("nano-8bit", f"{m}_8bit"), ("nano", m))
        for text, m in (
            ("Muon", "muon"),
            ("SCALE", "scale"),
            ("GaLore", "galore"),
            ("Stable-SPAM", "stable_spam"),
        )
    ),
    _at("nano-ablation", "columns against rows, no momentum", "column", "row"),
    _at("nano-ablation", "columns against signs, no momentum", "column", "sign"),
    _at("nano-ablation", "rows for the head alone", "column_head_by_rows", "column"),
    _at("nano-ablation", "the same against rows everywhere", "column_head_by_rows", "row"),
    Question("the same against SCALE", ("nano-ablation", "column_head_by_rows"), ("nano", "scale")),
    Question("momentum on the last layer", ("nano", "scale"), ("nano-ablation", "column")),
    *(
        _at(f"nano-{batch}", f"{text} against {other}", ours, theirs)
        for batch in ("1k", "4k", "16k")
        for text, other, ours, theirs in (
            ("SCALE", "AdamW", "scale", "adamw"),
            ("spectral normalisation", "AdamW", "scale_spectral", "adamw"),
            ("spectral normalisation", "Muon", "scale_spectral", "muon"),
            ("Muon", "AdamW", "muon", "adamw"),
        )
    ),
    _at("nano-lowrank-long", "restarts against none", "low_rank_restarts", "low_rank"),
    _at("nano-lowrank-long", "refactorization alone", "low_rank_refactorize", "low_rank"),
    _at("nano-lowrank-long", "momentum reset alone", "low_rank_reset", "low_rank"),
    _at("nano-lowrank-long", "the rates of refactorization alone", "low_rank_slow", "low_rank"),
    _at("nano-lowrank-long", "refactorization at these", "low_rank_refactorize", "low_rank_slow"),
    _at("nano-lowrank-long", "restarts at these", "low_rank_restarts_slow", "low_rank_slow"),
    _at(_CAST, "2:4 by CAST against dense, trained as long", "cast", "continued"),
    _at(_CAST, "2:4 by CAST against a fixed mask", "cast", "fixed"),
    _at(_CAST, "2:4 by CAST against SR-STE", "cast", "srste"),
)


def table() -> Table:
    """Return the findings whose two methods are tuned and have rows."""
    lines = []
    for question in QUESTIONS:
        difference = question.difference()
        if difference is None or question.edges():
            continue
        config = RunConfig(**question.rows()[0][0]["config"])
        p = "-" if difference.p is None else f"{max(difference.p, 0.001):.3f}"
        p = f"< {p}" if difference.p is not None and difference.p < 0.001 else p
        batch = config.tokens_per_step
        cells = [question.text, difference.text(), f"{difference.seeds}", p]
        lines.append([*cells, f"{batch:,}", f"{config.steps * batch / 1e6:.1f} M"])
    headers = ("question", "difference in perplexity", "seeds", "p", "batch", "tokens")
    return Table(headers, lines, left=2)


def _rows(plan: str, method: str) -> list[Row]:
    if plan == _CAST:
        return by_method(Comparison("nano").rows)[method]
    path = Plan(plan).results_path
    return rows_of(read_rows(path) if path.exists() else [], method, "tuned")


def _edges(name: str, method: str) -> list[str]:
    if name == _CAST:
        return Comparison("nano").edges(method)
    plan = Plan(name)
    return plan.edges(method, "tuned", plan.tuning_rows(method))
