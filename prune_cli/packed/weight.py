"""One logical weight of a packed checkpoint, and the stored tensors that make it up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from prune_cli.checkpoint.dtypes import torch_dtype
from prune_cli.errors import RequestError
from prune_cli.packed.codes import Codes
from prune_cli.packed.scales import grid_shape, scale_values, spread

CoupledGroup = Literal["codes", "scales", "zeros"]
Parts = Mapping[CoupledGroup, torch.Tensor]
# So many weights are decoded at a time, so that what lies between code and value takes little memory.
_CHUNK = 1 << 21
_BYTES, _BITS = 256, 8


@dataclass(frozen=True)
class _Rows:
    """Some rows of matrix `at`: their stored codes, and the scale and zero point of each weight."""

    at: int
    rows: slice
    stored: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


@dataclass(frozen=True)
class PackedWeight:
    """`name`, `shape` and `dtype` are what a plain checkpoint has, `dtype` one in which all values are exact.

    `parts` are the stored tensors that it is decoded from, `beside` those that only runtimes of the format read.
    Scales belong to tiles of `tile` (rows, columns) of the codes' matrices, which are `transposed` to the weight's.
    `arithmetic` is the dtype in which numbers and scales are multiplied.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    label: str
    codes: Codes
    tile: tuple[int, int]
    parts: Mapping[CoupledGroup, str]
    beside: tuple[str, ...] = ()
    arithmetic: str = "F32"
    transposed: bool = False

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """(..., rows, columns) of the codes."""
        *leading, rows, columns = self.shape
        return (*leading, columns, rows) if self.transposed else self.shape

    def one_expert(self) -> PackedWeight:
        """How each matrix of a weight that holds those of several experts is stored, each part along its first axis."""
        return replace(self, shape=self.shape[1:])

    def decode(self, parts: Parts) -> torch.Tensor:
        """The values. Raises RequestError, naming the part, for NaN in scales or codes."""
        dtype = torch_dtype(self.dtype)
        values = torch.empty(self.matrix_shape, dtype=dtype)
        flat = values.view(-1, *values.shape[-2:])
        for some in self._some_rows(parts):
            flat[some.at, some.rows] = self._values(some, self._unpacked(some.stored)).to(dtype)
        return values.transpose(-1, -2).contiguous() if self.transposed else values

    def zeros(self, parts: Parts, dtype: torch.dtype) -> int | None:
        """How many values are 0 in `dtype`, told by the codes alone; all values are finite then.

        None where zero points shift them, rows end within a byte, or a scale is 0 or brings values out of range.
        Raises RequestError as `decode` does.
        """
        scales = scale_values(parts["scales"], self.parts["scales"]).float().abs()
        codes = parts["codes"]
        if "zeros" in parts or self._ends_within_a_byte(codes):
            return None
        numbers = self._numbers_of_bytes(codes)
        known = numbers[numbers.isfinite() & (numbers != 0)].abs().double()
        least, most = (float(end(known) * end(scales)) for end in (torch.min, torch.max))
        ranges = [torch.finfo(each) for each in (dtype, torch_dtype(self.dtype), torch_dtype(self.arithmetic))]
        if not all(each.tiny <= least and most <= each.max for each in ranges):
            return None
        counts = torch.bincount(codes.view(-1).view(torch.uint8), minlength=_BYTES)
        self._check_numbers(numbers[counts > 0])
        return int((counts * (numbers == 0).sum(1)).sum())

    def _ends_within_a_byte(self, codes: torch.Tensor) -> bool:
        columns = self.matrix_shape[-1]
        return self.codes.stored_columns(columns) * codes.element_size() * _BITS != columns * self.codes.bits

    def _numbers_of_bytes(self, codes: torch.Tensor) -> torch.Tensor:
        """(256, codes of a byte): the numbers that every byte of stored codes holds."""
        every = torch.arange(_BYTES, dtype=torch.uint8)[:, None]
        stored = every.view(codes.dtype) if codes.element_size() == 1 else every
        return self.codes.numbers(self.codes.unpack(stored, max(1, _BITS // self.codes.bits)))

    def encode(self, parts: Parts, values: torch.Tensor) -> torch.Tensor:
        """New codes, stored as before, for `values` on the weight's own scales.

        A weight whose stored value did not change keeps its code, one that is 0 gets that of 0, another the nearest.
        """
        wanted = values.transpose(-1, -2) if self.transposed else values
        wanted = wanted.reshape(-1, *self.matrix_shape[-2:])
        stored = torch.empty_like(parts["codes"], memory_format=torch.contiguous_format)
        flat = self._matrices(stored)
        for some in self._some_rows(parts):
            flat[some.at, some.rows] = self._new_codes(some, wanted[some.at, some.rows])
        return stored

    def _values(self, some: _Rows, codes: torch.Tensor) -> torch.Tensor:
        """What `codes` are worth on the scales of `some`."""
        dtype = torch_dtype(self.arithmetic)
        numbers = self.codes.numbers(codes)
        self._check_numbers(numbers)
        numbers = numbers.to(dtype)
        if some.zeros is not None:
            numbers = numbers - some.zeros.to(dtype)
        return numbers * some.scales.to(dtype)

    def _check_numbers(self, numbers: torch.Tensor) -> None:
        if not bool(torch.isfinite(numbers.sum())):
            raise RequestError(
                f"{self.parts['codes']} holds codes that stand for no number ({self.label}): "
                "download the checkpoint again."
            )

    def _new_codes(self, some: _Rows, wanted: torch.Tensor) -> torch.Tensor:
        dtype, old = torch_dtype(self.dtype), self._unpacked(some.stored)
        old_values = self._values(some, old).to(dtype)
        zeros = torch.zeros(1, 1) if some.zeros is None else some.zeros
        scales = some.scales.float()
        # What is 0, or has a scale of 0, is 0 whatever the scale.
        numbers = torch.where((wanted == 0) | (scales == 0), zeros, wanted.float() / scales + zeros)
        codes = self.codes.nearest(numbers)
        values = self._values(some, codes).to(dtype)
        # What became 0 gets no code of -0.
        codes = torch.where(values == 0, self.codes.nearest(zeros), codes)
        same = (wanted == old_values) | (values == old_values)
        return self.codes.pack(torch.where(same, old, codes), some.stored)

    def _unpacked(self, stored: torch.Tensor) -> torch.Tensor:
        return self.codes.unpack(stored, self.matrix_shape[-1])

    # --- shapes -------------------------------------------------------------------------------------------------

    def _some_rows(self, parts: Parts) -> Iterator[_Rows]:
        rows, columns = self.matrix_shape[-2:]
        grid = grid_shape(self.matrix_shape[-2:], self.tile)
        scales = scale_values(parts["scales"], self.parts["scales"]).reshape(-1, *grid)
        zeros = self._zero_points(parts["zeros"], grid) if "zeros" in parts else None
        step = max(1, _CHUNK // max(1, columns))
        for at, codes in enumerate(self._matrices(parts["codes"])):
            for begin in range(0, rows, step):
                some = range(begin, min(begin + step, rows))
                yield _Rows(
                    at,
                    slice(some.start, some.stop),
                    codes[some.start : some.stop],
                    spread(scales[at], self.tile, some, columns),
                    None if zeros is None else spread(zeros[at], self.tile, some, columns),
                )

    def _matrices(self, codes: torch.Tensor) -> torch.Tensor:
        """A view of stored codes as (matrices, rows, stored columns)."""
        rows, columns = self.matrix_shape[-2:]
        return codes.view(-1, rows, self.codes.stored_columns(columns))

    def _zero_points(self, stored: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """(matrices, tiles down, tiles across) numbers; packed ones lie along the columns of the grid."""
        codes = self.codes.unpack(stored.T, grid[0]).T if stored.dtype == torch.int32 else stored
        return self.codes.numbers(codes).reshape(-1, *grid)
