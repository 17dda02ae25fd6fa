"""A checkpoint whose units are fewer, seen through the one that has them all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from prune_cli.checkpoint import Checkpoint, data_bytes
from prune_cli.structured.coupling import Cut, Part


class Narrowed(Checkpoint):
    """`source` without the units that `kept` (part and block -> the ones that stay) leaves out; nothing is stored."""

    def __init__(self, source: Checkpoint, parts: Sequence[Part], kept: Mapping[tuple[str, int], torch.Tensor]) -> None:
        cuts = [(part, name, cut) for part in parts for name, cut in part.cuts.items()]
        entries = dict(source.entries)
        for part, name, cut in cuts:
            shape = narrowed_shape(entries[name].shape, part, cut)
            entry = entries[name]
            nbytes = data_bytes(entry.dtype, torch.Size(shape).numel())
            entries[name] = replace(entry, shape=shape, end=entry.begin + nbytes)
        super().__init__(source.folder, entries, source.files, source.index)
        self._source = source
        self._kept = kept
        self._parts = parts

    def read(self, name: str) -> torch.Tensor:
        tensor = self._source.read(name)
        for part in self._parts:
            if name in part.cuts:
                tensor = part.cuts[name].apply(tensor, self._kept[part.name, part.blocks[name]], part.units)
        return tensor


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


def narrowed_shape(shape: Sequence[int], part: Part, cut: Cut) -> tuple[int, ...]:
    return tuple(
        sum(cut.sections) * part.keep + cut.tail if axis == cut.axis else size for axis, size in enumerate(shape)
    )
