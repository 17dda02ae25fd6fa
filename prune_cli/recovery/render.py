"""A recovery as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from prune_cli.recovery.tables import BLOCKS, TRAINING, lead, sections
from prune_cli.report.format import duration, size

if TYPE_CHECKING:
    from prune_cli.recovery.report import RecoveryReport

_TRAINED = {BLOCKS: "Held-out error of the blocks", TRAINING: "Held-out divergence from the teacher"}


def show_recovery(console: Console, report: RecoveryReport, *, verbose: bool) -> None:
    """The three losses; with --verbose the blocks, or the looks at held-out samples."""
    (_, header, rows), (what, header_of_trained, trained) = sections(report)
    console.print(_table(f"{report.model.given}, recovered", header, rows))
    if verbose:
        console.print(_table(_TRAINED[what], header_of_trained, trained))
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
