"""What a terminal shows of a finished run, as an SVG: the picture of the README.

prune-cli prune examples/demo-model demo-out --method wanda --sparsity 0.5 --eval builtin --generate 16
python examples/draw_terminal.py demo-out docs/demo.svg
"""

from __future__ import annotations

import argparse
import io
import re
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from prune_cli.commands.terminal import show_report
from prune_cli.report.read import read_report
from prune_cli.request.command_line import command_of

_WIDTH = 100
# Fonts that a page would have to fetch, which the hosts of READMEs forbid.
_FETCHED_FONTS = re.compile(r"@font-face \{.*?\}", re.DOTALL)


def picture(folder: Path) -> str:
    """The command of the run in `folder`, and what it showed when it ended."""
    report = read_report(folder).report
    console = Console(record=True, width=_WIDTH, file=io.StringIO(), force_terminal=True, legacy_windows=False)
    console.print(f"[bold]$[/bold] {command_of(replace(report.request, overwrite=False))}", highlight=False)
    show_report(console, report, verbose=False)
    svg = console.export_svg(title="prune-cli", theme=MONOKAI, unique_id="demo")
    return _FETCHED_FONTS.sub("", svg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an output of prune-cli prune")
    parser.add_argument("svg", type=Path)
    given = parser.parse_args()
    given.svg.write_text(picture(given.folder), encoding="utf-8")


if __name__ == "__main__":
    main()
