"""What `inspect` found, for a terminal, where blocks are folded, for a pipe, a line per tensor, and as CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from prune_cli.commands.terminal import elided, table_of
from prune_cli.report.format import percent, size

if TYPE_CHECKING:
    from prune_cli.checks.inspection import InspectedTensor, Inspection

_BLOCK = re.compile(r"^(.*?\.\d+)\.")
_CONVERT = (
    "Today's compressed-tensors loads such weights with random values: prune-cli convert MODEL OUT --format dense "
    "makes them plain."
)
_CSV = ("name", "file", "shape", "dtype", "parameters", "bytes", "zeros", "sparsity", "pattern", "axis", "encoding")


def show_inspection(console: Console, inspection: Inspection, *, full: bool) -> None:
    """Into a pipe, and with `full`, every tensor; on a terminal else a line per block."""
    if not console.is_terminal:
        for tensor in inspection.tensors:
            console.print("\t".join([tensor.name, *_cells(tensor)]), highlight=False, soft_wrap=True)
    elif full:
        rows = [(tensor.name, *_cells(tensor)) for tensor in inspection.tensors]
        table = table_of(inspection.model, "tensor", "shape", "dtype", "zeros", "pattern", "stored as")
        for name, *cells in rows:
            table.add_row(elided(console, name, cells), *cells)
        console.print(table)
    else:
        table = table_of(f"{inspection.model} (--full lists every tensor)", *_FOLDED)
        for row in folded(inspection.tensors):
            table.add_row(*row)
        console.print(table)
    _show_totals(console, inspection)


_FOLDED = ("block or tensor", "tensors", "parameters", "dtype", "zeros", "pattern")


def folded(tensors: Sequence[InspectedTensor]) -> Iterator[tuple[str, ...]]:
    """A row per block, with the least and most of what differs in it, and a row per tensor outside the blocks."""
    groups: dict[str, list[InspectedTensor]] = {}
    for tensor in tensors:
        block = _BLOCK.match(tensor.name)
        groups.setdefault(block[1] if block else tensor.name, []).append(tensor)
    for name, group in groups.items():
        zeros = [tensor.sparsity for tensor in group if tensor.sparsity is not None]
        least, most = (percent(min(zeros)), percent(max(zeros))) if zeros else ("–", "–")
        patterns = sorted({tensor.pattern for tensor in group if tensor.pattern})
        yield (
            name,
            str(len(group)),
            f"{sum(tensor.parameters for tensor in group):,}",
            ", ".join(dict.fromkeys(tensor.dtype for tensor in group)),
            least if least == most else f"{least} to {most}",
            ", ".join(patterns),
        )


def to_csv(inspection: Inspection) -> str:
    """A line per tensor, all that `--json` has of it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_CSV)
    for tensor in inspection.tensors:
        cells = [getattr(tensor, name) for name in _CSV]
        writer.writerow(["x".join(map(str, cell)) if isinstance(cell, tuple) else cell for cell in cells])
    return text.getvalue()


def _cells(tensor: InspectedTensor) -> list[str]:
    pattern = "" if tensor.pattern is None else tensor.pattern + ("" if tensor.axis == 1 else " (columns)")
    shape = "x".join(map(str, tensor.shape))
    return [shape, tensor.dtype, percent(tensor.sparsity), pattern, tensor.encoding or ""]


def _show_totals(console: Console, inspection: Inspection) -> None:
    table = table_of(f"Totals of {inspection.model}", "part", "tensors", "parameters", "size", "zeros")
    for total in inspection.totals:
        row = (str(total.tensors), f"{total.parameters:,}", size(total.bytes), percent(total.sparsity))
        table.add_row(total.part, *row)
    console.print(table)
    for name, file in inspection.absent.items():
        console.print(f"The index says that {name} is in {file}, but it is not there.", highlight=False, soft_wrap=True)
    if inspection.formats:
        table = table_of("Stored as", "form", "tensors", "parameters", "size", "bits a weight", "zeros")
        for form in inspection.formats:
            row = (str(form.tensors), f"{form.parameters:,}", size(form.bytes), f"{form.bits_per_weight:.2f}")
            table.add_row(form.format, *row, percent(form.sparsity))
        console.print(table)
    if any(form.format.endswith("bitmask") for form in inspection.formats):
        console.print(_CONVERT, highlight=False, soft_wrap=True)
