"""`prune-cli push`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from prune_cli.commands.error_handling import report_failures
from prune_cli.commands.options import Json, Quiet, Verbose, print_result

_CONTINUE = "Interrupted; run the same command again: files that arrived are not sent again."


def push(
    out: Annotated[Path, typer.Argument(help="Folder that prune-cli prune or recover wrote, with its report.")],
    repo: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If the repository is made: only for its owner.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Push to this branch [default: main].")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Propose it as a pull request, also to a repository of others.")
    ] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit [default: model, method, sparsity].")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check OUT, list what would be sent, and stop; needs no network.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Upload OUT to the Hugging Face hub in one commit, and print the link.

    Only a finished output goes: every weight file must be, byte for byte, what the report in OUT describes. Weights of
    an earlier upload that OUT does not have are removed in the same commit. The token is that of `hf auth login` or
    HF_TOKEN. After an interruption, run the same command again: what arrived is not sent twice.
    """
    with report_failures(as_json=as_json, verbose=verbose, interrupted_says=_CONTINUE):
        from prune_cli.commands.terminal import show_push
        from prune_cli.hub.push import PushRequest
        from prune_cli.hub.push import push as run
        from prune_cli.progress import Lines, Silent

        _calm_client(verbose=verbose, quiet=quiet)
        request = PushRequest(out, repo, private, revision, create_pr, message, dry_run)
        console = Console(stderr=True)
        # Lines, no live bar: the hub's client draws its own.
        result = run(request, Silent() if quiet else Lines(console))
        for warning in () if quiet else result.warnings:
            console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
        print_result(result.to_json, as_json=as_json, quiet=quiet, show=lambda page: show_push(page, result))


def _calm_client(*, verbose: bool, quiet: bool) -> None:
    """The hub's client draws bars unless --quiet, and logs its retries with --verbose only."""
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not verbose:
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
