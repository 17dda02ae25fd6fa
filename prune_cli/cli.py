"""The command line, a file of `commands/` per command. No torch at import time, so that --help answers at once."""

from __future__ import annotations

from typing import Annotated

import typer

from prune_cli.commands.bench import bench
from prune_cli.commands.check import check
from prune_cli.commands.convert import convert
from prune_cli.commands.evaluate import evaluate
from prune_cli.commands.inspect import inspect
from prune_cli.commands.methods import methods
from prune_cli.commands.prune import prune
from prune_cli.commands.push import push
from prune_cli.commands.recover import recover
from prune_cli.commands.report import report
from prune_cli.commands.soup import soup
from prune_cli.commands.sweep import sweep
from prune_cli.commands.verify import verify
from prune_cli.version import __version__

app = typer.Typer(
    name="prune-cli",
    help="Make a language model sparser in one shot, without training it, and tell what it cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"prune-cli {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(prune)
app.command()(recover)
app.command("eval")(evaluate)
app.command()(check)
app.command()(inspect)
app.command()(bench)
app.command()(soup)
app.command()(methods)
app.command()(convert)
app.command()(sweep)
app.command()(push)
app.command()(report)
app.command()(verify)
