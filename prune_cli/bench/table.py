"""A measurement as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from prune_cli.report.format import size

if TYPE_CHECKING:
    from prune_cli.bench.result import BenchResult, Figure, Ratio

_ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("parameters", "parameters", lambda count: f"{count:,}"),
    ("bytes_on_disk", "size on disk", size),
    ("load_seconds", "load time", lambda seconds: f"{seconds:.2f} s"),
    ("peak_loading_bytes", "peak memory, loading", size),
    ("peak_running_bytes", "peak memory, running", size),
    ("prefill", "prefill, tokens/s", lambda figure: _figure(figure, 1)),
    ("decode", "decode, tokens/s", lambda figure: _figure(figure, 1)),
    ("latency_median", "latency per token, ms", lambda figure: _figure(figure, 1000)),
    ("latency_p95", "latency, 95th percentile, ms", lambda figure: _figure(figure, 1000)),
)


def show_bench(console: Console, result: BenchResult) -> None:
    settings = result.settings
    table = Table()
    table.add_column("")
    for title, model in zip(("MODEL", "OTHER"), result.models, strict=False):
        console.print(f"{title}: {model.model} ({model.architecture})", highlight=False, soft_wrap=True)
        table.add_column(title, justify="right")
    ratios = {ratio.figure: ratio for ratio in result.ratios}
    console.print(
        f"{settings['prompt_tokens']} prompt tokens, {settings['new_tokens']} new ones, batch of "
        f"{settings['batch_size']}, {settings['repeats']} rounds, {result.environment['device']}",
        highlight=False,
        soft_wrap=True,
    )
    if ratios:
        table.add_column("ratio", justify="right")
        table.add_column("rounds", justify="right")
    for name, title, write in _ROWS:
        ratio = _ratio(ratios.get(name)) if ratios else ()
        table.add_row(title, *(write(getattr(model, name)) for model in result.models), *ratio)
    table.add_row("computed in", *(model.dtype for model in result.models), *(("", "") if ratios else ()))
    console.print(table)
    for warning in result.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    console.print(result.protocol[0].upper() + result.protocol[1:] + ".", highlight=False, soft_wrap=True)


def _figure(figure: Figure, factor: float) -> str:
    digits = 1 if figure.median * factor >= 10 else 3
    return f"{figure.median * factor:,.{digits}f}"


def _ratio(ratio: Ratio | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    if ratio.lowest == ratio.highest:
        return f"{ratio.ratio:.2f}x", ""
    return f"{ratio.ratio:.2f}x", f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
