"""A checkpoint whose units are fewer, seen through the one that has them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from prune_cli.checkpoint.dtypes import data_bytes
from prune_cli.checkpoint.reader import Checkpoint
from prune_cli.model.tensor_info import TensorInfo
from prune_cli.structured.units import CoupledGroup


class SlicedCheckpoint(Checkpoint):
    """`source` without the units of `part` that `kept` (block -> the ones that stay) leaves out; nothing is stored."""

    def __init__(
        self, source: Checkpoint, group: CoupledGroup, infos: Mapping[str, TensorInfo], kept: Mapping[int, torch.Tensor]
    ) -> None:
        entries = dict(source.entries)
        for name, shape in group.shapes(infos).items():
            entry = entries[name]
            entries[name] = replace(entry, shape=shape, end=entry.begin + data_bytes(entry.dtype, prod(shape)))
        super().__init__(source.folder, entries, source.files, source.index)
        self._source = source
        self._part = group
        self._kept = kept

    def read(self, name: str) -> torch.Tensor:
        tensor, group = self._source.read(name), self._part
        if name not in group.slices:
            return tensor
        return group.slices[name].apply(tensor, self._kept[group.blocks[name]], group.units)


class ScatteredCheckpoint(Checkpoint):
    """The blocks of `written` in the shapes of `source`: as the narrower that was killed had left them in the model.

    Maps that read units have zeros for those that are gone, and other tensors what they had in `source`.
    """

    def __init__(
        self, source: Checkpoint, written: Checkpoint, groups: Sequence[CoupledGroup], kept: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(source.folder, source.entries, source.files, source.index)
        self._source = source
        self._written = written
        self._parts = groups
        self._kept = kept

    def read(self, name: str) -> torch.Tensor:
        tensor = self._written.read(name)
        for group in self._parts:
            if name in group.slices:
                cut = group.slices[name]
                rows = cut.rows(self._kept[group.name], group.units)
                output_sq = self._source.read(name)
                base = torch.zeros_like(output_sq) if name in group.consumers.values() else output_sq.clone()
                tensor = base.index_copy_(cut.axis, rows, tensor)
        return tensor

    def read_ahead(self, names: Iterator[str]) -> None:
        self._written.read_ahead(names)
