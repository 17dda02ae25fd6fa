"""`prune-cli report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prune_cli.commands.error_handling import report_failures
from prune_cli.commands.options import Json, Quiet, Verbose, print_result

if TYPE_CHECKING:
    from prune_cli.report.types import Report


def report(
    reports: Annotated[
        list[str], typer.Argument(metavar="REPORT...", help="Folders of pruned models, or prune_report.json files.")
    ],
    page: Annotated[
        Path, typer.Option("--out", "-o", metavar="PAGE", help="The file to write; replaced if it is there.")
    ] = Path("prune_report.html"),
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """One HTML page of one report, or of several side by side.

    The page is a single file that loads nothing: figures, charts by block and by kind of layer, every tensor with a
    search, and the command that repeats the run. Every prune writes it too, as OUT/prune_report.html.
    """
    with report_failures(as_json=as_json, verbose=verbose):
        from prune_cli.errors import RequestError
        from prune_cli.report.html.page import page_of
        from prune_cli.report.read import read_report

        if page.is_dir() or not page.parent.is_dir():
            raise RequestError(f"{page} cannot be written: give a file in a folder that exists to --out.")
        read = [read_report(each).report for each in reports]
        text = page_of(read)
        page.write_text(text, encoding="utf-8")
        print_result(
            lambda: _document(page, read),
            as_json=as_json,
            quiet=quiet,
            show=lambda _: typer.echo(f"Written to {page}"),
        )


def _document(page: Path, reports: Sequence[Report]) -> str:
    document = {"page": str(page), "reports": [json.loads(each.to_json()) for each in reports]}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
