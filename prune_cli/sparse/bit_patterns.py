"""The tensors of a checkpoint folder, dense or sparse, as flat bit patterns. Numpy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prune_cli.checkpoint.dtypes import FLOATS
from prune_cli.checkpoint.reader import Checkpoint, TensorEntry
from prune_cli.sparse.decode_shard import decoded, elements, mapped
from prune_cli.sparse.format import SparseShard, SparseTensor, is_sparse, open_shard, unsigned


@dataclass(frozen=True)
class Stored:
    """One tensor, where it lies, and its entry as it would be in a dense file; `codes` is the dtype of packed ones."""

    file: str
    dense: TensorEntry
    sparse: SparseTensor | None
    codes: str | None = None

    @property
    def is_float(self) -> bool:
        return self.dense.dtype in FLOATS


class StoredTensors:
    """Raises RequestError for a folder that cannot be opened or a sparse shard whose header is not sound."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = Checkpoint.open(folder)
        self.shards: dict[str, SparseShard] = {}
        self.tensors: dict[str, Stored] = {}
        for file in self.checkpoint.files:
            if is_sparse(folder / file):
                shard = self.shards[file] = open_shard(folder / file)
                for name, entry in shard.dense_entries.items():
                    self.tensors[name] = Stored(file, entry, shard.tensors[name])
        for entry in self.checkpoint.entries.values():
            if entry.file not in self.shards:
                self.tensors[entry.name] = Stored(entry.file, entry, None)
        self._data = {file: mapped(folder / file) for file in self.checkpoint.files}

    def bits(self, name: str) -> np.ndarray:
        """All elements, flat, as unsigned integers. Raises PruneError, naming the tensor, if it is damaged."""
        stored = self.tensors[name]
        if stored.sparse is None or stored.sparse.is_as_dense:
            return elements(self._data[stored.file], stored.sparse.values if stored.sparse else stored.dense)
        bits, position = np.empty(stored.dense.count, unsigned(stored.dense.dtype)), 0
        for piece in self.pieces(name):
            bits[position : position + len(piece)] = piece
            position += len(piece)
        return bits

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The elements of a tensor of a sparse shard, piece by piece, its checksum checked at the end."""
        stored = self.tensors[name]
        assert stored.sparse is not None
        yield from decoded(self.shards[stored.file], stored.sparse, self._data[stored.file])

    def sha256(self, file: str) -> str:
        with (self.checkpoint.folder / file).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def dense_sha256(self, file: str) -> str:
        """Of the dense file that a sparse one was made from. Raises PruneError for the first damaged tensor."""
        shard = self.shards[file]
        digest = hashlib.sha256(len(shard.dense_header).to_bytes(8, "little") + shard.dense_header)
        for entry in sorted(shard.dense_entries.values(), key=lambda entry: (entry.begin, entry.end)):
            for piece in self.pieces(entry.name):
                digest.update(piece.data)
        return digest.hexdigest()
