"""Accumulators over the inputs of one linear layer; every layer that reads the same input tensor shares them.

Each is a plain value, tensors and counts, that can be pickled and sent to another process. `merge` takes in what
another of its kind and size has gathered of later tokens: the result is that of all tokens, up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, Self

import torch

# Of rows (tokens, in): a sum (in,) and the weight that it counts with.
Measure = Callable[[torch.Tensor], tuple[torch.Tensor, int]]

_CACHED_ROWS = 128
# A Gram matrix is made in this many bands of rows, none so narrow that its product is slow.
_BANDS, _LEAST_BAND = 8, 256
# Their 8 or 11 significant bits fit TF32's 11, and the tensor cores sum in float32: such products lose nothing.
_EXACT_IN_TF32 = (torch.bfloat16, torch.float16)


@contextmanager
def _tensor_cores(*factors: torch.Tensor) -> Iterator[None]:
    """Within, float32 products on a CUDA device round their factors to TF32, if those lose nothing by it."""
    if not all(factor.is_cuda and factor.dtype in _EXACT_IN_TF32 for factor in factors):
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

    def merge(self, other: Self) -> None:
        self._sum += other._sum.to(self._sum.device)

    def value(self) -> torch.Tensor:
        return self._sum.float()


class Average:
    """(in,): of what `measure` says of each piece of rows, (sum (in,), weight), the sums over the weights."""

    def __init__(self, inputs: int, device: torch.device, measure: Measure) -> None:
        self._sum = torch.zeros(inputs, dtype=sum_dtype(device), device=device)
        self._weight = 0
        self._measure = measure

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of any float dtype; for what is told by sample, those of one sample."""
        total, weight = self._measure(rows.float())
        self._sum += total
        self._weight += weight

    def merge(self, other: Self) -> None:
        self._sum += other._sum.to(self._sum.device)
        self._weight += other._weight

    def value(self) -> torch.Tensor:
        return (self._sum / max(self._weight, 1)).float()


