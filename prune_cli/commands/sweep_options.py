"""What `prune-cli sweep` alone can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_cli.commands.options import MACHINE, OUTPUT, RUN, TEXT

SEARCH = "Search for an allocation"

Out = Annotated[Path, typer.Argument(metavar="OUTDIR", help="Folder to write; must not exist yet.")]
Data = Annotated[
    str,
    typer.Option(
        metavar="SOURCE", help="Text on which the loss is measured, as for prune --eval.", rich_help_panel=TEXT
    ),
]
Windows = Annotated[
    int | None,
    typer.Option(
        "--eval-windows",
        "--windows",
        help="So many windows of --data, drawn with the seed [default: all].",
        rich_help_panel=TEXT,
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        "--method",
        "-m",
        metavar="LIST",
        help="Methods and presets with commas; steps follow a +, as wanda,wanda+swaps,sparsegpt+dense,best.",
        rich_help_panel=RUN,
    ),
]
Grid = Annotated[
    str,
    typer.Option(
        "--sparsity",
        "-s",
        metavar="GRID",
        help="FROM:TO:STEP with both ends, or sparsities with commas.",
        rich_help_panel=RUN,
    ),
]
Patterns = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="N:M patterns to measure as well, as 2:4,4:8.", rich_help_panel=RUN),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="KEY=VALUE",
        help="METHOD.KEY=VALUE or STEP.KEY=VALUE; with one method alone, KEY=VALUE.",
        rich_help_panel=RUN,
    ),
]
Sensitivity = Annotated[
    float,
    typer.Option(
        help="Prune also each block alone to this sparsity, by the first method, for a table; 0 leaves it out.",
        rich_help_panel=RUN,
    ),
]
Search = Annotated[
    str | None,
    typer.Option(
        metavar="HOW",
        help="Instead of a grid: search how the blocks share one sparsity of one method, by random or evolution.",
        rich_help_panel=SEARCH,
    ),
]
Budget = Annotated[
    int | None,
    typer.Option(help="Candidates of --search; evolution has as many again [default: 32].", rich_help_panel=SEARCH),
]
HeldOut = Annotated[
    int | None,
    typer.Option(
        help="Windows of the calibration text, beside --samples, that judge candidates [default: 16].",
        rich_help_panel=SEARCH,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto (every CUDA device), cpu, cuda, cuda:N or mps; with commas, the points are split over them.",
        rich_help_panel=MACHINE,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue an interrupted sweep, or add points to one that is done.",
        rich_help_panel=OUTPUT,
    ),
]
