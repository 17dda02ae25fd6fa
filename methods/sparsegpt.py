"""SparseGPT: column by column, the error of a pruned weight pushed into the later ones (Frantar & Alistarh, 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from methods._gram import alpha_option, damped, dense_target, raised_damping
from methods._method import Method, Pruned
from methods._pattern import NofM, Pattern, Unstructured, keep_highest, keep_highest_count, pruned_count, zeroed


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
    """Algorithm 1 of arXiv:2301.00774 on (out, in); `gram` and, for dense targets, `cross` are (in, in).

    Raises ValueError where the Gram matrix cannot be made positive definite.
    """
    gram = statistics["gram"].clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0
    upper, damping = damped(gram, options.damping, _upper_factor_of_inverse)
    start = weight
    if "cross" in statistics:
        # Follow the dense outputs: the unconstrained solution takes the place of the dense weights.
        target = dense_target(weight, statistics, options.alpha) + damping * float(gram.diagonal().mean()) * weight
        start = target @ (upper.T @ upper)
    new = start.masked_fill(dead, 0.0)
    keep = torch.ones_like(new, dtype=torch.bool)
    inputs = new.shape[1]
    for first in range(0, inputs, _block_size(options, pattern)):
        last = min(first + _block_size(options, pattern), inputs)
        _solve_block(new, keep, upper, first, last, pattern)
    return Pruned(zeroed(new, keep), keep, raised_damping(options.damping, damping))


def _block_size(options: Options, pattern: Pattern) -> int:
    return (
        options.block_size
        if isinstance(pattern, Unstructured)
        else max(1, options.block_size // pattern.of) * pattern.of
    )


def _upper_factor_of_inverse(gram: torch.Tensor) -> torch.Tensor:
    """U with U^T U = gram^-1, upper triangular."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return torch.linalg.cholesky(inverse, upper=True)


def _solve_block(
    new: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, first: int, last: int, pattern: Pattern
) -> None:
    """Choose and compensate columns `first` to `last` in place; what they lose goes into the columns behind them."""
    columns = new[:, first:last]
    factor = upper[first:last, first:last]
    diagonal = factor.diagonal()
    if isinstance(pattern, Unstructured):
        keep[:, first:last] = _choose(columns, diagonal, pattern, first, last)
    errors = torch.zeros_like(columns)
    for j in range(last - first):
        if isinstance(pattern, NofM) and j % pattern.of == 0:
            group = slice(j, j + pattern.of)
            score = (columns[:, group] / diagonal[group]).square()
            keep[:, first + j : first + j + pattern.of] = keep_highest(score, pattern)
        kept = columns[:, j].where(keep[:, first + j], 0.0)
        errors[:, j] = (columns[:, j] - kept) / diagonal[j]
        columns[:, j:] -= errors[:, j : j + 1] * factor[j, j:]
        columns[:, j] = kept
    new[:, last:] -= errors @ upper[first:last, last:]


def _choose(
    columns: torch.Tensor, diagonal: torch.Tensor, pattern: Unstructured, first: int, last: int
) -> torch.Tensor:
    """The mask of one block of columns; counted so that the blocks together prune exactly what the tensor should."""
    rows = columns.shape[0]
    count = pruned_count(pattern.sparsity, rows * last) - pruned_count(pattern.sparsity, rows * first)
    return keep_highest_count((columns / diagonal).square(), count)


METHOD = Method(
    summary="solves for the mask and the kept weights together, column by column, from the inputs' Gram matrix",
    paper="Frantar & Alistarh, SparseGPT, arXiv:2301.00774",
    cost="one forward pass, a Gram matrix and a Cholesky factor per distinct input, one sweep over the columns",
    needs=("gram",),
    prune=prune,
    options=Options,
    solves=True,
)