def mean(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`mean`: of every input over the tokens."""
    return rows.sum(0), len(rows)


def sample_sum(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`sample_sum`: the mean over samples of the sum over a sample's tokens."""
    return rows.sum(0), 1


def within_variance(rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`within_variance`: the mean over samples of the variance within a sample, longer ones counting more."""
    return rows.var(0, unbiased=False) * len(rows), len(rows)


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
        # A rounded mean serves to centre with: what it misses is taken back below.
        centre = rows.sum(0, dtype=torch.float32) / len(rows)
        chunk_rows = _CACHED_ROWS if rows.device.type == "cpu" else len(rows)
        sums = torch.zeros(min(chunk_rows, len(rows)), rows.shape[1], device=rows.device)
        squares = torch.zeros_like(sums)
        for chunk in rows.split(chunk_rows):
            apart = chunk.float() - centre
            sums[: len(apart)].add_(apart)
            squares[: len(apart)].addcmul_(apart, apart)
        missed = sums.sum(0, dtype=self._mean.dtype) / len(rows)
        within = squares.sum(0, dtype=self._mean.dtype) - missed.square() * len(rows)
        self._join(centre + missed, within, len(rows))

    def merge(self, other: Self) -> None:
        if other._tokens:
            device = self._mean.device
            self._join(other._mean.to(device), other._squares.to(device), other._tokens)

    def _join(self, mean: torch.Tensor, squares: torch.Tensor, count: int) -> None:
        """Take in `count` > 0 tokens by their mean (in,) and the sum (in,) of their squared distances from it."""
        shift, tokens = mean - self._mean, self._tokens + count
        self._squares += squares + shift.square() * (self._tokens * count / tokens)
        self._mean += shift * (count / tokens)
        self._tokens = tokens

    def value(self) -> torch.Tensor:
        return (self._squares / max(self._tokens, 1)).clamp_min(0).float()


class Gram:
    """`gram` (in, in): the sum over tokens of x^T x.

    It is kept on `device`, which may be the host where the inputs' device has no room for it, and made in bands of
    rows: of a symmetric matrix only what lies on and right of the diagonal.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.total = torch.zeros(inputs, inputs, device=device)
        self._bands = _bands(inputs)

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` x (tokens, in) of any float dtype."""
        with _tensor_cores(rows):
            rows = rows.float()
            for band in self._bands:
                _add_product(self.total[band, band.start :], rows[:, band], rows[:, band.start :])

    def merge(self, other: Self) -> None:
        self.total += other.total.to(self.total.device)

    def value(self) -> torch.Tensor:
        for band in self._bands:
            self.total[band.stop :, band] = self.total[band, band.stop :].T
        return self.total


class Cross:
    """(lefts, in): the sum over tokens of y^T x, y being something else that is known of the same tokens.

    `cross` is that of the dense model's inputs, `output_cross` that of the outputs that are wanted. Kept on `device`.
    """

    def __init__(self, lefts: int, inputs: int, device: torch.device) -> None:
        self.total = torch.zeros(lefts, inputs, device=device)
        self._bands = _bands(lefts)

    def add(self, lefts: torch.Tensor, rows: torch.Tensor) -> None:
        """Take in `lefts` y (tokens, lefts) and `rows` x (tokens, in), of any float dtype."""
        with _tensor_cores(lefts, rows):
            lefts, rows = lefts.float(), rows.float()
            for band in self._bands:
                _add_product(self.total[band], lefts[:, band], rows)

    def merge(self, other: Self) -> None:
        self.total += other.total.to(self.total.device)

    def value(self) -> torch.Tensor:
        return self.total


def _bands(rows: int) -> list[slice]:
    band = max(_LEAST_BAND, -(-rows // _BANDS))
    return [slice(first, min(first + band, rows)) for first in range(0, rows, band)]


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if right.device == total.device:
        total.addmm_(left.T, right)
    else:
        total += (left.T @ right).to(total.device)


class RowSketch:
    """A few rows R (rows, in) that stand for all tokens X: E||R D^T||^2 = ||X D^T||^2 for every D.

    Tokens are dealt out to `rows` buckets in turn and summed with random signs (a count sketch: Charikar et al.,
    ICALP 2002); with no more tokens than buckets, R is X itself and nothing is estimated.
    """

    def __init__(self, rows: int, inputs: int, device: torch.device, seed: int) -> None:
        self.total = torch.zeros(rows, inputs, device=device)
        self._taken = self._passed = 0
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, rows: torch.Tensor) -> None:
        """Take in `rows` (tokens, in) of any float dtype, in the order of the tokens."""
        signs = self._next_signs(len(rows)).to(rows.device, torch.float32)
        begin = 0
        while begin < len(rows):
            first = (self._passed + begin) % len(self.total)
            end = min(begin + len(self.total) - first, len(rows))
            self.total[first : first + end - begin].addcmul_(rows[begin:end].float(), signs[begin:end])
            begin = end
        self._taken += len(rows)
        self._passed += len(rows)

    def skip(self, tokens: int) -> None:
        """Let `tokens` pass that another sketch takes in, which will be merged with this one."""
        self._next_signs(tokens)
        self._passed += tokens

    def _next_signs(self, tokens: int) -> torch.Tensor:
        """-1 or 1 (tokens, 1) int64, those of the next tokens."""
        return torch.randint(0, 2, (tokens, 1), generator=self._generator).mul_(2).sub_(1)

    def merge(self, other: Self) -> None:
        """Raises ValueError where `other` did not skip the tokens that this one took in, or the other way round."""
        if self._taken + other._taken > max(self._passed, other._passed):
            raise ValueError("Two sketches of the same tokens cannot be merged: each must skip what the other takes.")
        self.total += other.total.to(self.total.device)
        self._taken += other._taken
        if other._passed > self._passed:
            self._passed = other._passed
            self._generator.set_state(other._generator.get_state())

    def value(self) -> torch.Tensor:
        return self.total


class InOrder:
    """What `make` makes of each piece by itself, to be merged in an order that spans several processes.

    One accumulator that took in all pieces of all processes would have the same bits.
    """

    def __init__(self, make: Callable[[], Accumulator]) -> None:
        self._make = make
        self.pieces: list[Accumulator] = []

    def add(self, rows: torch.Tensor) -> None:
        piece = self._make()
        piece.add(rows)
        self.pieces.append(_on_host(piece))

    def merge(self, other: Self) -> None:
        self.pieces += other.pieces

    def merged(self) -> Accumulator:
        whole = self._make()
        for piece in self.pieces:
            whole.merge(piece)
        return whole

    def value(self) -> torch.Tensor:
        return self.merged().value()


def _on_host(accumulator: Accumulator) -> Accumulator:
    """`accumulator` with its tensors where every process can have them."""
    for name, value in vars(accumulator).items():
        if isinstance(value, torch.Tensor):
            setattr(accumulator, name, value.cpu())
    return accumulator


class Accumulator(Protocol):
    def add(self, rows: torch.Tensor) -> None: ...
    def merge(self, other: Any) -> None: ...
    def value(self) -> torch.Tensor: ...


# The statistics that a method may ask for by name.
ACCUMULATORS: dict[str, Callable[[int, torch.device], Accumulator]] = {
    "sq_norm": SquaredNorm,
    "mean": partial(Average, measure=mean),
    "variance": Variance,
    "gram": Gram,
    "sample_sum": partial(Average, measure=sample_sum),
    "within_variance": partial(Average, measure=within_variance),
}
# Of these, the ones that take in one sample at a time.
BY_SAMPLE = frozenset({"sample_sum", "within_variance"})
