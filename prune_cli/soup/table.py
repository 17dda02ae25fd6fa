"""A soup's report as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from prune_cli.report.format import percent

if TYPE_CHECKING:
    from prune_cli.soup.report import SoupReport


def show_soup(console: Console, report: SoupReport) -> None:
    totals = report.totals
    console.print(
        f"{totals.averaged} of {totals.tensors} tensors {'averaged' if report.output else 'would be averaged'}, the "
        f"others are identical in all models; {totals.sparse} are sparse.",
        highlight=False,
        soft_wrap=True,
    )
    table = Table()
    table.add_column("", overflow="fold")
    table.add_column("weight", justify="right")
    table.add_column("zeros in the sparse tensors", justify="right")
    for each in report.inputs:
        table.add_row(each.model, f"{each.weight:.4g}", percent(each.sparsity))
    if report.output is not None:
        table.add_row("the soup", "", percent(totals.sparsity_of_sparse))
    console.print(table)
    for warning in report.warnings:
        console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
    if report.output is not None:
        console.print(f"Written to {report.output['folder']}", highlight=False, soft_wrap=True)
