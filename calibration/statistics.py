"""Accumulators over the inputs of one linear map; every map that reads the same input tensor shares them."""

from collections.abc import Callable
from typing import Protocol

import torch


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest float for sums over batches (Metal has no float64)."""
    return torch.float32 if device.type == "mps" else torch.float64


class SquaredNorm:
    """`sq_norm` (in,): the sum over tokens of every input's square, diag(X^T X)."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(inputs, dtype=sum_dtype(device), device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of any float dtype."""
        rows = rows.float()
        self._sum += rows.square().sum(0).to(self._sum.dtype)

    def value(self) -> torch.Tensor:
        return self._sum.float()


class RowSketch:
    """A few rows R (rows, in) that stand for all tokens X: E||R D^T||^2 = ||X D^T||^2 for every D.

    Tokens are dealt out to `rows` buckets in turn and summed with random signs (a count sketch: Charikar et al.,
    ICALP 2002); with no more tokens than buckets, R is X itself and nothing is estimated.
    """

    def __init__(self, rows: int, inputs: int, device: torch.device, seed: int) -> None:
        self._rows = torch.zeros(rows, inputs, device=device)
        self._taken = 0
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of any float dtype, in the order of the tokens."""
        buckets = len(self._rows)
        for chunk in rows.split(buckets):
            signs = torch.randint(0, 2, (len(chunk), 1), generator=self._generator).mul_(2).sub_(1)
            first = self._taken % buckets
            head = min(len(chunk), buckets - first)
            signed = chunk.float() * signs.to(chunk.device)
            self._rows[first : first + head] += signed[:head]
            self._rows[: len(chunk) - head] += signed[head:]
            self._taken += len(chunk)

    def value(self) -> torch.Tensor:
        return self._rows


class Accumulator(Protocol):
    def add(self, rows: torch.Tensor) -> None: ...
    def value(self) -> torch.Tensor: ...


# The statistics that a method may ask for by name.
ACCUMULATORS: dict[str, Callable[[int, torch.device], Accumulator]] = {"sq_norm": SquaredNorm}
