"""The kinds of low-bit codes: how they lie in a stored tensor, and which number each stands for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BYTE = 8


class Codes(Protocol):
    """A code takes `bits`; `dtypes` are those of stored tensors, as in headers. Unpacked codes are one a weight."""

    @property
    def bits(self) -> int: ...

    @property
    def dtypes(self) -> frozenset[str]: ...

    def stored_columns(self, columns: int) -> int:
        """How many elements of the stored tensor hold a row of `columns` codes."""
        ...

    def unpack(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        """(..., columns) codes of a byte each."""
        ...

    def pack(self, codes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The inverse, in the dtype of the stored tensor `like`."""
        ...

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes stand for, in float32; NaN for a code that is none."""
        ...

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        """The codes of the numbers nearest to float32 `numbers`; of two that are equally near the even one."""
        ...


class E4M3:
    """FP8 with four bits of exponent: a byte each, no infinity."""

    bits = 8
    dtypes = frozenset({"F8_E4M3"})
    highest = 448.0

    def stored_columns(self, columns: int) -> int:
        return columns

    def unpack(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        return stored.view(torch.uint8)

    def pack(self, codes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return codes.view(like.dtype)

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.clamp(-self.highest, self.highest).to(torch.float8_e4m3fn).view(torch.uint8)


class E2M1:
    """FP4: two in a byte, the earlier in its lower half."""

    bits = 4
    dtypes = frozenset({"U8", "I8", "F4"})

    def __init__(self) -> None:
        self._numbers = torch.tensor([*_E2M1, *(-number for number in _E2M1)])
        middles = torch.tensor([(a + b) / 2 for a, b in pairwise(_E2M1)])
        # A middle belongs to the lower of its neighbours, unless that is the odd one.
        odd = torch.arange(len(middles)) % 2 == 1
        self._middles = torch.where(odd, torch.nextafter(middles, torch.zeros(())), middles)

    def stored_columns(self, columns: int) -> int:
        return columns // 2

    def unpack(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        return _unpack(stored, self.bits)

    def pack(self, codes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return _pack(codes, self.bits).view(like.dtype)

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        return self._numbers[codes.int()]

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        magnitude = torch.bucketize(numbers.abs().contiguous(), self._middles)
        return (magnitude + len(_E2M1) * (numbers < 0)).to(torch.uint8)


@dataclass(frozen=True)
class Int8:
    """Whole numbers of up to 8 `bits`, a signed byte each."""

    bits: int = 8
    dtypes = frozenset({"I8"})

    @property
    def lowest(self) -> float:
        return -float(1 << (self.bits - 1))

    @property
    def highest(self) -> float:
        return -self.lowest - 1

    def stored_columns(self, columns: int) -> int:
        return columns

    def unpack(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        return stored

    def pack(self, codes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return codes

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        numbers = codes.float()
        if self.bits == _BYTE:
            return numbers
        return numbers.masked_fill((numbers < self.lowest) | (numbers > self.highest), torch.nan)

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.round().clamp(self.lowest, self.highest).to(torch.int8)


@dataclass(frozen=True)
class Int32Words:
    """Whole numbers of 2, 4 or 8 `bits` plus half their range, packed along the row from the low bits of int32 on."""

    bits: int
    dtypes = frozenset({"I32"})

    @property
    def lowest(self) -> float:
        return -float(1 << (self.bits - 1))

    @property
    def highest(self) -> float:
        return -self.lowest - 1

    def stored_columns(self, columns: int) -> int:
        return -(-columns * self.bits // 32)

    def unpack(self, stored: torch.Tensor, columns: int) -> torch.Tensor:
        return _unpack(stored, self.bits)[..., :columns]

    def pack(self, codes: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        missing = like.shape[-1] * 32 // self.bits - codes.shape[-1]
        return _pack(torch.nn.functional.pad(codes, (0, missing)), self.bits).view(torch.int32)

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        return codes.float() + self.lowest

    def nearest(self, numbers: torch.Tensor) -> torch.Tensor:
        return (numbers.round().clamp(self.lowest, self.highest) - self.lowest).to(torch.uint8)


def _unpack(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes from the lowest bits of each byte on; words are stored lowest byte first."""
    as_bytes = stored.contiguous().view(torch.uint8)
    parts = [(as_bytes >> shift) & ((1 << bits) - 1) for shift in range(0, _BYTE, bits)]
    return torch.stack(parts, dim=-1).flatten(-2)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    parts = codes.unflatten(-1, (-1, _BYTE // bits)).unbind(-1)
    packed = torch.zeros_like(parts[0])
    for at, part in enumerate(parts):
        packed |= part << (at * bits)
    return packed
