"""A tensor's bit patterns as kept values and a mask, and back: docs/sparse-safetensors.md. Numpy alone.

Tensors come flat and as unsigned integers of their elements' size, so that every dtype is treated alike: what is
dropped is the pattern of all zero bits (+0.0), and every other one (-0.0, NaN with its payload) comes back as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from prune_cli.sparse.deflate import Inflating
from prune_cli.sparse.groups import LARGEST_GROUP, CodingError, GroupCode, fullest

Values = np.ndarray | Inflating
DENSE, BITMASK = "dense", "bitmask"
# Elements worked on at a time: what a step makes of them stays in the processor's cache.
_CHUNK = 1 << 17
_SAMPLE = 1 << 16
# What the mask's own entry costs in a header, at most; a smaller gain is none.
_ENTRY_BYTES = 256


@dataclass(frozen=True)
class Plan:
    """How a tensor is stored: `encoding` is dense, bitmask or N:M; how many values and how many bytes of mask."""

    encoding: str
    values: int
    mask_bytes: int


def chunk_elements(encoding: str) -> int:
    """How many elements `encode` and `decode` work on at a time; whole words of the mask."""
    if encoding == BITMASK:
        return _CHUNK
    code = GroupCode.named(encoding)
    whole = code.groups_per_word * code.of
    return _CHUNK // whole * whole


def mask_bytes(encoding: str, count: int) -> int:
    """The size of the mask of `count` elements. Raises CodingError where this encoding cannot have that many."""
    if encoding == BITMASK:
        return -(-count // 8)
    code = GroupCode.named(encoding)
    if count % code.of:
        raise CodingError(f"its {count} elements are no whole groups of {code.of}")
    return code.mask_bytes(count)


def plan(bits: np.ndarray, row: int) -> Plan:
    """The smallest encoding of `bits`, flat unsigned integers, of which `row` are one row of the tensor."""
    count, size = len(bits), bits.dtype.itemsize
    kept = int(np.count_nonzero(bits))
    best = Plan(BITMASK, kept, mask_bytes(BITMASK, count))

    def total(candidate: Plan) -> int:
        return candidate.values * size + candidate.mask_bytes

    for candidate in sorted(_candidates(bits, row), key=total):
        if total(candidate) >= total(best):
            break
        code, size_of_chunk = GroupCode.named(candidate.encoding), chunk_elements(candidate.encoding)
        if all(fullest(chunk != 0, code.of) <= code.keep for chunk in _chunks(bits, size_of_chunk)):
            best = candidate
            break
    return best if total(best) + _ENTRY_BYTES < count * size else Plan(DENSE, count, 0)


def _candidates(bits: np.ndarray, row: int) -> Iterator[Plan]:
    """The N:M that the first elements keep; the rest may hold more."""
    for of in range(2, LARGEST_GROUP + 1):
        if row % of or not len(bits):
            continue
        keep = max(fullest(bits[: _SAMPLE // of * of] != 0, of), 1)
        if keep < of:
            encoding = f"{keep}:{of}"
            yield Plan(encoding, len(bits) // of * keep, mask_bytes(encoding, len(bits)))


def _chunks(bits: np.ndarray, size: int) -> Iterator[np.ndarray]:
    return (bits[begin : begin + size] for begin in range(0, len(bits), size))


def encode(bits: np.ndarray, encoding: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of (kept values, bytes of the mask) in order; for an N:M that `plan` has found."""
    code = None if encoding == BITMASK else GroupCode.named(encoding)
    for chunk in _chunks(bits, chunk_elements(encoding)):
        kept = chunk != 0
        if code is None:
            mask = np.packbits(kept, bitorder="little")
        else:
            mask, kept = code.pack(kept)
        yield np.compress(kept, chunk), mask


def decode(values: Values, mask: np.ndarray, encoding: str, count: int) -> Iterator[np.ndarray]:
    """The pieces of the `count` elements that `values` (their unsigned integers) and `mask` (bytes) stand for.

    Raises CodingError where the two and `count` do not fit together. Nothing is allocated beyond a piece.
    """
    if len(mask) != mask_bytes(encoding, count):
        raise CodingError(f"its mask has {len(mask)} bytes, expected {mask_bytes(encoding, count)}")
    size, position = chunk_elements(encoding), 0
    for begin in range(0, count, size):
        here = min(size, count - begin)
        first, last = (mask_bytes(encoding, end) for end in (begin, begin + here))
        kept = np.flatnonzero(_unpack(mask[first:last], encoding, here))
        if position + len(kept) > len(values):
            raise CodingError(f"its mask keeps more than its {len(values)} values")
        piece = np.zeros(here, values.dtype)
        piece[kept] = values[position : position + len(kept)]
        position += len(kept)
        yield piece
    if position != len(values):
        raise CodingError(f"its mask keeps {position} values, but {len(values)} are stored")


def _unpack(mask: np.ndarray, encoding: str, count: int) -> np.ndarray:
    if encoding != BITMASK:
        return GroupCode.named(encoding).unpack(mask, count)
    kept = np.unpackbits(mask, bitorder="little").view(bool)
    if kept[count:].any():
        raise CodingError("the end of its mask is not filled up with zeros")
    return kept[:count]
