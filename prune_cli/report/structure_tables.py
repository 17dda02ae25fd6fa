"""The structure section of a report as rows of text, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prune_cli.report.format import size

if TYPE_CHECKING:
    from prune_cli.report.types import BlockChange, NotLoaded, Size, StructureReport

SIZES = ("", "before", "after", "after / before")
NOT_LOADED = ("name", "what it is", "tensors", "parameters", "size", "in the output")
BLOCKS = ("block", "now", "removed", "why", "scores")


def size_rows(before: Size, after: Size) -> list[tuple[str, str, str, str]]:
    """What the model was and is, with the ratios."""
    rows = [
        ("parameters", before.parameters, after.parameters),
        ("bytes of weights", before.bytes, after.bytes),
        ("blocks", before.blocks, after.blocks),
        ("KV cache, bytes per token", before.kv_cache_bytes_per_token, after.kv_cache_bytes_per_token),
        ("multiplications per token", before.macs_per_token, after.macs_per_token),
    ]
    return [(name, _number(a), _number(b), f"{b / a:.3f}" if a and b is not None else "–") for name, a, b in rows]


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def share_text(structure: StructureReport) -> str:
    """'25.00 % of the blocks, 21.90 % of the parameters'."""
    return ", ".join(f"{100 * share:.2f} % of the {what}" for what, share in structure.removed_shares.items())


def not_loaded_rows(found: Sequence[NotLoaded]) -> list[tuple[str, ...]]:
    """What transformers leaves out when it loads the model, a row for all that goes together."""
    return [
        (each.name, each.kind, str(each.tensors), f"{each.parameters:,}", size(each.bytes), each.became)
        for each in found
    ]


def block_rows(blocks: Sequence[BlockChange]) -> list[tuple[str, ...]]:
    """A row per block of the input."""
    return [
        (*_fate(block), ", ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in block.scores.items()))
        for block in blocks
    ]


@dataclass(frozen=True)
class BlockTable:
    """What became of each block of the input, with a column for each kind of score."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def block_table(structure: StructureReport) -> BlockTable:
    scores = list(dict.fromkeys(name for block in structure.blocks for name in block.scores))
    return BlockTable(
        header=("block", "number now", "removed", "why", *(name.replace("_", " ") for name in scores)),
        rows=[
            (*_fate(block), *(f"{block.scores[name]:.4g}" if name in block.scores else "–" for name in scores))
            for block in structure.blocks
        ],
    )


def _fate(block: BlockChange) -> tuple[str, str, str, str]:
    """Its number, its number in the output, what was removed of it, and why."""
    now = "gone" if block.new_block is None else str(block.new_block)
    return str(block.block), now, block.removed or "nothing", block.why
