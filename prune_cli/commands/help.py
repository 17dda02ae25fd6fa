"""How --help and wrong options look: commands and options in groups, summaries whole, refusals as sentences."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand, TyperGroup

from prune_cli.commands.usage_errors import told_in_a_sentence

GROUPS = {
    "Prune": ("prune", "sweep", "recover", "soup"),
    "Look": ("inspect", "eval", "compare", "report", "methods", "bench"),
    "Judge": ("check", "verify"),
    "Publish": ("convert", "push"),
}
_ANY_LENGTH = 10_000


class Commands(TyperGroup):
    """The commands by what they are for; one that no group names would be listed under Other."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        known = self.list_commands(ctx)
        named = {name for names in GROUPS.values() for name in names}
        for title, names in {**GROUPS, "Other": tuple(name for name in known if name not in named)}.items():
            rows = [(name, self.commands[name].get_short_help_str(_ANY_LENGTH)) for name in names if name in known]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


class Command(TyperCommand):
    """Options under the titles that they are declared with; a wrong one told in a sentence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with told_in_a_sentence():
            return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            row = parameter.get_help_record(ctx)
            if row is not None:
                own = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or own, []).append(row)
        # What every command has comes last.
        for title in sorted(groups, key=lambda title: (title != "Arguments", title == "Options")):
            with formatter.section(title):
                formatter.write_dl(groups[title])
