"""Pages of ``optimzoo memory``: a table of 80 columns, JSON, a picture of stacked bars."""

import json
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimzoo.memory.account import Account
from optimzoo.memory.measure import Measurement
from optimzoo.memory.plan import MOST, Fit
from optimzoo.memory.tracker import CATEGORIES, GRADIENTS, PARAMETERS, STATE, Peak

Bar = tuple[str, dict[str, int]]  # a label, and bytes by category
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
    """Row of one method: what it holds between steps, and its peak if that was asked for."""

    method: str
    account: Account
    peak: Peak | None = None

    @property
    def size(self) -> int:
        """Return the bytes by which rows are sorted."""
        return self.peak.bytes if self.peak else self.account.total


def page(title: str, rows: Sequence[Row], refused: dict[str, str], notes: Sequence[str]) -> str:
    """Return the table of methods, smallest first, each with a bar of its bytes by category."""
    rows = sorted(rows, key=lambda row: row.size)
    most = max((row.size for row in rows), default=1)
    unit, name = _unit(most)
    heads = ("weights", "grads", "state", "held", *(["peak"] if rows and rows[0].peak else []))
    columns = "".join(f"{head:>8}" for head in heads)
    lines = [*_heading(title), f"{'method':<15}{columns}  {name}"]
    for row in rows:
        account = row.account
        sizes = [account.params, account.grads, account.state_total, account.total]
        sizes += [row.peak.bytes] if row.peak else []
        figures = "".join(f"{_figure(size, unit):>8}" for size in sizes)
        lines.append(f"{row.method:<15}{figures}  {_bar(row, most)}".rstrip())
    legend = "  ".join(f"{shade} {category}" for category, shade in _SHADES.items())
    return "\n".join([*lines, *_refusals(refused), "", legend, *_notes(notes)])


def breakdown(peak: Peak) -> str:
    """Return the categories of a peak as text, one per line."""
    unit, name = _unit(peak.bytes)
    lines = [f"the peak, in the {peak.phase}: {_figure(peak.bytes, unit)} {name}"]
    for category in CATEGORIES:
        bytes_ = peak.by_category.get(category, 0)
        if bytes_:
            share = bytes_ / peak.bytes
            bar = "█" * round(30 * share)
            lines.append(f"  {category:<22}{_figure(bytes_, unit):>9}{share:>7.1%}  {bar}".rstrip())
    return "\n".join(lines)


def fits_page(
    title: str,
    fits: Sequence[Fit],
    refused: dict[str, str],
    notes: Sequence[str],
    *,
    nothing: str,
    own_step: bool,
) -> str:
    """Return the page of settings that fit, in the order given; ``nothing`` if none does."""
    lines = _heading(title)
    several = len({fit.shards for fit in fits}) > 1
    if fits:
        unit, name = _unit(max(fit.peak.bytes for fit in fits))
        gpus = f"{'GPUs':>6}" if several else ""
        lines.append(f"{'method':<15}{'change':<26}{gpus}{'micro-batch':>13}{'peak ' + name:>10}")
    else:
        lines.append(_fill(nothing))
    for fit in fits:
        batch = "its own" if own_step else f"{fit.batch}{'+' if fit.batch == MOST else ''}"
        size = _figure(fit.peak.bytes, unit)
        gpus = f"{fit.shards:>6}" if several else ""
        lines.append(f"{fit.method:<15}{CHANGES[fit.setting]:<26}{gpus}{batch:>13}{size:>10}")
    return "\n".join([*lines, *_refusals(refused), *_notes(notes)])


def measured_page(title: str, result: Measurement) -> str:
    """Return the page of a measurement, with the error of a script that failed."""
    unit, name = _unit(max(result.tensors.bytes, result.rss_peak))
    lines = [*_heading(title), breakdown(result.tensors)]
    sizes: dict[str, int | None] = {"resident before": result.rss_before}
    sizes |= {"resident peak": result.rss_peak}
    sizes |= {"CUDA allocated": result.cuda_allocated, "CUDA reserved": result.cuda_reserved}
    for label, size in sizes.items():
        if size is not None:
            lines.append(f"  {label:<22}{_figure(size, unit):>9} {name}")
    if result.error:
        lines += ["", f"it failed after {result.seconds:.1f} s; the figures are up to there", ""]
        lines.append(result.error)
    return "\n".join(lines)


def as_record(row: Row) -> dict[str, Any]:
    """Return a row as a record for JSON, in bytes."""
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
    """Write JSON to a file, whole or not at all, or into a pipe or a device."""
    text = json.dumps(value, indent=1) + "\n"
    _write_whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    if path.exists() and not path.is_file():  # /dev/stdout cannot be replaced, and must not be
        write(path)
        return
    path = path.resolve()  # a link stays one
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """Return a bar for each method, the smallest first."""
    return [(row.method, _parts(row)) for row in sorted(rows, key=lambda row: row.size)]


