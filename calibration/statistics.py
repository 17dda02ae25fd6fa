"""Accumulators over the inputs of one linear map; every map that reads the same input tensor shares them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

_CACHED_ROWS = 128
# Rows of a Gram matrix that are made at once where the matrix does not fit the device.
_BAND = 1024
# Their 8 or 11 significant bits fit TF32's 11, and the tensor cores sum in float32: such products lose nothing.
_EXACT_IN_TF32 = (torch.bfloat16, torch.float16)


@contextmanager
def _tensor_cores(wanted: bool) -> Iterator[None]:
    """Within, float32 products on a CUDA device round their factors to TF32."""
    if not wanted:
        yield
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest float for sums over batches (Metal has no float64)."""
    return torch.float32 if device.type == "mps" else torch.float64


class SquaredNorm:
    """`sq_norm` (in,): the sum over tokens of every input's square, diag(X^T X)."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(inputs, dtype=sum_dtype(device), device=device)

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of any float dtype."""
        # Partial sums that fit a CPU's cache are several times faster than squaring all rows first.
        chunk_rows = _CACHED_ROWS if rows.device.type == "cpu" else len(rows)
        partial = torch.zeros(min(chunk_rows, len(rows)), rows.shape[1], device=rows.device)
        for chunk in rows.split(chunk_rows):
            chunk = chunk.float()
            partial[: len(chunk)].addcmul_(chunk, chunk)
        self._sum += partial.sum(0, dtype=self._sum.dtype)

    def total(self) -> torch.Tensor:
        return self._sum

    def value(self) -> torch.Tensor:
        return self._sum.float()


class Mean:
    """`mean` (in,): the mean of every input over the tokens."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(inputs, dtype=sum_dtype(device), device=device)
        self._tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of any float dtype."""
        self._sum += rows.float().sum(0)
        self._tokens += len(rows)

    def value(self) -> torch.Tensor:
        return (self._sum / max(self._tokens, 1)).float()


class Variance:
    """`variance` (in,): of every input over the tokens (of all of them, not a sample's estimate).

    Batches are merged with the shift between their means (Chan, Golub & LeVeque 1979), so inputs with a large mean and
    a small variance keep their digits.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._mean = torch.zeros(inputs, dtype=sum_dtype(device), device=device)
        self._squares = torch.zeros_like(self._mean)
        self._tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of any float dtype."""
        if not len(rows):
            return
        rows = rows.float()
        mean = rows.sum(0, dtype=self._mean.dtype) / len(rows)
        centred = SquaredNorm(rows.shape[1], rows.device)
        for chunk in rows.split(_CACHED_ROWS if rows.device.type == "cpu" else len(rows)):
            centred.add(chunk - mean.float())
        shift, tokens = mean - self._mean, self._tokens + len(rows)
        self._squares += centred.total() + shift.square() * (self._tokens * len(rows) / tokens)
        self._mean += shift * (len(rows) / tokens)
        self._tokens = tokens

    def value(self) -> torch.Tensor:
        return (self._squares / max(self._tokens, 1)).float()


class SampleSum:
    """`sample_sum` (in,): the mean over samples of the sum over a sample's tokens."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(inputs, dtype=sum_dtype(device), device=device)
        self._samples = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of one sample."""
        self._sum += rows.float().sum(0)
        self._samples += 1

    def value(self) -> torch.Tensor:
        return (self._sum / max(self._samples, 1)).float()


class WithinVariance:
    """`within_variance` (in,): the mean over samples of the variance within a sample."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self._sum = torch.zeros(inputs, dtype=sum_dtype(device), device=device)
        self._tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of one sample."""
        self._sum += rows.float().var(0, unbiased=False) * len(rows)
        self._tokens += len(rows)

    def value(self) -> torch.Tensor:
        return (self._sum / max(self._tokens, 1)).float()


class Gram:
    """`gram` (in, in): the sum over tokens of x^T x; with a second stream of inputs, `cross`: of y^T x.

    It is kept on `home`; a product that does not fit the inputs' device whole is made there `in_bands`.
    """

    def __init__(self, inputs: int, home: torch.device, *, in_bands: bool = False) -> None:
        self._sum = torch.zeros(inputs, inputs, device=home)
        self._band = _BAND if in_bands else inputs

    def add(self, rows: torch.Tensor, others: torch.Tensor | None = None) -> None:
        """Take in `rows` x (tokens, in), and `others` y (tokens, in) for a cross product, of any float dtype."""
        left = rows if others is None else others
        with _tensor_cores(rows.is_cuda and rows.dtype in _EXACT_IN_TF32 and left.dtype in _EXACT_IN_TF32):
            rows, left = rows.float(), left.float()
            if self._band >= len(self._sum):
                self._sum.addmm_(left.T, rows)
                return
            for first in range(0, len(self._sum), self._band):
                band = slice(first, first + self._band)
                self._sum[band] += (left[:, band].T @ rows).to(self._sum.device)

    def value(self) -> torch.Tensor:
        return self._sum


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
        signs = torch.randint(0, 2, (len(rows), 1), generator=self._generator).mul_(2).sub_(1)
        signs = signs.to(rows.device, torch.float32)
        begin = 0
        while begin < len(rows):
            first = self._taken % len(self._rows)
            end = min(begin + len(self._rows) - first, len(rows))
            self._rows[first : first + end - begin].addcmul_(rows[begin:end].float(), signs[begin:end])
            self._taken += end - begin
            begin = end

    def value(self) -> torch.Tensor:
        return self._rows


class Accumulator(Protocol):
    def add(self, rows: torch.Tensor) -> None: ...
    def value(self) -> torch.Tensor: ...


# The statistics that a method may ask for by name.
ACCUMULATORS: dict[str, Callable[[int, torch.device], Accumulator]] = {
    "sq_norm": SquaredNorm,
    "mean": Mean,
    "variance": Variance,
    "gram": Gram,
    "sample_sum": SampleSum,
    "within_variance": WithinVariance,
}
# Of these, the ones that take in one sample at a time.
BY_SAMPLE = frozenset({"sample_sum", "within_variance"})
