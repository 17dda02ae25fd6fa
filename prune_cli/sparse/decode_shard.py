"""The tensors of sparse shards as they were before, checked against their checksums. Numpy alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prune_cli.checkpoint.reader import TensorEntry
from prune_cli.errors import PruneError
from prune_cli.sparse.coding import Values, decode
from prune_cli.sparse.deflate import Inflating
from prune_cli.sparse.format import SparseShard, SparseTensor, unsigned
from prune_cli.sparse.groups import CodingError
from prune_cli.sparse.zlib_backend import zlib

_PIECE = 1 << 22


def decoded(shard: SparseShard, tensor: SparseTensor, data: np.ndarray | None = None) -> Iterator[np.ndarray]:
    """The pieces of a tensor as flat unsigned integers. Raises PruneError where they or their checksum are wrong."""
    data = mapped(shard.path) if data is None else data
    values = _values(data, tensor)
    checksum = 0
    try:
        pieces = split(values) if tensor.mask is None else decode(
            values, elements(data, tensor.mask), tensor.encoding, tensor.count
        )  # fmt: skip
        for piece in pieces:
            checksum = zlib.crc32(piece.data, checksum)
            yield piece
        if isinstance(values, Inflating):
            values.check_end()
    except CodingError as error:
        raise PruneError(f"{tensor.name} in {shard.path} is damaged: {error}.") from error
    if checksum != tensor.crc32:
        raise PruneError(
            f"{tensor.name} in {shard.path} is damaged: its checksum is {checksum:08x}, expected {tensor.crc32:08x}."
        )


def _values(data: np.ndarray, tensor: SparseTensor) -> Values:
    if tensor.high is None:
        return elements(data, tensor.values)
    high, low = (elements(data, part) for part in (tensor.high, tensor.values))
    return Inflating(high, low, unsigned(tensor.dtype))


def mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.uint8, mode="r")


def elements(data: np.ndarray, entry: TensorEntry) -> np.ndarray:
    """A tensor's elements as unsigned integers, without copying; bytes for dtypes of less than one."""
    return np.frombuffer(data[entry.begin : entry.end], unsigned(entry.dtype))


def split(bits: Values) -> Iterator[np.ndarray]:
    step = _PIECE // bits.dtype.itemsize
    return (bits[begin : begin + step] for begin in range(0, len(bits), step))
