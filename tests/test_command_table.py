"""What the docs and the help claim of every command, held against the commands themselves."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.console import Console

from methods import load_method, method_names
from methods.steps import load_step, step_names
from methods.structured import load_structured, structured_names
from prune_cli.cli import app
from prune_cli.commands.help import GROUPS
from prune_cli.commands.terminal import table_of
from prune_cli.request.method_info import choices
from prune_cli.request.presets import PRESETS, SUMMARIES
from tests.conftest import RunCommand

ROOT = Path(__file__).parent.parent
COMMANDS: Mapping[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def flags(name: str) -> set[str]:
    return {flag for parameter in COMMANDS[name].params for flag in parameter.opts + parameter.secondary_opts}


def test_every_command_stands_in_one_group_with_its_whole_summary(command: RunCommand) -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(COMMANDS)
    shown = " ".join(command("-h").stdout.split())
    for each in COMMANDS.values():
        summary = " ".join(each.help.split("\n\n")[0].split())
        assert summary.removesuffix(".").split(". ")[0] in shown, each.name


def test_every_command_takes_what_the_docs_say_of_every_command() -> None:
    assert "Every command takes `--json`" in (ROOT / "docs" / "command-line.md").read_text()
    assert [name for name in COMMANDS if not {"-q", "--json"} <= flags(name)] == []


def test_no_page_names_an_option_that_no_command_has() -> None:
    known = {flag for name in COMMANDS for flag in flags(name)} | {"--version", "--help", "--install-completion"}
    named: dict[str, str] = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in page.read_text(encoding="utf-8").splitlines():
            for shown in re.findall(r"prune-cli (\w+)((?: [^`|&#]*)?)", line):
                named |= dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z-]+", shown[1]), page.name)
    assert {flag: page for flag, page in named.items() if flag not in known} == {}


def test_the_table_of_methods_is_what_the_methods_say() -> None:
    table = [row for rows in choices().values() for row in rows]
    loaded = [(name, load_method(name)) for name in method_names()]
    loaded += [(name, load_structured(name)) for name in structured_names()]
    loaded += [(name, load_step(name)) for name in step_names()]
    for name, owner in loaded:
        assert (name, owner.summary, owner.cost) in table
    assert SUMMARIES.keys() == PRESETS.keys() <= {row[0] for row in next(iter(choices().values()))}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (("-m", "wnda"), "wanda"),
        (("--preset", "bst"), "best"),
        (("-m", "magnitude", "--allocate", "unifrm"), "uniform"),
        (("-m", "magnitude", "--eval", "wikitxt2"), "wikitext2"),
        (("--refine", "swap"), "swaps"),
    ],
)
def test_a_slip_is_answered_with_what_was_meant(said: tuple[str, ...], meant: str, command: RunCommand) -> None:
    refused = command("prune", "m", "o", *said)
    assert refused.code == 2
    assert refused.stderr.rstrip().endswith(f"(did you mean {meant}?).")


def test_the_words_of_a_header_are_never_broken() -> None:
    """At 80 columns, also where the cells below have to be folded."""
    header = ("task", "metric", "examples", "score", "dense", "change", "recovery")
    row = ("builtin", "accuracy", "107", "0.4019 ± 0.0476", "0.3738 ± 0.0470", "+0.0280", "107.50 % ± 5.82 %")
    shown = table_of("the built-in task", *header)
    shown.add_row(*row)
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(shown)
    lines = console.export_text().splitlines()
    assert all(name in lines[2] for name in header)
    assert {len(line.rstrip()) for line in lines[1:]} == {len(lines[1])}
    assert set(" ".join(row).split()) <= set(" ".join(lines).split())
