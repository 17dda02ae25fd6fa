"""The tensors of one block of the model; those that a checkpoint decodes are held no longer than they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_cli.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    import torch

_MATRIX = 2


@dataclass(frozen=True)
class ReadWhenSliced:
    """Stands for a tensor as the slices of safetensors do, which transformers takes too: `[...]` reads it."""

    checkpoint: Checkpoint
    name: str

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.checkpoint.read(self.name)[index]


class BlockTensors(Mapping[str, "torch.Tensor"]):
    """By name, as stored; a decoded matrix is decoded again whenever it is asked for.

    What holds the matrices of several experts is asked for once for each, so it is kept.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        self._checkpoint = checkpoint
        self._names = dict.fromkeys(names)
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        if name in self._kept:
            return self._kept[name]
        tensor = self._checkpoint.read(name)
        if self._checkpoint.is_stored(name) or tensor.ndim > _MATRIX:
            self._kept[name] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def to_load(self) -> dict[str, Any]:
        """What transformers makes the model's parameters of, one after the other."""
        stored = self._checkpoint.is_stored
        return {name: self[name] if stored(name) else ReadWhenSliced(self._checkpoint, name) for name in self._names}
