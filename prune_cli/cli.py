"""The command line, a file of `commands/` per command. No torch at import time, so that --help answers at once."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated

import typer

from prune_cli.commands.bench import bench
from prune_cli.commands.check import check
from prune_cli.commands.compare import compare
from prune_cli.commands.convert import convert
from prune_cli.commands.error_handling import INTERRUPTED, refuse_several_processes
from prune_cli.commands.evaluate import evaluate
from prune_cli.commands.help import Command, Commands
from prune_cli.commands.inspect import inspect
from prune_cli.commands.installation import installation
from prune_cli.commands.methods import methods
from prune_cli.commands.prune import prune
from prune_cli.commands.push import push
from prune_cli.commands.recover import recover
from prune_cli.commands.report import report
from prune_cli.commands.soup import soup
from prune_cli.commands.sweep import sweep
from prune_cli.commands.verify import verify
from prune_cli.ranks.environment import process_count
from prune_cli.version import __version__

app = typer.Typer(
    name="prune-cli",
    help="Make a language model sparser in one shot, without training it, and tell what it cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# The other commands run in one process.
_OF_SEVERAL_PROCESSES = ("prune", "eval")


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="With --version: libraries, devices and folders too.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"prune-cli {__version__}")
        for line in installation() if verbose else ():
            typer.echo(line)
        raise typer.Exit
    if context.invoked_subcommand != "bench":
        # Threads that spin for one another crawl beside a busy process; `bench` measures plain torch.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if context.invoked_subcommand not in _OF_SEVERAL_PROCESSES:
        refuse_several_processes(context.invoked_subcommand)


app.command(cls=Command)(prune)
app.command(cls=Command)(recover)
app.command("eval", cls=Command)(evaluate)
app.command(cls=Command)(compare)
app.command(cls=Command)(check)
app.command(cls=Command)(inspect)
app.command(cls=Command)(bench)
app.command(cls=Command)(soup)
app.command(cls=Command)(methods)
app.command(cls=Command)(convert)
app.command(cls=Command)(sweep)
app.command(cls=Command)(push)
app.command(cls=Command)(report)
app.command(cls=Command)(verify)


def run() -> None:
    """The program. It ends at once after an interrupt, and after the failure of one of several processes."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED or (end.code and process_count() > 1):
            # Python would wait for a thread that a library was just starting, and gloo for the lost process: forever.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        raise
