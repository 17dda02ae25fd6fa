"""What plain removal leaves of the input's tensors, read from the input."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from methods.structured._expert_tables import without_removed
from prune_cli.checkpoint.layout import Layout
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.structured.plan import NewNumbers, StructuredPlan, TensorSlice


def sliced(tensor: torch.Tensor, part: TensorSlice) -> torch.Tensor:
    if tensor.dtype.itemsize > 1:
        return tensor.index_select(part.axis, torch.tensor(part.entries))
    # torch selects no entries of float8.
    return tensor.view(torch.uint8).index_select(part.axis, torch.tensor(part.entries)).view(tensor.dtype)


def renumbered(source: Checkpoint, name: str, table: NewNumbers) -> torch.Tensor:
    return without_removed(source.read(name), torch.tensor(table.kept), source.read(table.router))


class KeptTensors(Checkpoint):
    """The tensors of an output by their names there, as they are before anything is fitted.

    A file of the output may have been left half written; this never is.
    """

    def __init__(self, source: Checkpoint, layout: Layout, change: StructuredPlan) -> None:
        super().__init__(source.folder, layout.entries, layout.files, source.index)
        self._source, self._change = source, change

    def read(self, name: str) -> torch.Tensor:
        change = self._change
        if name in change.tables:
            return renumbered(self._source, change.tensors[name].source, change.tables[name])
        tensor = self._source.read(change.tensors[name].source)
        return sliced(tensor, change.slices[name]) if name in change.slices else tensor

    def read_ahead(self, names: Iterator[str]) -> None:
        self._source.read_ahead(self._change.tensors[name].source for name in names)
