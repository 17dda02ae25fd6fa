"""Kept values in two parts, of which one is deflated: docs/sparse-safetensors.md. Numpy and zlib.

A float's sign goes to its other end, so that the exponent is in its first byte, the high one. Those bytes are of few
kinds and become a DEFLATE stream (RFC 1951) of Huffman codes alone; the others are noise and stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from prune_cli.checkpoint.dtypes import SHORT_FLOATS
from prune_cli.sparse.groups import CodingError
from prune_cli.sparse.zlib_backend import zlib

# Where the high byte holds much else than an exponent nothing is gained.
DEFLATED = SHORT_FLOATS
_RAW = -15
_STEP = 1 << 16


def split_values(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unsigned integers to (high bytes, the others: of every value together, the lowest first)."""
    kind = values.dtype.type
    turned = values << kind(1)
    turned |= values >> kind(8 * values.dtype.itemsize - 1)
    every = turned.view(np.uint8).reshape(len(values), values.dtype.itemsize)
    return every[:, -1].copy(), every[:, :-1].copy().reshape(-1)


def joined_values(high: np.ndarray, low: np.ndarray, kind: np.dtype) -> np.ndarray:
    """The inverse of `split_values`."""
    every = np.empty((len(high), kind.itemsize), np.uint8)
    every[:, -1] = high
    every[:, :-1] = low.reshape(len(high), kind.itemsize - 1)
    turned = every.reshape(-1).view(kind)
    values = turned >> kind.type(1)
    values |= turned << kind.type(8 * kind.itemsize - 1)
    return values


def deflated(pieces: Iterable[np.ndarray]) -> bytes:
    """One stream of all the high bytes."""
    coder = zlib.compressobj(1, zlib.DEFLATED, _RAW, 8, zlib.Z_HUFFMAN_ONLY)
    return b"".join([*(coder.compress(piece.data) for piece in pieces), coder.flush()])


class Inflating:
    """Kept values as a sequence that is sliced once, in order: what is not asked for is never inflated."""

    def __init__(self, high: np.ndarray, low: np.ndarray, kind: np.dtype) -> None:
        self.dtype = kind
        self._low = low
        self._coder = zlib.decompressobj(_RAW)
        self._left = iter(high[begin : begin + _STEP].data for begin in range(0, len(high), _STEP))
        self._waiting: bytes | memoryview = b""

    def __len__(self) -> int:
        return len(self._low) // (self.dtype.itemsize - 1)

    def __getitem__(self, place: slice) -> np.ndarray:
        begin, end, _ = place.indices(len(self))
        high = np.frombuffer(b"".join(self._inflated(end - begin)), np.uint8)
        others = self.dtype.itemsize - 1
        return joined_values(high, self._low[begin * others : end * others], self.dtype)

    def check_end(self) -> None:
        """Raises CodingError if more bytes were stored than values asked for."""
        for _ in self._output(1):
            raise CodingError("its high bytes are more than its values")
        if not self._coder.eof or self._coder.unused_data or next(self._left, None) is not None:
            raise CodingError("the end of its high bytes is missing or followed by others")

    def _inflated(self, count: int) -> Iterator[bytes]:
        while count:
            piece = next(self._output(count), None)
            if piece is None:
                raise CodingError("its high bytes are fewer than its values")
            count -= len(piece)
            yield piece

    def _output(self, most: int) -> Iterator[bytes]:
        """What comes out next, of at most `most` bytes; nothing at the end."""
        while not self._coder.eof:
            if not len(self._waiting):
                self._waiting = next(self._left, b"")
            ended = not len(self._waiting)
            try:
                piece = self._coder.decompress(self._waiting, most)
            except zlib.error as error:  # pyright: ignore[reportGeneralTypeIssues]
                raise CodingError(f"its high bytes are no DEFLATE stream ({error})") from None
            self._waiting = self._coder.unconsumed_tail
            if piece:
                yield piece
            elif ended:
                return
