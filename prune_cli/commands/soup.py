"""`prune-cli soup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands import options
from prune_cli.commands.error_handling import report_failures
from prune_cli.commands.prune_options import DryRun, Overwrite, Resume
from prune_cli.errors import RequestError


def soup(
    models: Annotated[list[str], typer.Argument(help="Two or more checkpoint folders or model ids of the hub.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet.")],
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="Share of each model, adding up to 1 [default: equal shares]."),
    ] = None,
    masks: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="same: refuse models whose zeros differ. union: keep what any model keeps, averaged with the zeros of "
            "the others. intersection: keep what all keep.",
        ),
    ] = "same",
    allow_changed_inputs: options.AllowChanged = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    log_file: options.LogFile = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Average MODELS that share a mask into OUT and keep their sparsity (Sparse Model Soups, arXiv:2306.16788).

    The models are copies of one pruned checkpoint, retrained with its zeros held, as with other seeds or data. One
    tensor is in memory at a time. Tokenizer and other files come from the first model. A matrix counts as sparse when
    more than 1 % of it is zero in any model.

    Examples:

    prune-cli soup ./seed-1 ./seed-2 ./seed-3 ./soup

    prune-cli soup ./a ./b ./soup --weights 0.7,0.3 --masks intersection --dry-run
    """
    with report_failures(as_json=as_json, verbose=verbose, out=out):
        from prune_cli.commands.log_file import progress_on
        from prune_cli.preflight.requests import check_models, check_new_folder
        from prune_cli.soup.request import SoupRequest

        request = SoupRequest(
            models=tuple(models),
            out=out,
            weights=_numbers(weights) if weights is not None else None,
            masks=options.checked_later(masks),
            allow_changed_inputs=allow_changed_inputs,
            overwrite=overwrite,
            resume=resume,
            dry_run=dry_run,
        )
        request.check()
        check_models([(given, None) for given in models])
        if not dry_run:
            check_new_folder(out, models, resume=resume, overwrite=overwrite)
        options.begin(models, verbose=verbose, quiet=quiet)
        from prune_cli.soup.run import soup as average
        from prune_cli.soup.table import show_soup

        with progress_on(Console(stderr=True), quiet=quiet, log_file=log_file) as progress:
            report = average(request, progress)
        options.print_result(
            report.to_json, as_json=as_json, quiet=quiet, show=lambda console: show_soup(console, report)
        )


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RequestError(f"--weights is {text!r}, but must be numbers with commas between, as 0.5,0.5.") from None
