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
    """`source` without the units of `groups` that `kept` (name of the group -> block -> those that stay) leaves out.

    Nothing is stored.
    """

    def __init__(
        self,
        source: Checkpoint,
        groups: Sequence[CoupledGroup],
        infos: Mapping[str, TensorInfo],
        kept: Mapping[str, Mapping[int, torch.Tensor]],
    ) -> None:
        entries = dict(source.entries)
        for group in groups:
            for name, shape in group.shapes(infos).items():
                entry = entries[name]
                entries[name] = replace(entry, shape=shape, end=entry.begin + data_bytes(entry.dtype, prod(shape)))
        super().__init__(source.folder, entries, source.files, source.index)
        self._source = source
        self._groups = groups
        self._kept = kept

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        for group in self._groups:
            if name in group.slices:
                tensor = group.slices[name].apply(tensor, self._kept[group.name][group.blocks[name]], group.units)
        return tensor


class ZeroedCheckpoint(Checkpoint):
    """`source` with zeros in the linear layers that read units, for those that `kept` leaves out; `kept` as above."""

    def __init__(
        self,
        source: Checkpoint,
        groups: Sequence[CoupledGroup],
        infos: Mapping[str, TensorInfo],
        kept: Mapping[str, Mapping[int, torch.Tensor]],
    ) -> None:
        super().__init__(source.folder, source.entries, source.files, source.index)
        self._source = source
        self._groups = groups
        self._infos = infos
        self._kept = kept

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        for group in self._groups:
            if group.reads(name, self._infos):
                block = group.blocks[name]
                tensor = group.slices[name].zeroed(tensor, self._kept[group.name][block], group.units)
        return tensor


class ScatteredCheckpoint(Checkpoint):
    """The blocks of `written` in the shapes of `source`: as the narrower that was killed had left them in the model.

    Maps that read units have zeros for those that are gone, and other tensors what they had in `source`.
    """

    def __init__(
        self,
        source: Checkpoint,
        written: Checkpoint,
        groups: Sequence[CoupledGroup],
        infos: Mapping[str, TensorInfo],
        kept: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(source.folder, source.entries, source.files, source.index)
        self._source = source
        self._written = written
        self._groups = groups
        self._infos = infos
        self._kept = kept

    def read(self, name: str) -> torch.Tensor:
        tensor = self._written.read(name)
        for group in self._groups:
            if name in group.slices:
                dense = self._source.read(name)
                whole = torch.zeros_like(dense) if group.reads(name, self._infos) else dense.clone()
                tensor = group.slices[name].put(whole, tensor, self._kept[group.name], group.units)
        return tensor

    def read_ahead(self, names: Iterator[str]) -> None:
        self._written.read_ahead(names)
