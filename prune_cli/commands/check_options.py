"""What `prune-cli check` alone can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prune_cli.commands.options import TEXT

RULES, CI = "Rules", "For CI"
Limit = str | None
Target = Annotated[
    str, typer.Argument(metavar="REPORT_OR_MODEL", help="A pruned model (folder or hub id), or a report's file.")
]
MaxPerplexity = Annotated[Limit, typer.Option(metavar="X", help="Perplexity at most this.", rich_help_panel=RULES)]
MaxPerplexityIncrease = Annotated[
    Limit,
    typer.Option(
        metavar="5%|0.3",
        help="Above the dense model's: in percent of it, or more than it by.",
        rich_help_panel=RULES,
    ),
]
MaxKl = Annotated[
    Limit,
    typer.Option(metavar="X", help="KL divergence from the dense model, nats per token.", rich_help_panel=RULES),
]
MinTop1 = Annotated[
    Limit,
    typer.Option(metavar="90%", help="Share of tokens with the dense model's first choice.", rich_help_panel=RULES),
]
MinSparsity = Annotated[
    Limit,
    typer.Option(
        metavar="49%",
        help="Share of zeros in the tensors that the report calls pruned; without a report in all matrices of the "
        "blocks.",
        rich_help_panel=RULES,
    ),
]
MaxSize = Annotated[
    Limit,
    typer.Option(
        metavar="0.6x|4GB", help="Of the weight files: in bytes, or of the dense model's.", rich_help_panel=RULES
    ),
]
Baseline = Annotated[
    str | None,
    typer.Option(
        metavar="REPORT",
        help="The report of an earlier run: no more perplexity (0.5 % for rounding) and bytes, no less sparsity than "
        "it has, where no other rule says so.",
        rich_help_panel=RULES,
    ),
]
ThresholdsFile = Annotated[
    Path | None,
    typer.Option(
        "--thresholds",
        metavar="FILE",
        help="Rules from YAML or JSON: options as max-perplexity: 130, and bounds on any number of the report, as "
        "totals.bytes_after: {max: 4GB}. Options of the command line win.",
        rich_help_panel=RULES,
    ),
]
RequireLoadable = Annotated[
    bool,
    typer.Option(
        "--require-loadable",
        help="It loads in plain transformers, in a fresh process, nothing missing or left over, and generates.",
        rich_help_panel=RULES,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Text to measure on [default: that of the report].", rich_help_panel=TEXT),
]
Against = Annotated[
    str | None,
    typer.Option(metavar="DENSE", help="The dense model [default: the report's].", rich_help_panel=TEXT),
]
EvalWindows = Annotated[
    int | None,
    typer.Option(
        "--eval-windows",
        "--samples",
        help="So many windows of the text, drawn with the seed 0 [default: those of the report, or all].",
        rich_help_panel=TEXT,
    ),
]
Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write JUnit XML, a test case per rule.", rich_help_panel=CI)
]
Github = Annotated[
    bool | None,
    typer.Option(
        "--github/--no-github",
        help="Annotations and the step summary of GitHub Actions [default: where GITHUB_ACTIONS is true].",
        rich_help_panel=CI,
    ),
]
