"""`prune-cli inspect`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from prune_cli.commands.error_handling import report_failures
from prune_cli.commands.options import Json, Model, Quiet, Revision, Verbose, print_result


def inspect(
    model: Model,
    revision: Revision = None,
    full: Annotated[
        bool, typer.Option("--full", help="List every tensor on a terminal too, as into a pipe; -v does the same.")
    ] = False,
    as_json: Json = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print a line of CSV per tensor and nothing else.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Shape, dtype, zeros and N:M pattern of every tensor; totals of embeddings, blocks and head.

    On a terminal a line stands for a block; into a pipe every tensor has a line of its own, with tabs.
    """
    with report_failures(as_json=as_json, verbose=verbose):
        from prune_cli.checks.inspection import inspect_model
        from prune_cli.commands.inspection_tables import show_inspection, to_csv
        from prune_cli.errors import RequestError

        if as_csv and as_json:
            raise RequestError("--csv and --json exclude each other: choose one.")

        inspection = inspect_model(model, revision)
        print_result(
            partial(to_csv, inspection) if as_csv else inspection.to_json,
            as_json=as_json or as_csv,
            quiet=quiet,
            show=lambda console: show_inspection(console, inspection, full=full or verbose),
        )
