"""How two texts use the experts of a mixture, as a table of those that they use most differently."""

from __future__ import annotations

from itertools import groupby
from math import inf
from typing import TYPE_CHECKING

from prune_cli.report.format import percent, text_name
from prune_cli.report.structure_tables import BlockTable

if TYPE_CHECKING:
    from prune_cli.report.types import ExpertComparison, ExpertUse

# Of a block's experts so many are shown; the report's JSON has all.
_MOST = 8


def compared_table(compared: ExpertComparison) -> BlockTable:
    """Of each block the experts whose share of the tokens by one text is at least twice that by the other."""
    rows = []
    for _, uses in groupby(compared.experts, key=lambda use: use.block):
        apart = [use for use in uses if not 0.5 < _ratio(use) < 2]
        apart.sort(key=lambda use: abs(use.share - use.compared_share), reverse=True)
        rows += [_row(use) for use in apart[:_MOST]]
    return BlockTable(("block", "expert", "in the output", "calibration", text_name(compared.text)), rows)


def _ratio(use: ExpertUse) -> float:
    return use.compared_share / use.share if use.share else inf if use.compared_share else 1.0


def _row(use: ExpertUse) -> tuple[str, ...]:
    stays = "kept" if use.kept else "gone"
    return str(use.block), str(use.expert), stays, percent(use.share), percent(use.compared_share)
