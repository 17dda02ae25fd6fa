"""Figures as people read them, one way for terminal, Markdown, HTML and card."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prune_cli.report.types import Report, TextReport

_MB, _GB = 1e6, 1e9


_COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "K"))


def change_of(before: float, after: float) -> str:
    """The relative change of a positive number: '+16.5 %', or 'as before' where nothing of it would be seen."""
    change = 100 * (after / before - 1)
    return "as before" if abs(change) < 0.05 else f"{change:+.1f} %"


def size(count: float) -> str:
    return f"{count / _GB:.2f} GB" if count >= _GB else f"{count / _MB:.1f} MB" if count >= 1e5 else f"{count:,.0f} B"


def duration(seconds: float) -> str:
    """Seconds up to two minutes, then minutes, then hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def duration_range(low: float, high: float) -> str:
    """Both ends in one unit: '20 to 45 s', '1.5 to 4 min'; too short to tell apart is 'under 2 s'."""
    if high < 2:
        return "under 2 s"
    unit, name = (1, "s") if high < 120 else (60, "min") if high < 7200 else (3600, "h")
    ends = [f"{end / unit:.0f}" if end >= 10 * unit else f"{end / unit:.1f}".removesuffix(".0") for end in (low, high)]
    return f"{ends[0]} to {ends[1]} {name}"


def count_of(number: float) -> str:
    return next((f"{number / unit:.2f} {name}" for unit, name in _COUNTS if number >= unit), f"{number:.0f}")


def method_name(report: Report) -> str:
    """The method with its steps, and what else was asked of it: 'preset best (admm, dense target)'."""
    request = report.request
    parts = [report.method.name, *(["dense target"] if request.target == "dense" else [])]
    # A report of before `auto` was has no count.
    sampled = report.sampled if request.self_calibration == "auto" else request.self_calibration
    parts += ["self-calibration"] if sampled else []
    told = ", ".join(parts)
    return told if request.preset is None else f"preset {request.preset} ({told})"


def text_name(text: TextReport) -> str:
    """A source of text as it was given, but of a path only its last part."""
    source = text.source
    return source.rpartition("/")[2] or source if source.startswith(("/", "./", "../", "~")) else source


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
