"""`prune-cli verify`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands.error_handling import report_failures


def verify(
    model: options.Model,
    against: Annotated[
        str | None, typer.Option(metavar="DENSE", help="The dense model: kept weights must be its own.")
    ] = None,
    revision: options.Revision = None,
    allow_changed_inputs: options.AllowChanged = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Check MODEL, dense or sparse: headers, coding, checksums, and all that its report says of its weights.

    Exit codes: 0 sound, 1 something is wrong (each problem is told with the tensor's or file's name), 2 no checkpoint.
    """
    with report_failures(as_json=as_json, verbose=verbose):
        from prune_cli.checks.verify import verify as run
        from prune_cli.commands.terminal import show_verification
        from prune_cli.progress import progress_on

        with progress_on(Console(stderr=True), quiet=quiet) as progress:
            found = run(model, against, revision, progress, allow_changed=allow_changed_inputs)
        options.print_result(
            found.to_json,
            as_json=as_json,
            quiet=quiet and not found.problems,
            show=lambda console: show_verification(console, found),
        )
    if found.problems:
        raise typer.Exit(1)
