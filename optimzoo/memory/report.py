"""The pages of ``optimzoo memory``: a table of 80 columns, JSON, a picture of stacked bars."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimzoo.memory.account import Account
from optimzoo.memory.measure import Measurement
from optimzoo.memory.plan import Fit
from optimzoo.memory.tracker import CATEGORIES, GRADIENTS, PARAMETERS, STATE, Peak

_BAR = 22
_SHADES = {PARAMETERS: "█", GRADIENTS: "▓", STATE: "▒", "rest": "░"}
CHANGES = {
    (False, False): "as it is",
    (True, False): "checkpointing",
    (False, True): "release",
    (True, True): "checkpointing + release",
}


@dataclass(frozen=True)
class Row:
    """One method of the page: what it holds between steps, and its peak if that was asked for."""

    method: str
    account: Account
    peak: Peak | None = None

    @property
    def size(self) -> int:
        """Bytes by which rows are compared."""
        return self.peak.bytes if self.peak else self.account.total


def page(title: str, rows: Sequence[Row], refused: dict[str, str]) -> str:
    """The table of methods, smallest first, each with a bar of what its bytes are."""
    rows = sorted(rows, key=lambda row: row.size)
    most = max((row.size for row in rows), default=1)
    unit, name = _unit(most)
    heads = ("weights", "grads", "state", "held", *(["peak"] if rows and rows[0].peak else []))
    lines = [title, "", f"{'method':<15}" + "".join(f"{head:>8}" for head in heads) + f"  {name}"]
    for row in rows:
        held = row.account
        sizes = [held.params, held.grads, held.state_total, held.total]
        sizes += [row.peak.bytes] if row.peak else []
        figures = "".join(f"{_figure(size, unit):>8}" for size in sizes)
        lines.append(f"{row.method:<15}{figures}  {_bar(row, most)}".rstrip())
    for method, why in refused.items():
        lines.append(_cut(f"{method:<15}{why}"))
    legend = "  ".join(f"{shade} {kind}" for kind, shade in _SHADES.items())
    return "\n".join([*lines, "", legend])


def breakdown(peak: Peak) -> str:
    """What a peak consists of, a category a line."""
    unit, name = _unit(peak.bytes)
    lines = [f"the peak, in the {peak.phase}: {_figure(peak.bytes, unit)} {name}"]
    for category in CATEGORIES:
        bytes_ = peak.by_category.get(category, 0)
        if bytes_:
            share = bytes_ / peak.bytes
            bar = "█" * round(30 * share)
            lines.append(f"  {category:<22}{_figure(bytes_, unit):>9}{share:>7.1%}  {bar}".rstrip())
    return "\n".join(lines)


def fits_page(title: str, fits: Sequence[Fit], limit: str) -> str:
    """The settings that fit, in the order found."""
    if not fits:
        return f"{title}\n\nnothing fits in {limit}; a shorter sequence or a smaller model may"
    unit, name = _unit(max(fit.peak.bytes for fit in fits))
    lines = [title, "", f"{'method':<15}{'change':<26}{'micro-batch':>11}{'peak ' + name:>10}"]
    for fit in fits:
        change = CHANGES[fit.checkpointing, fit.release]
        size = _figure(fit.peak.bytes, unit)
        lines.append(f"{fit.method:<15}{change:<26}{fit.batch:>11}{size:>10}")
    return "\n".join(lines)


def measured_page(title: str, found: Measurement) -> str:
    """A live measurement; of a script that failed, what there was and its error."""
    unit, name = _unit(max(found.tensors.bytes, found.rss_peak))
    lines = [title, "", breakdown(found.tensors)]
    sizes: dict[str, int | None] = {"resident before": found.rss_before}
    sizes |= {"resident peak": found.rss_peak}
    sizes |= {"CUDA allocated": found.cuda_allocated, "CUDA reserved": found.cuda_reserved}
    for label, size in sizes.items():
        if size is not None:
            lines.append(f"  {label:<22}{_figure(size, unit):>9} {name}")
    if found.error:
        lines += ["", f"it failed after {found.seconds:.1f} s; the figures are up to there", ""]
        lines.append(found.error)
    return "\n".join(lines)


def as_record(row: Row) -> dict[str, Any]:
    """A row for JSON, in bytes."""
    state: dict[str, dict[str, int]] = {}
    for (role, tensor), bytes_ in row.account.state.items():
        state.setdefault(role, {})[tensor] = bytes_
    return {
        "method": row.method,
        "parameters": row.account.params,
        "gradients": row.account.grads,
        "state": state,
        "held": row.account.total,
        "peak": asdict(row.peak) if row.peak else None,
    }


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def write_picture(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Stacked bars, one a method, smallest on top.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from None
    rows = sorted(rows, key=lambda row: -row.size)
    unit, name = _unit(max(row.size for row in rows))
    figure = Figure(figsize=(9, 1.4 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(rows)
    for index, category in enumerate(CATEGORIES):
        widths = [_parts(row).get(category, 0) / unit for row in rows]
        if any(widths):
            color = f"C{index}"
            axes.barh([r.method for r in rows], widths, left=left, label=category, color=color)
            left = [a + b for a, b in zip(left, widths, strict=True)]
    for at, total in enumerate(left):
        axes.text(total, at, f" {total:.2f}", va="center", fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(name)
    axes.margins(x=0.08, y=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    figure.savefig(temporary, dpi=150)
    os.replace(temporary, path)


def _parts(row: Row) -> dict[str, int]:
    if row.peak:
        return row.peak.by_category
    held = row.account
    return {PARAMETERS: held.params, GRADIENTS: held.grads, STATE: held.state_total}


def _bar(row: Row, most: int) -> str:
    parts = dict(_parts(row))
    named = {kind: parts.pop(kind, 0) for kind in (PARAMETERS, GRADIENTS, STATE)}
    bar, done = "", 0
    for kind, size in {**named, "rest": sum(parts.values())}.items():
        done += size
        bar += _SHADES[kind] * (round(_BAR * done / most) - len(bar))
    return bar


def _unit(most: int) -> tuple[float, str]:
    return (1e9, "GB") if most >= 1e9 else (1e6, "MB")


def _figure(size: int, unit: float) -> str:
    return f"{size / unit:.2f}" if unit == 1e9 else f"{size / unit:.1f}"


def _cut(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