def bars_of_fits(fits: Sequence[Fit], own_step: bool) -> list[Bar]:
    """Return a bar for each setting that fits, in the order given."""
    bars = []
    several = len({fit.shards for fit in fits}) > 1
    for fit in fits:
        words = [fit.method, *([CHANGES[fit.setting]] if any(fit.setting) else [])]
        words += [f"{fit.shards} GPUs"] if several else []
        words += [] if own_step else [f"batch {fit.batch}"]
        bars.append((", ".join(words), fit.peak.by_category))
    return bars


def write_picture(path: Path, title: str, bars: Sequence[Bar], limit: int | None = None) -> None:
    """Write stacked bars, the first on top, and a line at ``limit`` bytes.

    Raises:
        ImportError: without matplotlib.
    """
    figure, suffix = draw(title, bars, limit), path.suffix[1:].lower()
    _write_whole(path, lambda place: figure.savefig(place, dpi=150, format=suffix))


def draw(title: str, bars: Sequence[Bar], limit: int | None = None) -> Any:
    """Return the picture of :func:`write_picture` as a matplotlib figure."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from None
    totals = [sum(parts.values()) for _, parts in bars]
    unit, name = _unit(max([*totals, limit or 0]))
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    figure = Figure(figsize=(9, 2.0 + 0.3 * len(bars)), layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(bars))
    starts = [0.0] * len(bars)
    for index, category in enumerate(CATEGORIES):
        widths = [parts.get(category, 0) / unit for _, parts in bars]
        if any(widths):
            axes.barh(places, widths, left=starts, label=category, color=f"C{index}")
            starts = [a + b for a, b in zip(starts, widths, strict=True)]
    for place, total in zip(places, totals, strict=True):
        text = f" {_figure(total, unit)}"
        axes.annotate(text, (total / unit, place), va="center", fontsize=8)
    if limit is not None:
        axes.axvline(limit / unit, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set_yticks(places, [_cut(label, 60) for label, _ in bars], fontsize=9)
    axes.invert_yaxis()
    # Room for the figure behind the longest bar, whatever its width.
    axes.set_xlim(0, 1.12 * max([*totals, limit or 0, 1]) / unit)
    axes.margins(y=0.5 / max(2, len(bars)))
    axes.set_xlabel(name)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("\n".join(_fill(line, 100) for line in title.splitlines()), fontsize=10)
    figure.legend(fontsize=8, ncols=4, loc="outside lower center", frameon=False)
    return figure


def _parts(row: Row) -> dict[str, int]:
    if row.peak:
        return row.peak.by_category
    account = row.account
    return {PARAMETERS: account.params, GRADIENTS: account.grads, STATE: account.state_total}


def _bar(row: Row, most: int) -> str:
    parts = dict(_parts(row))
    named = {category: parts.pop(category, 0) for category in (PARAMETERS, GRADIENTS, STATE)}
    bar, done = "", 0
    for category, size in {**named, "rest": sum(parts.values())}.items():
        done += size
        bar += _SHADES[category] * (round(_BAR * done / most) - len(bar))
    return bar


def _unit(most: int) -> tuple[float, str]:
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"))
    return next((unit for unit in units if most >= unit[0]), units[-1])


def _figure(size: int, unit: float) -> str:
    return f"{size / unit:.2f}" if unit == 1e9 else f"{size / unit:.1f}"


def one_line(error: BaseException) -> str:
    """Return an error's first line, after its type if that is not ValueError."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, ValueError) and first else f"{type(error).__name__}: {first}"


def count_of(parameters: int) -> str:
    """Return a number of parameters as `6,738.4 M`; below 0.1 M in full."""
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e5 else f"{parameters:,}"


def cut_left(text: str, width: int) -> str:
    """Return the last ``width`` characters of a text, with an ellipsis if it is longer."""
    return text if len(text) <= width else "…" + text[1 - width :]


def _refusals(refused: dict[str, str]) -> list[str]:
    return [
        textwrap.fill(f"{method:<15}{why}", 80, subsequent_indent=" " * 15)
        for method, why in refused.items()
    ]


def _notes(notes: Sequence[str]) -> list[str]:
    return ["", *(_fill(note) for note in notes)] if notes else []


def _heading(title: str) -> list[str]:
    return [*(_fill(line) for line in title.splitlines()), ""]


def _fill(text: str, width: int = 80) -> str:
    return textwrap.fill(text, width, subsequent_indent="  ")


def _cut(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
