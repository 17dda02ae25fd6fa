"""Decoded tensors of sparse files for torch, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from prune_cli.sparse.decode_shard import decoded, mapped
from prune_cli.sparse.format import SparseShard, SparseTensor, unsigned

_TYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32",
    "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip


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
        flat = torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, _TYPES[tensor.dtype]))
        return flat.reshape(tensor.shape)
