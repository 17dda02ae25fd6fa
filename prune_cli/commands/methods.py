"""`prune-cli methods`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from methods import method_names
from methods.structured import structured_names
from prune_cli.commands.error_handling import report_failures
from prune_cli.commands.options import Json, Quiet, complete_method, print_result


def methods(
    name: Annotated[str | None, typer.Argument(help="Only this one.", autocompletion=complete_method)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Presets, methods, steps and allocations with what they do and cost; of one by NAME also options and paper."""
    with report_failures(as_json=as_json, verbose=False):
        from methods.steps import step_names
        from prune_cli.commands.terminal import show_choices, show_methods
        from prune_cli.request.allocation import STRATEGIES
        from prune_cli.request.method_info import choices, describe
        from prune_cli.request.pipeline import find_method

        if name is None and not as_json:
            print_result(str, as_json=False, quiet=quiet, show=lambda console: show_choices(console, choices()))
            return
        if name is not None and name not in (*structured_names(), *step_names(), *STRATEGIES):
            find_method(name)
        every = (*method_names(), *structured_names(), *step_names(), *STRATEGIES)
        names = [name] if name is not None else list(dict.fromkeys(every))
        described = [facts for each in names for facts in describe(each)]
        print_result(
            lambda: json.dumps(described, indent=1, ensure_ascii=False) + "\n",
            as_json=as_json,
            quiet=quiet,
            show=lambda console: show_methods(console, described),
        )
