"""Decoded tensors of sparse files for torch, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from prune_cli.checkpoint.dtypes import torch_dtype
from prune_cli.sparse.decode_shard import decoded, mapped
from prune_cli.sparse.format import SparseShard, SparseTensor, unsigned


class SparseFiles:
    """The encoded tensors of some sparse files; reading is thread-safe and checks each tensor's checksum."""

    def __init__(self, shards: Iterable[SparseShard]) -> None:
        self._places: dict[str, tuple[SparseShard, SparseTensor, np.ndarray]] = {}
        for shard in shards:
            data = mapped(shard.path)
            for tensor in shard.tensors.values():
                if not tensor.is_as_dense:
                    self._places[tensor.name] = (shard, tensor, data)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __deepcopy__(self, memo: Any) -> SparseFiles:
        return self

    def read(self, name: str) -> torch.Tensor:
        """The dense tensor on the CPU, in its stored dtype. Raises PruneError, naming it, if it is damaged."""
        shard, tensor, data = self._places[name]
        bits = np.empty(tensor.count, unsigned(tensor.dtype))
        position = 0
        for piece in decoded(shard, tensor, data):
            bits[position : position + len(piece)] = piece
            position += len(piece)
        flat = torch.from_numpy(bits.view(np.uint8)).view(torch_dtype(tensor.dtype))
        return flat.reshape(tensor.shape)
