"""Which N of every M elements are kept, as numbers: the N:M part of docs/sparse-safetensors.md.

A state is the M-bit number whose bit i stands for element i of its group; the states of a pattern are those with N ones
in ascending order, and a group is told by the place of its state in that order. k places share a little-endian word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from math import comb

import numpy as np

LARGEST_GROUP = 16
_WORD_BYTES = (1, 2, 4)
_LARGEST_TABLE = 1 << 16
_NAME = re.compile(r"(\d{1,2}):(\d{1,2})")


class CodingError(ValueError):
    """Stored bytes that no encoder writes; the message says what is wrong with them, without the tensor's name."""


@dataclass(frozen=True)
class GroupCode:
    """The coding of N:M; `word_bytes` and `groups_per_word` are those with the fewest bits a group."""

    keep: int
    of: int

    @classmethod
    def named(cls, name: str) -> GroupCode:
        """'2:4' to its code. Raises CodingError for what is no N:M with 0 < N < M <= 16."""
        match = _NAME.fullmatch(name)
        keep, of = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 0 < keep < of <= LARGEST_GROUP or name != f"{keep}:{of}":
            raise CodingError(f"the encoding {name[:20]!r} is not known")
        return _code(keep, of)

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    @cached_property
    def states(self) -> int:
        return comb(self.of, self.keep)

    @cached_property
    def word_bytes(self) -> int:
        fitting = [size for size in _WORD_BYTES if self._groups_in(size)]
        return min(fitting, key=lambda size: (size / self._groups_in(size), size))

    @cached_property
    def groups_per_word(self) -> int:
        return self._groups_in(self.word_bytes)

    def _groups_in(self, size: int) -> int:
        groups = 0
        while self.states ** (groups + 1) <= 256**size:
            groups += 1
        return groups

    def mask_bytes(self, count: int) -> int:
        """Bytes of the positions of `count` elements, a multiple of M."""
        return -(-(count // self.of) // self.groups_per_word) * self.word_bytes

    # --- to numbers ---------------------------------------------------------------------------------------------

    def pack(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Booleans of whole groups, at most N true in each, to (words as bytes, booleans with exactly N true).

        A group with fewer is filled up with its first other elements.
        """
        bits = self.groups_per_word * self.of
        by_bits = self.word_bytes == 1 and bits in (12, 16)
        words = self._words_of_bits(kept, bits) if by_bits else self._words_of_ranks(kept)
        data = words.view(np.uint8)
        full = np.count_nonzero(kept) == len(kept) // self.of * self.keep
        return data, kept if full else self.unpack(data, len(kept))

    def _words_of_bits(self, kept: np.ndarray, bits: int) -> np.ndarray:
        """Words of one byte, by tables of what the 16 bits that a word's elements are among stand for."""
        step, tables = 3 if bits == 12 else 2, self._words_of_windows
        packed = _filled_up(np.packbits(kept, bitorder="little"), step)
        words = np.empty((len(packed) // step, len(tables)), np.uint8)
        for place, table in enumerate(tables):
            windows = np.ndarray(len(words), "<u2", packed, place, (step,))
            words[:, place] = table.take(windows)
        return words.reshape(-1)[: self.mask_bytes(len(kept))]

    def _words_of_ranks(self, kept: np.ndarray) -> np.ndarray:
        ranks = self._rank_of_number.take(group_numbers(kept, self.of))
        padded = np.zeros(-(-len(ranks) // self.groups_per_word) * self.groups_per_word, f"<u{self.word_bytes}")
        padded[: len(ranks)] = ranks
        words = padded[0 :: self.groups_per_word].copy()
        for place in range(1, self.groups_per_word):
            words += padded[place :: self.groups_per_word] * words.dtype.type(self.states**place)
        return words

    def unpack(self, data: np.ndarray, count: int) -> np.ndarray:
        """The bytes of `pack` back to `count` booleans. Raises CodingError for words that it never writes."""
        words = np.frombuffer(data, f"<u{self.word_bytes}")
        if not len(words):
            return np.zeros(0, bool)
        if int(words.max()) >= self.states**self.groups_per_word:
            raise CodingError(f"a word of its mask stands for no group of {self}")
        spare = len(words) * self.groups_per_word - count // self.of
        if spare and int(words[-1]) >= self.states ** (self.groups_per_word - spare):
            raise CodingError("the end of its mask is not filled up with zeros")
        if self.states**self.groups_per_word <= _LARGEST_TABLE:
            return self._table_of_words.take(words, axis=0).reshape(-1)[:count]
        ranks = np.empty((len(words), self.groups_per_word), np.uint32)
        for place in range(self.groups_per_word):
            words, ranks[:, place] = np.divmod(words, np.uint32(self.states))
        return self._table.take(ranks.reshape(-1), axis=0).reshape(-1)[:count]

    @cached_property
    def _numbers(self) -> np.ndarray:
        """The states in ascending order."""
        every = np.arange(1 << self.of, dtype=np.uint32)
        return every[_ones(every) == self.keep]

    @cached_property
    def _table(self) -> np.ndarray:
        """(states, M) booleans."""
        return (self._numbers[:, None] >> np.arange(self.of, dtype=np.uint32) & 1).astype(bool)

    @cached_property
    def _rank_of_number(self) -> np.ndarray:
        """For each M-bit number with at most N ones the place of the state that it is filled up to."""
        filled = np.arange(1 << self.of, dtype=np.uint32)
        for _ in range(self.keep):
            filled = np.where(_ones(filled) < self.keep, filled | (filled + 1), filled)
        return np.searchsorted(self._numbers, filled).astype(np.uint8 if self.states <= 256 else np.uint16)

    @cached_property
    def _words_of_windows(self) -> list[np.ndarray]:
        """For each 16-bit number the word of its lowest bits; where words have 12 bits, also that of its highest."""
        windows, group = np.arange(1 << 16, dtype=np.uint32), (1 << self.of) - 1
        words = np.zeros(len(windows), np.uint8)
        for place in range(self.groups_per_word):
            words += self._rank_of_number[windows >> place * self.of & group] * np.uint8(self.states**place)
        return [words] if self.groups_per_word * self.of == 16 else [words, words[windows >> 4]]

    @cached_property
    def _table_of_words(self) -> np.ndarray:
        """(words, k * M) booleans."""
        words = np.arange(self.states**self.groups_per_word, dtype=np.uint32)
        groups = [self._table[words // self.states**place % self.states] for place in range(self.groups_per_word)]
        return np.concatenate(groups, axis=1)


def group_numbers(kept: np.ndarray, of: int) -> np.ndarray:
    """Booleans of whole groups to the number of each: bit i stands for element i."""
    if 16 % of:
        numbers = kept[0::of].astype(np.uint16)
        for place in range(1, of):
            numbers |= kept[place::of].astype(np.uint16) << place
        return numbers
    packed = np.packbits(kept, bitorder="little")
    if of >= 8:
        return packed.view(f"<u{of // 8}")
    numbers = np.empty((len(packed), 8 // of), np.uint8)
    for place in range(8 // of):
        np.right_shift(packed, place * of, out=numbers[:, place])
    numbers &= (1 << of) - 1
    return numbers.reshape(-1)[: len(kept) // of]


def _filled_up(packed: np.ndarray, step: int) -> np.ndarray:
    """These bytes and zeros up to a multiple of `step`."""
    missing = -len(packed) % step
    return np.append(packed, np.zeros(missing, np.uint8)) if missing else packed


def fullest(kept: np.ndarray, of: int) -> int:
    """The most elements that a group of `of` keeps, of booleans of whole groups."""
    if 16 % of == 0:
        packed = _filled_up(np.packbits(kept, bitorder="little"), 2)
        return int(_fullest_in(of).take(packed.view("<u2")).max(initial=0))
    counts = kept[0::of].astype(np.uint8)
    for place in range(1, of):
        counts += kept[place::of]
    return int(counts.max(initial=0))


@cache
def _fullest_in(of: int) -> np.ndarray:
    """For every 16 bits how many ones their fullest group has."""
    numbers = np.arange(1 << 16, dtype=np.uint32)
    groups = [_ones(numbers >> begin & (1 << of) - 1) for begin in range(0, 16, of)]
    return np.max(groups, axis=0).astype(np.uint8)


@cache
def _code(keep: int, of: int) -> GroupCode:
    return GroupCode(keep, of)


def _ones(numbers: np.ndarray) -> np.ndarray:
    return sum(((numbers >> place) & 1 for place in range(LARGEST_GROUP)), np.zeros_like(numbers))
