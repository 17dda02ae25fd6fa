"""A recovery as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from prune_cli.recovery.tables import (
    BLOCK_HEADER,
    LOSS_HEADER,
    TRAINING_HEADER,
    block_rows,
    lead,
    loss_rows,
    training_rows,
)
from prune_cli.report.format import duration, size

if TYPE_CHECKING:
    from prune_cli.recovery.report import RecoveryReport


def show_recovery(console: Console, report: RecoveryReport, *, verbose: bool) -> None:
    """The three losses; with --verbose the blocks, or the looks at held-out samples."""
    console.print(_table(f"{report.model.given}, recovered", LOSS_HEADER, loss_rows(report)))
    if verbose and report.training is not None:
        console.print(_table("Held-out divergence from the teacher", TRAINING_HEADER, training_rows(report)))
    elif verbose:
        console.print(_table("Held-out error of the blocks", BLOCK_HEADER, block_rows(report)))
    told = (
        lead(report),
        *(f"warning: {warning}" for warning in report.warnings),
        f"{duration(report.seconds)}, peak memory {size(report.peak_host_bytes)}. Written to {report.output.folder}; "
        "recover_report.html there shows the training.",
    )
    for each in told:
        console.print(each, highlight=False, soft_wrap=True)


def _table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    made = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
