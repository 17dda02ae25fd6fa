"""`prune-cli convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands.error_handling import report_failures


def convert(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    into: Annotated[
        str,
        typer.Option(
            "--format", help="sparse: each tensor as dense, bitmask or N:M, whatever is smallest; dense: back again."
        ),
    ] = "sparse",
    self_contained: Annotated[
        bool,
        typer.Option(
            "--self-contained",
            help="Put a loader beside the sparse files: trust_remote_code=True then loads them without this package.",
        ),
    ] = False,
    compress: Annotated[
        bool,
        typer.Option(
            "--compress", help="Deflate exponents too: about a third smaller again, slower to write and to read."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write sparse files even where they are larger than the dense ones.")
    ] = False,
    revision: options.Revision = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run, if there is one.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT, or an interrupted run.")] = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Store MODEL, any checkpoint with zeros, as sparse safetensors in OUT, or a sparse one as dense again.

    No bit of a weight is lost: sparse and back gives the same files. --format dense also reads compressed-tensors'
    sparse-bitmask and sparse-24-bitmask. docs/sparse-safetensors.md has the format.
    """
    with report_failures(as_json=as_json, verbose=verbose, out=out):
        from prune_cli.preflight.requests import check_models

        check_models([(model, revision)])
        from prune_cli.commands.log_file import progress_on
        from prune_cli.commands.terminal import show_conversion
        from prune_cli.sparse.convert import ConvertRequest
        from prune_cli.sparse.convert import convert as run

        request = ConvertRequest(
            model, out, options.checked_later(into), resume, overwrite, revision, self_contained, compress, force
        )
        request.check()
        with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
            done = run(request, progress)
        options.print_result(
            done.to_json, as_json=as_json, quiet=quiet, show=lambda console: show_conversion(console, done)
        )
