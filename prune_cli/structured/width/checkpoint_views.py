"""A checkpoint whose units are fewer, seen through the one that has them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from prune_cli.checkpoint.reader import Checkpoint, data_bytes
from prune_cli.model.tensor_map import Place
from prune_cli.structured.units import Part


class Narrowed(Checkpoint):
    """`source` without the units of `part` that `kept` (block -> the ones that stay) leaves out; nothing is stored."""

    def __init__(
        self, source: Checkpoint, part: Part, places: Mapping[str, Place], kept: Mapping[int, torch.Tensor]
    ) -> None:
        entries = dict(source.entries)
        for name, shape in part.shapes(places).items():
            entry = entries[name]
            entries[name] = replace(entry, shape=shape, end=entry.begin + data_bytes(entry.dtype, prod(shape)))
        super().__init__(source.folder, entries, source.files, source.index)
        self._source = source
        self._part = part
        self._kept = kept

    def read(self, name: str) -> torch.Tensor:
        tensor, part = self._source.read(name), self._part
        if name not in part.cuts:
            return tensor
        return part.cuts[name].apply(tensor, self._kept[part.blocks[name]], part.units)


class Widened(Checkpoint):
    """The blocks of `written` in the shapes of `source`: as the narrower that was killed had left them in the model.

    Maps that read units have zeros for those that are gone, and other tensors what they had in `source`.
    """

    def __init__(
        self, source: Checkpoint, written: Checkpoint, parts: Sequence[Part], kept: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__(source.folder, source.entries, source.files, source.index)
        self._source = source
        self._written = written
        self._parts = parts
        self._kept = kept

    def read(self, name: str) -> torch.Tensor:
        tensor = self._written.read(name)
        for part in self._parts:
            if name in part.cuts:
                cut = part.cuts[name]
                rows = cut.rows(self._kept[part.name], part.units)
                whole = self._source.read(name)
                base = torch.zeros_like(whole) if name in part.consumers.values() else whole.clone()
                tensor = base.index_copy_(cut.axis, rows, tensor)
        return tensor

    def read_ahead(self, names: Iterator[str]) -> None:
        self._written.read_ahead(names)
