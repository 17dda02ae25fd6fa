"""A checkpoint folder as if it were dense: encoded tensors are decoded when they are read, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.errors import RequestError
from prune_cli.sparse.format import SparseShard, SparseTensor, is_sparse, open_shard

if TYPE_CHECKING:
    import torch


class Decoded(Checkpoint):
    """`stored` through its sparse shards; entries are those of the dense files, `sparse` tells how each is stored."""

    def __init__(self, stored: Checkpoint, shards: Mapping[str, SparseShard]) -> None:
        from prune_cli.sparse.torch_tensors import SparseFiles

        entries: dict[str, TensorEntry] = {e.name: e for e in stored.entries.values() if e.file not in shards}
        for shard in shards.values():
            entries |= shard.dense_entries
        super().__init__(stored.folder, entries, stored.files, stored.index, stored.absent)
        self.sparse: dict[str, SparseTensor] = {
            name: t for shard in shards.values() for name, t in shard.tensors.items()
        }
        self._stored = stored
        self._decoder = SparseFiles(shards.values())

    def read(self, name: str) -> torch.Tensor:
        """The dense tensor. Raises PruneError, naming it, if it is damaged."""
        return self._decoder.read(name) if name in self._decoder else self._stored.read(name)

    def storage(self, name: str) -> tuple[int, str | None]:
        tensor = self.sparse.get(name)
        return (
            super().storage(name) if tensor is None else (sum(part.nbytes for part in tensor.parts), tensor.stored_as)
        )

    def read_ahead(self, names: Iterator[str]) -> None:
        parts = (part.name for name in names for part in (self.sparse[name].parts if name in self.sparse else ()))
        self._stored.read_ahead(parts)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint for reading, dense or sparse. Raises RequestError for what is not sound."""
    checkpoint = Checkpoint.open(folder)
    shards = {file: open_shard(folder / file) for file in checkpoint.files if is_sparse(folder / file)}
    return Decoded(checkpoint, shards) if shards else checkpoint


def refuse_sparse(checkpoint: Checkpoint) -> None:
    """For what copies files and overwrites tensors in them."""
    if any(is_sparse(checkpoint.folder / file) for file in checkpoint.files):
        raise RequestError(f"{checkpoint.folder} is stored sparse: prune-cli convert it with --format dense first.")
