"""A sweep as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from prune_cli.report.figures import fitted_into
from prune_cli.report.format import duration, duration_range, percent, size

if TYPE_CHECKING:
    from prune_cli.sweeps.estimate import Estimate
    from prune_cli.sweeps.report import SweepReport
    from prune_cli.sweeps.search_report import SearchReport


def show_sweep(console: Console, report: SweepReport) -> None:
    """A row per sparsity or pattern with a column per method, then knees and blocks."""
    methods = list(dict.fromkeys(point.method for point in report.points))
    found = {(point.pattern or f"{point.asked_sparsity:g}", point.method): point for point in report.points}
    title = f"Perplexity of {report.request['model']} on {report.text.source} (dense {report.dense.perplexity:.3f})"
    grid = _table(title, "sparsity", *methods)
    for asked in dict.fromkeys(asked for asked, _ in found):
        points = [found.get((asked, method)) for method in methods]
        grid.add_row(asked, *("–" if point is None else f"{point.evaluation.perplexity:.3f}" for point in points))
    console.print(grid)
    for each in report.knees:
        knee = each.knee
        told = f"none: {knee.reason}"
        if knee.sparsity is not None:
            told = f"{percent(knee.sparsity)}, between {percent(knee.low)} and {percent(knee.high)}"
        console.print(f"Essential-sparsity knee of {each.method}: {told}", highlight=False)
    if report.sensitivity is not None:
        title = f"Each block alone at {percent(report.sensitivity.asked_sparsity)} by {report.sensitivity.method}"
        blocks = _table(title, "block", "loss increase (nats)")
        for block in report.sensitivity.blocks:
            increase = f"{block.loss_increase:+.5f} ± {block.loss_increase_standard_error:.5f}"
            blocks.add_row(str(block.block), increase)
        console.print(blocks)
    console.print(f"{duration(report.seconds)}. Written to {report.request['out']}", highlight=False, soft_wrap=True)


def show_search(console: Console, report: SearchReport) -> None:
    """The uniform allocation and the best of each search, then the one to use, by block."""
    title = f"{report.method} at {report.asked_sparsity:g}, {report.request['budget']} candidates a search"
    results = _table(title, "", "held-out loss", f"perplexity on {report.text.source}", "loss over uniform")
    for result in report.results:
        over = f"{result.over_uniform:+.5f} ± {result.over_uniform_standard_error:.5f}"
        results.add_row(result.name, f"{result.held_out_loss:.5f}", f"{result.evaluation.perplexity:.3f}", over)
    console.print(results)
    blocks = _table(f"Chosen on the held-out windows: {report.winner}", "block", "sparsity")
    for block, value in report.allocation["facts"]["by_block"].items():
        blocks.add_row(block, percent(value))
    console.print(blocks)
    console.print(report.verdict[0].upper() + report.verdict[1:], highlight=False)
    told = f"{duration(report.seconds)}. For prune: --allocate file:{report.request['out']}/allocation.json"
    console.print(told, highlight=False, soft_wrap=True)


def show_estimate(console: Console, plan: Estimate) -> None:
    devices = ", ".join(plan.devices)
    console.print(
        f"{plan.model} ({plan.architecture}) on {devices} in {plan.compute_dtype}", highlight=False, soft_wrap=True
    )
    figures = _table("What would happen", "", "")
    for method, count in plan.points.items():
        figures.add_row(f"points of {method}", str(count))
    figures.add_row("blocks pruned alone", str(plan.blocks_alone))
    figures.add_row("points side by side", str(plan.side_by_side))
    figures.add_row("memory of each beside the others", size(plan.bytes_of_point))
    if plan.memory is not None:
        figures.add_row("fitted into", fitted_into(plan.memory))
    figures.add_row("passes over the weights", str(plan.passes))
    figures.add_row("calibration, tokens a point", f"{plan.calibration_tokens:,}")
    figures.add_row("evaluation, tokens a point", f"{plan.evaluation_tokens:,}")
    figures.add_row("time, estimated", duration_range(plan.seconds.low, plan.seconds.high))
    console.print(figures)


def _table(title: str, first: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column(first, overflow="fold")
    for column in columns:
        made.add_column(column, justify="right", overflow="fold")
    return made
