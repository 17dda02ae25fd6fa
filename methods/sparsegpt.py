"""SparseGPT: column by column, the error of a pruned weight pushed into the later ones (Frantar & Alistarh, 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from methods._gram import alpha_option, damped, dense_target, follows_dense, raised_damping
from methods._method import Method, Pruned
from methods._pattern import NofM, Pattern, Unstructured, keep_highest, keep_highest_count, pruned_count, zeroed
from methods._torch import torch

# Fewer columns than this are not worth a product of matrices.
_ONE_BY_ONE = 16
_INVERTED_AT_ONCE = 64


@dataclass(frozen=True)
class Options:
    block_size: int = field(
        default=128, metadata={"help": "columns among which an unstructured mask is chosen at once", "least": 1}
    )
    damping: float = field(
        default=0.01, metadata={"help": "added to the Gram matrix, as a share of its mean diagonal", "least": 0}
    )
    alpha: float = alpha_option()


def prune(
    weight: torch.Tensor,
    statistics: Mapping[str, torch.Tensor],
    pattern: Pattern,
    options: Options,
    generator: torch.Generator,
) -> Pruned:
    """Algorithm 1 of arXiv:2301.00774 on (out, in); `gram` is (in, in), for dense targets `cross` too, or
    `output_cross` (out, in).

    Raises ValueError where the Gram matrix cannot be made positive definite.
    """
    gram = statistics["gram"].clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0
    upper, damping = damped(gram, options.damping, _upper_factor_of_inverse)
    start = weight
    if follows_dense(statistics):
        # Follow the dense outputs: the unconstrained solution takes the place of the dense weights.
        target = dense_target(weight, statistics, options.alpha) + damping * float(gram.diagonal().mean()) * weight
        start = target @ (upper.T @ upper)
    sweep = _Sweep(start.masked_fill(dead, 0.0), upper, pattern, options.block_size)
    sweep.choose_and_solve(0, weight.shape[1])
    keep = sweep.keep.T.contiguous()
    return Pruned(zeroed(sweep.columns.T.contiguous(), keep), keep, raised_damping(options.damping, damping))


def _upper_factor_of_inverse(gram: torch.Tensor) -> torch.Tensor:
    """U with U^T U = gram^-1, upper triangular: gram = R R^T with R upper triangular, U = R^-1."""
    return _inverse_of_upper(torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1))


def _inverse_of_upper(factor: torch.Tensor) -> torch.Tensor:
    """By halves: three quarters of the work are products of matrices."""
    inputs = len(factor)
    if inputs <= _INVERTED_AT_ONCE:
        return torch.linalg.solve_triangular(
            factor, torch.eye(inputs, dtype=factor.dtype, device=factor.device), upper=True
        )
    left, right = slice(inputs // 2), slice(inputs // 2, inputs)
    inverse = torch.zeros_like(factor)
    inverse[left, left] = _inverse_of_upper(factor[left, left])
    inverse[right, right] = _inverse_of_upper(factor[right, right])
    inverse[left, right] = -(inverse[left, left] @ factor[left, right]) @ inverse[right, right]
    return inverse


class _Sweep:
    """One pass over the columns, halved again and again: what the left half lost goes into the right one at once.

    `columns` and `keep` are (in, out), so that a column lies together in memory.
    """

    def __init__(self, weight: torch.Tensor, upper: torch.Tensor, pattern: Pattern, block_size: int) -> None:
        self.columns = weight.T.contiguous()
        self.keep = torch.ones_like(self.columns, dtype=torch.bool)
        self._errors = torch.zeros_like(self.columns)
        self._upper = upper
        self._pattern = pattern
        # So many columns get their mask at once.
        self._together = block_size if isinstance(pattern, Unstructured) else pattern.of

    def choose_and_solve(self, first: int, last: int) -> None:
        pieces = -(-(last - first) // self._together)
        if pieces == 1:
            self._choose(first, last)
            self._solve(first, last)
        else:
            middle = first + pieces // 2 * self._together
            self.choose_and_solve(first, middle)
            self._push(first, middle, last)
            self.choose_and_solve(middle, last)

    def _choose(self, first: int, last: int) -> None:
        """The mask of some columns; counted so that all together prune exactly what the tensor should."""
        score = (self.columns[first:last].T / self._upper.diagonal()[first:last]).square()
        if isinstance(self._pattern, NofM):
            keep = keep_highest(score, self._pattern)
        else:
            sparsity, rows = self._pattern.sparsity, len(score)
            keep = keep_highest_count(score, pruned_count(sparsity, rows * last) - pruned_count(sparsity, rows * first))
        self.keep[first:last] = keep.T

    def _solve(self, first: int, last: int) -> None:
        """Prune columns whose mask is known, each at the price of the later ones."""
        if last - first > _ONE_BY_ONE:
            middle = (first + last) // 2
            self._solve(first, middle)
            self._push(first, middle, last)
            self._solve(middle, last)
            return
        for j in range(first, last):
            column, factor = self.columns[j], self._upper[j]
            torch.div(zeroed(column, ~self.keep[j]), factor[j], out=self._errors[j])
            self.columns[j + 1 : last].addr_(factor[j + 1 : last], self._errors[j], alpha=-1)

    def _push(self, first: int, middle: int, last: int) -> None:
        factor = self._upper[first:middle, middle:last]
        self.columns[middle:last].addmm_(factor.T, self._errors[first:middle], alpha=-1)


METHOD = Method(
    summary="solves for the mask and the kept weights together, column by column, from the inputs' Gram matrix",
    paper="Frantar & Alistarh, SparseGPT, arXiv:2301.00774",
    cost="one forward pass, a Gram matrix and a Cholesky factor per distinct input, one sweep over the columns",
    needs=("gram",),
    prune=prune,
    options=Options,
    solves=True,
    counts_rows=False,
)
