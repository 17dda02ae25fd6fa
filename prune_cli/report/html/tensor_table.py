"""The tensors of one or several reports: which kind of layer each is, its row in the table, values for the charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from prune_cli.report.format import percent

if TYPE_CHECKING:
    from prune_cli.report.types import Report, TensorReport

QUANTITIES = ("sparsity", "output_error")


@dataclass(frozen=True)
class Cell:
    """What is shown, and the number that the column is sorted by (None sorts last)."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """One tensor; `cells` hold asked sparsity, sparsity and output error of each report in turn."""

    name: str
    role: str
    block: Cell
    shape: str
    dtype: str
    action: str
    why: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Point:
    """A measured value of one pruned tensor of a report."""

    label: str
    kind: str
    block: int | None
    value: float


def rows_of(reports: Sequence[Report]) -> list[Row]:
    """Every tensor that any of the reports lists, in their order; facts from the first report that has it."""
    by_name = [{tensor.name: tensor for tensor in report.tensors} for report in reports]
    names = dict.fromkeys(name for tensors in by_name for name in tensors)
    return [_row(name, [tensors.get(name) for tensors in by_name]) for name in names]


def _row(name: str, found: Sequence[TensorReport | None]) -> Row:
    there = [tensor for tensor in found if tensor is not None]
    first = there[0]
    actions = dict.fromkeys(tensor.action for tensor in there)
    notes = dict.fromkeys(text for tensor in there for text in (tensor.reason, *tensor.notes) if text)
    block = first.block
    return Row(
        name=name,
        role=first.role,
        block=Cell("–" if block is None else str(block), block),
        shape=" × ".join(map(str, first.shape)),
        dtype=first.dtype,
        action=" / ".join(actions),
        why="; ".join(notes),
        cells=[cell for tensor in found for cell in _cells(tensor)],
    )


def _cells(tensor: TensorReport | None) -> list[Cell]:
    if tensor is None:
        return [Cell("absent")] * 3
    error = tensor.output_error
    return [
        Cell(percent(tensor.asked_sparsity), tensor.asked_sparsity),
        Cell(percent(tensor.sparsity), tensor.sparsity),
        Cell("–" if error is None else f"{error:.4f}", error),
    ]


def kinds_of(names: Iterable[str]) -> dict[str, str]:
    """What a linear layer is called in every block: the fewest last parts of its name that tell it from the others.

    Numbers (of blocks, of experts) are no part of a kind: `model.layers.3.mlp.down_proj.weight` is a `down_proj`.
    """
    paths = {name: tuple(p for p in name.removesuffix(".weight").split(".") if not p.isdecimal()) for name in names}
    distinct = set(paths.values())
    short: dict[tuple[str, ...], str] = {}
    for path in distinct:
        lengths = range(1, len(path) + 1)
        unique = (n for n in lengths if sum(other[-n:] == path[-n:] for other in distinct) == 1)
        short[path] = ".".join(path[-next(unique, len(path)) :])
    return {name: short[path] for name, path in paths.items()}


def points_of(reports: Sequence[Report], labels: Sequence[str], quantity: str) -> list[Point]:
    """The values of `quantity` ('sparsity' or 'output_error') of all pruned tensors that have one."""
    pruned = [[tensor for tensor in report.tensors if tensor.action == "pruned"] for report in reports]
    kinds = kinds_of(dict.fromkeys(tensor.name for tensors in pruned for tensor in tensors))
    return [
        Point(label, kinds[tensor.name], tensor.block, value)
        for label, tensors in zip(labels, pruned, strict=True)
        for tensor in tensors
        if (value := getattr(tensor, quantity)) is not None
    ]


def scores_of(report: Report, label: str) -> list[Point]:
    """What a structured run judged its blocks by."""
    return [
        Point(label, name.replace("_", " "), block.block, score)
        for block in (report.structure.blocks if report.structure else [])
        for name, score in block.scores.items()
    ]


def means(points: Iterable[Point], *fields: str) -> dict[tuple[Any, ...], tuple[float, float, float]]:
    """Mean, least and greatest value of the points that are alike in `fields`, in the order of their appearance."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for point in points:
        groups.setdefault(tuple(getattr(point, name) for name in fields), []).append(point.value)
    return {key: (fmean(values), min(values), max(values)) for key, values in groups.items()}
